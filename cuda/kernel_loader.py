"""Load the cubins of compiler.py onto a device, as kernels that runtime.py launches."""

import functools
import logging
import threading

import torch

from . import compiler, driver, targets
from .cupy_import import load_cupy
from .errors import KernelsUnavailable
from .runtime import Kernel

log = logging.getLogger(__name__)

PORTABLE_CLUSTER = 8  # CTAs; a kernel with larger clusters needs a function attribute
STATIC_SHARED = 48 << 10  # bytes; a kernel with more dynamic shared memory needs a function attribute
MAX_DYNAMIC_SHARED_SIZE, NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14  # values of CUfunction_attribute

_kernels = {}  # {kernel()'s arguments: Kernel, or the KernelsUnavailable that its build raised}
_locks = {}    # {kernel()'s arguments: a lock}, so that threads build different kernels at the same time
_importing = threading.Lock()


def kernel(source, entry, defines, device, shared=0):
    """The kernel `entry` of kernels/`source`, compiled with `defines` for `device` and loaded there.

    defines: ((name, int or str), ...); shared: bytes of dynamic shared memory.
    Raises KernelsUnavailable if the kernel can never be built or loaded here; a second call raises at once. Other errors may be temporary
    and are not cached: PyTorch's OutOfMemoryError, or a driver error that something else on the device caused.
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
        raise KernelsUnavailable(str(built))  # a new one, since raising the same one again keeps callers' tensors alive
    return built


def has_kernel(source, entry, device, shared=0):
    """Whether kernel() has this kernel, built without defines; False on the CPU. Logs the reason once if a GPU can't have it."""
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
    """A Kernel, or a KernelsUnavailable. Raises errors that may be temporary."""
    try:
        with _importing:
            cupy, _ = load_cupy(), driver.driver()
        cubin = compiler.compile_cubin(source, defines, targets.for_device(torch.device("cuda", index)).arch)
        with torch.cuda.device(index):
            function = _function(cupy, cubin, entry, shared, dict(defines).get("CTAS", 1) > PORTABLE_CLUSTER)
            return Kernel(function.ptr, index, shared, driver.has_dependent_launch(index), function)
    except KernelsUnavailable as error:
        return error
    except Exception as error:  # CuPy's versions have no common class of driver errors, but all their errors have the driver's status
        if getattr(error, "status", None) not in driver.PERMANENT:
            raise
        log.debug("%s", source, exc_info=True)
        return KernelsUnavailable(f"The CUDA driver did not load the kernel {entry} of {source}: {error}")


def _function(cupy, cubin, entry, shared, large_clusters):
    """The cubin's kernel as CuPy's function, which keeps the module loaded."""
    module = cupy.cuda.function.Module()
    _load(module, cubin)
    function = module.get_function(entry)
    if shared > STATIC_SHARED:
        driver.set_function_attribute(function.ptr, MAX_DYNAMIC_SHARED_SIZE, shared)
    if large_clusters:
        driver.set_function_attribute(function.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    return function


def _load(module, cubin):
    """Load a cubin into a CuPy module. If the device is out of memory, PyTorch's unused cached memory is freed first. Raises PyTorch's
    OutOfMemoryError if that isn't enough."""
    for last in (False, True):
        try:
            return module.load(cubin)
        except Exception as error:
            if getattr(error, "status", None) != driver.OUT_OF_MEMORY:
                raise
            if last:
                raise torch.OutOfMemoryError(f"CUDA out of memory: a kernel could not be loaded ({error}).") from error
            torch.cuda.empty_cache()
