"""One and two GPUs of one machine: the quantization of a FLUX.1-dev, a step of drawing, the node, and a killed process.

    python benchmarks/several_gpus.py --comfyui ~/ComfyUI                                       # all parts, full width, all blocks
    python benchmarks/several_gpus.py --comfyui ~/ComfyUI --blocks 6,12 --parts quantize draw
    python benchmarks/several_gpus.py --comfyui ~/ComfyUI --parts quantize --runs two one --start-together --into ~/earlier.json

The weights are random, as in quantize_full.py and flux_step.py. Every part runs in processes of its own, with a limit of time, and is
written to the result file as soon as it is measured. quantize: the seconds from the MODEL in host memory to the file, with 2 processes (the
last of which is killed in the middle), 2 processes that go on from there, 2 and 1 without interruption (--runs chooses), the SHA-256 of
the files, and how long each process computes, waits and exchanges (rank_times.py). With --start-together the runs' processes make their
models at the same time, and then run one after the other.
draw: a step in W4A8 with fused blocks, whose inputs travel from process 0, launched one by one and as a CUDA graph on each GPU (--groups:
attention in so many groups of heads; "several" is the last of them). exchange: microseconds of the stages around one block's attention, in
a CUDA graph. node: SVDQuant Several GPUs on the quantized file, and a killed worker.
"""

import argparse
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import family_models
import flux_model
import quantize_full
import several_gpus_stages
import torch
from machine import description, load_pack, recorded, result_path, synchronize, timed
from rank_times import RankTimes

MARK, READY = "part: ", "ready to begin"
FILE = "flux_svdquant.safetensors"
RUNS = {"killed": (2, "killed", "a"), "went_on": (2, "again", "a"), "two": (2, "two", "b"), "one": (1, "one", "c")}  # processes and folders
FLUX = family_models.MODELS["flux1-dev"]


def parallel():
    """A context that yields the Ranks of this process's group, or Alone."""
    from comfyui_svdquant.quant.parallel import alone, ranks

    return ranks.joined_run() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else nullcontext(alone.ALONE)


def quantize(args):
    """Quantize, save, and say how long it took."""
    from comfyui_svdquant.quant.host import quantize, saving
    from comfyui_svdquant.quant.quantizer import presets

    torch.manual_seed(0)
    model = family_models.resized(FLUX, args.hidden, args.blocks)
    patcher = quantize_full.new_model(model)
    latent = {"samples": torch.zeros(1, 16, args.size // 8, args.size // 8)}
    prompts, recipe = quantize_full.conditioning(args.prompts, args.text_tokens, model), presets.make_recipe("best")
    path = os.path.join(args.folder, args.name, FILE)
    with parallel() as ranks, torch.inference_mode():
        if args.kill_after and ranks.rank == ranks.size - 1:
            threading.Timer(args.kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        ranks.gathered(None)
        if args.go:
            print(READY, flush=True)
            while not os.path.exists(args.go):
                time.sleep(0.05)
            ranks.gathered(None)
        times, began = RankTimes(ranks), time.perf_counter()
        made, records = quantize.quantize(patcher, recipe, prompts, latent, args.steps, 0, quantize_full.Progress(),
                                          os.path.join(args.folder, "progress", args.progress), ranks)
        seconds, ranks_times = time.perf_counter() - began, times.of_all()
        if ranks.rank == 0:
            print(f"quantized in {seconds:.2f} s", flush=True)
            saving.write_model(made, path, "native", True)
            print(MARK + json.dumps({"seconds": seconds, "seconds_with_saving": time.perf_counter() - began, "layers": len(records),
                                     "ranks": ranks_times}), flush=True)


def step_times(run, count=9):
    run()
    times = sorted(timed(run, count)[0])
    return {"ms": times[count // 2], "least_ms": times[0], "most_ms": times[-1]}


def draw(args):
    """A step of each size on one GPU, alone and as a CUDA graph, and on all, launched one by one and as one graph a GPU."""
    from comfyui_svdquant.quant.families.flux1 import FAMILY
    from comfyui_svdquant.quant.host import divided_steps, step_graphs
    from comfyui_svdquant.quant.quantizer.metrics import relative_error

    torch.manual_seed(0)
    flux = flux_model.packed_flux(64, fused=True, depth=args.blocks[0], depth_single_blocks=args.blocks[1], hidden_size=args.hidden,
                                  num_heads=args.hidden // 128)
    with parallel() as ranks, torch.inference_mode():
        for size in args.sizes:
            torch.manual_seed(1)
            inputs = flux_model.inputs(size)

            def divided(steps):
                if ranks.rank == 0:
                    return steps.draw(flux, flux, inputs | {"transformer_options": {}})
                if (found := steps.followed()) is not None:
                    announced, (given, _, live) = found
                    steps.follow(announced, flux, given, live)

            found = {"size": size}
            os.environ[step_graphs.VARIABLE] = "0"
            if ranks.rank == 0:
                one = flux(**inputs)
                found |= {"one": step_times(lambda: flux(**inputs))}
                found |= one_more(flux, inputs, one) if torch.cuda.is_available() else {}
            ranks.gathered(None)
            found |= {"several_without_graphs": step_times(functools.partial(divided, divided_steps.DividedSteps(ranks, FAMILY)))}
            os.environ[step_graphs.VARIABLE] = "1"
            for groups in args.groups:
                divided_steps.GROUPS, recording = groups, functools.partial(divided, divided_steps.DividedSteps(ranks, FAMILY))
                ordinary = recording()
                several, again = recording(), recording()  # the first is recorded
                found |= {"several": step_times(recording)}
                found[f"several_in_{groups}_groups"] = found["several"]
            if ranks.rank == 0:
                found |= {"relative_error": relative_error(several, one), "graphs": len(ranks.graphs),
                          "same_bits_again": torch.equal(several, again) and torch.equal(several, ordinary),
                          "bits_of_one_gpu": torch.equal(several, one), "writes": bool(ranks.peers.rooms)}
                print(MARK + json.dumps(found), flush=True)


def one_more(flux, inputs, one):
    """On one GPU: the step as a CUDA graph, and the relative error that another attention function of PyTorch makes."""
    from comfyui_svdquant.quant.quantizer.metrics import relative_error
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def efficient(_function, q, k, v, heads, *_, **__):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    other = flux(**inputs, transformer_options={"optimized_attention_override": efficient})
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flux(**inputs)
    synchronize()
    graph = recorded(lambda: flux(**inputs), 1, stream)
    return {"one_as_graph": step_times(graph.replay), "relative_error_of_other_attention": relative_error(other, one)}


def node(args):
    """SVDQuant Several GPUs as a workflow runs it, with the file of `quantize`."""
    import comfy.sample
    import folder_paths
    from comfyui_svdquant.quant.host import loader, several_gpus
    from comfyui_svdquant.quant.quantizer.metrics import relative_error

    folder = next(found for _, name, _ in RUNS.values() if os.path.exists(os.path.join(found := os.path.join(args.folder, name), FILE)))
    folder_paths.add_model_folder_path("diffusion_models", folder)
    several_gpus.host_options = lambda: [] if torch.cuda.is_available() else ["--cpu"]
    prompt, latent = quantize_full.conditioning(1, args.text_tokens, FLUX), torch.zeros(1, 16, args.size // 8, args.size // 8)

    def sample(patcher):
        noise, began = comfy.sample.prepare_noise(latent, 5), time.perf_counter()
        made = comfy.sample.sample(patcher, noise, 4, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=5)
        return made, time.perf_counter() - began

    with torch.inference_mode():
        model = loader.load_model(os.path.join(folder, FILE), name=FILE)
        sample(model)
        one, seconds_one = sample(model)
        several = several_gpus.several_gpus(model, 2)
        first, seconds_first = sample(several)
        second, seconds = sample(several)
        drawing = several.wrappers[several_gpus.WRAPPER][several_gpus.KEY][0]
        found = {"seconds_4_steps_one": seconds_one, "seconds_4_steps_with_start": seconds_first, "seconds_4_steps": seconds,
                 "same_bits_again": torch.equal(first, second), "relative_error": relative_error(first, one)}
        threading.Timer(seconds / 2, drawing.crew.processes[0].kill).start()
        began = time.perf_counter()
        try:
            sample(several)
            found["killed"] = "no error"
        except RuntimeError as error:
            found["killed"] = str(error)
        found["seconds_until_the_error"] = time.perf_counter() - began
        print(MARK + json.dumps(found), flush=True)
        third, _ = sample(several)
        print(MARK + json.dumps({"next_run_same_bits": torch.equal(third, first)}), flush=True)
        drawing.crew.close()


def exchange(args):
    """The stages around one block's attention."""
    with parallel() as ranks, torch.inference_mode():
        for size in args.sizes:
            for groups in args.groups:
                found = {"size": size, "groups": groups} | several_gpus_stages.stages(ranks, size, args.hidden, groups)
                if ranks.rank == 0:
                    print(MARK + json.dumps(found), flush=True)


PARTS = {"quantize": quantize, "draw": draw, "exchange": exchange, "node": node}


def launch(args, part, processes, limit, *options, ready=lambda: None):
    """(what a part's processes print, their exit code, seconds). It is killed after `limit` seconds. ready: called once a process waits
    for the file of --go, or has ended."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--child", part, *options]
    began, found = time.perf_counter(), {}
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1000000000"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        lines = []
        for line in process.stdout:
            if line.startswith(MARK):
                lines.append(json.loads(line.removeprefix(MARK)))
            elif line.startswith(READY):
                ready()
            print(f"{time.perf_counter() - began:5.0f} s {line}", end="", flush=True)
    timer.cancel()
    ready()
    found = {"exit_code": process.returncode, "seconds_of_the_processes": time.perf_counter() - began, "lines": lines}
    print(part, options, {key: value for key, value in found.items() if key != "lines"}, flush=True)
    return found


def quantize_run(args, run, go=None, ready=lambda: None):
    """launch of one of RUNS, and the files that it leaves. go: the file for which its processes wait, or None."""
    processes, name, progress = RUNS[run]
    options = ["--name", name, "--progress", progress, *(["--kill-after", str(args.kill_at)] if run == "killed" else []),
               *(["--go", go] if go else [])]
    found = launch(args, "quantize", processes, args.limit, "--folder", args.folder, *options, ready=ready)
    folder = os.path.join(args.folder, name)
    return found | {"blocks": args.blocks, "files": os.listdir(folder) if os.path.isdir(folder) else []}


def quantize_runs(args, write):
    """The runs of --runs, each of which is written at its end, and again with its file's digest."""
    with ThreadPoolExecutor() as pool:
        gates, waiting = {}, {}
        if args.start_together:
            for run in args.runs:
                gates[run] = threading.Event(), os.path.join(args.folder, f"go_{run}")
                waiting[run] = pool.submit(quantize_run, args, run, gates[run][1], gates[run][0].set)
            for ready, _ in gates.values():
                ready.wait()
        digests = {}
        for run in args.runs:
            if waiting:
                Path(gates[run][1]).touch()
            found = waiting[run].result() if waiting else quantize_run(args, run)
            write(f"quantize_{run}", found)
            if found["files"] and found["lines"]:
                digests[run] = found, pool.submit(sha256, os.path.join(args.folder, RUNS[run][1], FILE))
        for run, (found, digest) in digests.items():
            found["lines"][0]["sha256"] = digest.result()
            write(f"quantize_{run}", found)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else hashlib.sha256(file.read()).hexdigest()


def measure(args, part, write):
    """Run a part, and write what it found."""
    if part == "quantize":
        quantize_runs(args, write)
    else:
        write(part, launch(args, part, 1 if part == "node" else 2, args.limit, "--folder", args.folder))


def merged(path, result):
    """The content of an earlier result file, into which `result` goes. Its parts note of which commit they are, and its runs of
    quantization of how many blocks."""
    earlier = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, found in earlier.items():
        if isinstance(found, dict) and name != "arguments":
            found.setdefault("commit", earlier["commit"])
            if name.startswith("quantize_"):
                found.setdefault("blocks", earlier["arguments"]["blocks"])
    return earlier | result


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True)
    parser.add_argument("--blocks", type=lambda text: tuple(map(int, text.split(","))), default=family_models.depths(FLUX))
    parser.add_argument("--hidden", type=int, default=flux_model.DEV["hidden_size"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="of the pictures that are drawn")
    parser.add_argument("--groups", type=int, nargs="+", default=[2], help="of a GPU's heads")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--draw-blocks", type=lambda text: tuple(map(int, text.split(","))), default=family_models.depths(FLUX))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="of quantize")
    parser.add_argument("--start-together", action="store_true", help="quantize: all runs make their models at the same time")
    parser.add_argument("--into", help="an earlier result file, whose other parts are kept")
    parser.add_argument("--kill-at", type=float, default=10, help="seconds after which the last process is killed")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a part may take")
    parser.add_argument("--commit", help="the commit to record, where the folder is no checkout")
    parser.add_argument("--out")
    for hidden in ("--child", "--folder", "--name", "--progress", "--go"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parsed()
    if args.child:
        if "LOCAL_RANK" in os.environ and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES", "") == "":
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]
        quantize_full.enter_comfyui(args.comfyui, 0)
        load_pack()
        if args.child == "draw":
            args.blocks = args.draw_blocks
        return PARTS[args.child](args)
    result = description() | {"gpus": torch.cuda.device_count(), "arguments": {"blocks": args.blocks, "draw_blocks": args.draw_blocks,
                              "hidden": args.hidden, "size": args.size, "prompts": args.prompts, "steps": args.steps}}
    if args.commit:
        result["commit"] = args.commit
    if args.into:
        result = merged(args.into, result)
    path = Path(args.out or result_path("several_gpus", result["device"]))

    def write(name, found):
        result[name] = found
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        for part in args.parts:
            measure(args, part, write)


if __name__ == "__main__":
    main()
