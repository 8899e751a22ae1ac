"""Row scales, for int8 activations: every group scale of a weight row as one float of the row times a small integer.

    weight_scale[g, n] = c_n * i[g, n],   i in -15..16

Then code * i fits int8, and the int32 sum of a row runs over all of K (kernels/gemm_wgmma.cu). Our quantizer writes such scales. Other
people's checkpoints have arbitrary ones; the kernels compute with the nearest multiples of the row scale.
"""

import torch

LOWEST, HIGHEST = -15, 16
# max|scale| / c of the candidates. Whole numbers find every exact c; the values between serve arbitrary scales, whose best c need not
# divide the largest scale.
DIVISORS = (*range(1, 17), *(10 + step / 8 for step in range(52) if step % 8))


def integers(weight_scale, row_scale):
    """i (G, N) float32, whole numbers, as the kernels compute them."""
    per_unit = torch.where(row_scale == 0, torch.zeros_like(row_scale), row_scale.reciprocal())
    return (weight_scale.float() * per_unit).round()


def row_scale(weight_scale):
    """weight_scale (G, N) 16 bit -> c (N,) float32 on its device: the one with the least squared error of c * i.

    Exact, and then the largest such c, where the scales are integer multiples of one float.
    """
    scales = weight_scale.float()
    largest = scales.abs().amax(dim=0)
    best, least = largest, torch.full_like(largest, torch.inf)
    for divisor in DIVISORS:
        c = largest / divisor
        i = integers(scales, c)
        error = (scales - c * i).square_().sum(dim=0)
        error[(i.amin(dim=0) < LOWEST) | (i.amax(dim=0) > HIGHEST)] = torch.inf  # the kernels don't clamp
        better = error < least * (1 - 1e-4) - 1e-9 * largest.square()  # a later one must be better by more than rounding
        best, least = torch.where(better, c, best), torch.where(better, error, least)
    return best


def rounded(weight_scale, row_scale):
    """The scales (G, N) float32 that the int8 kernels compute with."""
    return row_scale * integers(weight_scale, row_scale)
