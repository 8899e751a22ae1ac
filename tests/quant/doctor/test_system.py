"""The doctor's checks of programs and GPUs."""

import pytest
import torch
from comfyui_svdquant.cuda import autotune, driver, self_test
from comfyui_svdquant.quant.doctor import system
from comfyui_svdquant.quant.doctor.part import Host


def test_the_versions(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv(autotune.VARIABLE, "1")
    monkeypatch.delenv(self_test.VARIABLE, raising=False)
    lines, problems, _ = system.system(Host("0.3.75"))
    assert not problems and lines[1] == "ComfyUI 0.3.75" and lines[3] == f"PyTorch {torch.__version__}, built for CUDA 12.8"
    assert lines[0].startswith("SVDQuant nodes ") and lines[0][-1].isdecimal() and lines[4:] == ("SVDQUANT_AUTOTUNE=1",)
    assert system.system(Host()).lines[1] == "ComfyUI: not found"


def test_the_comfyui_around_the_pack(tmp_path):
    pack = tmp_path / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    assert system.version_beside(pack) is None and system.version_beside(pack.parents[-1]) is None
    (tmp_path / "comfyui_version.py").write_text('# generated\n__version__ = "0.33.0"\n')
    assert system.version_beside(pack) == "0.33.0"


@pytest.mark.parametrize(("capability", "arch"), [((7, 5), "7.5 (sm_75)"), ((9, 0), "9.0 (sm_90a)"), ((12, 1), "12.1 (sm_121)")])
def test_a_gpu(fake, capability, arch):
    fake(capability)
    assert system.gpus(Host()) == ((f"A GPU, 24.0 GiB (12.0 free), compute capability {arch}, 128 SMs",), (), False)


def test_a_gpu_that_is_newer_than_the_pack(fake):
    fake((14, 0))
    lines, problems, _ = system.gpus(Host())
    assert "14.0 (sm_140)" in lines[0] and "the nearest older generation" in lines[1] and not problems


def test_a_gpu_that_is_too_old(fake):
    fake((6, 1))
    lines, (problem,), _ = system.gpus(Host())
    assert "7.5 (RTX 20) or newer; this one has 6.1. On this GPU 4-bit layers run through PyTorch" in problem and len(lines) == 1


def test_comfyui_on_the_cpu_of_a_machine_with_a_gpu(fake):
    fake()
    _, (problem,), _ = system.gpus(Host("0.3.75", torch.device("cpu")))
    assert problem.startswith("ComfyUI computes on the CPU although there is a GPU") and problem.endswith("start it without --cpu.")
    assert not system.gpus(Host("0.3.75", torch.device("cuda", 0))).problems


def test_no_gpu_that_pytorch_can_use(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {}
    for version in ("unknown", "470.1"):
        for cuda in (None, "13.0"):
            monkeypatch.setattr(driver, "version", lambda version=version: version)
            monkeypatch.setattr(torch.version, "cuda", cuda)
            found[version, cuda] = system.gpus(Host()).problems
    assert found["unknown", None] == found["unknown", "13.0"] == ()
    assert "built for the CPU; install a PyTorch for CUDA" in found["470.1", None][0]
    assert "PyTorch for CUDA 13.0 finds no GPU, although there is NVIDIA's driver 470.1; update the driver" in found["470.1", "13.0"][0]


def test_an_amd_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    lines, problems, _ = system.gpus(Host())
    assert "an AMD GPU" in lines[0] and "through PyTorch" in lines[0] and not problems
