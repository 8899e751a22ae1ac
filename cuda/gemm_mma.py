"""Launch of kernels/gemm_mma.cu: an SVDQuant layer's second kernel through mma.sync, on every architecture but Hopper's own wgmma.

Which tile a matrix gets is decided here, from the shape and the number of SMs alone, so that the same call is always the same kernel.
"""

import functools
from dataclasses import dataclass

import torch

from . import compiler, runtime
from .images import padded
from .int4 import GROUP_SIZE

SOURCE, ENTRY = "gemm_mma.cu", "gemm"
INTEGER, BYTES, NIBBLES = 0, 1, 2  # the kernel's CODES
NATIVE_INT4 = (75, 80, 86, 87, 89)  # compute capabilities with 4-bit MMAs; elsewhere ptxas would emulate them in 200 instructions


@dataclass(frozen=True)
class Tile:
    """A CTA of row_warps x token_warps warps, each with 64 weight rows and 8 * tiles tokens.

    cost: time of an output element on a full GPU, as a multiple of the largest tile's. A warp of 64 x 64 loads 128 rows and tokens
    for 4096 products of the K dimension, one of 64 x 32 96 for 2048 (and expands its weights for half as many tokens), one of 64 x 16
    80 for 1024; so do the tiles from L2: 1/128 + 1/256 rows and tokens an element, 1/128 + 1/128, 1/64 + 1/64.
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

    def stage_bytes(self, mode):
        """A stage of the ring: activation, weights, weight scales, activation scales; see the kernel's picture."""
        x = self.tokens * (64 if mode == NIBBLES else 128)
        return x + self.rows * 64 + 2 * self.rows * 2 + (0 if mode == INTEGER else 2 * self.tokens * 4)

    def stages(self, mode, number):
        """Turing prefetches through registers into the other of two stages; elsewhere as many as fit, 3 at most."""
        return 2 if number == 75 else min(3, (shared_limit(number) - self.shared_bytes(mode, 0)) // self.stage_bytes(mode))

    def shared_bytes(self, mode, stages, next_ranks=None):
        """next_ranks: as in defines_of; then, after the ring and in its place, the tile's outputs and proj_down's rows."""
        ring = stages * self.stage_bytes(mode)
        if next_ranks is not None:
            ring = max(ring, (self.tokens + next_ranks) * self.rows * 2)
        return ring + 3 * self.tokens * 4 + 16 + (self.rows * 4 if mode == INTEGER else 0)


LARGE = Tile(2, 4, 8, 1.0)   # 128 rows x 256 tokens
MEDIUM = Tile(2, 4, 4, 1.2)  # 128 x 128
SMALL = Tile(1, 4, 2, 2.0)   # 64 x 64


def shared_limit(number):
    """Bytes of shared memory that a CTA may have."""
    return {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(number, 99) << 10


def tiles_of(mode, number):
    """The tiles to choose from. Turing has neither the shared memory nor the registers (of its prefetch) for the large one."""
    return (MEDIUM, SMALL) if number == 75 else (LARGE, MEDIUM, SMALL)


@functools.cache
def choose_tile(mode, number, sms, m, n, tiles=None):
    """Of tiles, or tiles_of(mode, number), that with the least time: waves of one CTA an SM x what its elements cost. Small CTAs share
    an SM, four at a time."""
    def time(tile):
        at_once = sms * (4 if tile == SMALL else 1)
        waves = -(-(-(-m // tile.tokens) * -(-n // tile.rows)) // at_once)
        return waves * (at_once // sms) * tile.rows * tile.tokens * tile.cost
    return min(tiles or tiles_of(mode, number), key=time)


def defines_of(mode, tile, number, half, turing=None, gelu=False, next_ranks=None):
    """next_ranks: the kernel ends with the next layer's codes (mlp.py); that layer's rank, padded to 32."""
    stages = 2 if turing else tile.stages(mode, number)
    shared = tile.shared_bytes(mode, stages, next_ranks)
    defines = (("CODES", mode), ("HALF", int(half)), ("ROW_WARPS", tile.row_warps), ("TOKEN_WARPS", tile.token_warps),
               ("TILES", tile.tiles), ("STAGES", stages), ("SHARED_BYTES", shared), ("GELU", int(gelu)))
    if next_ranks is not None:
        defines = *defines, ("NEXT", next_ranks)
    return defines if turing is None else (*defines, ("TURING", int(turing)))


def variants(arch):
    """Every (source, entry, defines) that can be launched on `arch`, such as "sm_89"."""
    number = compiler.arch_number(arch)
    modes = (BYTES,) if number == 90 else (INTEGER, NIBBLES if number in NATIVE_INT4 else BYTES)  # 90's int8 is gemm_wgmma
    return [(SOURCE, ENTRY, defines_of(mode, tile, number, half, gelu=gelu)) for mode in modes for tile in tiles_of(mode, number)
            for half in ((True,) if number == 75 else (False, True)) for gelu in (False, True)]


@functools.lru_cache(maxsize=1024)
def launcher(kind, m, n, k, rank, unsigned_from, dtype, device, tile=None, turing=None, gelu_from=None):
    """A function of the addresses of (y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias).

    gelu_from: y's column from which on it is gelu(y), a multiple of 64; None: nowhere.
    """
    gelu = gelu_from is not None
    number = compiler.arch_number(compiler.architecture(device))
    tile = tile or choose_tile(kind, number, compiler.multiprocessors(device), m, n)
    defines = defines_of(kind, tile, number, dtype == torch.float16, turing, gelu)
    kernel = runtime.kernel(SOURCE, ENTRY, defines, device, dict(defines)["SHARED_BYTES"])
    grid = -(-m // tile.tokens) * -(-n // tile.rows)
    return kernel.launcher((grid,), (tile.threads,), 10, (m, n, k, rank, unsigned_from, *((gelu_from,) if gelu else ())))


def gemm(mode, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias, unsigned_from, m,
         tile=None, turing=None, gelu_from=None):
    """The layer's output from its quantized activation.

    mode: "int8" or "int4"; act: its image (images.py), int4's with 64 bytes a row through 4-bit MMAs, with 128 through int8's;
    act_scale: (2, Mp) for int8, (K / 64, Mp) for int4, float32; low: (rank blocks, Mp, 32) and low_scale: (Mp,), or None at rank 0;
    weight: (N, K / 2) int8; weight_scale: (K / 64, N); row_scale: (N,) float32 for int8, else None; proj_up: (N, R); bias: (N,) or None.
    Mp is M padded to 16. tile and turing are the tests' choice of a path; gelu_from: as in launcher. Returns (M, N) in weight_scale's
    dtype.
    """
    y = torch.empty(m, weight.shape[0], dtype=weight_scale.dtype, device=weight.device)
    launch(y, mode, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias, unsigned_from, tile, turing, gelu_from)
    return y


def launch(y, mode, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias, unsigned_from,
           tile=None, turing=None, gelu_from=None):
    """As gemm, into y (M, N)."""
    (m, n), k, rank = y.shape, 2 * weight.shape[1], proj_up.shape[1]
    if m == 0:
        return
    rows = padded(m, 16)
    kind = INTEGER if mode == "int8" else NIBBLES if act.shape[2] == 64 else BYTES
    expected = (-(-k // 128), rows, 64 if kind == NIBBLES else 128)
    scales = (2 if kind == INTEGER else k // GROUP_SIZE, rows)
    if k % GROUP_SIZE or n % 16 or rank % 16:
        raise ValueError(f"The GEMM takes K in multiples of 64, N and ranks in multiples of 16; got {k}, {n} and {rank}.")
    if act.shape != expected or act_scale.shape != scales:
        raise ValueError(f"For {m} tokens and K = {k} in {mode} the activation is {expected} with scales {scales}; "
                         f"got {tuple(act.shape)} and {tuple(act_scale.shape)}.")
    if n * k >= 1 << 33:
        raise ValueError(f"A layer of {n} x {k} has more bytes than the GEMM's 32-bit offsets reach.")
    run = launcher(kind, m, n, k, rank, unsigned_from, y.dtype, weight.device, tile, turing, gelu_from)
    run(*map(runtime.address, (y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias)))
