"""Launch of kernels/put.cu: writes into the memory of other GPUs, and the wait for theirs."""

import functools
from typing import NamedTuple

import torch

from . import kernel_loader, targets

SOURCE, ENTRY = "put.cu", "put"
THREADS, RANKS = 1024, 64  # as in put.cu; RANKS: the most processes
BESIDE = 6  # a put beside attention has so many times fewer CTAs than the GPU has SMs, which attention's last wave usually leaves idle
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
    return [(SOURCE, ENTRY, (("PARTS", parts),)) for parts in (1, 3)]


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


def put(tensors, heads, to, distances, control, stop, channel, count, beside=False):
    """Write rows of tensors (B, H, tokens, D), one or three that `fits`, into the memory of all processes, and let the stream wait for
    `count` more puts of each process through the channel, or until the int32 at `stop`, in pinned memory, is not 0.

    heads: that each process gets, from its Destination's first_head on; to: of `table`; distances: bytes between a token's rows there, and
    between those of its tensors; control: address of this process's memory; beside: whether attention runs meanwhile. A row there has the
    heads side by side.
    """
    first, wide = tensors[0], PIECE // tensors[0].element_size()
    strides = tuple(stride // wide for x in (*tensors, *[first] * (3 - len(tensors))) for stride in x.stride()[:-1])
    pieces = first.shape[3] // wide
    if all(strides[i] == pieces for i in (1, 4, 7)):
        heads, pieces = 1, heads * pieces  # longer rows
    addresses = [x.data_ptr() for x in tensors]
    launch = _launch(first.device, len(tensors), to.shape[0], beside, (channel, count, first.shape[0], heads, pieces), strides,
                     tuple(distance // PIECE for distance in distances))
    launch(*addresses, *addresses[:1] * (3 - len(addresses)), to.data_ptr(), control, stop)


@functools.lru_cache(maxsize=1024)
def _launch(device, parts, ranks, beside, sizes, strides, distances):
    kernel = kernel_loader.kernel(SOURCE, ENTRY, (("PARTS", parts),), device)
    ctas = targets.multiprocessors(device) // (BESIDE if beside else 1)
    return kernel.launcher((max(1, ctas // ranks), ranks), (THREADS,), 6, (*sizes, *strides, *distances))
