"""The CUDA driver through ctypes, and its cached properties."""

import types

import pytest
from comfyui_svdquant.cuda import driver, targets
from comfyui_svdquant.cuda.errors import KernelsUnavailable


@pytest.mark.parametrize("version, number, expected", [(13000, 90, True), (12030, 120, True), (12020, 90, False), (13000, 89, False)])
def test_the_devices_and_drivers_with_dependent_launches(monkeypatch, version, number, expected):
    def get_version(pointer):
        pointer._obj.value = version
        return 0

    monkeypatch.setattr(driver, "driver", lambda: types.SimpleNamespace(cuDriverGetVersion=get_version))
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
    assert driver.has_dependent_launch.__wrapped__(0) is expected


def test_no_driver_or_an_old_one(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    for library, message in ((missing, "need NVIDIA's driver .*: no such file"),
                             (lambda name: types.SimpleNamespace(cuLaunchKernelEx=None),
                              "need an NVIDIA driver for CUDA 12 or newer. Update the driver")):
        monkeypatch.setattr(driver.ctypes, "CDLL", library)
        with pytest.raises(KernelsUnavailable, match=message):
            driver.driver.__wrapped__()


@pytest.mark.parametrize(("line", "nvml", "expected"), [
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@host)  Tue Oct  1", None, "580.159.04"),
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Mon Jun 12", None, "535.54"), (None, b"581.29", "581.29"),
    ("something else", b"581.29", "581.29"), (None, b"", "unknown"), (None, None, "unknown")])
def test_the_drivers_version(monkeypatch, tmp_path, line, nvml, expected):
    """It is in a file on Linux, and NVML has it elsewhere."""
    def get_version(text, size):
        text.value = nvml
        return 0

    def load(name):
        if nvml is None:
            raise OSError(f"{name}: no such file")
        return types.SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlSystemGetDriverVersion=get_version)

    if line:
        (tmp_path / "version").write_text(line + "\nGCC version: 14.2.0\n")
    monkeypatch.setattr(driver, "VERSION_FILE", str(tmp_path / "version"))
    monkeypatch.setattr(driver.ctypes, "CDLL", load)
    assert driver.version.__wrapped__() == expected
