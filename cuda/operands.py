"""The operands of an SVDQuant layer."""

from typing import NamedTuple, Optional

from torch import Tensor


class LayerOperands(NamedTuple):
    """A layer's tensors and constants: everything it computes with besides its input x (..., K).

    N outputs, R the rank, G = K / 64 groups. The float tensors are 16-bit and share a dtype.
    """

    weight: Tensor                       # (N, K/2) int8, packed 4-bit codes (int4.py)
    weight_scale: Tensor                 # (G, N)
    proj_down: Tensor                    # (K, R)
    proj_up: Tensor                      # (N, R)
    smooth: Tensor                       # (K,), the divisor of x
    bias: Optional[Tensor]               # (N,)
    unsigned_from: int                   # first column of x that is a GELU's output; K if there is none
    act_bits: int = 4                    # bits of the activation's codes: 4 or 8
    row_scale: Optional[Tensor] = None   # (N,) float32, from row_scales.row_scale; the kernels need it for act_bits 8
    gelu_from: Optional[int] = None      # first output column to which the layer itself applies GELU; None if there is none

    @property
    def tensors(self):
        """The stored tensors: weight, weight_scale, proj_down, proj_up, smooth, bias."""
        return self[:6]
