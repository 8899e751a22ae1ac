"""Machine code to running kernels: CuPy loads a cubin, the driver launches its kernel.

A launch is one call of the driver by ctypes. CuPy's own looks at the type of each argument every time, and can't say that a kernel
may start while the one before it ends. Neither library is loaded before the first kernel is asked for.
"""

import contextlib
import ctypes
import functools
import logging
import os
import struct
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from . import compiler
from .compiler import KernelsUnavailable
from .images import padded

log = logging.getLogger(__name__)

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
PORTABLE_CLUSTER = 8  # CTAs; a kernel of larger clusters has to say that it wants them
_CONFIG = "=7I4xqqI4x"  # CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes, how many of them
_STREAM = 32  # where in it the stream is
ALIGNMENT = 256  # bytes, of each part of a chain's work memory

# PyTorch's own short cuts, none of which a PyTorch without CUDA has.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # ten times as fast as torch.cuda.current_stream
_current_device = getattr(torch._C, "_cuda_getDevice", None)  # torch.cuda.current_device, without the check that CUDA is initialized
_take = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)  # both together half of what a tensor takes
_give = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)
_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # torch.empty_strided for Inductor's code, in half the time

# {CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, padding, 1 in a union of 64 bytes}
_PDL = ctypes.create_string_buffer(struct.pack("=I4xI60x", 6, 1))


@functools.cache
def driver():
    """The CUDA driver's library."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise KernelsUnavailable(f"The CUDA kernels need NVIDIA's driver ({error}).") from error
    if not hasattr(library, "cuTensorMapEncodeTiled"):  # it came with 12.0
        raise KernelsUnavailable("The CUDA kernels need an NVIDIA driver for CUDA 12 or newer. Update the driver.")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4  # so that it takes ints
    return library


@functools.cache
def _knows_dependent_launches(index):
    """From Hopper on, and CUDA 12.3, whose graphs can hold them."""
    version = ctypes.c_int()
    _check("cuDriverGetVersion", driver().cuDriverGetVersion(ctypes.byref(version)))
    return version.value >= 12030 and compiler.arch_number(compiler.device_target(index)) >= 90


def _check(name, status):
    if status != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name} failed: {(text.value or b'unknown error').decode()} ({status})")


def _ensure_context():
    """The driver's functions need a context, which PyTorch makes in the threads that use the GPU; here, in one that has not."""
    context = ctypes.c_void_p()
    _check("cuCtxGetCurrent", driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check("cuDevicePrimaryCtxRetain", driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), _current_device()))
        _check("cuCtxSetCurrent", driver().cuCtxSetCurrent(context))


class Boxes(NamedTuple):
    """A matrix of 2-byte elements in the GPU's memory, (rows, columns) and contiguous, that a kernel's copy engine moves by boxes of so
    many rows and columns, swizzled by 128 bytes in shared memory. The columns are a multiple of 8, a box's at most 64."""

    rows: int
    columns: int
    box_rows: int
    box_columns: int


@functools.lru_cache(maxsize=1024)
def _tensor_map(boxes):
    """A CUtensorMap of Boxes at address 0.

    The driver says nothing of its 128 bytes. That the first eight are the address is Hopper's format, and looked at here: raises
    KernelsUnavailable where it is another.
    """
    sizes, strides = (ctypes.c_uint64 * 2)(boxes.columns, boxes.rows), (ctypes.c_uint64 * 1)(2 * boxes.columns)
    box, steps = (ctypes.c_uint32 * 2)(boxes.box_columns, boxes.box_rows), (ctypes.c_uint32 * 2)(1, 1)
    memory = ctypes.create_string_buffer(128 + 64)
    begin = -ctypes.addressof(memory) % 64  # where the driver may write it

    def encode(address):
        status = driver().cuTensorMapEncodeTiled(  # 1: 16-bit unsigned, in 2 dimensions; 0: no interleaving; 3: 128 bytes' swizzle
            ctypes.byref(memory, begin), 1, 2, ctypes.c_void_p(address), sizes, strides, box, steps, 0, 3, 0, 0)
        _check("cuTensorMapEncodeTiled", status)
        return memory[begin:begin + 128]

    one, other = (encode(address) for address in (1 << 20, 3 << 40))
    if one[8:] != other[8:] or struct.unpack("=QQ", one[:8] + other[:8]) != (1 << 20, 3 << 40):
        raise KernelsUnavailable("The CUDA kernels don't know this driver's format of tensor maps: the tensor's address is not where it "
                                 "was. Update this node pack.")
    return bytes(8) + one[8:]


class _Memory:
    """A thread's memory for the launches of a chain, in this order: their CUlaunchConfigs, the ints, 8 bytes each, their tensor maps, and
    for each kernel where its parameters are.

    Of an int's 8 bytes the driver takes as many as the parameter has: all of a pointer, or the low 4.
    """

    __slots__ = ("bytes", "values", "maps", "stream", "work", "parts", "calls")

    def __init__(self, names, steps, parts, constants):
        _ensure_context()
        order = (*names, *parts, *constants)
        values = [0] * (len(names) + len(parts)) + [*constants.values()] + [size for launcher, _ in steps for size in launcher.sizes]
        maps = [_tensor_map(launcher.boxes) for launcher, _ in steps if launcher.boxes]
        self.values = struct.calcsize(_CONFIG) * len(steps)
        written = bytes(self.values) + struct.pack(f"={len(values)}q", *values) + b"".join(maps)
        mapped, pointed, own = self.values + 8 * len(values), len(written), len(order)
        count = sum(len(arguments) + len(launcher.sizes) for launcher, arguments in steps)
        self.bytes = ctypes.create_string_buffer(written, pointed + 8 * count)
        begin, self.maps, calls = ctypes.addressof(self.bytes), [], []
        for turn, (launcher, arguments) in enumerate(steps):
            places = [*map(order.index, arguments), *range(own, own + len(launcher.sizes))]
            own += len(launcher.sizes)
            parameters = [begin + self.values + 8 * place for place in places]
            if launcher.boxes:
                self.maps.append((mapped, places[0]))
                parameters[0] = begin + mapped
                mapped += 128
            config = turn * struct.calcsize(_CONFIG)
            struct.pack_into(_CONFIG, self.bytes, config, *launcher.head, 0, *launcher.attributes)
            struct.pack_into(f"={len(places)}q", self.bytes, pointed, *parameters)
            calls.append((begin + config, launcher.kernel.function, begin + pointed, None))
            pointed += 8 * len(places)
        self.parts, self.calls = (self.values + 8 * len(names), tuple(parts.values())), tuple(calls)
        self.stream = self.work = 0

    def turn_to(self, stream):
        """Most of the time it is the same one."""
        for turn in range(len(self.calls)):
            struct.pack_into("=q", self.bytes, turn * struct.calcsize(_CONFIG) + _STREAM, stream)
        self.stream = stream

    def work_at(self, begin):
        """Most of the time the allocator gives what it was given before."""
        where, places = self.parts
        struct.pack_into(f"={len(places)}q", self.bytes, where, *(0 if place is None else begin + place for place in places))
        self.work = begin


def chain(names, *steps, work=(), constants=()):
    """A function of ints, the `names`, that launches kernels of one device one after the other on PyTorch's current stream of that device.

    work: {name: bytes} of memory that is the chain's own while the kernels run; what has no bytes is at 0.
    constants: {name: int}, the same in every call. steps: (Launcher, the names of its kernel's first arguments); a name that stands
    twice is the first of names, work and constants.
    All that doesn't change from call to call is written once a thread.
    """
    index, launch, threads = steps[0][0].kernel.index, driver().cuLaunchKernelEx, threading.local()
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
            memory = threads.memory = _Memory(names, steps, parts, constants)
        if (stream := _raw_stream(index)) != memory.stream:
            memory.turn_to(stream)
        begin = _take(size, stream) if size else 0
        try:
            if begin != memory.work:
                memory.work_at(begin)
            pack(memory.bytes, memory.values, *values)
            for where, place in memory.maps:
                pack_address(memory.bytes, where, values[place])
            for call in memory.calls:
                if status := launch(*call):
                    _check("cuLaunchKernelEx", status)
        finally:
            if begin:
                _give(begin)  # to be used again after the kernels, by what the stream does then

    return run


def laid_out(work):
    """Where the parts of {name: bytes} begin in one allocation, None where there are no bytes; and the bytes of it all."""
    places, end = {}, 0
    for name, size in work.items():
        places[name] = end if size else None
        end += padded(size, ALIGNMENT)
    return places, end


def allocator(shape, dtype, device):
    """A function of nothing: a new contiguous tensor on the device, with its index."""
    fresh, short = functools.partial(torch.empty, shape, dtype=dtype, device=device), _empty
    if device.type != "cuda" or short is None:
        return fresh
    index, strides = device.index, torch.empty(shape, device="meta").stride()

    def allocate():
        return short(shape, strides, dtype) if _current_device() == index else fresh()

    return allocate


class Launcher:
    """A kernel with its grid, block and last arguments. `launcher(*ints)`, its first ones, launches it."""

    __slots__ = ("kernel", "head", "attributes", "sizes", "boxes", "run")

    def __init__(self, kernel, grid, block, count, sizes, pdl, boxes):
        self.kernel, self.sizes, self.boxes = kernel, sizes, boxes
        self.head = (*grid, 1, 1)[:3] + (*block, 1, 1)[:3] + (kernel.shared,)
        self.attributes = (ctypes.addressof(_PDL), 1) if pdl and kernel.dependent else (0, 0)
        if boxes:
            _tensor_map(boxes)
        self.run = chain(range(count), (self, range(count)))

    def __call__(self, *values):
        self.run(*values)


def address(tensor):
    """Of a tensor, or 0 for None: as a kernel takes them."""
    return 0 if tensor is None else tensor.data_ptr()


class Kernel:
    """A kernel on one device. `kernel(grid, block, *args)` launches it on PyTorch's current stream of that device.

    args: tensors on the device (their addresses), None (a null pointer) and ints.
    A launch allocates nothing on the device and waits for nothing, so that CUDA graphs can record it.
    """

    __slots__ = ("function", "index", "shared", "dependent", "owner")

    def __init__(self, function, index, shared, dependent=False, owner=None):
        self.function = function
        self.index = index
        self.shared = shared        # bytes of dynamic shared memory of a block
        self.dependent = dependent  # whether the device knows programmatic dependent launch
        self.owner = owner          # CuPy's function, which keeps the module loaded

    def __call__(self, grid, block, *args, pdl=False):
        self.launcher(grid, block, len(args), pdl=pdl)(*(arg if type(arg) is int else address(arg) for arg in args))

    def active_clusters(self, ctas, threads):
        """How many clusters of `ctas` CTAs with `threads` threads the device holds at once; 0 also where the driver doesn't say."""
        cluster = ctypes.create_string_buffer(struct.pack("=I4x3I52x", 4, ctas, 1, 1))  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        config = ctypes.create_string_buffer(
            struct.pack(_CONFIG, ctas, 1, 1, threads, 1, 1, self.shared, 0, ctypes.addressof(cluster), 1))
        count = ctypes.c_int()
        with torch.cuda.device(self.index):
            _ensure_context()  # a thread of warm_up's may have waited while another loaded the kernel
            status = driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), ctypes.c_void_p(self.function), config)
        if status:
            log.debug("cuOccupancyMaxActiveClusters failed with %s for clusters of %s CTAs", status, ctas)
        return 0 if status else count.value

    def launcher(self, grid, block, count, sizes=(), pdl=False, boxes=None):
        """A Launcher: a function of the kernel's first `count` arguments, ints, for one shape many times.

        sizes: the arguments that follow, ints.
        pdl: let it start while the kernel before it ends. The kernel must then wait_for_previous_grid() (common.cuh).
        boxes: the Boxes whose address the first int is. The kernel's first argument is then a TensorMap (hopper.cuh).
        """
        return Launcher(self, grid, block, count, sizes, pdl, boxes)


# --- From the source -------------------------------------------------------------------------------------------------

_kernels = {}  # {what was asked for: Kernel, or the KernelsUnavailable that building it ended in}
_locks = {}    # {the same: the lock of whoever builds it}; others build other kernels meanwhile
_importing = threading.Lock()


def kernel(source, entry, defines, device, shared=0):
    """The kernel `entry` of kernels/`source`, compiled with `defines` for `device` and loaded there.

    defines: ((name, int or str), ...); shared: bytes of dynamic shared memory.
    Raises KernelsUnavailable, the second time at once, or PyTorch's OutOfMemoryError.
    """
    index = device.index
    key = source, entry, defines, torch.cuda.current_device() if index is None else index, shared
    built = _kernels.get(key)
    if built is None:
        with _locks.setdefault(key, threading.Lock()):
            built = _kernels.get(key)
            if built is None:
                built = _kernels[key] = _build(*key)
    if isinstance(built, KernelsUnavailable):
        raise KernelsUnavailable(str(built))  # a new one: one raised again keeps every caller's frame, and the tensors in it
    return built


def has_kernel(source, entry, device, shared=0):
    """Whether kernel() gives this one without defines; False on the CPU. Where it might be expected to, says once why not."""
    if device.type != "cuda" or torch.version.hip:
        return False
    try:
        kernel(source, entry, (), device, shared)
    except KernelsUnavailable as error:
        _warn_once(str(error))
        return False
    return True


@functools.cache
def _warn_once(message):
    log.warning("%s Until then models are quantized by PyTorch alone, which is slower.", message)


def _build(source, entry, defines, index, shared):
    try:
        with _importing:
            cupy, _ = load_cupy(), driver()
        cubin = compiler.compile_cubin(source, defines, compiler.device_target(index))
        with torch.cuda.device(index):
            function = _function(cupy, cubin, entry, shared, dict(defines).get("CTAS", 1) > PORTABLE_CLUSTER)
            return Kernel(function.ptr, index, shared, _knows_dependent_launches(index), function)
    except KernelsUnavailable as error:
        return error
    except torch.OutOfMemoryError:  # another time there may be room
        raise
    except Exception as error:  # the driver's errors have no common class in all versions of CuPy
        log.debug("%s", source, exc_info=True)
        return KernelsUnavailable(f"The CUDA driver did not load the kernel {entry} of {source}: {error}")


def _function(cupy, cubin, entry, shared, large_clusters):
    from cupy_backends.cuda.api import driver

    module = cupy.cuda.function.Module()
    _load(module, cubin)
    function = module.get_function(entry)
    if shared > 48 << 10:
        driver.funcSetAttribute(function.ptr, 8, shared)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if large_clusters:
        driver.funcSetAttribute(function.ptr, 14, 1)  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    return function


def _load(module, cubin):
    for held in (True, False):
        try:
            return module.load(cubin)
        except Exception as error:
            if getattr(error, "status", None) != OUT_OF_MEMORY:
                raise
            if not held:
                raise torch.OutOfMemoryError(f"CUDA out of memory: a kernel could not be loaded ({error}).") from error
            torch.cuda.empty_cache()  # which PyTorch holds, and doesn't use


# --- CuPy ------------------------------------------------------------------------------------------------------------


def cupy_package():
    return f"cupy-cuda{compiler.cuda_major()}x"


def load_cupy():
    """Import CuPy, 13 or newer and for CUDA; raises KernelsUnavailable with what to install."""
    install = f"Install it into ComfyUI's Python: pip install {cupy_package()}"
    try:
        with _nvidias_cuda():
            import cupy
            import cupy.cuda.function
    except ImportError as error:
        if getattr(error, "name", None) == "cupy":
            raise KernelsUnavailable(f"The CUDA kernels need CuPy, which is not installed. {install}") from error
        raise KernelsUnavailable(f"The CUDA kernels need CuPy, and the one here can't be imported ({_first_line(error)}). "
                                 f"{install}") from error
    except Exception as error:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy, and the one here can't be imported ({_first_line(error)}). "
                                 f"{install}") from error
    if int(cupy.__version__.split(".")[0]) < 13:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy 13 or newer; this is CuPy {cupy.__version__}. "
                                 f"{install.replace('pip install', 'pip install --upgrade')}")
    if cupy.cuda.runtime.is_hip:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy for CUDA; this one is for ROCm. {install}")
    try:
        cupy.cuda.runtime.runtimeGetVersion()
    except Exception as error:  # CuPy loads the runtime of its own generation, PyTorch brought that of another
        raise KernelsUnavailable(f"CuPy {cupy.__version__} does not fit this PyTorch, which is built for CUDA "
                                 f"{torch.version.cuda} ({_first_line(error)}). {install}") from error
    return cupy


@contextlib.contextmanager
def _nvidias_cuda():
    """CuPy 14 imports NVIDIA's package `cuda`. Where the repository is on the path (`python -m` run in it), ours hides that."""
    if sys.modules.get("cupy"):  # it is there: other threads look at the path too
        yield
        return
    folder, path = Path(__file__).resolve().parent, sys.path[:]
    if (file := getattr(sys.modules.get("cuda"), "__file__", None)) and Path(file).resolve().parent == folder:
        del sys.modules["cuda"]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != folder.parent]
    try:
        yield
    finally:
        sys.path[:] = path


def _first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)
