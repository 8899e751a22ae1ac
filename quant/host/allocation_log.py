"""The log of ComfyUI's Dynamic VRAM, because of which the GPU must not be used by several threads.

comfy-aimdo, which works beneath PyTorch's allocator, writes its log by a Python function, and in the middle of an allocation: its thread
holds the allocator's lock and waits for Python's. A thread that meanwhile frees a tensor holds Python's lock and waits for the allocator's,
and so neither ever goes on. ComfyUI lets comfy-aimdo log allocations only if it was started with --verbose DEBUG.
"""

import logging
import sys


def forbids_threads():
    """Whether allocations on the GPU are logged by Dynamic VRAM. Kernels are then compiled by the calls that need them, and a quantized
    block leaves the GPU before the next one begins."""
    memory = sys.modules.get("comfy.memory_management")  # older ComfyUIs have no such module
    return getattr(memory, "aimdo_enabled", False) and logging.getLogger().isEnabledFor(logging.DEBUG)
