"""Launch of kernels/gemm_wgmma.cu: the int8 GEMM of Hopper, an SVDQuant layer's second kernel."""

import functools

import torch

from . import kernel_loader, runtime, targets
from .activation_layout import BLOCK, RANK_BLOCK, ROWS, padded
from .operands import NO_LORA

SOURCE, ENTRY = "gemm_wgmma.cu", "gemm"
PAIR = 2  # CTAs of a cluster: they share their tokens, or a tile's K
RESIDENT_RANKS = 128  # the most ranks whose blocks fit in every tile's ring at once; with more the kernel is compiled with LORA
# {a tile's (weight rows, tokens, CTAs that share K): stages of its ring, as many as fit}
STAGES = {(192, 192, 1): 4, (192, 128, 1): 6, (192, 64, 1): 9, (128, 256, 1): 4, (128, 192, 1): 5, (128, 128, 1): 7, (128, 64, 1): 12,
          (192, 128, 2): 5, (192, 64, 2): 9, (128, 128, 2): 7, (128, 64, 2): 12}

# {tokens of a tile: clocks that a block's MMAs wait}, measured by clock64. Short MMAs don't hide the expansion of their weights.
WAITS = {64: 410, 128: 205, 192: 70, 256: 40}


def defines_of(tile, dtype, gelu, lora, gated=False):
    rows, tokens, split = tile
    return (("HALF", int(dtype == torch.float16)), ("ROWS", rows), ("TOKENS", tokens), ("STAGES", STAGES[tile]), ("CLUSTER", PAIR // split),
            ("SPLIT", split), ("GELU", int(gelu)), ("LORA", int(lora)), ("GATED", int(gated)))


def variants():
    """Every (source, entry, defines) that `launcher` may compile."""
    ends = (False, False), (True, False), (False, True)  # with GELU, gated
    return [(SOURCE, ENTRY, defines_of(tile, dtype, gelu, lora, gated))
            for tile in STAGES for dtype in (torch.bfloat16, torch.float16) for gelu, gated in ends for lora in (False, True)]


def slice_of(tile):
    """The tokens that a warpgroup stores at a time."""
    return min(64, tile[1] // tile[2])


def shared_bytes(tile, gated=False):
    """Bytes of a CTA's shared memory: the ring, the transposed outputs, the other CTA's sums, the tokens' and rows' factors, the barriers,
    as in gemm_wgmma.cuh. gated: also 1 / row_scale and the barriers of a residual."""
    rows, tokens, split = tile
    warpgroups, out = rows // 64, tokens // split
    slices = min((3 if gated else 2) * slice_of(tile), out) * 128
    ring = STAGES[tile] * (tokens * 128 + rows * 64 + 2 * rows * 2)
    sums = warpgroups * out * 64 * 4 if split > 1 else 0
    residual = rows * 4 + 8 * warpgroups * (out // slice_of(tile)) if gated else 0
    return ring + warpgroups * slices + sums + 2 * (3 * out * 4 + rows * 6) + 16 * STAGES[tile] + 16 + 16 * warpgroups + residual


def count_tiles(tile, m, n):
    """The number of cluster tiles. A cluster computes two tiles side by side along the weight rows, or one tile whose K its CTAs share."""
    rows, tokens, split = tile
    return -(-m // tokens) * -(-n // (rows * PAIR // split))


def fastest_tile(m, n, k, sms, unsigned_from):
    """The tile with the least time: waves of clusters times the time of a tile, in the clocks of an H100's tensor cores.

    The time of a block of 128 columns is that of its MMAs, of their waits, and a term for the bytes loaded, which cost power more than
    time. A tile then finishes its outputs, and a shared tile also exchanges its sums.
    For 15 of 16 measured shapes the choice among up to 11 tiles is within 1 % of the fastest. The other has 23 waves, and its timings vary.
    """
    def time(tile):
        rows, tokens, split = tile
        area, blocks = rows * tokens, -(-k // BLOCK)
        block = area / 32 + WAITS[tokens] + (2 * tokens + rows) / 8
        end = 1600 + area / split / 32 + (area / split / 4 if split > 1 else 0)
        return -(-count_tiles(tile, m, n) // (sms // PAIR)) * (-(-blocks // split) * block + end)

    return min((tile for tile in STAGES if tile[2] == 1 or divisible(k, unsigned_from)), key=time)


def divisible(k, unsigned_from):
    """Whether two CTAs may share a tile's K. Not if a layer has two parts: the first part's sum is rounded whole."""
    return k > BLOCK and not border(k, unsigned_from)


def border(k, unsigned_from):
    """The block where the second of two parts begins; 0 if there is one part."""
    return unsigned_from // BLOCK if 0 < unsigned_from < k else 0


@functools.lru_cache(maxsize=1024)
def launcher(tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from=None, pdl=False, lora=NO_LORA,
             gated=False):
    """A function that launches the kernel. Its arguments are the addresses of (y, act, act_scale, lora_act, lora_act_scale, weight,
    weight_scale, row_scale, proj_up, bias), and of lora_up if takes_lora().

    gated: y is residual + gate * the layer's output, without GELU. The addresses of residual (m, N), contiguous, and of gate (N,), both of
    `dtype` and at multiples of 16 bytes, then follow those of y and of bias.

    tile: one of STAGES. gelu_from: the first column of y that gets GELU, a multiple of 64; None if none does. lora: LoRASizes.
    pdl: the kernel may start while the previous kernel ends. The previous kernel must not write the layer's own tensors.
    """
    gelu, with_lora = gelu_from is not None, takes_lora(rank, lora)
    if not divisible(k, unsigned_from):
        tile = *tile[:2], 1
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines_of(tile, dtype, gelu, with_lora, gated), device, shared_bytes(tile, gated))
    clusters = min(targets.multiprocessors(device) // PAIR, count_tiles(tile, m, n))
    sizes = (m, padded(m, ROWS), n, k, rank, border(k, unsigned_from), int(unsigned_from < k), *(lora.arguments if with_lora else ()),
             *((gelu_from,) if gelu else ()))
    boxes = (runtime.Boxes(m, n, slice_of(tile), 64),) * (1 + gated)
    return kernel.launcher((PAIR * clusters,), (2 * tile[0] + 128,), 10 + 2 * gated + with_lora, sizes, pdl, boxes)


def takes(k, unsigned_from):
    """Whether the kernel takes this layer: a border between two parts must lie between two blocks."""
    return unsigned_from == k or unsigned_from % BLOCK == 0


def takes_lora(rank, lora):
    """Whether the kernel must be compiled with LORA: for LoRASizes with ranks, and for a branch that doesn't lie in the ring at once."""
    return bool(lora.ranks) or padded(rank, RANK_BLOCK) > RESIDENT_RANKS


def gemm(tile, q, operands, m, out=None, residual=None, gate=None):
    """The layer's output (m, N), in weight_scale's dtype, from its quantized activation; with a residual and a gate, as of launcher(),
    residual + gate * that output.

    tile: one of STAGES; q: a Quantized of int8 codes; operands: the layer's LayerOperands with a row_scale, and with a rank and a gelu_from
    in multiples of 16 and of 64; out: the tensor to write y to. All tensors begin at a multiple of 16 bytes.
    """
    n, k, rank = operands.weight.shape[0], 2 * operands.weight.shape[1], operands.proj_up.shape[1]
    y = torch.empty(m, n, dtype=operands.weight_scale.dtype, device=q.act.device) if out is None else out
    lora, added = operands.lora, (residual, gate) if residual is not None else ()
    launch = launcher(tile, m, n, k, rank, operands.unsigned_from, y.dtype, q.act.device, operands.gelu_from, lora=lora,
                      gated=bool(added))
    launch(*map(runtime.address, (y, *added[:1], *q, operands.weight, operands.weight_scale, operands.row_scale, operands.proj_up,
                                  operands.bias, *added[1:], *((operands.lora_up,) if takes_lora(rank, lora) else ()))))
    return y
