"""Codes that allow for the activation's rounding.

The packed weight Q does not meet x but x + e, e the rounding error of the 4-bit activation. What is left of the output, with R the
smoothed weight less the branch, H the Gram matrix of the inputs and S the diagonal one of e,

    E |R x - Q (x + e)|^2 = |(R - Q) H^1/2|^2 + |Q S^1/2|^2 = |(T - Q) (H + S)^1/2|^2 + what no Q changes,    T = R - R S (H + S)^-1,

so GPTQ aims at T in the metric of H + S: where the inputs hardly move, their rounding is louder than they are, and a smaller weight
passes on less of it. With all of S, 8-bit activations pay for what 4-bit ones gain; SHARE of it serves both.
"""

import torch

from ...cuda.int4 import GELU_SHIFT
from ...cuda.reference import quantize_activation, scaled_codes

SHARE = 0.25


def activation_noise(x, smooth, unsigned_from):
    """(K,) the mean square of what rounding to 4 bits does to each smoothed input.

    x: (M, K) float32 sample; smooth: (K,) float32; unsigned_from: int, the first column that comes out of a GELU.
    """
    rounded = scaled_codes(*quantize_activation(x, smooth, unsigned_from))
    rounded[:, unsigned_from:] -= GELU_SHIFT / smooth[unsigned_from:]
    return (rounded - x / smooth).square().mean(dim=0)


def quiet_target(residual, noise, factor):
    """T = residual - residual S (H + S)^-1, S the diagonal matrix of `noise`: what the codes aim at.

    residual: (N, K) float32; noise: (K,); factor: gptq.Factor of H + S. Returns (N, K).
    """
    passed = (residual * noise)[:, factor.order]
    passed = torch.linalg.solve_triangular(factor.lower.t(), passed, upper=True, left=False)
    passed = torch.linalg.solve_triangular(factor.lower, passed, upper=False, left=False)
    target = residual.clone()
    target[:, factor.order] -= passed
    return target
