"""GPTQ on the residual (arXiv 2210.17323): round column by column, and let the remaining columns compensate for each rounding error.
The group scales are fixed beforehand, and the most active inputs come first.

It is computed as Babai's nearest plane (arXiv 2507.18553), which gives the same codes from the Cholesky factor of the Gram matrix itself
and inverts nothing. With H = C C^T, C lower triangular, and the rounding errors e of a row, the squared output error is

    e H e^T = sum over j of  (e_j C_jj + sum over i > j of e_i C_ij)^2

so the columns are rounded from the last to the first, and the target of column j is w_j + (sum over i > j of e_i C_ij) / C_jj.
"""

from dataclasses import dataclass

import torch

from ...cuda import gptq as kernel
from ...cuda.int4 import GROUP_SIZE
from .group_scales import CODE_MAX, CODE_MIN
from .rounding import round_to_nearest

BLOCK = kernel.COLUMNS  # columns that are rounded between two updates of the remaining columns
DAMPING = 0.1  # in units of the mean diagonal
DAMPING_FEW_TOKENS = 0.3  # if there are fewer tokens than twice the number of columns
ATTEMPTS = 4  # each with ten times the damping of the one before
PERMUTED_ROWS = 1024  # rows of the Gram matrix that are permuted at a time; all at once would need a third copy of it


def damping(tokens, columns):
    """The damping, in units of the mean diagonal. Few tokens need more, or GPTQ overfits to them."""
    return DAMPING_FEW_TOKENS if tokens < 2 * columns else DAMPING


@dataclass(frozen=True)
class Factor:
    """The Gram matrix of a layer's inputs, in the form that GPTQ and refit use.

    order: (K,) int64, the inputs by ascending energy; lower: (K, K) float32, C with C C^T = H + λ I for the Gram
    matrix H of the inputs in that order; damping: λ in units of H's mean diagonal.
    """

    order: torch.Tensor
    lower: torch.Tensor
    damping: float


def damped_cholesky(gram, damp, smooth=None, noise=None):
    """The Factor of inputs that have the Gram matrix `gram` and are then divided by `smooth`, with `noise` added to its diagonal.

    gram: (K, K) float32, symmetric; damp: in units of the mean diagonal, raised tenfold until a Cholesky factor exists; smooth: (K,), or
    None for ones; noise: (K,), or None for zeros. Allocates one more matrix of gram's size. Raises ValueError if no damping is enough.
    """
    smooth = torch.ones_like(gram[0]) if smooth is None else smooth
    diagonal = gram.diagonal() / smooth.square()
    order = diagonal.cpu().argsort(stable=True).to(gram.device)  # CUDA's sorting kernels take 35 MB of host memory
    mean = diagonal.mean().clamp_min(torch.finfo(gram.dtype).tiny)
    divisor = smooth[order]
    damped, info = torch.empty_like(gram), torch.empty((), dtype=torch.int32, device=gram.device)
    for attempt in range(ATTEMPTS):
        for rows in torch.arange(len(gram), device=gram.device).split(PERMUTED_ROWS):
            torch.div(gram[order[rows]][:, order], divisor * divisor[rows, None], out=damped[rows[0]:rows[-1] + 1])
        strength = damp * 10**attempt
        damped.diagonal().add_(mean * strength + (0 if noise is None else noise[order]))
        # LAPACK stores matrices by columns. The transpose of a symmetric matrix is the same matrix, so it is factored in place.
        lower = damped.t()
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not info:
            return Factor(order, lower, strength)
    raise ValueError("The Gram matrix of a layer's inputs has no Cholesky factor, even with more damping; calibrate on other prompts.")


def gptq_round(weight, scales, factor, check=lambda: None):
    """Codes for `weight` under fixed scales, with a smaller output error than rounding to nearest.

    weight: (N, K) float32; scales: (G, N); factor: Factor of the layer's inputs; check: called between blocks, to cancel.
    Returns (N, K) int8, -8..7.
    """
    if not scales.any():
        return round_to_nearest(weight, scales)
    steps = scales.float().t().contiguous()  # (N, G)
    inverse = torch.where(steps == 0, torch.zeros_like(steps), 1 / steps)  # codes with a scale of 0 have no effect: all are 0
    # The division runs on the CPU, like the sort in damped_cholesky.
    groups = (torch.arange(weight.shape[1]) // GROUP_SIZE).int().to(weight.device)[factor.order]
    weight = weight[:, factor.order]
    pending = torch.zeros_like(weight)  # for each column j, the sum of e_i C_ij over the rounded columns i
    codes = torch.empty_like(weight, dtype=torch.int8)
    round_block = kernel.round_block if kernel.available(weight) else _round_block
    for stop in range(weight.shape[1], 0, -BLOCK):
        check()
        start = max(0, stop - BLOCK)
        columns = slice(start, stop)
        block = factor.lower[columns, columns].contiguous()
        lost = round_block(weight[:, columns], pending[:, columns], steps, inverse, groups[columns], block,
                           codes[:, columns])
        pending[:, :start].addmm_(lost, factor.lower[columns, :start])
    natural = torch.empty_like(codes)
    natural[:, factor.order] = codes
    return natural


def _round_block(weight, pending, steps, inverse, groups, lower, codes):
    """cuda.gptq.round_block in plain PyTorch, for devices without that kernel."""
    groups, per_diagonal = groups.long(), 1 / lower.diagonal()
    # Transposed, so that each column of the weight is contiguous.
    weight, pending, steps, inverse = weight.t().contiguous(), pending.t().contiguous(), steps.t()[groups], inverse.t()[groups]
    lost = torch.empty_like(weight)
    for i in reversed(range(len(lower))):
        code = torch.addcmul(weight[i], pending[i], per_diagonal[i]).mul_(inverse[i]).round_().clamp_(CODE_MIN, CODE_MAX)
        torch.addcmul(weight[i], code, steps[i], value=-1, out=lost[i])
        codes[:, i] = code
        pending[:i].addr_(lower[i, :i], lost[i])
    return lost.t()
