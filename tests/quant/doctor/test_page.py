"""The doctor's page: its form, that it never raises, and the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import compiler, cupy_import, driver, targets
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.quant.doctor import kernels, needs, page, system
from comfyui_svdquant.quant.doctor.part import Host, Part

ROOT = Path(page.__file__).resolve().parents[2]
TITLES = ("System", "GPU", "Driver", "CuPy", "NVRTC", "Kernel cache", "Kernels", "Self-test", "Autotune", "Pinned memory", "Speed")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), (14, 0)])
def test_a_machine_in_order(fake, capability):
    fake(capability, architectures=(75, 80, 86, 89, 90, 100, 120, 121, 140))
    text = page.examine(Host("0.33.0", torch.device("cuda", 0), 8 << 30))
    assert text.splitlines()[0] == "SVDQuant Doctor: no problem found"
    assert tuple(line for line in text.splitlines()[1:] if line and not line.startswith(" ")) == TITLES
    assert f"compute capability {capability[0]}.{capability[1]} (sm_" in text and "ComfyUI 0.33.0" in text and "not measured" in text
    assert "failed" not in text and "unknown:" not in text


def test_problems_come_first_and_are_numbered(fake, monkeypatch):
    fake((12, 0), cuda=12020)
    monkeypatch.setattr(cupy_import, "installed", dict)
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    def missing():
        raise KernelsUnavailable("The CUDA kernels need CuPy, which is not installed. Install it into ComfyUI's Python: "
                                 "pip install cupy-cuda12x")

    monkeypatch.setattr(cupy_import, "load_cupy", missing)
    lines = page.examine().splitlines()
    assert lines[0] == "SVDQuant Doctor: 3 problems" and lines[4] == "" and [line[:3] for line in lines[1:4]] == ["1. ", "2. ", "3. "]
    assert "older than CUDA 12.3" in lines[1] and "pip install cupy-cuda12x" in lines[2] and "NVRTC 13.0 is newer than" in lines[3]
    blocked = lines[lines.index("Kernels") + 1]
    assert blocked.startswith("  not in use until the problems above are solved")


def test_problems_that_only_cost_speed_do_not_block_the_kernels(fake):
    fake((12, 0), cuda=12020, nvrtc=(13, 0))
    text = page.examine()
    assert text.startswith("SVDQuant Doctor: 2 problems") and "not in use" not in text


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "version", lambda: "unknown")
    text = page.examine(measure=True)
    assert text.startswith("SVDQuant Doctor: no problem found\n")
    assert "none that PyTorch can use. On the CPU 4-bit layers run through PyTorch: exact, but many times slower" in text
    assert "CuPy" not in text and "Speed" not in text


@pytest.mark.parametrize("measure", [False, True])
def test_a_check_that_fails_is_a_line(fake, monkeypatch, measure):
    fake()

    def broken(*args):
        raise OSError("the disk\nis gone")

    for module, name in ((system, "_own_version"), (torch.cuda, "get_device_properties"), (driver, "cuda_version"),
                         (cupy_import, "installed"), (compiler, "nvrtc"), (compiler, "cache_folder"), (kernels, "choose"), (needs, "_pin")):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(kernels, "layers", broken)
    text = page.examine(Host(), measure)
    assert text.count("this check failed: OSError: the disk") == (11 if measure else 10) and "is gone" not in text


def test_a_gpu_that_can_not_be_asked(fake, monkeypatch):
    fake()

    def lost(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(targets, "for_device", lost)
    text = page.examine()
    assert "this check failed: RuntimeError: CUDA error: device-side assert triggered" in text and "Kernels" not in text


def test_the_home_folder_is_not_on_the_page(fake, monkeypatch, tmp_path):
    fake()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    text = page.examine()
    assert str(tmp_path) not in text and f"  ~{os.sep}kernels: 0 files" in text
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("USERPROFILE", "/")
    assert str(tmp_path) in page.examine(), "the root is no name"


def test_nothing_is_measured_unless_it_is_asked_for(fake, monkeypatch):
    fake()
    monkeypatch.setattr(page, "benchmark", lambda machine: Part(("measured",)))
    assert page.examine().endswith("Speed\n  not measured") and page.examine(measure=True).endswith("Speed\n  measured")


def run(*arguments, options=()):
    done = subprocess.run([sys.executable, *options, str(ROOT / "doctor.py"), *arguments], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [(), ("--no-benchmark",)])
def test_the_command(arguments):
    status, page, _ = run(*arguments)
    assert status == 0 and page.startswith("SVDQuant Doctor: ") and f"PyTorch {torch.__version__}" in page and "\nGPU\n" in page


def test_the_command_without_pytorch():
    status, _, error = run(options=("-E", "-S"))
    assert status == 1 and error.startswith("doctor: this Python has no ") and error.count("\n") == 1
