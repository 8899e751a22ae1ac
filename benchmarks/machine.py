"""The description of a result's machine and versions, its file, the timing functions, and the import of the pack."""

import platform
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "demo"))  # whose folder host/ the benchmarks share

from host.pack import load_pack  # noqa: E402, F401

EMPTY = "CUDA Graph is empty"  # part of PyTorch's warning after an empty capture, which PyTorch reports in no other way


def commit():
    """The checked-out commit, with "-dirty" if files differ from it; "unknown" outside a checkout."""
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def description():
    """{device, versions, date, commit}"""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat(),
            "commit": commit()}


def result_path(name, device):
    """The result file of benchmark `name` on GPU `device` (torch.cuda.get_device_name()): benchmarks/results/<name>_<gpu>.json"""
    return ROOT / "benchmarks" / "results" / f"{name}_{device.replace('NVIDIA ', '').split()[0].lower()}.json"


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run, count):
    """(milliseconds of each of `count` run()s, the last one's result). A run begins when the GPU has finished the one before it, so its
    time includes Python and the driver where the GPU waits for them."""
    times = []
    for _ in range(count):
        synchronize()
        start = time.perf_counter()
        y = run()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times, y


def recorded(run, calls, stream=None):
    """A CUDA graph of `calls` run()s, captured on `stream` (torch.cuda.graph's own if None). Raises RuntimeError if they launch nothing,
    because replays of an empty graph would seem to take no time."""
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
    for warning in caught:
        if EMPTY in str(warning.message):
            raise RuntimeError("Nothing was launched, so there is nothing to time.")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return graph


def graph_time(run, calls=10, repeats=9):
    """Microseconds of one run() on the GPU, the median of `repeats` replays of a CUDA graph of `calls` of them.

    run should rotate among enough buffers to exceed the L2 cache, unless a model's data would stay in it. Raises RuntimeError if it
    launches nothing.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = recorded(run, calls, stream)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2] * 1e3 / calls
