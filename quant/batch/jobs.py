"""A list of quantizations: one process a GPU of this machine, or over a Ray cluster. Each job is a quantize.py of its own.

A job that fails is tried once more, on another GPU where there is one. A table at the end says what became of each. A job writes its file
completely or not at all, and one that was interrupted goes on from its finished blocks.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..quantizer.pace import duration
from .options import new_parser, parsed

PROGRAM = [sys.executable, str(Path(__file__).resolve().parents[2] / "quantize.py")]
TRIES = 2
TAIL = 5  # lines of a failed job's output in the table


@dataclass
class Job:
    """One quantization. arguments: of quantize.py; tried: [GPU or node] of the attempts; result: None until it is over, then a sentence."""

    name: str
    arguments: list
    tried: list = field(default_factory=list)
    done: bool = False
    result: str | None = None
    seconds: float = 0.0


def read(path, shared):
    """[Job] of a file. shared: arguments of the command line that hold for all. Raises ValueError for a list that can't be run."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is no list of jobs: write [{{\"in\": \"a.safetensors\", \"out\": \"b.safetensors\"}}, ...].")
    jobs = [Job(str(entry.get("out")), arguments_of(entry, shared, path)) for entry in entries]
    targets = [os.path.abspath(job.name) for job in jobs]
    if twice := next((target for target in targets if targets.count(target) > 1), None):
        raise ValueError(f"{path} has two jobs that write {twice}; give each its own file.")
    return jobs


def arguments_of(entry, shared, path):
    """The command line of a job. Raises ValueError if a key is no option."""
    known = {action.dest: action for action in new_parser()._actions if action.option_strings}
    if not isinstance(entry.get("in"), str) or not isinstance(entry.get("out"), str):
        raise ValueError(f"A job in {path} has no `in` and `out`, which name its model and its file.")
    found = [entry["in"], entry["out"], *shared]
    for key, value in entry.items():
        if key in ("in", "out"):
            continue
        action = known.get(key.replace("-", "_"))
        if action is None or key in ("jobs", "ray", "help"):
            raise ValueError(f"A job in {path} has the key {key!r}, which is no option of quantize.py.")
        option = action.option_strings[-1]
        if action.nargs == 0:
            found += [option] if value else []
        elif key == "lora":
            for lora in value:
                found += [option, *map(str, lora if isinstance(lora, list) else [lora])]
        else:
            found += [option, *map(str, value if isinstance(value, list) else [value])]
    return found


def run(options, own, theirs):
    """Run the jobs of --jobs. own: the arguments of the command line; theirs: those for ComfyUI. Returns the exit code."""
    shared = without(own, {"--jobs": 1, "--ray": 1 if options.ray not in (None, "auto") else 0})
    try:
        jobs = read(options.jobs, shared)
        for job in jobs:
            parsed(job.arguments)  # ends the program for options that can't start a run
        places = ray_places(options.ray) if options.ray else gpus()
    except (OSError, ValueError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 1
    ending = ["--", *theirs] if theirs else []
    try:
        run_all(jobs, places, lambda job, place: place([*PROGRAM, *job.arguments, *ending]))
    except KeyboardInterrupt:
        print("quantize: interrupted; unfinished jobs go on from their finished blocks when the same command runs again.", file=sys.stderr)
    print(table(jobs))
    return 0 if all(job.done for job in jobs) else 1


def without(arguments, names):
    """The arguments without these options. names: {option: number of its values}."""
    found, left = [], iter(arguments)
    for argument in left:
        if argument.split("=")[0] in names:
            for _ in range(0 if "=" in argument else names[argument]):
                next(left, None)
        else:
            found.append(argument)
    return found


def run_all(jobs, places, attempt):
    """Run every job, one at a time on each place. attempt(job, place) -> (exit code, output). places: {name: place}."""
    waiting, idle, over, running = list(jobs), list(places), queue.Queue(), 0

    def next_pair():
        """(job, name of an idle place) or None. A second attempt waits for another place than the first, if there is one at all."""
        pairs = ((job, name) for job in waiting for name in idle if name not in job.tried or len(places) == 1)
        return next(pairs, None)

    def work(job, name):
        began = time.perf_counter()
        try:
            code, output = attempt(job, places[name])
        except Exception as error:  # a place that is gone: the job is tried elsewhere
            code, output = 1, str(error)
        over.put((job, name, code, output, time.perf_counter() - began))

    while waiting or running:
        while pair := next_pair():
            job, name = pair
            waiting.remove(job)
            idle.remove(name)
            job.tried.append(name)
            print(f"{job.name}: {'started' if len(job.tried) == 1 else 'tried again'} on {name}", file=sys.stderr, flush=True)
            threading.Thread(target=work, args=(job, name), daemon=True).start()
            running += 1
        job, name, code, output, seconds = over.get()
        running -= 1
        idle.append(name)
        job.done, job.seconds = code == 0, job.seconds + seconds
        job.result = "done" if job.done else "; ".join(line.strip() for line in output.splitlines()[-TAIL:]) or f"exit code {code}"
        print(f"{job.name}: {job.result} ({duration(seconds)})", file=sys.stderr, flush=True)
        if not job.done and len(job.tried) < TRIES:
            waiting.append(job)


def table(jobs):
    """What became of each job, as Markdown."""
    rows = [(job.name, "done" if job.done else "failed" if job.result else "not run", ", ".join(job.tried) or "-",
             duration(job.seconds) if job.seconds else "-", "" if job.done else job.result or "") for job in jobs]
    return "\n".join(f"| {' | '.join(row)} |" for row in (("file", "", "on", "time", "why"), ("---",) * 5, *rows))


# --- Places ---------------------------------------------------------------------------------------------------------------


def gpus():
    """{name: place} of this machine's GPUs; of the CPU if there is none."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(count)))
    if not count:
        return {"cpu": lambda command: finished(command, {})}
    return {f"GPU {name}": lambda command, name=name: finished(command, {"CUDA_VISIBLE_DEVICES": name}) for name in named[:count]}


def finished(command, environment):
    """(exit code, what it wrote) of a process."""
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding="utf-8", errors="replace")
    return done.returncode, done.stdout


def ray_places(address):
    """{name: place} of a Ray cluster's GPUs: as many jobs at a time as it has, each on a GPU that Ray chooses. Files and this pack have the
    same paths on all nodes. Raises ValueError without Ray."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("Ray is not installed in this Python; pip install ray, or leave --ray out to use this machine's GPUs.") from None

    def on_node(command, folder):
        # Ray sends this function itself, since its workers don't know the pack's modules, and sets CUDA_VISIBLE_DEVICES before it runs.
        import subprocess

        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                              errors="replace")
        return done.returncode, done.stdout

    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    count = int(ray.cluster_resources().get("GPU", 0))
    if not count:
        raise ValueError("The Ray cluster has no GPU; start its nodes with --num-gpus.")
    # SPREAD sends a second attempt to another node where it can. Ray itself tries nothing again: that is run_all's part.
    remote = ray.remote(num_gpus=1, max_retries=0, scheduling_strategy="SPREAD")(on_node)
    return {f"Ray {number}": lambda command: ray.get(remote.remote(command, os.getcwd())) for number in range(count)}
