"""Stand-ins on the CPU for the memory that GPUs write to, and for the kernels of put.cu: files that the processes map, and NumPy."""

import contextlib
import ctypes
import mmap
import os
import tempfile
import time
import types

import numpy as np
import torch

PIECE = np.dtype("V16")
# What goes wrong, whether in this process, and whether a wait has ended without what it waited for.
MADE = {"trouble": None, "here": False, "late": False}


def at(address, shape, strides, dtype=PIECE):
    """An array in memory. strides: in elements."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    flat = np.frombuffer((ctypes.c_ubyte * (extent * dtype.itemsize)).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, [stride * dtype.itemsize for stride in strides])


def word(address):
    return ctypes.c_uint32.from_address(address)


class Memory:
    """In place of peer_memory.PeerMemory."""

    def __init__(self, size, _device):
        self.size, self.maps, self.addresses = size, [], []
        file, self.path = tempfile.mkstemp()
        os.truncate(file, size)
        os.close(file)
        self.address = self.opened(self.path)

    def opened(self, path):
        with open(path, "r+b") as file:
            self.maps.append(mmap.mmap(file.fileno(), self.size))
        return ctypes.addressof(ctypes.c_ubyte.from_buffer(self.maps[-1]))

    def handle(self):
        if MADE["here"] and MADE["trouble"] == "no handle":
            raise RuntimeError("This memory can't be shared.")
        return self.path

    def map(self, handles, rank):
        if MADE["here"] and MADE["trouble"] == "not mapped":
            raise RuntimeError("That memory can't be mapped.")
        self.addresses[:] = [self.address if other == rank else self.opened(path) for other, path in enumerate(handles)]

    def part(self, offset, size):
        return torch.frombuffer(self.maps[0], dtype=torch.uint8, count=size, offset=offset)


def put_launch(put, own_rank):
    """In place of put._launch: put.cu's kernel in NumPy."""
    def made(_device, parts, ranks, _beside, sizes, strides, distances):
        (channel, count, images, heads, pieces), (token_there, part_there) = sizes, distances

        def write(sources, address, image, first_head, first_token, tokens):
            for part, source in enumerate(sources):
                of_image, of_head, of_token = strides[3 * part:3 * part + 3]
                shape = images, tokens, heads, pieces
                begin = source + 16 * (first_head * of_head + first_token * of_token)
                there = at(address + 16 * part * part_there, shape, (image, token_there, pieces, 1))
                there[:] = at(begin, shape, (of_image, of_token, of_head, 1))
                if MADE["here"] and MADE["trouble"] == "wrong":
                    there[..., :1] = bytes(16)

        def launch(q, k, v, destinations, control, stop):
            for rank in range(ranks):
                address, flag, *rest = at(destinations + 48 * rank, (6,), (1,), np.dtype("i8")).tolist()
                write((q, k, v)[:parts], address, *rest)
                sent = word(put.flag_of(control + 1024, channel, rank))
                sent.value += 1
                if not (MADE["here"] and MADE["trouble"] == "never") or rank == own_rank:
                    word(flag).value = sent.value
            until = time.monotonic() + (0.2 if MADE["trouble"] == "never" else 60)  # in place of another thread's stop
            for rank in range(ranks):
                received, flag = word(put.flag_of(control + 2048, channel, rank)), word(put.flag_of(control, channel, rank))
                received.value += count
                while flag.value < received.value and not word(stop).value and time.monotonic() < until:
                    time.sleep(1e-4)
                MADE["late"] |= flag.value < received.value
        return launch
    return made


class Torch(types.SimpleNamespace):
    """PyTorch for peer_attention.py, with stand-ins for streams and pinned memory."""

    def __getattr__(self, name):
        return getattr(torch, name)


def install(rank):
    from comfyui_svdquant.cuda import put
    from comfyui_svdquant.quant.parallel import peer_attention

    stream = types.SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None, record_event=lambda: None)
    cuda = types.SimpleNamespace(Stream=lambda device: stream, current_stream=lambda device: stream, stream=contextlib.nullcontext,
                                 Event=lambda: types.SimpleNamespace(record=lambda: None, query=lambda: not MADE["late"]))
    peer_attention.torch = Torch(cuda=cuda, zeros=lambda *args, pin_memory, **kwargs: torch.zeros(*args, **kwargs))
    peer_attention.TRY_SECONDS = 0.05
    peer_attention.DEVICE, peer_attention.ROUNDED, peer_attention.peer_memory.PeerMemory = "cpu", 1 << 16, Memory
    peer_attention.targets = types.SimpleNamespace(multiprocessors=lambda device: 1)
    put._launch = put_launch(put, rank)


@contextlib.contextmanager
def trouble(name, here):
    MADE.update(trouble=name, here=here)
    yield
    MADE.update(trouble=None, here=False, late=False)


def slow_attention(generator):
    """An attention function without rounding that takes any time."""
    def attention(q, k, v, _own):
        time.sleep(float(torch.rand(1, generator=generator)) * 3e-3)
        return (q + k - v).transpose(1, 2).flatten(2)
    return attention
