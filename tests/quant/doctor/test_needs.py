"""The doctor's checks of the driver, CuPy, NVRTC, the cache and pinned memory."""

import sys
import tempfile

import pytest
import torch
from comfyui_svdquant.cuda import compiler, cupy_import, driver
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.quant.doctor import needs
from comfyui_svdquant.quant.doctor.part import Host


def raising(error):
    def raises(*args, **named):
        raise error
    return raises


# --- The driver ------------------------------------------------------------------------------------------------------


def test_the_driver(machine):
    assert needs.nvidia_driver(machine()) == (("version 580.159.04, for CUDA 13.0",), (), False)


@pytest.mark.parametrize(("capability", "cuda", "count"), [((9, 0), 12020, 1), ((9, 0), 12030, 0), ((12, 0), 12020, 1), ((8, 9), 12020, 0)])
def test_a_driver_that_can_not_overlap_kernels(machine, capability, cuda, count):
    problems = needs.nvidia_driver(machine(capability, cuda=cuda)).problems
    assert len(problems) == count and all("older than CUDA 12.3" in problem and "update the driver" in problem for problem in problems)


def test_a_driver_that_is_too_old(machine, monkeypatch):
    gpu = machine()
    monkeypatch.setattr(driver, "cuda_version", raising(KernelsUnavailable("The CUDA kernels need an NVIDIA driver for CUDA 12 or newer. "
                                                                           "Update the driver.")))
    _, (problem,), _ = needs.nvidia_driver(gpu)
    assert problem.startswith("The CUDA kernels need an NVIDIA driver for CUDA 12 or newer. Update the driver. Until then ")


# --- CuPy ------------------------------------------------------------------------------------------------------------


def test_cupy(machine):
    assert needs.cupy(machine()) == (("cupy-cuda13x 14.2.0",), (), False)


@pytest.mark.parametrize(("cuda", "package"), [("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x")])
def test_no_cupy(machine, monkeypatch, cuda, package):
    gpu = machine()
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cupy_import, "installed", dict)
    monkeypatch.setitem(sys.modules, "cupy", None)
    lines, (problem,), _ = needs.cupy(gpu)
    assert lines == ("not installed",) and f"not installed. Install it into ComfyUI's Python: pip install {package}." in problem


def test_two_cupys(machine, monkeypatch):
    gpu = machine()
    monkeypatch.setattr(cupy_import, "installed", lambda: {"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"})
    lines, (problem,), blocks = needs.cupy(gpu)
    assert lines == ("cupy-cuda12x 13.6.0, cupy-cuda13x 14.2.0",) and not blocks
    assert "pip uninstall cupy-cuda12x cupy-cuda13x, and then pip install cupy-cuda13x." in problem


def test_two_cupys_that_can_not_be_imported_are_one_problem(machine, monkeypatch):
    gpu = machine()
    monkeypatch.setattr(cupy_import, "installed", lambda: {"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"})
    monkeypatch.setattr(cupy_import, "load_cupy", raising(KernelsUnavailable("CuPy is broken. pip uninstall a b")))
    _, (problem,), blocks = needs.cupy(gpu)
    assert problem.startswith("CuPy is broken. pip uninstall a b. Until then ") and blocks


# --- NVRTC -----------------------------------------------------------------------------------------------------------


def test_nvrtc(machine):
    assert needs.nvrtc(machine()) == (("version 13.0, compiles for sm_89",), (), False)
    assert needs.nvrtc(machine((12, 1), architectures=(100, 120))).lines == ("version 13.0, compiles for sm_120",)


def test_no_nvrtc(machine, monkeypatch):
    gpu = machine()
    monkeypatch.setattr(compiler, "nvrtc", raising(KernelsUnavailable("The CUDA kernels need NVRTC 12 or newer, and none was found. "
                                                                      "Install it into ComfyUI's Python: pip install nvidia-cuda-nvrtc")))
    lines, (problem,), _ = needs.nvrtc(gpu)
    assert lines == ("not found",) and "pip install nvidia-cuda-nvrtc. Until then 4-bit layers run through PyTorch" in problem


def test_an_nvrtc_that_is_older_than_the_gpu(machine, monkeypatch):
    gpu = machine((12, 0), nvrtc=(12, 4), architectures=(75, 80, 86, 89, 90))
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    _, (problem,), _ = needs.nvrtc(gpu)
    assert "NVRTC 12.4 can't compile for this GPU (sm_120)" in problem and "pip install --upgrade nvidia-cuda-nvrtc-cu12" in problem


def test_an_nvrtc_that_is_newer_than_the_driver(machine, monkeypatch):
    gpu = machine(nvrtc=(13, 0), cuda=12080)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    _, (problem,), _ = needs.nvrtc(gpu)
    assert "NVRTC 13.0 is newer than the driver's CUDA 12.8" in problem and "pip install nvidia-cuda-nvrtc-cu12" in problem
    assert not needs.nvrtc(machine(nvrtc=(12, 8), cuda=13000)).problems, "a newer driver loads older machine code"


# --- The cache -------------------------------------------------------------------------------------------------------


def test_the_cache(monkeypatch, tmp_path):
    folder = tmp_path / "a" / "kernels"
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
    assert needs.cache() == ((f"{folder}: 0 files, 0.0 MB, writable",), (), False)
    assert not (tmp_path / "a").exists(), "the doctor makes no folder"
    compiler.write_entry(folder / "gemm.cubin", bytes(3_000_000 - 32))
    assert needs.cache() == ((f"{folder}: 1 files, 3.0 MB, writable",), (), False)
    assert [path.name for path in folder.iterdir()] == ["gemm.cubin"]


def test_a_cache_that_is_read_only(monkeypatch, tmp_path):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", raising(PermissionError(13, "Permission denied")))
    lines, (problem,), _ = needs.cache()
    assert lines == (f"{tmp_path}: 0 files, 0.0 MB",)
    assert f"{tmp_path}, can't be written (Permission denied)" in problem and "set SVDQUANT_CACHE_DIR to another folder" in problem


def test_a_cache_within_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file" / "kernels"))
    assert "can't be written" in needs.cache().problems[0]


# --- Pinned memory ---------------------------------------------------------------------------------------------------


def test_pinned_memory(monkeypatch):
    monkeypatch.setattr(needs, "_pin", lambda size: None)
    lines, problems, _ = needs.pinned_memory(Host("0.33.0", None, 8 << 30))
    assert lines[0] == "ComfyUI may pin 8.0 GiB" and lines[1].startswith("16 MiB were pinned in ") and not problems
    assert needs.pinned_memory(Host("0.33.0", None, -1)).lines[0] == "ComfyUI pins none, as with --disable-pinned-memory"
    assert len(needs.pinned_memory(Host()).lines) == 1


def test_memory_that_can_not_be_pinned(monkeypatch):
    monkeypatch.setattr(needs, "_pin", raising(RuntimeError("CUDA error: out of memory\nlong text")))
    lines, (problem,), _ = needs.pinned_memory(Host())
    assert lines == ("not possible: CUDA error: out of memory",) and "raise the limit of locked memory" in problem
