"""Launch of kernels/gemm_mma.cu: an SVDQuant layer's second kernel, with mma.sync, which every GPU has.

The choice of the tile depends only on the layer's shape and the number of SMs, so that equal calls always run the same kernel.
"""

import functools
from dataclasses import dataclass

import torch

from . import kernel_loader, runtime, targets
from .activation_layout import BLOCK, ROWS, CodeStorage, padded
from .int4 import GROUP_SIZE
from .operands import NO_LORA

SOURCE, ENTRY = "gemm_mma.cu", "gemm"
MAX_WEIGHTS = 1 << 33  # weights of a layer: the kernel's offsets in the packed weight are 32-bit


@dataclass(frozen=True)
class Tile:
    """A CTA of row_warps x token_warps warps, each with 64 weight rows and 8 * tiles tokens.

    cost: the time per output element on a full GPU, as a multiple of the largest tile's. Small tiles load more per product: for each column
    of K, a warp of 64 x 64 loads 128 rows and tokens for 4096 products, a warp of 64 x 32 loads 96 for 2048 (and expands its weights for
    half as many tokens), and a warp of 64 x 16 loads 80 for 1024. Per output element, the tiles load 1/128 + 1/256, 1/128 + 1/128 and
    1/64 + 1/64 rows and tokens from L2.
    """

    row_warps: int
    token_warps: int
    tiles: int
    cost: float

    @property
    def rows(self):
        return 64 * self.row_warps

    @property
    def tokens(self):
        return 8 * self.tiles * self.token_warps

    @property
    def threads(self):
        return 32 * self.row_warps * self.token_warps

    def stage_bytes(self, storage):
        """Bytes of a stage of the ring: activation, weights, weight scales, activation scales, as in the picture in gemm_mma.cu."""
        x = self.tokens * (64 if storage == CodeStorage.INT4_NIBBLES else 128)
        return x + self.rows * 64 + 2 * self.rows * 2 + (0 if storage == CodeStorage.INT8 else 2 * self.tokens * 4)

    def stages(self, storage, target, lora=False):
        """Stages of the ring: two if the kernel prefetches through registers, otherwise as many as fit, at most 3."""
        if not target.async_copies:
            return 2
        return min(3, (target.shared_per_cta - self.shared_bytes(storage, 0, lora=lora)) // self.stage_bytes(storage))

    def shared_bytes(self, storage, stages, next_ranks=None, lora=False):
        """Bytes of shared memory of a CTA. With next_ranks (see defines_of) the tile's outputs and proj_down's rows reuse the ring's memory
        after the main loop."""
        ring = stages * self.stage_bytes(storage)
        if next_ranks is not None:
            ring = max(ring, (self.tokens + next_ranks) * self.rows * 2)
        return ring + 3 * self.tokens * 4 + 16 + (self.rows * 4 if storage == CodeStorage.INT8 else 0) + (16 if lora else 0)


LARGE = Tile(2, 4, 8, 1.0)   # 128 rows x 256 tokens
MEDIUM = Tile(2, 4, 4, 1.2)  # 128 x 128
SMALL = Tile(1, 4, 2, 2.0)   # 64 x 64

# Tiles for a GEMM that ends with the next layer's codes (mlp.py). Each tile of N writes a partial sum of the next layer's LoRA branch, so
# tall tiles write fewer of them.
WIDE = Tile(4, 2, 8, 1.0)    # 256 rows x 128 tokens
NARROW = Tile(4, 2, 4, 1.2)  # 256 x 64
NEXT_RANKS = 64  # the largest rank of the next layer: a tile's rows of proj_down must fit in shared memory beside its outputs


def tiles_of(target):
    """The tiles to choose from. Without asynchronous copies, the large tile lacks both the registers and the shared memory."""
    return (LARGE, MEDIUM, SMALL) if target.async_copies else (MEDIUM, SMALL)


def next_tiles_of(storage):
    """The tiles to choose from for a GEMM that ends with the next layer's codes, the largest first. With INT4_BYTES the wide tile needs
    too many registers."""
    return (WIDE, NARROW, SMALL) if storage == CodeStorage.INT4_NIBBLES else (NARROW, SMALL)


def fastest_tile(tiles, sms, m, n):
    """The tile with the least time: waves of one CTA per SM, times the cost of a CTA's elements. Four small CTAs fit on an SM at once."""
    def time(tile):
        at_once = sms * (4 if tile == SMALL else 1)
        waves = -(-(-(-m // tile.tokens) * -(-n // tile.rows)) // at_once)
        return waves * (at_once // sms) * tile.rows * tile.tokens * tile.cost
    return min(tiles, key=time)


def defines_of(storage, tile, target, dtype, turing=None, gelu=False, next_ranks=None, lora=False, gated=False):
    """The definitions of one compiled kernel.

    turing: True or False sets whether the kernel prefetches through registers, for tests; None: the GPU's own way.
    next_ranks: the next layer's rank, padded to 32, if the kernel ends with the next layer's codes (mlp.py).
    lora: whether the kernel also takes LoRAs' ranks; gated: whether it adds its outputs, times a gate, to a residual.
    """
    stages = 2 if turing else tile.stages(storage, target, lora)
    shared = tile.shared_bytes(storage, stages, next_ranks, lora)
    defines = (("CODES", int(storage)), ("HALF", int(dtype == torch.float16)), ("ROW_WARPS", tile.row_warps),
               ("TOKEN_WARPS", tile.token_warps), ("TILES", tile.tiles), ("STAGES", stages), ("SHARED_BYTES", shared), ("GELU", int(gelu)),
               ("LORA", int(lora)), ("GATED", int(gated)))
    if next_ranks is not None:
        defines = *defines, ("NEXT", next_ranks)
    return defines if turing is None else (*defines, ("TURING", int(turing)))


def variants(storage, target):
    """Every (source, entry, defines) that `launcher` may compile for codes in this storage."""
    ends = (False, False), (True, False), *(((False, True),) if gates(storage) else ())  # with GELU, gated
    return [(SOURCE, ENTRY, defines_of(storage, tile, target, dtype, gelu=gelu, lora=lora, gated=gated))
            for tile in tiles_of(target) for dtype in target.dtypes for gelu, gated in ends for lora in (False, True)]


def gates(storage):
    """Whether the kernel takes a residual and a gate. With INT4_BYTES, which no GPU uses by default, a large tile would spill registers."""
    return storage != CodeStorage.INT4_BYTES


@functools.lru_cache(maxsize=1024)
def launcher(storage, tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from=None, turing=None, lora=NO_LORA,
             gated=False):
    """A function that launches the kernel. Its arguments are the addresses of (y, act, act_scale, lora_act, lora_act_scale, weight,
    weight_scale, row_scale, proj_up, bias), and of lora_up if there is a LoRA.

    gelu_from: the first column of y that gets GELU, a multiple of 64; None if none does. lora: LoRASizes. gated: as of
    gemm_wgmma.launcher.
    """
    gelu, with_lora = gelu_from is not None, bool(lora.ranks)
    defines = defines_of(storage, tile, targets.for_device(device), dtype, turing, gelu, lora=with_lora, gated=gated)
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines, device, dict(defines)["SHARED_BYTES"])
    grid = -(-m // tile.tokens) * -(-n // tile.rows)
    sizes = m, n, k, rank, unsigned_from, *(lora.arguments if with_lora else ()), *((gelu_from,) if gelu else ())
    return kernel.launcher((grid,), (tile.threads,), 10 + 2 * gated + with_lora, sizes)


def gemm(storage, tile, q, operands, m, *added):
    """The layer's output (m, N), in weight_scale's dtype, from its quantized activation; arguments as in launch."""
    weight = operands.weight
    y = torch.empty(m, weight.shape[0], dtype=operands.weight_scale.dtype, device=weight.device)
    launch(y, storage, tile, q, operands, None, *added)
    return y


def launch(y, storage, tile, q, operands, turing=None, residual=None, gate=None):
    """Write the layer's output into y (M, N); with a residual and a gate, as of gemm_wgmma.launcher, residual + gate * that output.

    storage: the codes' CodeStorage; q: a Quantized; operands: the layer's LayerOperands, with rank and gelu_from in multiples of 16 and
    of 64, as the kernel takes them. turing: as in defines_of. Raises ValueError for shapes that the kernel doesn't take.
    """
    (m, n), k, rank = y.shape, 2 * operands.weight.shape[1], operands.proj_up.shape[1]
    if m == 0:
        return
    rows = padded(m, ROWS)
    act = (-(-k // BLOCK), rows, BLOCK // 2 if storage == CodeStorage.INT4_NIBBLES else BLOCK)
    act_scale = (2 if storage == CodeStorage.INT8 else k // GROUP_SIZE, rows)
    if k % GROUP_SIZE or n % 16 or rank % 16:
        raise ValueError(f"The GEMM takes K in multiples of 64, N and ranks in multiples of 16; got {k}, {n} and {rank}.")
    if q.act.shape != act or q.act_scale.shape != act_scale:
        raise ValueError(f"For {m} tokens and K = {k} in {storage.name} the activation is {act} with scales {act_scale}; "
                         f"got {tuple(q.act.shape)} and {tuple(q.act_scale.shape)}.")
    if n * k >= MAX_WEIGHTS:
        raise ValueError(f"A layer of {n} x {k} has more bytes than the GEMM's 32-bit offsets can address.")
    lora, added = operands.lora, () if residual is None else (residual, gate)
    run = launcher(storage, tile, m, n, k, rank, operands.unsigned_from, y.dtype, operands.weight.device, operands.gelu_from, turing, lora,
                   bool(added))
    run(*map(runtime.address, (y, *added[:1], *q, operands.weight, operands.weight_scale, operands.row_scale, operands.proj_up,
                               operands.bias, *added[1:], *((operands.lora_up,) if lora.ranks else ()))))
