"""What PyTorch raises when a device is out of memory."""

import re

import torch

# PyTorch has no exception type for the errors of CUDA's libraries, such as cuBLAS: it raises RuntimeError with the status name in it.
LIBRARY_OUT_OF_MEMORY = re.compile(r"\bCU[A-Z]+_STATUS_ALLOC_FAILED\b")


def is_out_of_memory(error):
    """Whether a RuntimeError means that a device is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or LIBRARY_OUT_OF_MEMORY.search(str(error)) is not None
