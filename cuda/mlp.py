"""Two linears with a GELU between them, in 4-bit activations: the first one's GEMM ends with the second one's codes (kernels/next.cuh),
so that what is between is never in memory.

    x -> quantize.cu -> gemm_mma.cu: GELU, codes and scales; of the branch, a share for each tile's columns
                        partial_sums.cu: the shares added up
                        gemm_mma.cu -> y

In 8 bits that does not pay: a token's scale is known after the last of the first layer's columns (benchmarks/NOTES.md).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import compiler, gemm_mma, ops, quantize, runtime
from .gemm_mma import BYTES, NIBBLES, Tile
from .images import RANK_BLOCK, padded

# Tall tiles leave few shares: with 256 rows, FLUX's 12288 columns are 48 of them.
WIDE = Tile(4, 2, 8, 1.0)    # 256 rows x 128 tokens
NARROW = Tile(4, 2, 4, 1.2)  # 256 x 64
MAX_RANK = 64  # of the second layer; proj_down's rows of a tile have to find room beside its outputs
SHARES, SHARES_ENTRY, SHARES_THREADS = "partial_sums.cu", "add_partial_sums", 128

LAYER = ("weight", "weight_scale", "proj_down", "proj_up", "smooth", "bias")


def numbered(names, number):
    return tuple(name + number for name in names)


TENSORS = ("x", "y", *numbered(LAYER, "1"), *numbered(LAYER, "2"))
CONSTANTS = {"nothing": 0}
# Each kernel's arguments, by the names of TENSORS, of CONSTANTS and of what the kernels leave to each other.
QUANTIZE = ("x", "smooth1", "proj_down1", "act1", "act_scale1", "low1", "low_scale1")
FIRST = ("nothing", "act1", "act_scale1", "low1", "low_scale1", "weight1", "weight_scale1", "nothing", "proj_up1", "bias1",
         "act2", "act_scale2", "shares", "smooth2", "proj_down2")
ADD = ("shares", "low2", "low_scale2")
SECOND = ("y", "act2", "act_scale2", "low2", "low_scale2", "weight2", "weight_scale2", "nothing", "proj_up2", "bias2")


def tiles_of(kind):
    """The tiles to choose from, the largest first. BYTES has not the registers for the wide one."""
    return (WIDE, NARROW, gemm_mma.SMALL) if kind == NIBBLES else (NARROW, gemm_mma.SMALL)


def svdquant_mlp(x, first, second, first_unsigned_from, second_unsigned_from):
    """second(GELU(first(x))) with 4-bit activations: (..., K) -> (..., N) in x.dtype.

    first, second: each layer's (weight, weight_scale, proj_down, proj_up, smooth, bias or None) and its unsigned_from, as in
    reference.svdquant_linear; GELU is tanh's. The codes between the layers are those of ops.svdquant_linear twice, to the bit, as is
    everything where there are no such kernels.
    """
    args = x, first, second, first_unsigned_from, second_unsigned_from
    return (_mlp if ops.plain(x) else _mlp_op)(*args)


# The schema is written out, since PyTorch 2.5 doesn't find lists of Optionals in collections.abc's annotations.
@torch.library.custom_op("svdquant::mlp", mutates_args=(), schema=(
    "(Tensor x, Tensor?[] first, Tensor?[] second, SymInt first_unsigned_from, SymInt second_unsigned_from) -> Tensor"))
def _mlp_op(x, first, second, first_unsigned_from, second_unsigned_from):
    return _mlp(x, first, second, first_unsigned_from, second_unsigned_from)


@_mlp_op.register_fake
def _(x, first, second, first_unsigned_from, second_unsigned_from):
    return x.new_empty(*x.shape[:-1], second[0].shape[0])


def _mlp(x, first, second, first_unsigned_from, second_unsigned_from):
    if ops.kernels_run(x, first[0]) and ops.kernels_run(x, second[0]):
        y = fused(x, first, second, first_unsigned_from, second_unsigned_from)
        if y is not None:
            return y
    hidden = ops.svdquant_linear(x, *first, first_unsigned_from, 4, gelu_from=0)
    return ops.svdquant_linear(hidden, *second, second_unsigned_from, 4)


def fused(x, first, second, first_unsigned_from, second_unsigned_from, codes=None, tile=None):
    """As svdquant_mlp on a GPU, or None where this kernel isn't for it. codes, tile: the tests' choice of a path."""
    k, dtype = x.shape[-1], x.dtype
    (hidden, first_rank), (n, second_rank) = first[3].shape, second[3].shape
    if not dtype == first[1].dtype == second[1].dtype or not x.is_contiguous() or x.data_ptr() % 16:
        return None
    try:
        plan = _plan(x.numel() // k, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype, x.device,
                     codes, tile)
    except compiler.KernelsUnavailable:  # the layers say so
        return None
    if plan is None:
        return None
    y = x.new_empty(*x.shape[:-1], n)
    launch(plan, x, y, first, second)
    return y


def launch(plan, x, y, first, second):
    """The launches of a _Plan."""
    product = quantize.multiplied(x.view(-1, x.shape[-1]), first[2]) if plan.multiply else ()
    plan.run(*map(runtime.address, (*product, x, y, *first, *second)))


@torch.compiler.assume_constant_result
def pays(device):
    """Whether a model's two layers should be one on `device`: on the CPU, where it is the same, and on GPUs with int4 tensor cores and room
    for it (RTX 30 and 40, A100; not measured there). An H100, whose 4-bit codes are bytes, takes 1893 us for 1601 (benchmarks/NOTES.md)."""
    if device.type != "cuda":
        return True
    try:
        return 80 <= compiler.arch_number(compiler.architecture(device)) < 90
    except compiler.KernelsUnavailable:  # a GPU that is too old; the layers say so
        return False


def prepare(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype, device):
    """Compile and load the kernels that svdquant_mlp of such layers will ask for, with a contiguous x (m, k)."""
    if _plan(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype, device, None, None) is None:
        ops.prepare(m, hidden, k, first_rank, first_unsigned_from, 4, dtype, 0, device=device)
        ops.prepare(m, n, hidden, second_rank, second_unsigned_from, 4, dtype, device=device)


class _Plan(NamedTuple):
    """The launches of two layers."""

    run: Callable    # of the addresses of multiplied()'s product and of TENSORS
    work: dict       # {name: bytes} of what the kernels leave to each other
    multiply: bool   # x @ proj_down of the first layer by cuBLAS; otherwise there is no product


@functools.lru_cache(maxsize=1024)
def _plan(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype, device, codes, tile):
    """The _Plan, or None where the kernels don't take the layers."""
    arch = compiler.architecture(device)
    number = compiler.arch_number(arch)
    codes = quantize.storage(4, arch) if codes is None else codes
    if (number < 80 or dtype not in (torch.bfloat16, torch.float16) or first_rank % ops.RANKS or second_rank % ops.RANKS
            or hidden % WIDE.rows or not 0 < second_rank <= MAX_RANK or max(k, n) * hidden >= 1 << 33):
        return None
    kind = NIBBLES if codes == quantize.NIBBLES else BYTES
    tile = tile or gemm_mma.choose_tile(kind, number, compiler.multiprocessors(device), m, hidden, tiles_of(kind))
    half, ranks, tiles = dtype == torch.float16, padded(second_rank, RANK_BLOCK), hidden // tile.rows
    work = {"shares": tiles * padded(m, 16) * ranks * 4}
    for number, columns, rank in (("1", k, first_rank), ("2", hidden, second_rank)):
        work |= zip(numbered(quantize.Quantized._fields, number), quantize.output_bytes(m, columns, rank, codes, dtype))

    quantized, cut = quantize.launcher(m, k, first_rank, k, first_unsigned_from, codes, dtype, device, pdl=True)
    defines = gemm_mma.defines_of(kind, tile, number, half, next_ranks=ranks)
    first = runtime.kernel(gemm_mma.SOURCE, gemm_mma.ENTRY, defines, device, dict(defines)["SHARED_BYTES"])
    first = first.launcher((-(-m // tile.tokens) * tiles,), (tile.threads,), len(FIRST),
                           (m, hidden, k, first_rank, first_unsigned_from, second_rank, second_unsigned_from))
    add = runtime.kernel(SHARES, SHARES_ENTRY, shares_defines(half, ranks), device)
    add = add.launcher((-(-padded(m, 16) * ranks // 8 // SHARES_THREADS),), (SHARES_THREADS,), len(ADD), (m, tiles))
    second = gemm_mma.launcher(kind, m, n, hidden, second_rank, second_unsigned_from, dtype, device)
    multiply = cut.ranks < first_rank
    names = (*(numbered(quantize.PRODUCT[dtype], "1") if multiply else ()), *TENSORS)
    run = runtime.chain(names, (quantized, QUANTIZE), (first, FIRST), (add, ADD), (second, SECOND), work=work, constants=CONSTANTS)
    return _Plan(run, work, multiply)


def shares_defines(half, ranks):
    return ("HALF", int(half)), ("RANKS", ranks)


def variants(arch):
    """Variants that stand for all that `arch`, such as "sm_89", compiles for this: the largest tile, which has the fewest registers to
    spare, with the most ranks."""
    number = compiler.arch_number(arch)
    if number < 80:
        return []
    kind, found = NIBBLES if quantize.storage(4, arch) == quantize.NIBBLES else BYTES, []
    for half in (False, True):
        defines = gemm_mma.defines_of(kind, tiles_of(kind)[0], number, half, next_ranks=MAX_RANK)
        found += [(gemm_mma.SOURCE, gemm_mma.ENTRY, defines), (SHARES, SHARES_ENTRY, shares_defines(half, MAX_RANK))]
    return found
