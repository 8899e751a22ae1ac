"""A layer whose output is added to a residual, times a gate: the end of an attention or of an MLP.

    z = residual + gate * svdquant_linear(x)

The GEMM adds it in its epilogue (GATED in kernels/gemm_wgmma.cu and gemm_mma.cu), so that the layer's own output is never in memory. If
it can't, block_ops.gated_residual does so in a pass of its own. Both round the layer's output to 16 bits first, and give the same bits.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

from . import block_ops, dispatch, ops
from .errors import KernelsUnavailable
from .operands import LayerOperands, LoRASizes


def gated_linear(x, operands, residual, gate):
    """residual + gate * ops.svdquant_linear(x, operands), (B, L, N) in x.dtype: a new tensor.

    x: (B, L, K), on a GPU of a type of block_ops.takes; residual: (B, L, N) in x.dtype; gate: (B or 1, 1, N); operands: LayerOperands
    without gelu_from.
    """
    return (_gated_linear if dispatch.plain(x) else _gated_op)(x, residual, gate, *operands.flat())


def addends(x, residual, gate):
    """(residual, gate) as a kernel reads them, or None if it can't: it has one gate for all tokens, and reads both in place."""
    fits = (dispatch.on_gpu(x) and residual.dtype == gate.dtype == x.dtype and residual.device == gate.device == x.device
            and residual.shape == (*x.shape[:-1], gate.shape[-1]) and gate.numel() == gate.shape[-1] and gate.stride(-1) == 1
            and residual.is_contiguous() and not (residual.data_ptr() | gate.data_ptr()) % 16)
    return (residual, gate) if fits else None


def _gated_linear(x, residual, gate, *flat):
    operands = LayerOperands(*flat[:-2], LoRASizes(tuple(flat[-2]), flat[-1]))
    added = addends(x, residual, gate)
    if added is not None:
        try:
            z = ops.by_kernels(x, operands, added)
            if z is not None:
                return z
        except KernelsUnavailable:  # svdquant_linear logs the reason
            pass
    return block_ops.gated_residual(residual, ops.svdquant_linear(x, operands), gate)


@torch.library.custom_op("svdquant::gated_linear", mutates_args=())
def _gated_op(x: Tensor, residual: Tensor, gate: Tensor, weight: Tensor, weight_scale: Tensor, proj_down: Tensor, proj_up: Tensor,
              smooth: Tensor, bias: Optional[Tensor], unsigned_from: int, act_bits: int, row_scale: Optional[Tensor],
              gelu_from: Optional[int], proj_scale: Optional[Tensor], lora_down: Optional[Tensor], lora_up: Optional[Tensor],
              lora_strength: Optional[Tensor], lora_ranks: Sequence[int], lora_part_rows: int) -> Tensor:
    return _gated_linear(x, residual, gate, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale,
                         gelu_from, proj_scale, lora_down, lora_up, lora_strength, lora_ranks, lora_part_rows)


@_gated_op.register_fake
def _(x, residual, *_operands):
    return x.new_empty(residual.shape)
