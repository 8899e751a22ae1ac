"""Two linear layers with a GELU between them and 4-bit activations. The first layer's GEMM ends with the second layer's codes
(kernels/next.cuh), so that the hidden states are never in memory.

    x -> quantize.cu -> gemm_mma.cu: GELU, codes and scales; a partial sum of the LoRA branch for each tile's columns
                        partial_sums.cu: adds up the partial sums
                        gemm_mma.cu -> y

8-bit activations gain nothing: a token's scale is known only after the first layer's last column (benchmarks/NOTES.md).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from . import choose, dispatch, expand_branch, gemm_mma, kernel_loader, ops, quantize_activation, runtime, targets, traced
from .activation_layout import RANK_BLOCK, ROWS, padded
from .errors import KernelsUnavailable
from .operands import LayerOperands

PARTIAL_SUMS, PARTIAL_SUMS_ENTRY, PARTIAL_SUMS_THREADS = "partial_sums.cu", "add_partial_sums", 128

LAYER = LayerOperands._fields[:6]  # the names of LayerOperands.tensors


def numbered(names, number):
    return tuple(name + number for name in names)


TENSORS = ("x", "y", *numbered(LAYER, "1"), *numbered(LAYER, "2"))
CONSTANTS = {"nothing": 0}
# Each kernel's arguments, as names of TENSORS, of CONSTANTS and of the work memory (_Launches.work).
QUANTIZE = ("x", "smooth1", "proj_down1", "act1", "act_scale1", "lora_act1", "lora_act_scale1")
FIRST = ("nothing", "act1", "act_scale1", "lora_act1", "lora_act_scale1", "weight1", "weight_scale1", "nothing", "proj_up1", "bias1",
         "act2", "act_scale2", "partial_sums", "smooth2", "proj_down2")
ADD = ("partial_sums", "lora_act2", "lora_act_scale2")
SECOND = ("y", "act2", "act_scale2", "lora_act2", "lora_act_scale2", "weight2", "weight_scale2", "nothing", "proj_up2", "bias2")


def svdquant_mlp(x, first, second):
    """second(GELU(first(x))) with 4-bit activations: (..., K) -> (..., N) in x.dtype.

    first, second: LayerOperands with act_bits 4; the first has gelu_from 0, the tanh-GELU. The codes between the layers equal those of two
    ops.svdquant_linear calls to the bit. Without such kernels the op is these two calls.
    """
    if dispatch.plain(x):
        return _mlp(x, first, second)
    return _mlp_op(x, *flat(first, second))


def flat(first, second):
    """The op's arguments after x."""
    # PyTorch 2.5's torch.compile takes a slice of a named tuple for another one.
    tensors = (tuple(layer)[:len(LAYER)] for layer in (first, second))
    return *tensors, first.unsigned_from, second.unsigned_from, first.proj_scale, second.proj_scale


@torch.library.custom_op("svdquant::mlp", mutates_args=())
def _mlp_op(x: Tensor, first: Sequence[Optional[Tensor]], second: Sequence[Optional[Tensor]], first_unsigned_from: int,
            second_unsigned_from: int, first_proj_scale: Optional[Tensor], second_proj_scale: Optional[Tensor]) -> Tensor:
    return _mlp(x, LayerOperands(*first, first_unsigned_from, gelu_from=0, proj_scale=first_proj_scale),
                LayerOperands(*second, second_unsigned_from, proj_scale=second_proj_scale))


@_mlp_op.register_fake
def _(x, first, second, *_others):
    return x.new_empty(*x.shape[:-1], second[0].shape[0])


def _mlp(x, first, second):
    first, second = expand_branch.in_16_bits(first), expand_branch.in_16_bits(second)
    if dispatch.on_gpu(x):
        y = fused(x, first, second)
        if y is not None:
            return y
    return ops.svdquant_linear(ops.svdquant_linear(x, first), second)


def fused(x, first, second, kernels=None):
    """As svdquant_mlp on a GPU, of layers whose branches are in 16 bits, or None if the layers must run one after the other. kernels:
    MLPKernels that replace choose()'s."""
    dtype = x.dtype
    if not dtype == first.weight_scale.dtype == second.weight_scale.dtype or not x.is_contiguous() or x.data_ptr() % 16:
        return None
    (hidden, first_rank), (n, second_rank), k = first.proj_up.shape, second.proj_up.shape, x.shape[-1]
    try:
        launches = _launches(x.numel() // k, k, hidden, n, first_rank, second_rank, first.unsigned_from, second.unsigned_from, dtype,
                             x.device, kernels)
    except KernelsUnavailable:  # the layers' own calls log the reason
        return None
    if launches is None:
        return None
    y = x.new_empty(*x.shape[:-1], n)
    launch(launches, x, y, first, second)
    return y


def layers(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype):
    """The choose.MLP of two layers, K -> hidden -> N, for m tokens."""
    return choose.MLP(choose.Layer(m, hidden, k, first_rank, first_unsigned_from, 4, dtype, 0),
                      choose.Layer(m, n, hidden, second_rank, second_unsigned_from, 4, dtype))


def launch(launches, x, y, first, second):
    """Run _Launches on a contiguous x (..., K), into y (..., N)."""
    product = quantize_activation.multiplied(x.view(-1, x.shape[-1]), first.proj_down) if launches.multiply else ()
    launches.run(*map(runtime.address, (*product, x, y, *first.tensors, *second.tensors)))


@traced.constant
def pays(device):
    """Whether fusing two layers is faster on `device`. True on the CPU, where both ways give the same result."""
    if device.type != "cuda":
        return True
    try:
        return targets.for_device(device).fused_mlp
    except KernelsUnavailable:  # the GPU is too old; the layers' calls log it
        return False


def prepare(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype, device):
    """Compile and load the kernels that svdquant_mlp needs for such layers and a contiguous x (m, k)."""
    sizes = m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype
    if _launches(*sizes, device, None) is None:
        for layer in layers(*sizes):
            ops.prepare(*layer, device=device)


class _Launches(NamedTuple):
    """The launches of two fused layers."""

    run: Callable    # runs all launches; takes the addresses of multiplied()'s product, if any, and of TENSORS
    work: dict       # {name: bytes} of the kernels' work memory
    multiply: bool   # cuBLAS computes the first layer's x @ proj_down; if False, there is no product


@functools.lru_cache(maxsize=1024)
def _launches(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype, device, kernels):
    """The _Launches of layers()' MLP, or None if the kernels don't take it. kernels: as in fused."""
    mlp = layers(m, k, hidden, n, first_rank, second_rank, first_unsigned_from, second_unsigned_from, dtype)
    kernels = kernels or ops.chosen(mlp, device)
    if kernels is None:
        return None
    (first, second), (storage, plans, tile, second_tile) = mlp, kernels
    ranks, tiles = padded(second.rank, RANK_BLOCK), hidden // tile.rows
    work = {"partial_sums": tiles * padded(m, ROWS) * ranks * 4}
    for number, layer in (("1", first), ("2", second)):
        sizes = quantize_activation.output_bytes(m, layer.k, layer.rank, storage, dtype)
        work |= zip(numbered(quantize_activation.Quantized._fields, number), sizes)

    quantize, plan = quantize_activation.launcher(m, k, first.rank, k, first.unsigned_from, storage, plans, dtype, device, pdl=True)
    defines = gemm_mma.defines_of(storage, tile, targets.for_device(device), dtype, next_ranks=ranks)
    gemm = kernel_loader.kernel(gemm_mma.SOURCE, gemm_mma.ENTRY, defines, device, dict(defines)["SHARED_BYTES"])
    gemm = gemm.launcher((-(-m // tile.tokens) * tiles,), (tile.threads,), len(FIRST),
                         (m, hidden, k, first.rank, first.unsigned_from, second.rank, second.unsigned_from))
    add = kernel_loader.kernel(PARTIAL_SUMS, PARTIAL_SUMS_ENTRY, add_defines(dtype, ranks), device)
    add = add.launcher((-(-padded(m, ROWS) * ranks // 8 // PARTIAL_SUMS_THREADS),), (PARTIAL_SUMS_THREADS,), len(ADD), (m, tiles))
    last = gemm_mma.launcher(storage, second_tile, m, second.n, hidden, second.rank, second.unsigned_from, dtype, device)
    multiply = plan.ranks < first.rank
    names = (*(numbered(quantize_activation.PRODUCT[dtype], "1") if multiply else ()), *TENSORS)
    run = runtime.chain(names, (quantize, QUANTIZE), (gemm, FIRST), (add, ADD), (last, SECOND), work=work, constants=CONSTANTS)
    return _Launches(run, work, multiply)


def add_defines(dtype, ranks):
    """The definitions of the kernel that adds up the partial sums."""
    return ("HALF", int(dtype == torch.float16)), ("RANKS", ranks)


def variants(storage, target):
    """The (source, entry, defines) that need the most registers, for the tests of machine code: the largest tile, with the most ranks."""
    found = []
    for dtype in target.dtypes:
        defines = gemm_mma.defines_of(storage, gemm_mma.next_tiles_of(storage)[0], target, dtype, next_ranks=gemm_mma.NEXT_RANKS)
        found += [(gemm_mma.SOURCE, gemm_mma.ENTRY, defines), (PARTIAL_SUMS, PARTIAL_SUMS_ENTRY, add_defines(dtype, gemm_mma.NEXT_RANKS))]
    return found


ops.runners[choose.MLP] = lambda kernels, x, first, second: fused(x, first, second, kernels)
ops.choices.append(_launches)
