"""Launch loaded kernels, one or several at a time.

A launch is one call of the driver through ctypes. CuPy's own launch checks the type of each argument every time, and doesn't support
programmatic dependent launch, with which a kernel starts while the previous one ends.
"""

import ctypes
import functools
import logging
import struct
import threading
from typing import NamedTuple

import torch

from . import driver
from .errors import KernelsUnavailable

log = logging.getLogger(__name__)

NO_SUCH_CLUSTERS = (1, 801, 912)  # CUDA_ERROR_INVALID_VALUE, NOT_SUPPORTED, INVALID_CLUSTER_SIZE
_CONFIG = "=7I4xqqI4x"  # CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes, number of attributes
_STREAM = 32  # offset of the stream in _CONFIG
ALIGNMENT = 256  # bytes; each part of a chain's work memory begins at a multiple of it

# PyTorch's internal fast paths. A PyTorch without CUDA has none of them.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # ten times as fast as torch.cuda.current_stream
_current_device = getattr(torch._C, "_cuda_getDevice", None)  # torch.cuda.current_device, without the check that CUDA is initialized
_take = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)  # together with _give in half the time of a tensor
_give = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)
_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # Inductor's torch.empty_strided, in half the time

# {CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, padding, 1 in a union of 64 bytes}
_PDL = ctypes.create_string_buffer(struct.pack("=I4xI60x", 6, 1))


class Boxes(NamedTuple):
    """A contiguous (rows, columns) matrix of 2-byte elements in device memory. The copy engine moves boxes of (box_rows, box_columns),
    swizzled by 128 bytes in shared memory. columns is a multiple of 8, box_columns at most 64."""

    rows: int
    columns: int
    box_rows: int
    box_columns: int


@functools.lru_cache(maxsize=1024)
def _tensor_map(boxes):
    """A CUtensorMap of Boxes at address 0.

    The format of its 128 bytes is not documented. On Hopper the first eight are the address, which this function verifies. Raises
    KernelsUnavailable if they are not.
    """
    sizes, strides = (ctypes.c_uint64 * 2)(boxes.columns, boxes.rows), (ctypes.c_uint64 * 1)(2 * boxes.columns)
    box, steps = (ctypes.c_uint32 * 2)(boxes.box_columns, boxes.box_rows), (ctypes.c_uint32 * 2)(1, 1)
    memory = ctypes.create_string_buffer(128 + 64)
    begin = -ctypes.addressof(memory) % 64  # the driver requires a multiple of 64 bytes

    def encode(address):
        status = driver.driver().cuTensorMapEncodeTiled(  # 1: uint16; 2 dimensions; 0: no interleaving; 3: swizzle by 128 bytes
            ctypes.byref(memory, begin), 1, 2, ctypes.c_void_p(address), sizes, strides, box, steps, 0, 3, 0, 0)
        driver.check("cuTensorMapEncodeTiled", status)
        return memory[begin:begin + 128]

    one, other = (encode(address) for address in (1 << 20, 3 << 40))
    if one[8:] != other[8:] or struct.unpack("=QQ", one[:8] + other[:8]) != (1 << 20, 3 << 40):
        raise KernelsUnavailable("The CUDA kernels don't know this driver's format of tensor maps: the tensor's address is not where it "
                                 "was. Update this node pack.")
    return bytes(8) + one[8:]


class _LaunchBuffer:
    """A thread's memory for the launches of a chain. In order: the CUlaunchConfigs, the ints of 8 bytes each, the tensor maps, and for each
    kernel the addresses of its parameters.

    The driver reads as many of an int's 8 bytes as the parameter has: all 8 for a pointer, the low 4 for an int.
    """

    __slots__ = ("bytes", "values", "maps", "stream", "work", "parts", "calls")

    def __init__(self, names, steps, parts, constants):
        driver.ensure_context()
        order = (*names, *parts, *constants)
        values = [0] * (len(names) + len(parts)) + [*constants.values()] + [size for launcher, _ in steps for size in launcher.sizes]
        maps = [_tensor_map(boxes) for launcher, _ in steps for boxes in launcher.boxes]
        self.values = struct.calcsize(_CONFIG) * len(steps)
        written = bytes(self.values) + struct.pack(f"={len(values)}q", *values) + b"".join(maps)
        mapped, pointed, own = self.values + 8 * len(values), len(written), len(order)
        count = sum(len(arguments) + len(launcher.sizes) for launcher, arguments in steps)
        self.bytes = ctypes.create_string_buffer(written, pointed + 8 * count)
        begin, self.maps, calls = ctypes.addressof(self.bytes), [], []
        for step, (launcher, arguments) in enumerate(steps):
            slots = [*map(order.index, arguments), *range(own, own + len(launcher.sizes))]  # indices of the parameters among the ints
            own += len(launcher.sizes)
            parameters = [begin + self.values + 8 * slot for slot in slots]
            for argument in range(len(launcher.boxes)):
                self.maps.append((mapped, slots[argument]))
                parameters[argument] = begin + mapped
                mapped += 128
            config = step * struct.calcsize(_CONFIG)
            struct.pack_into(_CONFIG, self.bytes, config, *launcher.head, 0, *launcher.attributes)
            struct.pack_into(f"={len(slots)}q", self.bytes, pointed, *parameters)
            calls.append((begin + config, launcher.kernel.function, begin + pointed, None))
            pointed += 8 * len(slots)
        self.parts, self.calls = (self.values + 8 * len(names), tuple(parts.values())), tuple(calls)
        self.stream = self.work = 0

    def set_stream(self, stream):
        """Launch on this stream from now on. Most calls use the same stream as the previous call."""
        for step in range(len(self.calls)):
            struct.pack_into("=q", self.bytes, step * struct.calcsize(_CONFIG) + _STREAM, stream)
        self.stream = stream

    def set_work(self, begin):
        """Place the chain's work memory at this address from now on. The allocator usually returns the same block each time."""
        first, offsets = self.parts
        struct.pack_into(f"={len(offsets)}q", self.bytes, first, *(0 if offset is None else begin + offset for offset in offsets))
        self.work = begin


def chain(names, *steps, work=(), constants=()):
    """A function that launches kernels of one device one after the other on PyTorch's current stream of that device. It takes ints, one
    for each of `names`.

    work: {name: bytes} of memory for the chain while the kernels run; a name with 0 bytes has address 0.
    constants: {name: int}, equal in every call. steps: (Launcher, names of its kernel's first arguments), each in names, work or
    constants, which are searched in this order.
    Each thread writes everything that doesn't change from call to call once.
    """
    index, launch, threads = steps[0][0].kernel.index, driver.driver().cuLaunchKernelEx, threading.local()
    pack, pack_address = struct.Struct(f"={len(names)}q").pack_into, struct.Struct("=q").pack_into
    parts, size = laid_out(dict(work))
    constants = dict(constants)

    def run(*values):
        if _current_device() != index:
            with torch.cuda.device(index):
                return run(*values)
        try:
            memory = threads.memory
        except AttributeError:
            memory = threads.memory = _LaunchBuffer(names, steps, parts, constants)
        if (stream := _raw_stream(index)) != memory.stream:
            memory.set_stream(stream)
        begin = _take(size, stream) if size else 0
        try:
            if begin != memory.work:
                memory.set_work(begin)
            pack(memory.bytes, memory.values, *values)
            for offset, slot in memory.maps:
                pack_address(memory.bytes, offset, values[slot])
            for call in memory.calls:
                if status := launch(*call):
                    driver.check("cuLaunchKernelEx", status)
        finally:
            if begin:
                _give(begin)  # the stream's later work may reuse it after the kernels

    return run


def current_stream(index):
    """The address of PyTorch's current stream of the CUDA device with this index."""
    return _raw_stream(index)


def laid_out(work):
    """Lay out {name: bytes} in one allocation: ({name: offset, or None for 0 bytes}, bytes of the allocation)."""
    offsets, end = {}, 0
    for name, size in work.items():
        offsets[name] = end if size else None
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def allocator(shape, dtype, device):
    """A function without arguments that returns a new contiguous tensor. The device has an index."""
    fresh, short = functools.partial(torch.empty, shape, dtype=dtype, device=device), _empty
    if device.type != "cuda" or short is None:
        return fresh
    index, strides = device.index, torch.empty(shape, device="meta").stride()

    def allocate():
        return short(shape, strides, dtype) if _current_device() == index else fresh()

    return allocate


class Launcher:
    """A kernel with its grid, its block and its last arguments. `launcher(*ints)` launches it with these first arguments."""

    __slots__ = ("kernel", "head", "attributes", "sizes", "boxes", "run")

    def __init__(self, kernel, grid, block, count, sizes, pdl, boxes):
        self.kernel, self.sizes, self.boxes = kernel, sizes, boxes
        self.head = (*grid, 1, 1)[:3] + (*block, 1, 1)[:3] + (kernel.shared,)
        self.attributes = (ctypes.addressof(_PDL), 1) if pdl and kernel.dependent else (0, 0)
        for each in boxes:
            _tensor_map(each)
        self.run = chain(range(count), (self, range(count)))

    def __call__(self, *values):
        self.run(*values)


def address(tensor):
    """The address of a tensor as a kernel takes it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Kernel:
    """A kernel on one device. `kernel(grid, block, *args)` launches it on PyTorch's current stream of that device.

    args: tensors on the device (their addresses), None (a null pointer) and ints.
    A launch neither allocates on the device nor synchronizes, so that CUDA graphs can record it.
    """

    __slots__ = ("function", "index", "shared", "dependent", "owner")

    def __init__(self, function, index, shared, dependent=False, owner=None):
        self.function = function
        self.index = index
        self.shared = shared        # bytes of dynamic shared memory of a CTA
        self.dependent = dependent  # whether the device has programmatic dependent launch
        self.owner = owner          # CuPy's function, which keeps the module loaded

    def __call__(self, grid, block, *args, pdl=False):
        self.launcher(grid, block, len(args), pdl=pdl)(*(arg if type(arg) is int else address(arg) for arg in args))

    def active_clusters(self, ctas, threads):
        """How many clusters of `ctas` CTAs with `threads` threads the device holds at once; 0 if it has no such clusters."""
        cluster = ctypes.create_string_buffer(struct.pack("=I4x3I52x", 4, ctas, 1, 1))  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        config = ctypes.create_string_buffer(
            struct.pack(_CONFIG, ctas, 1, 1, threads, 1, 1, self.shared, 0, ctypes.addressof(cluster), 1))
        count = ctypes.c_int()
        with torch.cuda.device(self.index):
            driver.ensure_context()  # a warm_up thread may have waited while another thread loaded the kernel
            status = driver.driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), ctypes.c_void_p(self.function), config)
        if status in NO_SUCH_CLUSTERS:
            log.debug("cuOccupancyMaxActiveClusters failed with %s for clusters of %s CTAs", status, ctas)
            return 0
        driver.check("cuOccupancyMaxActiveClusters", status)
        return count.value

    def launcher(self, grid, block, count, sizes=(), pdl=False, boxes=()):
        """A Launcher for many calls with one shape. It takes the kernel's first `count` arguments as ints.

        sizes: the arguments that follow, ints.
        pdl: the kernel may start while the previous one ends. It must then call wait_for_previous_grid() (common.cuh).
        boxes: Boxes at the addresses that are the first ints. These arguments of the kernel are TensorMaps (hopper.cuh).
        """
        return Launcher(self, grid, block, count, sizes, pdl, boxes)
