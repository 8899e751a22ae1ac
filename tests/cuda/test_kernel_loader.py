"""The loading of kernels without a GPU: which failures are cached, which are retried, and the messages."""

import contextlib
import types
import weakref

import pytest
import torch
from comfyui_svdquant.cuda import driver, kernel_loader
from comfyui_svdquant.cuda.errors import KernelsUnavailable


def test_a_failure_is_cached(monkeypatch):
    """A linear whose kernel is unavailable asks for it at every call, but the reason is determined once."""
    builds = []

    def build(*key):
        builds.append(key)
        return KernelsUnavailable("no CuPy")

    monkeypatch.setattr(kernel_loader, "_build", build)
    monkeypatch.setattr(kernel_loader, "_kernels", {})

    def layer(x):
        try:
            kernel_loader.kernel("awq.cu", "awq", (), torch.device("cuda", 0))
        except KernelsUnavailable as error:
            return str(error)

    inputs = [torch.ones(1) for _ in range(3)]
    left = [weakref.ref(x) for x in inputs]
    while inputs:
        assert layer(inputs.pop()) == "no CuPy"
    assert len(builds) == 1
    assert not any(x() is not None for x in left), "the cached failure holds no caller's tensors"


class LoadError(RuntimeError):
    """A driver error as CuPy raises it."""

    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize(("failures", "error", "emptied"), [
    ([], None, 0), ([2], None, 1), ([2, 2], torch.OutOfMemoryError, 1), ([209], LoadError, 0), ([2, 209], LoadError, 1)])
def test_a_gpu_whose_memory_is_full(monkeypatch, failures, error, emptied):
    """PyTorch's unused memory is freed. If that isn't enough, PyTorch's own OutOfMemoryError is raised."""
    calls = []

    class Module:
        def load(self, cubin):
            calls.append("load")
            if failures:
                raise LoadError(failures.pop(0))

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    with pytest.raises(error) if error else contextlib.nullcontext():
        kernel_loader._load(Module(), b"")
    assert calls.count("emptied") == emptied and not failures


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with everything except a kernel: {"load": the function that loads it}."""
    does = {"load": lambda: None}

    def function(*args):
        does["load"]()
        return types.SimpleNamespace(ptr=0x77)

    monkeypatch.setattr(kernel_loader, "_kernels", {})
    monkeypatch.setattr(kernel_loader, "load_cupy", lambda: None)
    monkeypatch.setattr(kernel_loader, "_function", function)
    monkeypatch.setattr(kernel_loader.driver, "driver", lambda: None)
    monkeypatch.setattr(kernel_loader.driver, "has_dependent_launch", lambda index: True)
    monkeypatch.setattr(kernel_loader.targets, "for_device", lambda device: kernel_loader.targets.TARGETS[89])
    monkeypatch.setattr(kernel_loader.compiler, "compile_cubin", lambda *args: b"")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    return does


WANTED = "awq.cu", "awq", (), torch.device("cuda", 0)


def raising(error):
    def load():
        raise error
    return load


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    LoadError(700),  # an illegal address in another kernel, which every later call reports
    LoadError(719),  # a launch failure of the same kind
    LoadError(46),   # the device is busy
    LoadError(999),
    driver.DriverError("cuFuncSetAttribute failed", 700),
    RuntimeError("CUDA error: an illegal memory access was encountered"),  # PyTorch's form of the error
    MemoryError(),
])
def test_a_temporary_error_is_raised_unchanged_and_not_cached(gpu, error):
    """The next call may succeed. A message that the kernels are unavailable would be wrong, and would last until the process ends."""
    gpu["load"] = raising(error)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            kernel_loader.kernel(*WANTED)
        assert raised.value is error
    gpu["load"] = lambda: None
    assert kernel_loader.kernel(*WANTED).function == 0x77


@pytest.mark.parametrize("error", [*map(LoadError, driver.PERMANENT), driver.DriverError("cuFuncSetAttribute failed", 1),
                                   KernelsUnavailable("no NVRTC")])
def test_a_permanent_error_is_cached(gpu, error):
    gpu["load"] = raising(error)
    with pytest.raises(KernelsUnavailable, match="no NVRTC" if isinstance(error, KernelsUnavailable) else "did not load the kernel awq"):
        kernel_loader.kernel(*WANTED)
    gpu["load"] = lambda: pytest.fail("the loader retried")
    with pytest.raises(KernelsUnavailable):
        kernel_loader.kernel(*WANTED)


@pytest.mark.parametrize(("shared", "defines", "expected"), [
    (0, (), []), (48 << 10, (("CTAS", 8),), []), (99 << 10, (), [(0x77, 8, 99 << 10)]), (0, (("CTAS", 16),), [(0x77, 14, 1)])])
def test_function_attributes_of_large_kernels(monkeypatch, shared, defines, expected):
    """More dynamic shared memory than the default, and larger clusters."""
    set_attributes = []

    def attribute(function, name, value):
        set_attributes.append((function.value, name.value, value.value))
        return 0

    module = types.SimpleNamespace(load=lambda cubin: None, get_function=lambda entry: types.SimpleNamespace(ptr=0x77))
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(function=types.SimpleNamespace(Module=lambda: module)))
    monkeypatch.setattr(driver, "driver", lambda: types.SimpleNamespace(cuFuncSetAttribute=attribute))
    assert kernel_loader._function(cupy, b"", "awq", shared, dict(defines).get("CTAS", 1) > kernel_loader.PORTABLE_CLUSTER).ptr == 0x77
    assert set_attributes == expected


def test_quantizing_without_kernels_logs_the_reason_once(monkeypatch, caplog):
    def missing(*args):
        return KernelsUnavailable("The CUDA kernels need CuPy. Install it.")

    monkeypatch.setattr(kernel_loader, "_build", missing)
    monkeypatch.setattr(kernel_loader, "_kernels", {})
    kernel_loader._warn_once.cache_clear()
    assert not any(kernel_loader.has_kernel(source, "entry", torch.device("cuda", 0)) for source in ("gptq.cu", "group_error.cu"))
    assert not kernel_loader.has_kernel("gptq.cu", "entry", torch.device("cpu"))
    assert [record.message for record in caplog.records] == [
        "The CUDA kernels need CuPy. Install it. Until then models are quantized by PyTorch alone, which is slower."]
