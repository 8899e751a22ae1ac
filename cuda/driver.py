"""The CUDA driver through ctypes. Its library is loaded with the first kernel."""

import contextlib
import ctypes
import functools
import os
import re

import torch

from . import targets
from .errors import KernelsUnavailable

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
# Statuses with which loading a kernel always fails again, because the GPU, the driver and the machine code don't fit together. Another
# program or another kernel may cause any other status. In order: CUDA_ERROR_INVALID_VALUE (more shared memory than the GPU has),
# STUB_LIBRARY, INSUFFICIENT_DRIVER (for the CUDA runtime), INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, UNSUPPORTED_PTX_VERSION,
# NOT_FOUND, NOT_SUPPORTED, SYSTEM_DRIVER_MISMATCH.
PERMANENT = (1, 34, 35, 200, 209, 218, 222, 500, 801, 803)
OLDEST_WITH_GRAPHS = 12030  # CUDA 12.3, whose graphs can hold programmatic dependent launches


class DriverError(RuntimeError):
    """A call of the CUDA driver failed. status: the driver's error number."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


@functools.cache
def driver():
    """The CUDA driver's library. Raises KernelsUnavailable if there is none, or if it is older than CUDA 12."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise KernelsUnavailable(f"The CUDA kernels need NVIDIA's driver ({error}).") from error
    if not hasattr(library, "cuTensorMapEncodeTiled"):  # this function is new in 12.0
        raise KernelsUnavailable("The CUDA kernels need an NVIDIA driver for CUDA 12 or newer. Update the driver.")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4  # ctypes then accepts ints as pointers
    return library


VERSION_FILE = "/proc/driver/nvidia/version"  # Linux has it, WSL doesn't; NVML takes 50 ms to start


@functools.cache
def version():
    """The version of NVIDIA's driver as its own programs print it, such as "580.159.04"; "unknown" if the driver doesn't say it."""
    with contextlib.suppress(OSError), open(VERSION_FILE, encoding="utf-8", errors="replace") as file:
        if found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.readline()):
            return found[0]
    text = ctypes.create_string_buffer(96)
    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text)):
            return "unknown"
    except (OSError, AttributeError):
        return "unknown"
    return text.value.decode(errors="replace") or "unknown"


def check(name, status):
    """Raise the error that the driver's function `name` returned, as torch.OutOfMemoryError or DriverError. Status 0 is success."""
    if status == 0:
        return
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    message = f"{name} failed: {(text.value or b'unknown error').decode()} ({status})"
    if status == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory: {message}")
    raise DriverError(message, status)


def ensure_context():
    """Give this thread a CUDA context, which the driver's functions need. PyTorch only makes one in threads in which it uses the GPU."""
    context = ctypes.c_void_p()
    check("cuCtxGetCurrent", driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        check("cuDevicePrimaryCtxRetain", driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch._C._cuda_getDevice()))
        check("cuCtxSetCurrent", driver().cuCtxSetCurrent(context))


def set_function_attribute(function, attribute, value):
    """Set a CUfunction_attribute of a loaded kernel."""
    status = driver().cuFuncSetAttribute(ctypes.c_void_p(function), ctypes.c_int(attribute), ctypes.c_int(value))
    check("cuFuncSetAttribute", status)


def cuda_version():
    """The newest CUDA that the driver supports, as the driver writes it: 12030 for 12.3. Raises as driver()."""
    version = ctypes.c_int()
    check("cuDriverGetVersion", driver().cuDriverGetVersion(ctypes.byref(version)))
    return version.value


@functools.cache
def has_dependent_launch(index):
    """Whether a kernel on this device may start while the previous one ends, also inside CUDA graphs."""
    return cuda_version() >= OLDEST_WITH_GRAPHS and targets.for_device(torch.device("cuda", index)).dependent_launch
