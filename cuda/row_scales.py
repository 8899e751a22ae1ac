"""Row scales, for int8 activations: each group scale of a weight row is a float of the row times a small integer.

    weight_scale[g, n] = c_n * i[g, n],   i in -15..16

Then code * i fits int8, and a row's int32 sum runs over all of K (kernels/gemm_wgmma.cu). This pack's quantizer writes such scales. Other
checkpoints have arbitrary scales, which the kernels round to the nearest multiples of the row scale.
"""

import torch

LOWEST, HIGHEST = -15, 16
# Candidates of max|scale| / c. The whole numbers find every exact c. The values between them are for arbitrary scales, whose largest need
# not be a multiple of the best c.
DIVISORS = (*range(1, 17), *(10 + step / 8 for step in range(52) if step % 8))


def integers(weight_scale, row_scale):
    """i (G, N), whole numbers in float32, as the kernels compute them."""
    per_unit = torch.where(row_scale == 0, torch.zeros_like(row_scale), row_scale.reciprocal())
    return (weight_scale.float() * per_unit).round()


def row_scale(weight_scale):
    """weight_scale (G, N) 16 bit -> c (N,) float32 on the same device, which minimizes the squared error of c * i.

    If the scales are integer multiples of one float, the result is exact: the largest such c.
    """
    scales = weight_scale.float()
    largest = scales.abs().amax(dim=0)
    best, least = largest, torch.full_like(largest, torch.inf)
    for divisor in DIVISORS:
        c = largest / divisor
        i = integers(scales, c)
        error = (scales - c * i).square_().sum(dim=0)
        error[(i.amin(dim=0) < LOWEST) | (i.amax(dim=0) > HIGHEST)] = torch.inf  # the kernels don't clamp i
        better = error < least * (1 - 1e-4) - 1e-9 * largest.square()  # a later candidate must be better by more than rounding errors
        best, least = torch.where(better, c, best), torch.where(better, error, least)
    return best


def rounded(weight_scale, row_scale):
    """The scales (G, N) float32 with which the int8 kernels compute."""
    return row_scale * integers(weight_scale, row_scale)
