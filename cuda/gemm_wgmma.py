"""The int8 GEMM of Hopper: chooses the tile, launches kernels/gemm_wgmma.cu."""

import functools

import torch

from . import compiler, images

ARCHITECTURES = ("sm_90a",)
SOURCE, ENTRY = "gemm_wgmma.cu", "gemm"
CLUSTER = 2  # CTAs that share their tokens
MAX_RANK = 128  # the branch's blocks lie in the ring all at once
# (weight rows, tokens) of a tile -> stages of its ring, as many as fit in shared memory.
STAGES = {(192, 192): 5, (192, 128): 6, (192, 64): 9, (128, 256): 5, (128, 192): 6, (128, 128): 8, (128, 64): 12}


def _defines(tile, dtype):
    rows, tokens = tile
    return (("HALF", int(dtype == torch.float16)), ("ROWS", rows), ("TOKENS", tokens), ("STAGES", STAGES[tile]), ("CLUSTER", CLUSTER))


def variants(arch):
    """[(source, entry, defines)] of all that may be asked for on `arch`."""
    if arch not in ARCHITECTURES:
        return []
    return [(SOURCE, ENTRY, _defines(tile, dtype)) for tile in STAGES for dtype in (torch.bfloat16, torch.float16)]


def shared_bytes(tile):
    """Shared memory of a CTA: the ring, the turned outputs, the tokens' and rows' factors, the barriers (see the kernel)."""
    rows, tokens = tile
    ring = STAGES[tile] * (tokens * 128 + rows * 64 + 2 * rows * 2)
    return ring + rows // 64 * (2 * 32 * 128 + (3 * tokens + 64) * 4) + 16 * STAGES[tile]


def count_tiles(tile, m, n):
    """Pairs of CTAs' tiles, side by side along the weight rows."""
    rows, tokens = tile
    return -(-m // tokens) * -(-n // (rows * CLUSTER))


@functools.lru_cache(maxsize=1024)
def choose_tile(m, n, sms):
    """The tile with the least time: waves of clusters times the time of a tile, which on an H100 went as its outputs and 16,000 more:
    what its weights' way through the registers takes, however many tokens they meet."""
    def time(tile):
        return -(-count_tiles(tile, m, n) // (sms // CLUSTER)) * (tile[0] * tile[1] + 16000)

    return min(STAGES, key=time)


@functools.lru_cache(maxsize=1024)
def launcher(m, n, k, rank, unsigned_from, dtype, device, tile=None):
    """A function of the addresses of (y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias)."""
    sms = compiler.multiprocessors(device)
    tile = tile or choose_tile(m, n, sms)
    kernel = compiler.kernel(SOURCE, ENTRY, _defines(tile, dtype), device, shared_bytes(tile))
    clusters = min(sms // CLUSTER, count_tiles(tile, m, n))
    border = unsigned_from // images.BLOCK if 0 < unsigned_from < k else 0
    sizes = m, images.padded(m, images.ROWS), n, k, rank, border, int(unsigned_from < k)
    return kernel.launcher((CLUSTER * clusters,), (2 * tile[0] + 128,), 10, sizes)


def takes(k, unsigned_from):
    """Whether a layer's two parts, if it has two, meet between two blocks."""
    return unsigned_from == k or unsigned_from % images.BLOCK == 0


def gemm(act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias, unsigned_from, m, out=None, tile=None):
    """y (m, N) in weight_scale's dtype.

    act: (blocks, padded m, 128) int8 in INTEGER order; act_scale: (2, padded m) float32; low, low_scale: the branch's image and its
    rows' factors, or None; weight: (N, K/2); weight_scale: (G, N); row_scale: (N,) float32 (scales.py); proj_up: (N, R);
    bias: (N,) or None. tile: in place of the chosen one.
    """
    n, k, rank = weight.shape[0], 2 * weight.shape[1], proj_up.shape[1]
    if rank > MAX_RANK:
        raise ValueError(f"the branch has rank {rank}; at most {MAX_RANK} ranks are fused")
    y = torch.empty(m, n, dtype=weight_scale.dtype, device=act.device) if out is None else out
    launch = launcher(m, n, k, rank, unsigned_from, y.dtype, act.device, tile)
    launch(*map(compiler.address, (y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias)))
    return y
