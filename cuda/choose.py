"""The one place that chooses the kernels for a layer on a GPU.

choose() is a pure function of the layer's sizes, the GPU's generation, its number of multiprocessors and the kernels that failed there, so
that every GPU's choice can be tested without that GPU. Each kernel's module holds the cost model by which choose() compares its tiles or
plans.
"""

from typing import NamedTuple, Optional

import torch

from . import awq, gemm_mma, gemm_wgmma, quantize_activation
from .activation_layout import CodeStorage
from .int4 import GROUP_SIZE
from .operands import NO_LORA, LoRASizes

OUTPUTS = 16       # the kernels compute outputs in multiples of this
RANKS = 16         # the kernels compute ranks of the LoRA branch in multiples of this
GELU_COLUMNS = 64  # columns that get GELU together: a warp's weight rows in gemm_mma.cu, a warpgroup's in gemm_wgmma.cu
W4A16 = 16         # act_bits of a Layer whose activation is not quantized


class Layer(NamedTuple):
    """A packed linear layer and its number of tokens: everything that determines the choice of kernels."""

    m: int                      # tokens
    n: int                      # outputs
    k: int                      # inputs
    rank: int                   # ranks of the LoRA branch
    unsigned_from: int          # as in LayerOperands
    act_bits: int               # 4 or 8 for an SVDQuant layer, or W4A16
    dtype: torch.dtype          # dtype of x and of the layer's floats
    gelu_from: Optional[int] = None  # as in LayerOperands
    lora: LoRASizes = NO_LORA
    gated: bool = False         # whether the output is residual + gate * the layer's (gated_linear.py)


class MLP(NamedTuple):
    """Two SVDQuant layers with 4-bit activations and a GELU between them, which run as one."""

    first: Layer
    second: Layer


class Kind(NamedTuple):
    """A kind of kernel: all that is compiled from a source for one storage of codes. choose() uses all of it or, after a wrong result on
    this GPU (self_test.py), none of it."""

    source: str                            # in kernels/
    storage: Optional[CodeStorage] = None  # None for kernels without codes of an activation
    feeds_next: bool = False               # whether the GEMM ends with the next layer's codes, as an MLP's first one does
    gated: bool = False                    # whether the GEMM adds its outputs, times a gate, to a residual


class LinearKernels(NamedTuple):
    """The kernels of an SVDQuant layer: quantize, then a GEMM."""

    storage: CodeStorage       # storage of the activation's codes
    plans: tuple               # of quantize_activation.Plan, the fastest first; the first one that fits on the GPU runs
    wgmma: bool                # True: gemm_wgmma computes the GEMM; False: gemm_mma does
    tile: object               # a key of gemm_wgmma.STAGES, or a gemm_mma.Tile
    rank: int                  # the layer's ranks, padded to 16
    gelu_from: Optional[int]   # as the GEMM takes it; None also where PyTorch applies GELU after the GEMM
    whole: bool                # the two launches compute the whole layer, its gate and residual included, from its operands as they are


class AWQKernel(NamedTuple):
    """The kernel of a W4A16 layer: one launch."""

    tiles: int  # one of awq.TILES


class MLPKernels(NamedTuple):
    """The kernels of an MLP: two layers in four launches (mlp.py)."""

    storage: CodeStorage        # storage of both activations' codes
    plans: tuple                # plans of the first layer's quantize kernel
    tile: gemm_mma.Tile         # tile of the first layer's GEMM
    second_tile: gemm_mma.Tile  # tile of the second layer's GEMM


def choose(layer, target, sms, failed=frozenset()):
    """The kernels for a Layer or an MLP on a GPU of a Target with `sms` multiprocessors: LinearKernels, AWQKernel or MLPKernels. None if
    the reference must compute the Layer, or if the MLP must run as two layers. failed: the Kinds that must not be used."""
    if isinstance(layer, MLP):
        return _choose_mlp(layer, target, sms, failed)
    if not layer.m or layer.k % GROUP_SIZE or layer.n % OUTPUTS or layer.n * layer.k >= gemm_mma.MAX_WEIGHTS:
        return None
    if layer.act_bits != W4A16:
        return _choose_linear(layer, target, sms, failed)
    return None if Kind(awq.SOURCE) in failed else AWQKernel(awq.fastest_tiles(layer.m))


def _choose_linear(layer, target, sms, failed):
    m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from, lora, gated = layer
    storage = code_storage(act_bits, target)
    wgmma = (storage == CodeStorage.INT8 and target.wgmma and gemm_wgmma.takes(k, unsigned_from)
             and Kind(gemm_wgmma.SOURCE, storage) not in failed)
    ranks = rank + -rank % RANKS
    if gelu_from is not None and gelu_from % GELU_COLUMNS:
        gelu_from = None
    if wgmma:
        tile = gemm_wgmma.fastest_tile(m, n, k, sms, unsigned_from)
    else:
        tile = gemm_mma.fastest_tile(gemm_mma.tiles_of(target), sms, m, n)
    plans = _plans(m, k, ranks, storage, target, sms, failed, fused=not lora.ranks)
    if not plans or not wgmma and Kind(gemm_mma.SOURCE, storage) in failed:
        return None
    whole = dtype in target.dtypes and ranks == rank and gelu_from == layer.gelu_from
    if gated:
        source = gemm_wgmma.SOURCE if wgmma else gemm_mma.SOURCE
        whole = whole and gelu_from is None and gemm_mma.gates(storage) and Kind(source, storage, gated=True) not in failed
    return LinearKernels(storage, plans, wgmma, tile, ranks, gelu_from, whole)


def _plans(m, k, ranks, storage, target, sms, failed, fused=True):
    """quantize_activation.plans_for without the plans of kernels that failed. None are left without quantize.cu, since another kernel's
    clusters may not fit on the GPU."""
    plans = quantize_activation.plans_for(m, k, ranks, storage, target, sms, fused=fused)
    if not failed:
        return plans
    if Kind(quantize_activation.SOURCE, storage) in failed:
        return ()
    return tuple(plan for plan in plans if Kind(quantize_activation.source(plan), storage) not in failed)


def _choose_mlp(layers, target, sms, failed):
    (first, second), storage = layers, code_storage(4, target)
    if (not target.async_copies or first.dtype not in target.dtypes or not first.m
            or first.k % GROUP_SIZE or second.n % OUTPUTS or first.n % gemm_mma.WIDE.rows
            or first.rank % RANKS or second.rank % RANKS or not 0 < second.rank <= gemm_mma.NEXT_RANKS
            or max(first.k, second.n) * first.n >= gemm_mma.MAX_WEIGHTS
            or not failed.isdisjoint((Kind(gemm_mma.SOURCE, storage), Kind(gemm_mma.SOURCE, storage, True)))):
        return None
    plans = _plans(first.m, first.k, first.rank, storage, target, sms, failed)
    if not plans:
        return None
    return MLPKernels(storage, plans, gemm_mma.fastest_tile(gemm_mma.next_tiles_of(storage), sms, first.m, first.n),
                      gemm_mma.fastest_tile(gemm_mma.tiles_of(target), sms, second.m, second.n))


def code_storage(act_bits, target):
    """The CodeStorage in which the GEMMs of a Target read codes of 4 or 8 bits."""
    if act_bits == 8:
        return CodeStorage.INT8
    return CodeStorage.INT4_NIBBLES if target.native_int4 else CodeStorage.INT4_BYTES
