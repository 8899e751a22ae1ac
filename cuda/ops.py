"""The ops that a quantized model calls, as torch.library custom ops: one call a layer, opaque to torch.compile."""

from typing import Optional

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("svdquant::linear", mutates_args=())
def svdquant_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, proj_down: Tensor, proj_up: Tensor,
                    smooth: Tensor, bias: Optional[Tensor], unsigned_from: int, act_bits: int) -> Tensor:
    """One SVDQuant layer, (..., K) -> (..., N) in x.dtype; arguments as in reference.svdquant_linear."""
    return reference.svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits)


@svdquant_linear.register_fake
def _(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("svdquant::awq_linear", mutates_args=())
def awq_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor,
               bias: Optional[Tensor]) -> Tensor:
    """One W4A16 layer, (..., K) -> (..., N) in x.dtype; arguments as in reference.awq_linear."""
    return reference.awq_linear(x, weight, weight_scale, weight_zeros, bias)


@awq_linear.register_fake
def _(x, weight, weight_scale, weight_zeros, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
