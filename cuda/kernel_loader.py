"""Machine code on a device: compiler.py's cubins become kernels that runtime.py launches."""

import functools
import logging
import threading

import torch

from . import compiler, driver, targets
from .cupy_import import load_cupy
from .errors import KernelsUnavailable
from .runtime import Kernel

log = logging.getLogger(__name__)

PORTABLE_CLUSTER = 8  # CTAs; a kernel of larger clusters has to say that it wants them
STATIC_SHARED = 48 << 10  # bytes; a kernel with more dynamic shared memory has to say so
MAX_DYNAMIC_SHARED_SIZE, NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14  # of CUfunction_attribute

_kernels = {}  # {what was asked for: Kernel, or the KernelsUnavailable that building it ended in}
_locks = {}    # {the same: the lock of whoever builds it}; others build other kernels meanwhile
_importing = threading.Lock()


def kernel(source, entry, defines, device, shared=0):
    """The kernel `entry` of kernels/`source`, compiled with `defines` for `device` and loaded there.

    defines: ((name, int or str), ...); shared: bytes of dynamic shared memory.
    Raises KernelsUnavailable where the kernel can never be had, the second time at once. Other errors are raised as they are and not
    remembered: PyTorch's OutOfMemoryError, or the driver's where something else has failed on the device.
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
    """Whether kernel() gives this one without defines; False on the CPU. Says once why it can't be had on a GPU."""
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
    """A Kernel, or a KernelsUnavailable; raises errors that may not occur the next time."""
    try:
        with _importing:
            cupy, _ = load_cupy(), driver.driver()
        cubin = compiler.compile_cubin(source, defines, targets.for_device(torch.device("cuda", index)).arch)
        with torch.cuda.device(index):
            function = _function(cupy, cubin, entry, shared, dict(defines).get("CTAS", 1) > PORTABLE_CLUSTER)
            return Kernel(function.ptr, index, shared, driver.has_dependent_launch(index), function)
    except KernelsUnavailable as error:
        return error
    except Exception as error:  # the driver's errors have no common class in all versions of CuPy, but all have its status
        if getattr(error, "status", None) not in driver.PERMANENT:
            raise
        log.debug("%s", source, exc_info=True)
        return KernelsUnavailable(f"The CUDA driver did not load the kernel {entry} of {source}: {error}")


def _function(cupy, cubin, entry, shared, large_clusters):
    """CuPy's function of the cubin's kernel, which keeps the module loaded."""
    module = cupy.cuda.function.Module()
    _load(module, cubin)
    function = module.get_function(entry)
    if shared > STATIC_SHARED:
        driver.set_function_attribute(function.ptr, MAX_DYNAMIC_SHARED_SIZE, shared)
    if large_clusters:
        driver.set_function_attribute(function.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    return function


def _load(module, cubin):
    """Load a cubin into a CuPy module, if need be into the memory that PyTorch holds and doesn't use. Raises PyTorch's OutOfMemoryError
    where that isn't enough."""
    for last in (False, True):
        try:
            return module.load(cubin)
        except Exception as error:
            if getattr(error, "status", None) != driver.OUT_OF_MEMORY:
                raise
            if last:
                raise torch.OutOfMemoryError(f"CUDA out of memory: a kernel could not be loaded ({error}).") from error
            torch.cuda.empty_cache()
