"""The setup of every test: the pack under the name `comfyui_svdquant`, and a real ComfyUI to import.

ComfyUI comes from COMFYUI_PATH or from .comfyui, where `make test` puts it. Its classes run in this process as its main.py would run
them with --cpu (unless there is a CUDA device) and a temporary base folder. Without a ComfyUI, tests/nodes, tests/host,
tests/quant/host and tests/benchmarks are skipped, and the others run.

With `-n auto --dist loadfile` files run in parallel, in up to four processes that share the cores. On a machine with a GPU they run in
one process, since the GPU's tests measure time and memory.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host import launch, setup
from host.pack import load_pack

CORES = os.cpu_count() or 1
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:  # before anything imports torch; servers that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // WORKERS)))

if importlib.util.find_spec("hypothesis"):  # only some of the tests need it
    from hypothesis import settings

    # Every run has the same cases; `--hypothesis-profile=default` tries others.
    settings.register_profile("fixed", derandomize=True)
    settings.load_profile("fixed")

ROOT = Path(__file__).resolve().parents[1]
HOST = setup.locate()
HAS_COMFY = (HOST.comfy / "main.py").is_file()
BASE = Path(tempfile.mkdtemp(prefix="svdquant-tests-"))
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit it
    # Not the user's cache: a verdict that a test brings about would hold in the user's ComfyUI too.
    os.environ["SVDQUANT_CACHE_DIR"] = str(BASE / "kernels")

collect_ignore_glob = [] if HAS_COMFY else ["nodes/*", "host/*", "quant/host/*", "benchmarks/test_*"]


def enter_comfy() -> None:
    """Make `import comfy...` and `import folder_paths` work here, with the options of the tests' servers."""
    import torch

    launch.enter(HOST.comfy, "--base-directory", str(BASE), *([] if torch.cuda.is_available() else ["--cpu"]))
    for name in ("diffusion_models", "unet", "vae"):
        (BASE / "models" / name).mkdir(parents=True)


load_pack()
if HAS_COMFY:
    enter_comfy()


def pytest_report_header() -> str:
    return f"ComfyUI: {HOST.comfy}" if HAS_COMFY else "ComfyUI: none, so its tests are left out; `make test` sets one up"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose marker needs something that this machine lacks."""
    import torch

    from .host.browser import chromium  # not above: a test imports this module by itself

    lacking = {"gpu": not torch.cuda.is_available(), "newer": not os.environ.get("COMFYUI_NEWER_PATH"), "browser": not chromium(),
               "heavy": not os.environ.get("SVDQUANT_HEAVY_TESTS")}
    left_out = {marker: [item for item in items if lacks and item.get_closest_marker(marker)] for marker, lacks in lacking.items()}
    gone = {item for found in left_out.values() for item in found}
    if gone:
        config.hook.pytest_deselected(items=list(gone))
        items[:] = [item for item in items if item not in gone]
    config.stash[DESELECTED] = {marker: [item.nodeid for item in found] for marker, found in left_out.items()}
    if hasattr(config, "workeroutput"):
        config.workeroutput["deselected"] = config.stash[DESELECTED]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(CORES, 4)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """All processes have deselected the same tests."""
    node.config.stash[DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", {})


DESELECTED = pytest.StashKey[dict[str, list[str]]]()  # {marker: ids of tests}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(DESELECTED, {})
    if tests := found.get("gpu"):
        terminalreporter.write_line(f"{len(tests)} tests marked gpu were deselected: this machine has no CUDA device.")
    if tests := found.get("browser"):
        terminalreporter.write_line(f"{len(tests)} tests in a browser were deselected: they need playwright (pip) and chromium (Debian).")
    if tests := found.get("heavy"):
        terminalreporter.write_line("Deselected, since SVDQUANT_HEAVY_TESTS is not set: " + ", ".join(tests))
    if tests := found.get("newer"):
        terminalreporter.write_line("Deselected, since COMFYUI_NEWER_PATH names no newer ComfyUI: " + ", ".join(tests))


def pytest_unconfigure() -> None:
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture
def inference_mode() -> Iterator[None]:
    """ComfyUI runs every node in inference mode."""
    import torch

    with torch.inference_mode():
        yield
