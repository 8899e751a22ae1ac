"""The launch of loaded kernels without a GPU: the bytes that a launch passes to the driver."""

import contextlib
import ctypes
import struct
import threading

import pytest
import torch
from comfyui_svdquant.cuda import driver as cuda_driver
from comfyui_svdquant.cuda import runtime
from comfyui_svdquant.cuda.errors import KernelsUnavailable


class FakeDriver:
    """Reads a launch as the driver would: {config's fields}, its attributes' bytes, the parameters."""

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
    """A Kernel on a fake device, and the fake driver that it calls."""
    driver = FakeDriver([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int])
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
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
    """CUlaunchAttribute is id 6, padding, and a union of 64 bytes that begins with 1. It is set only if the device supports it."""
    kernel, driver = launches
    for dependent in (True, False):
        kernel.dependent = dependent
        kernel((1,), (32,), 0, 0, 0, 0, 0, pdl=True)
    known, unknown = (call[2] for call in driver.calls)
    assert known == struct.pack("=I4xI60x", 6, 1) and unknown == b""


def test_a_chain(launches, monkeypatch):
    """Two kernels share ints, and have their own grids and constants. Only the ints and the stream change from launch to launch."""
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
    """Returns given addresses; records each allocation, and after how many launches it was freed."""

    def __init__(self, driver, monkeypatch):
        self.driver, self.next, self.log = driver, 0, []
        monkeypatch.setattr(runtime, "_take", self.take)
        monkeypatch.setattr(runtime, "_give", lambda begin: self.log.append(("given", begin, len(driver.calls))))

    def take(self, size, stream):
        self.log.append(("taken", size, stream))
        return self.next


def test_work_memory(launches, monkeypatch):
    """A chain's work memory is allocated on the launches' stream, and freed after the last launch or the one that failed."""
    kernel, driver = launches
    allocator = FakeAllocator(driver, monkeypatch)
    one = kernel.launcher((1,), (32,), 4, (5,))
    run = runtime.chain(("x", "lora_act"), (one, ("x", "codes", "lora_act", "scale")), (one, ("none", "scale", "weight", "x")),
                        work={"codes": 300, "none": 0, "lora_act": 1000, "scale": 7}, constants={"weight": 77})
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
    with pytest.raises(cuda_driver.DriverError, match="cuLaunchKernelEx failed"):
        run(14, 99)
    assert allocator.log[1:] == [("given", 1 << 40, 1)]


def test_no_work_memory(launches, monkeypatch):
    kernel, driver = launches
    allocator = FakeAllocator(driver, monkeypatch)
    kernel((1,), (32,), 1, 2, 3, 4, 5)
    assert len(driver.calls) == 1 and not allocator.log


def test_allocator(monkeypatch):
    """PyTorch's fast path allocates on the current device; torch.empty does on another device, or without the fast path."""
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
    """cuTensorMapEncodeTiled, whose 128 bytes begin with the address, as on Hopper, or have it elsewhere (`offset`)."""

    def __init__(self, offset=0):
        self.offset, self.calls = offset, []

    def __call__(self, memory, kind, dimensions, address, sizes, strides, box, steps, *modes):
        begin = ctypes.cast(memory, ctypes.c_void_p).value
        assert begin % 64 == 0 and dimensions == 2 and modes == (0, 3, 0, 0), "128 bytes' swizzle, no interleaving"
        self.calls.append((kind, *sizes, *strides, *box, *steps))
        ctypes.memset(begin, 0xAB, 128)
        ctypes.c_uint64.from_address(begin + self.offset).value = address.value
        return 0


@pytest.fixture
def maps(launches):
    runtime._tensor_map.cache_clear()
    launches[1].cuTensorMapEncodeTiled = FakeMaps()
    yield launches[1].cuTensorMapEncodeTiled
    runtime._tensor_map.cache_clear()


def test_a_tensor_map(launches, maps):
    """The kernel with boxes gets a map of the matrix at an address; the chain's other kernel gets the address."""
    kernel, driver = launches
    boxes = runtime.Boxes(rows=7, columns=48, box_rows=32, box_columns=64)
    mapped, plain = kernel.launcher((1,), (32,), 2, (5,), boxes=(boxes,)), kernel.launcher((1,), (32,), 2, (6,))
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
    """The launch writes the address into the map's first bytes. If the driver has it elsewhere, the kernels are unavailable."""
    kernel, _ = launches
    maps.offset = 8
    with pytest.raises(KernelsUnavailable, match="format of tensor maps: the tensor's address is not where it was. Update"):
        kernel.launcher((1,), (32,), 1, boxes=(runtime.Boxes(1, 64, 32, 64),))


def test_on_another_device(launches, monkeypatch):
    """During a launch, PyTorch's current device is the kernel's, and the stream is that device's."""
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
    with pytest.raises(cuda_driver.DriverError, match=r"cuLaunchKernelEx failed: invalid argument \(1\)") as raised:
        kernel((1,), (32,), 0, 0, 0, 0, 0)
    assert raised.value.status == 1
    driver.status = 2
    with pytest.raises(torch.OutOfMemoryError, match=r"cuLaunchKernelEx failed: invalid argument \(2\)"):
        kernel((1,), (32,), 0, 0, 0, 0, 0)


def test_launches_from_threads(launches):
    """Threads that launch at the same time never get each other's arguments."""
    kernel, driver = launches
    run = kernel.launcher((1,), (32,), 5)
    threads = [threading.Thread(target=lambda i=i: [run(i, i, i, i, i) for _ in range(1000)]) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(call[4] for call in driver.calls) == [[i] * 5 for i in range(1, 5) for _ in range(1000)]


def test_a_thread_without_a_context(launches, monkeypatch):
    """The driver's functions need a context, which PyTorch makes only in threads that call it."""
    kernel, driver = launches
    made, clusters = [], []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
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
    """The launcher then uses a plan without clusters."""
    kernel, driver = launches
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    driver.cuOccupancyMaxActiveClusters = lambda count, function, config: status
    assert kernel.active_clusters(8, 512) == 0


def test_an_unrelated_error_is_not_a_lack_of_clusters(launches, monkeypatch):
    """An illegal address in an earlier kernel must be raised: the plan without clusters would only fail later, and would be cached."""
    kernel, driver = launches
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    driver.cuOccupancyMaxActiveClusters = lambda count, function, config: 700
    with pytest.raises(cuda_driver.DriverError, match="cuOccupancyMaxActiveClusters failed"):
        kernel.active_clusters(8, 512)
