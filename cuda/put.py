"""Launches of kernels/put.cu: writes into the memory of other GPUs, and the wait for theirs."""

import functools
from typing import NamedTuple

import torch

from . import kernel_loader

SOURCE, PUT, WAIT = "put.cu", "put", "wait_for_puts"
THREADS, RANKS, CHANNELS = 256, 64, 2  # as in put.cu; RANKS: the most processes
CTAS = 128  # of a put, for all processes together
PIECE = 16  # bytes; rows and the distances between them are multiples of it
CONTROL = 4096  # bytes at the beginning of a process's memory, which hold put.cu's Control


class Destination(NamedTuple):
    """What a put writes into one process's memory: rows of `tokens` tokens from the first ones of each tensor on. address: of the first row
    there; flag: see flag_of; image: bytes from an image's rows to the next one's, there."""

    address: int
    flag: int
    image: int
    first_head: int
    first_token: int
    tokens: int


def variants():
    """Every (source, entry, defines) of this module."""
    return [(SOURCE, PUT, ()), (SOURCE, WAIT, ())]


def flag_of(address, channel, rank):
    """The address of the flag that process `rank` sets in the memory at `address`."""
    return address + 4 * (channel * RANKS + rank)


def table(destinations, device):
    """The Destinations of all processes, by rank, as a tensor for `put`."""
    rows = [[*to[:2], to.image // PIECE, *to[3:]] for to in destinations]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def fits(x):
    """Whether the rows of a tensor (B, heads, tokens, D) are of whole pieces."""
    wide = PIECE // x.element_size()
    return x.stride(-1) == 1 and x.data_ptr() % PIECE == 0 and not any(n % wide for n in (x.shape[-1], *x.stride()[:-1]))


def put(tensors, heads, to, control, channel, distances):
    """Write rows of tensors (B, H, tokens, D), one or three that `fits`, into the memory of all processes.

    heads: that each process gets, from its Destination's first_head on; to: of `table`; control: address of this process's memory;
    distances: bytes between a token's rows there, and between those of its tensors. A row there has the heads side by side.
    """
    first, wide = tensors[0], PIECE // tensors[0].element_size()
    strides = tuple(stride // wide for x in (*tensors, *[tensors[0]] * (3 - len(tensors))) for stride in x.stride()[:-1])
    pieces = first.shape[3] // wide
    if all(strides[i] == pieces for i in (1, 4, 7)):
        heads, pieces = 1, heads * pieces  # longer rows
    addresses = [x.data_ptr() for x in tensors]
    launch = _put_launch(first.device, to.shape[0], channel, (first.shape[0], len(tensors), heads, pieces), strides,
                         tuple(distance // PIECE for distance in distances))
    launch(*addresses, *addresses[:1] * (3 - len(addresses)), to.data_ptr(), control)


@functools.lru_cache(maxsize=1024)
def _put_launch(device, ranks, channel, sizes, strides, distances):
    kernel = kernel_loader.kernel(SOURCE, PUT, (), device)
    return kernel.launcher((max(1, CTAS // ranks), ranks), (THREADS,), 5, (channel, *sizes, *strides, *distances))


@functools.lru_cache(maxsize=64)
def _wait_launch(device, channel, ranks, count):
    return kernel_loader.kernel(SOURCE, WAIT, (), device).launcher((1,), (RANKS,), 2, (channel, ranks, count))


def wait(control, stop, channel, ranks, count, device):
    """Let the stream wait for `count` more puts of each process through a channel, or until the int32 at `stop`, in pinned memory, is not
    0."""
    _wait_launch(device, channel, ranks, count)(control, stop)
