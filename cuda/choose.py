"""Which kernels compute a layer on a GPU. Nothing else decides it.

choose() is a pure function of the layer's sizes, the GPU's generation and its number of multiprocessors, so that it can be looked at and
tested for every GPU without one. The modules of the kernels have the cost models that it compares their tiles and plans by.
"""

from typing import NamedTuple, Optional

import torch

from . import awq, gemm_mma, gemm_wgmma, quantize_activation
from .activation_layout import CodeStorage
from .int4 import GROUP_SIZE

OUTPUTS = 16       # the kernels compute a multiple of so many outputs
RANKS = 16         # the kernels' LoRA branches have a multiple of so many ranks
GELU_COLUMNS = 64  # go through GELU together: a warp's rows of the weight in gemm_mma.cu, a warpgroup's in gemm_wgmma.cu
W4A16 = 16         # a Layer's act_bits where the activation is not quantized


class Layer(NamedTuple):
    """A packed linear layer and its number of tokens: all that the choice of its kernels depends on."""

    m: int                      # tokens
    n: int                      # outputs
    k: int                      # inputs
    rank: int                   # of the LoRA branch
    unsigned_from: int          # as in LayerOperands
    act_bits: int               # 4 or 8 of an SVDQuant layer, or W4A16
    dtype: torch.dtype          # of x and of the layer's floats
    gelu_from: Optional[int] = None  # as in LayerOperands


class MLP(NamedTuple):
    """Two SVDQuant layers with 4-bit activations and a GELU between them, to run as one."""

    first: Layer
    second: Layer


class LinearKernels(NamedTuple):
    """An SVDQuant layer: quantize, then a GEMM."""

    storage: CodeStorage       # of the activation's codes
    plans: tuple               # quantize_activation.Plan, the fastest first; the GPU itself decides which of them fits
    wgmma: bool                # the GEMM is gemm_wgmma's, else gemm_mma's
    tile: object               # of gemm_wgmma.STAGES, or a gemm_mma.Tile
    rank: int                  # ranks of the kernels' LoRA branch: the layer's padded to 16, or 0 where the branch is added behind the GEMM
    gelu_from: Optional[int]   # that of the kernels; None also where GELU comes after them
    whole: bool                # the two launches are the whole layer, with its operands as they are


class AWQKernel(NamedTuple):
    """A W4A16 layer: one launch."""

    tiles: int  # of awq.TILES


class MLPKernels(NamedTuple):
    """An MLP's two layers in four launches (mlp.py)."""

    storage: CodeStorage        # of both activations' codes
    plans: tuple                # of the first layer's quantize
    tile: gemm_mma.Tile         # of the first layer's GEMM
    second_tile: gemm_mma.Tile  # of the second layer's


def choose(layer, target, sms):
    """The kernels for a Layer or an MLP on a GPU of a Target with `sms` multiprocessors: LinearKernels, AWQKernel or MLPKernels; None for
    a Layer that the reference has to compute, and for an MLP that has to run as two layers."""
    if isinstance(layer, MLP):
        return _choose_mlp(layer, target, sms)
    if not layer.m or layer.k % GROUP_SIZE or layer.n % OUTPUTS or layer.n * layer.k >= gemm_mma.MAX_WEIGHTS:
        return None
    return AWQKernel(awq.fastest_tiles(layer.m)) if layer.act_bits == W4A16 else _choose_linear(layer, target, sms)


def _choose_linear(layer, target, sms):
    m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from = layer
    storage = code_storage(act_bits, target)
    wgmma = storage == CodeStorage.INT8 and target.wgmma and gemm_wgmma.takes(k, unsigned_from)
    ranks = rank + -rank % RANKS
    if wgmma and ranks > gemm_wgmma.MAX_RANK:
        ranks, gelu_from = 0, None  # the branch is added behind the GEMM, and GELU comes after it
    elif gelu_from is not None and gelu_from % GELU_COLUMNS:
        gelu_from = None
    if wgmma:
        tile = gemm_wgmma.fastest_tile(m, n, k, sms, unsigned_from)
    else:
        tile = gemm_mma.fastest_tile(gemm_mma.tiles_of(target), sms, m, n)
    plans = quantize_activation.plans_for(m, k, ranks, storage, target, sms)
    whole = dtype in target.dtypes and ranks == rank and gelu_from == layer.gelu_from
    return LinearKernels(storage, plans, wgmma, tile, ranks, gelu_from, whole)


def _choose_mlp(layers, target, sms):
    (first, second), storage = layers, code_storage(4, target)
    if (not target.async_copies or first.dtype not in target.dtypes or not first.m
            or first.k % GROUP_SIZE or second.n % OUTPUTS or first.n % gemm_mma.WIDE.rows
            or first.rank % RANKS or second.rank % RANKS or not 0 < second.rank <= gemm_mma.NEXT_RANKS
            or max(first.k, second.n) * first.n >= gemm_mma.MAX_WEIGHTS):
        return None
    return MLPKernels(storage, quantize_activation.plans_for(first.m, first.k, first.rank, storage, target, sms),
                      gemm_mma.fastest_tile(gemm_mma.next_tiles_of(storage), sms, first.m, first.n),
                      gemm_mma.fastest_tile(gemm_mma.tiles_of(target), sms, second.m, second.n))


def code_storage(act_bits, target):
    """How the GEMMs of a Target want codes of 4 or 8 bits."""
    if act_bits == 8:
        return CodeStorage.INT8
    return CodeStorage.INT4_NIBBLES if target.native_int4 else CodeStorage.INT4_BYTES
