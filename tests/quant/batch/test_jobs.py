"""Lists of jobs: where each runs, what is tried again, and what the table says."""

import json
import sys
import threading
import types

import pytest
from comfyui_svdquant.quant.batch import jobs, options

from .commands import write_model


def job_file(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return str(path)


def made(count):
    return [jobs.Job(f"{i}.safetensors", [str(i)]) for i in range(count)]


def test_every_gpu_has_one_job_at_a_time_and_a_failed_job_goes_to_another(capsys):
    busy, most, seen, lock = {"a": 0, "b": 0}, [], [], threading.Lock()

    def attempt(job, place):
        with lock:
            busy[place] += 1
            most.append(busy[place])
            seen.append((job.name, place))
        threading.Event().wait(0.02)
        with lock:
            busy[place] -= 1
        if job.name == "1.safetensors" and job.tried == ["a"] or job.name == "1.safetensors" and job.tried == ["b"]:
            raise OSError("the GPU has fallen off the bus")
        return (1, "line\nIt is damaged.") if job.name == "3.safetensors" else (0, "")

    found = made(5)
    jobs.run_all(found, {"a": "a", "b": "b"}, attempt)
    assert max(most) == 1 and {place for _, place in seen} == {"a", "b"}
    assert [job.done for job in found] == [True, True, True, False, True]
    assert [len(job.tried) for job in found] == [1, 2, 1, 2, 1]
    assert len(set(found[1].tried)) == 2, "the second attempt is on another GPU"
    text = jobs.table(found)
    assert "| 3.safetensors | failed |" in text and "It is damaged." in text and "bus" not in text
    assert len(text.splitlines()) == 7


def test_a_lone_gpu_tries_a_job_again():
    found = made(1)
    codes = iter((1, 0))
    jobs.run_all(found, {"only": None}, lambda job, place: (next(codes), "x"))
    assert found[0].done and found[0].tried == ["only", "only"]


def test_a_job_is_a_command_line(tmp_path):
    entries = [{"in": "a.safetensors", "out": "b.safetensors", "preset": "data-free", "rank": 64, "overwrite": True,
                "lora": ["x.safetensors", ["y.safetensors", 0.5]], "text-encoder": ["t.safetensors", "u.safetensors"], "prompts": "p.txt"}]
    [job] = jobs.read(job_file(tmp_path / "jobs.json", entries), ["--seed", "3"])
    found = options.parsed(job.arguments)
    assert (found.preset, found.rank, found.overwrite, found.seed) == ("data-free", 64, True, 3)
    assert found.lora == [("x.safetensors", 1.0), ("y.safetensors", 0.5)] and found.text_encoder == ["t.safetensors", "u.safetensors"]
    assert jobs.without(["--jobs", "j.json", "--rank", "16", "--ray=auto"], {"--jobs": 1, "--ray": 0}) == ["--rank", "16"]


@pytest.mark.parametrize(("entries", "message"), [
    ({}, "no list of jobs"), ([], "no list of jobs"), ([{"in": "a"}], "no `in` and `out`"),
    ([{"in": "a", "out": "b", "ranke": 3}], "'ranke'"), ([{"in": "a", "out": "b"}, {"in": "c", "out": "b"}], "two jobs")])
def test_a_list_that_cannot_be_run(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        jobs.read(job_file(tmp_path / "jobs.json", entries), [])


def test_without_ray_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="pip install ray, or leave --ray out"):
        jobs.ray_places("auto")


def test_ray_runs_as_many_jobs_as_it_has_gpus(monkeypatch):
    asked = []

    class Remote:
        def __init__(self, function):
            self.function = function

        def remote(self, *arguments):
            return self.function(*arguments)

    def remote(**resources):
        asked.append(resources)
        return Remote

    fake = types.SimpleNamespace(init=lambda **options: asked.append(options), cluster_resources=lambda: {"GPU": 3.0}, remote=remote,
                                 get=lambda value: value)
    monkeypatch.setitem(sys.modules, "ray", fake)
    places = jobs.ray_places("auto")
    assert len(places) == 3 and asked[1]["num_gpus"] == 1
    found = made(4)
    jobs.run_all(found, places, lambda job, place: place([sys.executable, "-c", "import os; print(os.getcwd())", *job.arguments]))
    assert all(job.done for job in found)


def test_jobs_are_processes_that_write_files(tmp_path, monkeypatch, capsys):
    """Two jobs on the CPU: one is done, one fails twice and leaves nothing."""
    from .commands import SHIM, setup

    monkeypatch.setenv("COMFYUI_PATH", str(setup.locate().comfy))
    monkeypatch.setattr(jobs, "PROGRAM", [sys.executable, str(SHIM), jobs.PROGRAM[1]])
    monkeypatch.setattr(jobs, "gpus", lambda: {"cpu": lambda command: jobs.finished(command, {})})
    model = write_model(tmp_path / "flux.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678901")
    sources = {"bad": str(tmp_path / "damaged.safetensors"), "good": model}
    entries = [{"in": source, "out": str(tmp_path / "out" / f"{name}.safetensors")} for name, source in sources.items()]
    path = job_file(tmp_path / "jobs.json", entries)
    own = ["--jobs", path, "--preset", "data-free", "--rank", "16", "--progress", "off"]
    assert jobs.run(options.parsed(own), own, []) == 1
    printed = capsys.readouterr()
    assert "good.safetensors | done | cpu" in printed.out and "failed | cpu, cpu" in printed.out
    assert [found.name for found in (tmp_path / "out").iterdir()] == ["good.safetensors"]
