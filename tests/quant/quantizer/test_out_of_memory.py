"""The messages by which PyTorch, CuPy, CUDA's and HIP's libraries and the allocators of host memory say that memory is used up."""

import errno

import pytest
import torch
from comfyui_svdquant.quant.quantizer import calibration, out_of_memory


class OutOfMemoryError(MemoryError):
    """As CuPy's pool raises it."""

    __module__ = "cupy.cuda.memory"


ON_DEVICE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"), torch.OutOfMemoryError("anything"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA driver error: out of memory"), RuntimeError("HIP error: out of memory"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), RuntimeError("hipErrorOutOfMemory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB)"),
    *(RuntimeError(f"CUDA error: {status} when calling `cublasCreate(handle)`") for status in (
        "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUSOLVER_STATUS_ALLOC_FAILED",
        "CUSOLVER_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_NOT_INITIALIZED", "HIPBLAS_STATUS_ALLOC_FAILED",
        "HIPSOLVER_STATUS_ALLOC_FAILED")),
    RuntimeError("CUDA error: rocblas_status_memory_error when calling `rocblas_create_handle`"),
    OutOfMemoryError("Out of memory allocating 1,024 bytes (allocated so far: 8,589,934,592 bytes)."),
]
ON_HOST = [
    MemoryError(), MemoryError("Unable to allocate 3.00 GiB for an array with shape (1, 2) and data type float32"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:115] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 "
                 "bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    RuntimeError("unable to mmap 6500000000 bytes from file <flux.safetensors>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERS = [RuntimeError(message) for message in (
    "ALLOC_FAILED", "MY_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED_TWICE", "CUBLAS_STATUS_EXECUTION_FAILED", "shapes",
    "CUDA error: an illegal memory access was encountered", "the layer ran out of memory of its shapes")] + [
    OSError(errno.ENOSPC, "No space left on device"), ValueError("CUDA out of memory")]


def said(error):
    return f"{type(error).__name__}: {str(error)[:40]}"


@pytest.mark.parametrize("error", ON_DEVICE, ids=said)
def test_a_device_without_memory_is_recognized(error):
    assert out_of_memory.on_device(error) and not out_of_memory.on_host(error) and isinstance(error, out_of_memory.ERRORS)


@pytest.mark.parametrize("error", ON_HOST, ids=said)
def test_a_computer_without_memory_is_recognized(error):
    assert out_of_memory.on_host(error) and not out_of_memory.on_device(error) and isinstance(error, out_of_memory.ERRORS)


@pytest.mark.parametrize("error", OTHERS, ids=said)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error):
    assert not out_of_memory.on_device(error) and not out_of_memory.on_host(error)


@pytest.mark.parametrize("error", ON_DEVICE, ids=said)
def test_calibration_steps_down_where_the_device_is_full(error):
    memory, left = calibration.Memory("cpu"), [error]

    def run():
        if left:
            raise left.pop()
        return "done"

    assert memory.attempt("x", run) == "done" and memory.level == 1


@pytest.mark.parametrize("error", ON_HOST, ids=said)
def test_calibration_does_not_move_tensors_into_memory_that_is_full(error):
    memory = calibration.Memory("cpu")

    def run():
        raise error

    with pytest.raises(MemoryError) as caught:
        memory.attempt("double_blocks.0", run)
    message = str(caught.value)
    assert message.startswith("The computer has too little memory for double_blocks.0 (") and "close other programs" in message
    assert memory.level == 0 and "\n" not in message
