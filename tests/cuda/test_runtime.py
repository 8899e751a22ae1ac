"""From machine code to a launch, without a GPU: what is said where CuPy or a driver is missing, and what a launch hands to the driver."""

import contextlib
import ctypes
import importlib.metadata
import struct
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import compiler, runtime

ROOT = Path(runtime.__file__).parents[1]


def test_nothing_of_it_is_imported_with_the_pack():
    """CuPy's import takes a second, and it is of no use on a CPU."""
    code = "import sys; from cuda import runtime; print('cupy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(compiler.KernelsUnavailable, match="need CuPy, which is not installed.*pip install cupy-cuda12x$"):
        runtime.load_cupy()


def fake_cupy(version="14.2.0", is_hip=False, runtime_version=lambda: 13000):
    """The part of CuPy that load_cupy reads, as modules."""
    cupy, cuda, function = (types.ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.function"))
    cupy.__version__, cupy.__path__, cuda.__path__ = version, [], []
    cupy.cuda, cuda.function = cuda, function
    cuda.runtime = types.SimpleNamespace(is_hip=is_hip, runtimeGetVersion=runtime_version)
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.function": function}


def no_runtime():
    raise RuntimeError("CuPy failed to load libcudart.so.12: OSError: no such file\n(and more)")


@pytest.mark.parametrize("wrong, message", [
    (fake_cupy(version="12.3.0"), r"need CuPy 13 or newer; this is CuPy 12\.3\.0.*pip install --upgrade cupy-cuda13x$"),
    (fake_cupy(is_hip=True), r"CuPy for CUDA; this one is for ROCm.*pip install cupy-cuda13x$"),
    (fake_cupy(runtime_version=no_runtime), r"does not fit this PyTorch, which is built for CUDA 13\.0 \(CuPy failed to load "
                                            r"libcudart\.so\.12: OSError: no such file\)\..*pip install cupy-cuda13x$"),
])
def test_wrong_cupy(monkeypatch, wrong, message):
    for name, module in wrong.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(compiler.KernelsUnavailable, match=message):
        runtime.load_cupy()


def test_right_cupy(monkeypatch):
    modules = fake_cupy()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert runtime.load_cupy() is modules["cupy"]


def test_failure_is_remembered(monkeypatch):
    """A linear that can't have its kernel asks for it at every call: the reason is found once."""
    builds = []

    def build(*key):
        builds.append(key)
        return compiler.KernelsUnavailable("no CuPy")

    monkeypatch.setattr(runtime, "_build", build)
    monkeypatch.setattr(runtime, "_kernels", {})

    def layer(x):
        try:
            runtime.kernel("awq.cu", "awq", (), torch.device("cuda", 0))
        except compiler.KernelsUnavailable as error:
            return str(error)

    inputs = [torch.ones(1) for _ in range(3)]
    left = [weakref.ref(x) for x in inputs]
    while inputs:
        assert layer(inputs.pop()) == "no CuPy"
    assert len(builds) == 1
    assert not any(x() is not None for x in left), "what is remembered holds no caller's tensors"


class LoadError(RuntimeError):
    """As CuPy raises the driver's."""

    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize(("failures", "error", "emptied"), [
    ([], None, 0), ([2], None, 1), ([2, 2], torch.OutOfMemoryError, 1), ([209], LoadError, 0), ([2, 209], LoadError, 1)])
def test_a_gpu_whose_memory_is_full(monkeypatch, failures, error, emptied):
    """PyTorch gives back what it holds and doesn't use; then there is room, or it is PyTorch's own error."""
    calls = []

    class Module:
        def load(self, cubin):
            calls.append("load")
            if failures:
                raise LoadError(failures.pop(0))

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    with pytest.raises(error) if error else contextlib.nullcontext():
        runtime._load(Module(), b"")
    assert calls.count("emptied") == emptied and not failures


def test_full_memory_is_not_remembered(monkeypatch):
    """The next call may find room; what can't be loaded at all is remembered (above)."""
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime, "_kernels", {})
    for name, function in (("load_cupy", lambda: None), ("driver", lambda: None), ("_knows_dependent_launches", lambda index: True)):
        monkeypatch.setattr(runtime, name, function)
    monkeypatch.setattr(compiler, "device_target", lambda index: "sm_89")
    monkeypatch.setattr(compiler, "compile_cubin", lambda *args: b"")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(runtime, "_function", full)
    wanted = "awq.cu", "awq", (), torch.device("cuda", 0)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.kernel(*wanted)
    monkeypatch.setattr(runtime, "_function", lambda *args: types.SimpleNamespace(ptr=0x77))
    assert runtime.kernel(*wanted).function == 0x77


def test_quantizing_without_kernels_says_why_once(monkeypatch, caplog):
    def missing(*args):
        return compiler.KernelsUnavailable("The CUDA kernels need CuPy. Install it.")

    monkeypatch.setattr(runtime, "_build", missing)
    monkeypatch.setattr(runtime, "_kernels", {})
    runtime._warn_once.cache_clear()
    assert not any(runtime.has_kernel(source, "entry", torch.device("cuda", 0)) for source in ("gptq.cu", "group_error.cu"))
    assert not runtime.has_kernel("gptq.cu", "entry", torch.device("cpu"))
    assert [record.message for record in caplog.records] == [
        "The CUDA kernels need CuPy. Install it. Until then models are quantized by PyTorch alone, which is slower."]


@pytest.fixture
def cupy():
    if not any(name.startswith("cupy-cuda") for distribution in importlib.metadata.distributions()
               if (name := distribution.metadata["Name"] or "")):
        pytest.skip("CuPy is not installed")
    return runtime.load_cupy()


def test_cupy_from_the_repository(cupy):
    """`python -m benchmarks...` has the repository on its path, where `import cuda` finds our package."""
    code = "import sys; from cuda import runtime; print(runtime.load_cupy().__version__, sys.path[0] == '')"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == [cupy.__version__, "True"]


def test_no_driver(cupy):
    """Where CuPy finds no driver, the message is still ours."""
    if torch.cuda.is_available():
        pytest.skip("There is a driver")
    assert isinstance(runtime._build("awq.cu", "awq", (), 0, 0), compiler.KernelsUnavailable)


# --- Launch -----------------------------------------------------------------------------------------------------------


class FakeDriver:
    """Reads what a launch hands to the driver, as the driver would: {config's fields}, its attributes' bytes, the parameters."""

    def __init__(self, parameters, status=0):
        self.calls, self.parameters, self.status = [], parameters, status

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        *numbers, stream, attributes, count = struct.unpack("=7I4xQQI4x", ctypes.string_at(config, 56))
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        values = [kind.from_address(pointers[i]).value for i, kind in enumerate(self.parameters)]
        self.calls.append((numbers, stream, ctypes.string_at(attributes, 72 * count) if count else b"", function, values))
        assert extra is None
        return self.status

    def cuCtxGetCurrent(self, context):
        context._obj.value = 1
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"invalid argument"
        return 0


@pytest.fixture
def launches(monkeypatch):
    """A Kernel on a device that isn't there, and the driver that it calls."""
    driver = FakeDriver([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int])
    monkeypatch.setattr(runtime, "driver", lambda: driver)
    monkeypatch.setattr(runtime, "_current_device", lambda: 0)
    monkeypatch.setattr(runtime, "_raw_stream", lambda index: 0x1234)
    return runtime.Kernel(0x77, 0, 1024, dependent=True), driver


def test_launch_arguments(launches):
    kernel, driver = launches
    x = torch.zeros(4)
    kernel((2, 3), (128,), x, torch.nn.Parameter(x), None, 7, -1)
    (numbers, stream, attributes, function, values), = driver.calls
    assert (numbers, stream, attributes, function) == ([2, 3, 1, 128, 1, 1, 1024], 0x1234, b"", 0x77)
    assert values == [x.data_ptr(), x.data_ptr(), None, 7, -1]


def test_dependent_launch(launches):
    """CUlaunchAttribute: id 6, padding, a union of 64 bytes that begins with 1. Only where the device knows it."""
    kernel, driver = launches
    for dependent in (True, False):
        kernel.dependent = dependent
        kernel((1,), (32,), 0, 0, 0, 0, 0, pdl=True)
    known, unknown = (call[2] for call in driver.calls)
    assert known == struct.pack("=I4xI60x", 6, 1) and unknown == b""


@pytest.mark.parametrize("version, arch, expected", [(13000, "sm_90a", True), (12030, "sm_120", True), (12020, "sm_90a", False),
                                                     (13000, "sm_89", False)])
def test_who_knows_dependent_launches(launches, monkeypatch, version, arch, expected):
    def get_version(pointer):
        pointer._obj.value = version
        return 0

    launches[1].cuDriverGetVersion = get_version
    monkeypatch.setattr(compiler, "device_target", lambda index: arch)
    assert runtime._knows_dependent_launches.__wrapped__(0) is expected


def test_a_chain(launches, monkeypatch):
    """Two kernels that share ints, each with its own grid and constants; what changes is the ints and the stream."""
    kernel, driver = launches
    other = runtime.Kernel(0x88, 0, 0, dependent=True)
    first, second = kernel.launcher((2, 3), (64,), 3, (-7, 8)), other.launcher((9,), (32,), 4, (6,), pdl=True)
    run = runtime.chain("abcd", (first, "acd"), (second, "dbca"))
    driver.parameters = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    for stream, ints in ((0x1234, (10, 11, 12, 13)), (0x5678, (1 << 50, 21, 22, 23)), (0x5678, (30, 31, 32, 33))):
        monkeypatch.setattr(runtime, "_raw_stream", lambda index: stream)
        run(*ints)
        a, b, c, d = ints
        assert [call[:2] + call[3:] for call in driver.calls] == [
            ([2, 3, 1, 64, 1, 1, 1024], stream, 0x77, [a, c, d, -7, 8]),
            ([9, 1, 1, 32, 1, 1, 0], stream, 0x88, [d, b, c, a & 0x7FFFFFFF, 6])]
        assert [len(call[2]) for call in driver.calls] == [0, 72]
        driver.calls.clear()


class FakeAllocator:
    """Gives what it is told to; writes down what was taken, and given back after how many launches."""

    def __init__(self, driver, monkeypatch):
        self.driver, self.next, self.log = driver, 0, []
        monkeypatch.setattr(runtime, "_take", self.take)
        monkeypatch.setattr(runtime, "_give", lambda begin: self.log.append(("given", begin, len(driver.calls))))

    def take(self, size, stream):
        self.log.append(("taken", size, stream))
        return self.next


def test_work_memory(launches, monkeypatch):
    """A chain's own memory is taken on the launches' stream and given back behind the last one, or the one that failed."""
    kernel, driver = launches
    allocator = FakeAllocator(driver, monkeypatch)
    one = kernel.launcher((1,), (32,), 4, (5,))
    run = runtime.chain(("x", "low"), (one, ("x", "codes", "low", "scale")), (one, ("none", "scale", "weight", "x")),
                        work={"codes": 300, "none": 0, "low": 1000, "scale": 7}, constants={"weight": 77})
    driver.parameters = [ctypes.c_void_p] * 4 + [ctypes.c_int]
    for allocator.next, stream, x in ((1 << 20, 0x1234, 11), (1 << 20, 0x1234, 12), (1 << 40, 0x5678, 13)):
        monkeypatch.setattr(runtime, "_raw_stream", lambda index: stream)
        run(x, 99)
        codes, scale = allocator.next, allocator.next + 512 + 1024
        assert [call[4] for call in driver.calls] == [[x, codes, 99, scale, 5], [None, scale, 77, x, 5]]
        assert allocator.log == [("taken", 512 + 1024 + 256, stream), ("given", allocator.next, 2)]
        driver.calls.clear()
        allocator.log.clear()
    driver.status = 1
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed"):
        run(14, 99)
    assert allocator.log[1:] == [("given", 1 << 40, 1)]


def test_no_work_memory(launches, monkeypatch):
    kernel, driver = launches
    allocator = FakeAllocator(driver, monkeypatch)
    kernel((1,), (32,), 1, 2, 3, 4, 5)
    assert len(driver.calls) == 1 and not allocator.log


def test_allocator(monkeypatch):
    """On the current device by PyTorch's short cut, on another, or where that isn't there, in the common way."""
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, device, **named: made.append(device) or empty(*args, device="meta", **named))
    monkeypatch.setattr(runtime, "_current_device", lambda: 1)
    monkeypatch.setattr(runtime, "_empty", lambda *args: made.append(args))
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    allocate = [runtime.allocator((2, 3, 4), torch.float16, device) for device in devices]
    monkeypatch.setattr(runtime, "_empty", None)
    allocate.append(runtime.allocator((2, 3, 4), torch.float16, devices[1]))
    del made[:]
    for one in allocate:
        one()
    assert made == [devices[0], ((2, 3, 4), (12, 4, 1), torch.float16), devices[2], devices[1]]


class FakeMaps:
    """cuTensorMapEncodeTiled: what a map says goes into its 128 bytes as it does on Hopper, the address first, or elsewhere."""

    def __init__(self, place=0):
        self.place, self.calls = place, []

    def __call__(self, memory, kind, dimensions, address, sizes, strides, box, steps, *modes):
        begin = ctypes.cast(memory, ctypes.c_void_p).value
        assert begin % 64 == 0 and dimensions == 2 and modes == (0, 3, 0, 0), "128 bytes' swizzle, no interleaving"
        self.calls.append((kind, *sizes, *strides, *box, *steps))
        ctypes.memset(begin, 0xAB, 128)
        ctypes.c_uint64.from_address(begin + self.place).value = address.value
        return 0


@pytest.fixture
def maps(launches):
    runtime._tensor_map.cache_clear()
    launches[1].cuTensorMapEncodeTiled = FakeMaps()
    yield launches[1].cuTensorMapEncodeTiled
    runtime._tensor_map.cache_clear()


def test_a_tensor_map(launches, maps):
    """In place of an address the kernel gets a map of the matrix that begins there; the other kernel of the chain, the address."""
    kernel, driver = launches
    boxes = runtime.Boxes(rows=7, columns=48, box_rows=32, box_columns=64)
    mapped, plain = kernel.launcher((1,), (32,), 2, (5,), boxes=boxes), kernel.launcher((1,), (32,), 2, (6,))
    run = runtime.chain("abc", (mapped, "ba"), (plain, "bc"))

    class Map(ctypes.c_char * 128):
        pass

    Map.value = property(lambda self: bytes(self.raw))
    for address in (0x7F0000001000, 0x7F0000002000):
        driver.calls.clear()
        for driver.parameters in ([Map, ctypes.c_int, ctypes.c_int], [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]):
            run(11, address, 13)
        assert driver.calls[0][4] == [struct.pack("=Q", address) + b"\xab" * 120, 11, 5]
        assert driver.calls[3][4] == [address, 13, 6]
    assert maps.calls == [(1, 48, 7, 96, 64, 32, 1, 1)] * 2, "encoded for two addresses, once for all launches"


def test_another_format_of_tensor_maps(launches, maps):
    """The address is written over the map's first bytes: where the driver has it elsewhere, there are no kernels."""
    kernel, _ = launches
    maps.place = 8
    with pytest.raises(compiler.KernelsUnavailable, match="format of tensor maps: the tensor's address is not where it was. Update"):
        kernel.launcher((1,), (32,), 1, boxes=runtime.Boxes(1, 64, 32, 64))


def test_on_another_device(launches, monkeypatch):
    """PyTorch's current device is the kernel's while it is launched, and its stream that device's."""
    kernel, driver = launches
    kernel.index, current = 3, [0]

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(runtime, "_current_device", lambda: current[-1])
    monkeypatch.setattr(runtime, "_raw_stream", lambda index: 0x1000 * current[-1] + index)
    kernel((1,), (32,), 1, 2, 3, 4, 5)
    (_, stream, _, _, values), = driver.calls
    assert stream == 0x3003 and values == [1, 2, 3, 4, 5] and current == [0]


def test_a_launch_that_fails(launches):
    kernel, driver = launches
    driver.status = 1
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: invalid argument \(1\)"):
        kernel((1,), (32,), 0, 0, 0, 0, 0)


def test_launches_from_threads(launches):
    """Threads that launch at once, each with its own arguments: none gets another's."""
    kernel, driver = launches
    run = kernel.launcher((1,), (32,), 5)
    threads = [threading.Thread(target=lambda i=i: [run(i, i, i, i, i) for _ in range(1000)]) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(call[4] for call in driver.calls) == [[i] * 5 for i in range(1, 5) for _ in range(1000)]


def test_a_thread_without_a_context(launches, monkeypatch):
    """The driver's functions need a context, which PyTorch makes in the threads that call it."""
    kernel, driver = launches
    made, clusters = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda context: 0)
    driver.cuDevicePrimaryCtxRetain = lambda context, device: made.append(("retained", device)) or 0
    driver.cuCtxSetCurrent = lambda context: made.append("current") or 0
    run = kernel.launcher((1,), (32,), 5)
    for _ in range(2):
        run(0, 0, 0, 0, 0)
    assert made == [("retained", 0), "current"]
    driver.cuOccupancyMaxActiveClusters = lambda count, function, config: clusters.append(len(made)) or 0
    kernel.active_clusters(8, 512)
    assert clusters == [4], "asked once there is a context"


@pytest.mark.parametrize("status", [801, 912])
def test_a_driver_that_knows_no_clusters(launches, monkeypatch, status):
    """There is a plan without them."""
    kernel, driver = launches
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    driver.cuOccupancyMaxActiveClusters = lambda count, function, config: status
    assert kernel.active_clusters(8, 512) == 0


def test_no_driver_or_an_old_one(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    for library, message in ((missing, "need NVIDIA's driver .*: no such file"),
                             (lambda name: types.SimpleNamespace(cuLaunchKernelEx=None),
                              "need an NVIDIA driver for CUDA 12 or newer. Update the driver")):
        monkeypatch.setattr(runtime.ctypes, "CDLL", library)
        with pytest.raises(compiler.KernelsUnavailable, match=message):
            runtime.driver.__wrapped__()
