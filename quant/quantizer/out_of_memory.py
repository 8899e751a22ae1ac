"""Whether an error means that a device, or the computer itself, has no memory left.

PyTorch has an exception type for its own allocator on a device. The CUDA and HIP runtimes, their libraries and the allocators of host
memory raise RuntimeError or MemoryError, and only the message says why.
"""

import errno
import re

import torch

ERRORS = (RuntimeError, MemoryError, OSError)  # the types that an error about memory can have
# A library that can't get its workspace when it starts says that it is not initialized.
DEVICE = re.compile(r"\b(?:CUDA|HIP|XPU|MPS)\b[^\n]{0,40}\bout of memory\b|\bCUDA_ERROR_OUT_OF_MEMORY\b|\bhipErrorOutOfMemory\b"
                    r"|\b(?:CU|HIP)[A-Z]+_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)\b|\brocblas_status_memory_error\b")
HOST = re.compile(r"\bDefaultCPUAllocator\b|\bCannot allocate memory\b|\bnot enough memory\b", re.IGNORECASE)


def on_device(error):
    """Whether a device is out of memory: what it holds can move to host memory, and the work can be tried again."""
    if isinstance(error, torch.OutOfMemoryError) or type(error).__module__.startswith("cupy") and isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and DEVICE.search(str(error)) is not None


def on_host(error):
    """Whether host memory is used up, so that moving tensors there does not help."""
    if on_device(error):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and HOST.search(str(error)) is not None
