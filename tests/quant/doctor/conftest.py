"""A fake GPU of any generation, on a machine that has none."""

import types

import pytest
import torch
from comfyui_svdquant.cuda import autotune, compiler, cupy_import, driver, kernel_records, self_test, targets
from comfyui_svdquant.quant.doctor import needs

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(capability) puts a GPU, a driver for CUDA 13, CuPy, NVRTC 13 and a cache folder in place."""
    def put(capability=(8, 9), nvrtc=(13, 0), architectures=ARCHITECTURES, cuda=13000):
        def for_device(device):
            return targets.for_capability(capability)

        monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "kernels"))
        for name in (autotune.VARIABLE, self_test.VARIABLE):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
                            "get_device_properties": lambda device: types.SimpleNamespace(name="A GPU"),
                            "mem_get_info": lambda device: (12 << 30, 24 << 30), "empty_cache": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(targets, "for_device", for_device)
        monkeypatch.setattr(targets, "multiprocessors", lambda device: 128)
        monkeypatch.setattr(driver, "version", lambda: "580.159.04")
        monkeypatch.setattr(driver, "cuda_version", lambda: cuda)
        monkeypatch.setattr(compiler, "nvrtc", lambda: types.SimpleNamespace(version=nvrtc, architectures=architectures))
        monkeypatch.setattr(compiler, "all_sources_digest", lambda: "sources")
        monkeypatch.setattr(cupy_import, "load_cupy", lambda: None)
        monkeypatch.setattr(cupy_import, "installed", lambda: {"cupy-cuda13x": "14.2.0"})
        monkeypatch.setattr(needs, "_pin", lambda size: None)
        monkeypatch.setattr(kernel_records, "machine", lambda device: ("A GPU", "uuid", "580.159.04"))
        monkeypatch.setattr(self_test, "_failed", {})
    return put


@pytest.fixture
def machine(fake):
    """machine(capability, ...) is the fake GPU's Machine."""
    from comfyui_svdquant.quant.doctor.part import Machine

    def made(capability=(8, 9), **others):
        fake(capability, **others)
        device = torch.device("cuda", 0)
        return Machine(device, targets.for_device(device), targets.multiprocessors(device))
    return made
