"""Codes that account for the activation's rounding.

The quantized weight Q is not multiplied by x but by x + e, where e is the rounding error of the 4-bit activation. With R the smoothed
weight minus the branch, H the Gram matrix of the inputs and S the diagonal one of e, the output error is

    E |R x - Q (x + e)|^2 = |(R - Q) H^1/2|^2 + |Q S^1/2|^2 = |(T - Q) (H + S)^1/2|^2 + a constant,    T = R - R S (H + S)^-1,

so GPTQ rounds T in the metric of H + S. In directions of little variance the rounding error exceeds the inputs themselves, and a smaller
weight passes on less of it. With all of S, 8-bit activations lose what 4-bit ones gain; SHARE of it improves both.
"""

import torch

from ...cuda.int4 import GELU_SHIFT
from ...cuda.reference import quantize_activation, scaled_codes

SHARE = 0.25  # of S, for which the codes account


def activation_noise(x, smooth, unsigned_from):
    """(K,) float32: the mean square of the error that rounding to 4 bits makes in each smoothed input.

    x: (M, K) float32 sample; smooth: (K,) float32; unsigned_from: int, the first column that comes out of a GELU.
    """
    rounded = scaled_codes(*quantize_activation(x, smooth, unsigned_from))
    rounded[:, unsigned_from:] -= GELU_SHIFT / smooth[unsigned_from:]
    return (rounded - x / smooth).square().mean(dim=0)


def quiet_target(residual, noise, factor):
    """T = residual - residual S (H + S)^-1, with S the diagonal matrix of `noise`: the target of the codes.

    residual: (N, K) float32; noise: (K,); factor: gptq.Factor of H + S. Returns (N, K) float32.
    """
    passed = (residual * noise)[:, factor.order]
    passed = torch.linalg.solve_triangular(factor.lower.t(), passed, upper=True, left=False)
    passed = torch.linalg.solve_triangular(factor.lower, passed, upper=False, left=False)
    target = residual.clone()
    target[:, factor.order] -= passed
    return target
