"""The NVFP4 layer as a torch.library custom op: one call per layer, opaque to torch.compile."""

from typing import Optional

import torch
from torch import Tensor

from . import nvfp4


@torch.library.custom_op("svdquant::nvfp4_linear", mutates_args=())
def nvfp4_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor, proj_down: Tensor, proj_up: Tensor,
                 smooth: Tensor, bias: Optional[Tensor]) -> Tensor:
    """One SVDQuant layer in NVFP4, (..., K) -> (..., N) in x.dtype; arguments as in nvfp4.nvfp4_linear.

    On a GPU it computes in x's 16-bit dtype, elsewhere in float32.
    """
    in_16_bits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return nvfp4.nvfp4_linear(x, weight, weight_scale, weight_scale_2, proj_down, proj_up, smooth, bias,
                              x.dtype if in_16_bits else torch.float32)


@nvfp4_linear.register_fake
def _(x, weight, weight_scale, weight_scale_2, proj_down, proj_up, smooth, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
