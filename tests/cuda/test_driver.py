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
