"""Integer group scales: every scale of a weight row as one float of the row times a small integer.

    weight_scale[g, n] = c_n * i[g, n],   i in -15..16

With these, code * i fits int8 and the int32 sum of a row runs over all of K (kernels/gemm_wgmma.cu). Our quantizer writes such
scales; other people's checkpoints have free ones, of which the nearest are taken. Files of ours have i and c_n in place of the
scales, where those are their products to the bit.
"""

import torch

LOWEST, HIGHEST = -15, 16
# max|scale| / c of the candidates. Whole numbers find every exact c; those between serve free scales, whose best c is
# one where the largest scale needn't be hit exactly.
LOOK = 8  # every such group tells whether a candidate is worth a look at them all
DIVISORS = (*range(1, 17), *(10 + step / 8 for step in range(52) if step % 8))


def integers(weight_scale, row_scale):
    """i (G, N) float32, whole numbers, as the kernels compute them."""
    inverse = torch.where(row_scale == 0, torch.zeros_like(row_scale), row_scale.reciprocal())
    return (weight_scale * inverse).round_()


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


def exact_row_scale(weight_scale):
    """weight_scale (G, N) 16 bit -> c (N,) of its dtype, with which product(integers, c) is weight_scale to the bit; None where
    a row has no such c. c * 16 is finite."""
    largest, look = weight_scale.abs().amax(dim=0).float(), weight_scale[::LOOK].contiguous()
    found, settled = torch.empty_like(weight_scale[0]), torch.zeros_like(weight_scale[0], dtype=torch.bool)
    for divisor in range(HIGHEST, 0, -1):  # of our quantizer's rows, the most have a largest integer of 16, 15, ...
        c = (largest / divisor).to(weight_scale.dtype)
        rows = (_is_exact(look, c) & ~settled).nonzero().squeeze(1)
        rows = rows[_is_exact(weight_scale[:, rows], c[rows])]
        found[rows], settled[rows] = c[rows], True
        if settled.all():
            return found
    return None


def _is_exact(weight_scale, row_scale):
    """(N,) bool: whether the scales of a row are products of the row's float and integers."""
    i = integers(weight_scale, row_scale.float())
    fits = (i.amin(dim=0) >= LOWEST) & (i.amax(dim=0) <= HIGHEST) & (row_scale * HIGHEST).isfinite()
    # Of integers: == of floats does not tell -0 from 0.
    differ = product(i.to(torch.int8), row_scale).view(torch.int16) ^ weight_scale.view(torch.int16)
    return fits & (differ.amin(dim=0) == 0) & (differ.amax(dim=0) == 0)


def product(integers, row_scale):
    """The scales (G, N) 16 bit that integers (G, N) int8 and floats of the rows (N,) 16 bit stand for."""
    return integers * row_scale
