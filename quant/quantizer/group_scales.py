"""The scales of the 4-bit groups, chosen by the error that they leave and not only by the largest weight.

A scale may be negative: then the group's extreme has code -8, and the grid reaches one step further on its side.
Integer scales are c_n * i, with one c_n per row and i = 1..16 per group: a kernel then multiplies the codes by i in 8-bit integers and
needs no rescaling in its loop. c_n has four significant bits, so that c_n * i is exact in bf16, and only the
scale tensor needs to be stored.
"""

import torch

from ...cuda import group_error as kernel
from ...cuda.int4 import GROUP_SIZE, SIGNED_MAX
from .rounding import row_chunks

CODE_MIN, CODE_MAX = -SIGNED_MAX - 1, SIGNED_MAX
POSITIVE_FACTORS = tuple(1 - 0.05 * i for i in range(7))  # times absmax / 7: clipping the extreme allows finer steps
NEGATIVE_FACTORS = tuple(1 - 0.05 * i for i in range(4))  # times absmax / 8, with the extreme at code -8
MAX_INTEGER = 16  # code * i must fit int8: -8 * 16 = -128
MAX_NEGATIVE_INTEGER = 15  # -8 * -16 = 128 would not fit
ROW_DIVISORS = (16, 15, 14, 13, 12, 11)  # candidates for i of the row's largest group, which give six choices of c_n


def _groups(weight):
    return weight.unflatten(-1, (-1, GROUP_SIZE))


def group_error(groups, steps, energy):
    """The error that rounding leaves: the sum over each group of energy * (weight - code * step)^2.

    groups: (N, G, 64); steps: (N, G), not 0; energy: (G, 64), the mean square of each input; all float32. Returns (N, G).
    """
    if kernel.available(groups):
        return kernel.group_error(groups, steps, energy)
    steps = steps.unsqueeze(-1)
    codes = (groups / steps).round_().clamp_(CODE_MIN, CODE_MAX)
    return codes.mul_(steps).sub_(groups).square_().mul_(energy).sum(dim=-1)


def _better(groups, energy, best, error, steps):
    """For each group, the better of `best`, whose error is `error`, and `steps`. Returns (steps, error), (N, G) each."""
    new = group_error(groups, steps, energy)
    better = new < error
    return torch.where(better, steps, best), torch.where(better, new, error)


def free_steps(groups, energy):
    """The best step of each group among the candidates. groups: (N, G, 64), energy: (G, 64). Returns (N, G) float32."""
    index = groups.abs().argmax(dim=-1, keepdim=True)
    extreme = groups.gather(-1, index).squeeze(-1)  # (N, G), with its sign
    # A group of zeros gets its row's largest step: any step will do, and this one does not widen the row's range.
    largest = extreme.abs().amax(dim=1, keepdim=True)
    extreme = torch.where(extreme == 0, torch.where(largest == 0, torch.ones_like(largest), largest), extreme)
    best = extreme.abs() / CODE_MAX
    error = group_error(groups, best, energy)
    for factor in POSITIVE_FACTORS[1:]:
        best, error = _better(groups, energy, best, error, extreme.abs() * (factor / CODE_MAX))
    for factor in NEGATIVE_FACTORS:
        best, error = _better(groups, energy, best, error, extreme * (factor / CODE_MIN))
    return best


def four_bits(values):
    """Positive values rounded to four significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)


def integer_steps(groups, energy, free):
    """Steps c_n * i close to the free ones, chosen by error: c_n among six candidates per row, then i among its neighbours.

    groups: (N, G, 64); energy: (G, 64); free: (N, G). Returns (N, G) float32.
    """
    sign = free.sign()
    limit = torch.where(sign < 0, float(MAX_NEGATIVE_INTEGER), float(MAX_INTEGER))
    largest = free.abs().amax(dim=1, keepdim=True)
    best_row = best = best_error = None
    for divisor in ROW_DIVISORS:
        row = four_bits(largest / divisor)  # (N, 1)
        steps = sign * row * torch.minimum((free.abs() / row).round().clamp_min_(1), limit)
        error = group_error(groups, steps, energy)
        if best is None:
            best_row, best, best_error = row, steps, error
            continue
        better = error.sum(dim=1, keepdim=True) < best_error.sum(dim=1, keepdim=True)
        best_row = torch.where(better, row, best_row)
        best, best_error = torch.where(better, steps, best), torch.where(better, error, best_error)
    integers = (best / best_row).abs().round()
    for change in (-1, 1, 2):
        steps = sign * best_row * torch.minimum((integers + change).clamp_min_(1), limit)
        best, best_error = _better(groups, energy, best, best_error, steps)
    return best


def search(weight, energy, dtype, integer=True):
    """Scales that leave the least error in the layer's output, under the assumption that its inputs are independent.

    weight: (N, K) float32, the residual to be rounded; energy: (K,), the mean square of each smoothed input, or None for
    equal ones; dtype: the 16-bit type in which the scales are stored; integer: whether they are c_n * i. Returns (G, N) in `dtype`.
    Free scales are never worse than absmax / 7.
    """
    energy = torch.ones(weight.shape[1], device=weight.device) if energy is None else energy
    energy = energy.view(-1, GROUP_SIZE)
    found = torch.empty(len(energy), weight.shape[0], dtype=dtype, device=weight.device)
    # The kernel keeps intermediate results in registers, so it gains nothing from chunks.
    for rows in [slice(None)] if kernel.available(weight) else row_chunks(weight):
        groups = _groups(weight[rows])
        steps = free_steps(groups, energy)
        found[:, rows] = (integer_steps(groups, energy, steps) if integer else steps).t()
    return found
