"""The int8 GEMM of Hopper: chooses the tile, launches kernels/gemm_wgmma.cu."""

import functools

import torch

from . import compiler, images, runtime

ARCHITECTURES = ("sm_90a",)
SOURCE, ENTRY = "gemm_wgmma.cu", "gemm"
PAIR = 2  # CTAs of a cluster: they share their tokens, or a tile's K
MAX_RANK = 128  # the branch's blocks lie in the ring all at once
# (weight rows, tokens, CTAs that share K) of a tile -> stages of its ring, as many as fit.
STAGES = {(192, 192, 1): 4, (192, 128, 1): 6, (192, 64, 1): 9, (128, 256, 1): 4, (128, 192, 1): 5, (128, 128, 1): 7, (128, 64, 1): 12,
          (192, 128, 2): 5, (192, 64, 2): 9, (128, 128, 2): 7, (128, 64, 2): 12}

# Clocks that a block's MMAs wait in a tile of so many tokens, by clock64: short ones don't cover their weights' way through the registers.
WAITS = {64: 410, 128: 205, 192: 70, 256: 40}


def _defines(tile, dtype, gelu):
    rows, tokens, split = tile
    return (("HALF", int(dtype == torch.float16)), ("ROWS", rows), ("TOKENS", tokens), ("STAGES", STAGES[tile]), ("CLUSTER", PAIR // split),
            ("SPLIT", split), ("GELU", int(gelu)))


def variants(arch):
    """[(source, entry, defines)] of all that may be asked for on `arch`."""
    if arch not in ARCHITECTURES:
        return []
    return [(SOURCE, ENTRY, _defines(tile, dtype, gelu))
            for tile in STAGES for dtype in (torch.bfloat16, torch.float16) for gelu in (False, True)]


def slice_of(tile):
    """The tokens that a warpgroup stores at a time."""
    return min(64, tile[1] // tile[2])


def shared_bytes(tile):
    """Shared memory of a CTA: the ring, the turned outputs, the other CTA's sums, the tokens' and rows' factors, the barriers (see the
    kernel)."""
    rows, tokens, split = tile
    warpgroups, out = rows // 64, tokens // split
    slices = min(2 * slice_of(tile), out) * 128
    ring = STAGES[tile] * (tokens * 128 + rows * 64 + 2 * rows * 2)
    sums = warpgroups * out * 64 * 4 if split > 1 else 0
    return ring + warpgroups * slices + sums + 2 * (3 * out * 4 + rows * 6) + 16 * STAGES[tile] + 16 + 16 * warpgroups


def count_tiles(tile, m, n):
    """Clusters' tiles: two CTAs' side by side along the weight rows, or one that two share."""
    rows, tokens, split = tile
    return -(-m // tokens) * -(-n // (rows * PAIR // split))


@functools.lru_cache(maxsize=1024)
def choose_tile(m, n, k, sms, divisible):
    """The tile with the least time: waves of clusters times the time of a tile, in the clocks of an H100's tensor cores.

    A block of 128 columns takes as long as its MMAs, what they wait, and something for the bytes that come in (power, more than time).
    A tile has its outputs to finish; one that is shared, its sums to exchange too. divisible: whether K may be shared.
    Of 16 shapes and up to 11 tiles it finds the fastest or one within 1 %, but for one of 23 waves, where runs disagree.
    """
    def time(tile):
        rows, tokens, split = tile
        area, blocks = rows * tokens, -(-k // images.BLOCK)
        block = area / 32 + WAITS[tokens] + (2 * tokens + rows) / 8
        end = 1600 + area / split / 32 + (area / split / 4 if split > 1 else 0)
        return -(-count_tiles(tile, m, n) // (sms // PAIR)) * (-(-blocks // split) * block + end)

    return min((tile for tile in STAGES if tile[2] == 1 or divisible), key=time)


@functools.lru_cache(maxsize=1024)
def launcher(m, n, k, rank, unsigned_from, dtype, device, tile=None, pdl=False, gelu_from=None):
    """A function of the addresses of (y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias).

    pdl: it may start while the kernel before it ends, which must not be one that writes the layer's own tensors.
    gelu_from: y's column from which on it is gelu(y), a multiple of 64; None: nowhere.
    """
    gelu = gelu_from is not None
    sms = compiler.multiprocessors(device)
    border = unsigned_from // images.BLOCK if 0 < unsigned_from < k else 0
    divisible = k > images.BLOCK and not border  # the first part's sum is rounded as a whole
    tile = tile or choose_tile(m, n, k, sms, divisible)
    if not divisible:
        tile = *tile[:2], 1
    kernel = runtime.kernel(SOURCE, ENTRY, _defines(tile, dtype, gelu), device, shared_bytes(tile))
    clusters = min(sms // PAIR, count_tiles(tile, m, n))
    sizes = m, images.padded(m, images.ROWS), n, k, rank, border, int(unsigned_from < k), *((gelu_from,) if gelu else ())
    boxes = runtime.Boxes(m, n, slice_of(tile), 64)
    return kernel.launcher((PAIR * clusters,), (2 * tile[0] + 128,), 10, sizes, pdl, boxes)


def takes(k, unsigned_from):
    """Whether a layer's two parts, if it has two, meet between two blocks."""
    return unsigned_from == k or unsigned_from % images.BLOCK == 0


def gemm(act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias, unsigned_from, m, out=None, tile=None,
         gelu_from=None):
    """y (m, N) in weight_scale's dtype.

    act: (blocks, padded m, 128) int8 in INTEGER order; act_scale: (2, padded m) float32; low, low_scale: the branch's image and its
    rows' factors, or None; weight: (N, K/2); weight_scale: (G, N); row_scale: (N,) float32 (scales.py); proj_up: (N, R);
    bias: (N,) or None. tile: in place of the chosen one; gelu_from: as in launcher. All tensors begin at a multiple of 16 bytes.
    """
    n, k, rank = weight.shape[0], 2 * weight.shape[1], proj_up.shape[1]
    if rank > MAX_RANK:
        raise ValueError(f"the branch has rank {rank}; at most {MAX_RANK} ranks are fused")
    y = torch.empty(m, n, dtype=weight_scale.dtype, device=act.device) if out is None else out
    launch = launcher(m, n, k, rank, unsigned_from, y.dtype, act.device, tile, gelu_from=gelu_from)
    launch(*map(runtime.address, (y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias)))
    return y
