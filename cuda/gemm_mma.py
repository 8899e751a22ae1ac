"""Launch of kernels/gemm_mma.cu: an SVDQuant layer's second kernel through mma.sync, which every GPU has.

A tile's time follows from the shape and the number of SMs alone, so that the same call is always the same kernel.
"""

import functools
from dataclasses import dataclass

import torch

from . import kernel_loader, runtime, targets
from .activation_layout import BLOCK, ROWS, CodeStorage, padded
from .int4 import GROUP_SIZE

SOURCE, ENTRY = "gemm_mma.cu", "gemm"
MAX_WEIGHTS = 1 << 33  # weights of a layer: the kernel's offsets in the packed weight are 32-bit


@dataclass(frozen=True)
class Tile:
    """A CTA of row_warps x token_warps warps, each with 64 weight rows and 8 * tiles tokens.

    cost: the time of an output element on a full GPU, as a multiple of the largest tile's. A warp of 64 x 64 loads 128 rows and tokens
    for 4096 products of the K dimension, a warp of 64 x 32 loads 96 for 2048 (and expands its weights for half as many tokens), a warp of
    64 x 16 loads 80 for 1024. From L2 the tiles load 1/128 + 1/256, 1/128 + 1/128 and 1/64 + 1/64 rows and tokens an element.
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
        """Bytes of a stage of the ring: activation, weights, weight scales, activation scales; see the kernel's picture."""
        x = self.tokens * (64 if storage == CodeStorage.INT4_NIBBLES else 128)
        return x + self.rows * 64 + 2 * self.rows * 2 + (0 if storage == CodeStorage.INT8 else 2 * self.tokens * 4)

    def stages(self, storage, target):
        """Stages of the ring: two where the kernel prefetches through registers; elsewhere as many as fit, 3 at most."""
        if not target.async_copies:
            return 2
        return min(3, (target.shared_per_cta - self.shared_bytes(storage, 0)) // self.stage_bytes(storage))

    def shared_bytes(self, storage, stages, next_ranks=None):
        """Bytes of shared memory of a CTA. With next_ranks (see defines_of) the tile's outputs and proj_down's rows follow the ring, in its
        place."""
        ring = stages * self.stage_bytes(storage)
        if next_ranks is not None:
            ring = max(ring, (self.tokens + next_ranks) * self.rows * 2)
        return ring + 3 * self.tokens * 4 + 16 + (self.rows * 4 if storage == CodeStorage.INT8 else 0)


LARGE = Tile(2, 4, 8, 1.0)   # 128 rows x 256 tokens
MEDIUM = Tile(2, 4, 4, 1.2)  # 128 x 128
SMALL = Tile(1, 4, 2, 2.0)   # 64 x 64

# For a GEMM that ends with the next layer's codes (mlp.py). Tall tiles leave few partial sums: with 256 rows, FLUX's 12288 columns are 48
# tiles.
WIDE = Tile(4, 2, 8, 1.0)    # 256 rows x 128 tokens
NARROW = Tile(4, 2, 4, 1.2)  # 256 x 64
NEXT_RANKS = 64  # the most of the next layer; proj_down's rows of a tile have to find room beside its outputs


def tiles_of(target):
    """The tiles to choose from. The large one finds no registers beside a prefetch through registers, nor the shared memory."""
    return (LARGE, MEDIUM, SMALL) if target.async_copies else (MEDIUM, SMALL)


def next_tiles_of(storage):
    """The tiles to choose from for a GEMM that ends with the next layer's codes, the largest first. The wide one finds no registers for
    INT4_BYTES."""
    return (WIDE, NARROW, SMALL) if storage == CodeStorage.INT4_NIBBLES else (NARROW, SMALL)


def fastest_tile(tiles, sms, m, n):
    """The tile with the least time: waves of one CTA an SM x the cost of their elements. Small CTAs share an SM, four at a time."""
    def time(tile):
        at_once = sms * (4 if tile == SMALL else 1)
        waves = -(-(-(-m // tile.tokens) * -(-n // tile.rows)) // at_once)
        return waves * (at_once // sms) * tile.rows * tile.tokens * tile.cost
    return min(tiles, key=time)


def defines_of(storage, tile, target, dtype, turing=None, gelu=False, next_ranks=None):
    """The definitions of one compiled kernel.

    turing: have the kernel prefetch through registers, or not, on any GPU (for tests); None: as the GPU it is compiled for does.
    next_ranks: the kernel ends with the next layer's codes (mlp.py), whose rank is this, padded to 32.
    """
    stages = 2 if turing else tile.stages(storage, target)
    shared = tile.shared_bytes(storage, stages, next_ranks)
    defines = (("CODES", int(storage)), ("HALF", int(dtype == torch.float16)), ("ROW_WARPS", tile.row_warps),
               ("TOKEN_WARPS", tile.token_warps), ("TILES", tile.tiles), ("STAGES", stages), ("SHARED_BYTES", shared), ("GELU", int(gelu)))
    if next_ranks is not None:
        defines = *defines, ("NEXT", next_ranks)
    return defines if turing is None else (*defines, ("TURING", int(turing)))


def variants(storage, target):
    """Every (source, entry, defines) that `launcher` may ask for with codes in this storage."""
    return [(SOURCE, ENTRY, defines_of(storage, tile, target, dtype, gelu=gelu))
            for tile in tiles_of(target) for dtype in target.dtypes for gelu in (False, True)]


@functools.lru_cache(maxsize=1024)
def launcher(storage, tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from=None, turing=None):
    """A function of the addresses of (y, act, act_scale, lora_act, lora_act_scale, weight, weight_scale, row_scale, proj_up, bias).

    gelu_from: the first column of y that goes through GELU, a multiple of 64; None if none does.
    """
    gelu = gelu_from is not None
    defines = defines_of(storage, tile, targets.for_device(device), dtype, turing, gelu)
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines, device, dict(defines)["SHARED_BYTES"])
    grid = -(-m // tile.tokens) * -(-n // tile.rows)
    return kernel.launcher((grid,), (tile.threads,), 10, (m, n, k, rank, unsigned_from, *((gelu_from,) if gelu else ())))


def gemm(storage, tile, q, operands, m):
    """The layer's output (m, N), in weight_scale's dtype, from its quantized activation: see launch."""
    weight = operands.weight
    y = torch.empty(m, weight.shape[0], dtype=operands.weight_scale.dtype, device=weight.device)
    launch(y, storage, tile, q, operands)
    return y


def launch(y, storage, tile, q, operands, turing=None):
    """Write the layer's output into y (M, N).

    storage: the codes' CodeStorage; q: a Quantized; operands: the layer's LayerOperands, with rank and gelu_from as the kernel takes them:
    multiples of 16 and of 64. turing: as in defines_of. Raises ValueError for shapes that the kernel doesn't take.
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
        raise ValueError(f"A layer of {n} x {k} has more bytes than the GEMM's 32-bit offsets reach.")
    run = launcher(storage, tile, m, n, k, rank, operands.unsigned_from, y.dtype, operands.weight.device, operands.gelu_from, turing)
    run(*map(runtime.address, (y, *q, operands.weight, operands.weight_scale, operands.row_scale, operands.proj_up, operands.bias)))
