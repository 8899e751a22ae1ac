"""Memory of a GPU that the processes of other GPUs on this machine write to, by CUDA's handles for other processes."""

import contextlib
import ctypes
import logging
import weakref

import torch

from . import driver

LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
HANDLE = 64  # bytes of a CUipcMemHandle

log = logging.getLogger(__name__)


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * HANDLE)]


def _call(name, *args):
    driver.ensure_context()
    driver.check(name, getattr(driver.driver(), name)(*args))


class PeerMemory:
    """`size` bytes on a GPU, at first 0.

    PyTorch's allocators can't all share theirs: ComfyUI's usual one, cudaMallocAsync, can't. The memory is freed with the object and the
    last tensor of `part`, once the GPU has done all that it was asked to do. A process that ends leaves the memory of the others mapped,
    and the others' mappings keep its own. Raises DriverError or OutOfMemoryError.
    """

    def __init__(self, size, device):
        self.size, self.device, address = size, device, ctypes.c_uint64()
        with torch.cuda.device(device):
            try:
                _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.address, self.addresses = address.value, []
        self.mapped = []
        weakref.finalize(self, _release, device, self.address, self.mapped).atexit = False
        with torch.cuda.device(device):
            _call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
            torch.cuda.synchronize()

    def handle(self):
        """Bytes by which another process maps the memory."""
        handle = _Handle()
        with torch.cuda.device(self.device):
            _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.address))
        return bytes(handle)

    def map(self, handles, rank):
        """Map the others' memory. handles: of all processes by rank; rank: this one's. Fills `addresses`, by rank."""
        with torch.cuda.device(self.device):
            for other, handle in enumerate(handles):
                address = ctypes.c_uint64(self.address)
                if other != rank:
                    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(LAZY_PEER_ACCESS))
                    self.mapped.append(address.value)
                self.addresses.append(address.value)

    def part(self, offset, size):
        """(size,) uint8 tensor of this process's memory, which keeps the memory."""
        return torch.as_tensor(_Part(self, self.address + offset, size), device=self.device)


class _Part:
    """Names memory to torch.as_tensor, whose tensor keeps this object."""

    def __init__(self, memory, address, size):
        self.memory = memory
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}


def _release(device, address, mapped):
    with contextlib.suppress(Exception), torch.cuda.device(device):
        torch.cuda.synchronize()  # kernels may still use it; fails after an error of the GPU
    for name, found in (*(("cuIpcCloseMemHandle", each) for each in mapped), ("cuMemFree_v2", address)):
        try:
            with torch.cuda.device(device):
                _call(name, ctypes.c_uint64(found))
        except Exception as error:
            log.debug("%s: %s", name, error)
