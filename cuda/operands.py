"""The operands of an SVDQuant layer."""

from typing import NamedTuple, Optional

from torch import Tensor


class LayerOperands(NamedTuple):
    """What a layer computes with, besides its input x (..., K): its tensors and its constants.

    N outputs, R the rank, G = K / 64 groups. The floats are 16-bit and share a dtype.
    """

    weight: Tensor                       # (N, K/2) int8, packed 4-bit codes (int4.py)
    weight_scale: Tensor                 # (G, N)
    proj_down: Tensor                    # (K, R)
    proj_up: Tensor                      # (N, R)
    smooth: Tensor                       # (K,), the divisor of x
    bias: Optional[Tensor]               # (N,)
    unsigned_from: int                   # the first column of x that is a GELU's output; K if none is
    act_bits: int = 4                    # 4 or 8, of the activation's codes
    row_scale: Optional[Tensor] = None   # (N,) float32, row_scales.row_scale of the layer; the kernels need it for act_bits 8
    gelu_from: Optional[int] = None      # the first output to which the layer itself applies GELU; None if there is none

    @property
    def tensors(self):
        """The tensors but for row_scale: weight, weight_scale, proj_down, proj_up, smooth, bias."""
        return self[:6]
