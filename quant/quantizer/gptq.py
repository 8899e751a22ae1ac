"""GPTQ on the residual: round column by column and let the columns to come make up for what each one lost
(arXiv 2210.17323), with the group scales fixed beforehand and the most active inputs first.

It is done as Babai's nearest plane (arXiv 2507.18553), which gives the same codes from the Gram matrix's own Cholesky factor
and inverts nothing. With H = C C^T, C lower, and the errors e of a row, the metric is

    e H e^T = sum over j of  (e_j C_jj + sum over i > j of e_i C_ij)^2

so that, from the last column to the first, each column j aims at w_j + (sum over i > j of e_i C_ij) / C_jj.
"""

from dataclasses import dataclass

import torch

from ...cuda import gptq as kernel
from ...cuda.int4 import GROUP_SIZE
from .group_scales import CODE_MAX, CODE_MIN
from .rounding import round_to_nearest

BLOCK = kernel.COLUMNS  # columns between two updates of all that follow
DAMPING = 0.1  # of the mean diagonal
DAMPING_FEW_TOKENS = 0.3  # where fewer tokens were seen than twice the columns
RETRIES = 4  # each with ten times the damping
PERMUTED_ROWS = 1024  # of the Gram matrix that are put in order at a time: the whole would be a third copy of it


def damping(tokens, columns):
    """How much of the mean diagonal to add: little data needs more, or GPTQ fits what is not there."""
    return DAMPING_FEW_TOKENS if tokens < 2 * columns else DAMPING


@dataclass(frozen=True)
class Factor:
    """What GPTQ and refit know of a layer's inputs.

    order: (K,) the inputs by their energy, the most active last; lower: (K, K) float32, C with C C^T = H + λ I for the Gram
    matrix H of the inputs in that order; damping: λ in units of H's mean diagonal.
    """

    order: torch.Tensor
    lower: torch.Tensor
    damping: float


def damped_cholesky(gram, damp, smooth=None, noise=None):
    """The Factor of inputs with the Gram matrix `gram`, divided by `smooth`, plus `noise` on its diagonal; with more damping than
    `damp`, ten times as much at a time, where that leaves no Cholesky factor.

    gram: (K, K) float32, symmetric; smooth: (K,), or None for ones; noise: (K,), or None for zeros. Takes one more matrix of
    gram's size.
    """
    smooth = torch.ones_like(gram[0]) if smooth is None else smooth
    diagonal = gram.diagonal() / smooth.square()
    order = diagonal.cpu().argsort(stable=True).to(gram.device)  # CUDA's sorting kernels take 35 MB of host memory
    mean = diagonal.mean().clamp_min(torch.finfo(gram.dtype).tiny)
    divisor = smooth[order]
    damped, info = torch.empty_like(gram), torch.empty((), dtype=torch.int32, device=gram.device)
    for attempt in range(RETRIES):
        for rows in torch.arange(len(gram), device=gram.device).split(PERMUTED_ROWS):
            torch.div(gram[order[rows]][:, order], divisor * divisor[rows, None], out=damped[rows[0]:rows[-1] + 1])
        strength = damp * 10**attempt
        damped.diagonal().add_(mean * strength + (0 if noise is None else noise[order]))
        # LAPACK's matrices are stored by columns: the symmetric one's transpose is the same, and is factored in its own memory.
        lower = damped.t()
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not info:
            return Factor(order, lower, strength)
    raise ValueError("The statistics of a layer's input are not usable: no Cholesky factor. Calibrate on other prompts.")


def gptq_round(weight, scales, factor, check=lambda: None):
    """Codes for `weight` under fixed scales that leave less error in the output than rounding to nearest.

    weight: (N, K) float32; scales: (G, N); factor: Factor of the layer's inputs; check: called between blocks, to cancel.
    Returns (N, K) int8, -8..7.
    """
    if not scales.any():
        return round_to_nearest(weight, scales)
    steps = scales.float().t().contiguous()  # (N, G)
    inverse = torch.where(steps == 0, torch.zeros_like(steps), 1 / steps)  # such a group's codes stand for nothing: all are 0
    # Divided on the CPU, as `order` is sorted there.
    groups = (torch.arange(weight.shape[1]) // GROUP_SIZE).int().to(weight.device)[factor.order]
    weight = weight[:, factor.order]
    pending = torch.zeros_like(weight)  # for each column, the sum over the columns done of e_i C_ij
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
    """cuda.gptq.round_block in plain PyTorch: the path where there is no GPU kernel."""
    groups, per_diagonal = groups.long(), 1 / lower.diagonal()
    # A column of the weight is a row here, and so in one piece.
    weight, pending, steps, inverse = weight.t().contiguous(), pending.t().contiguous(), steps.t()[groups], inverse.t()[groups]
    lost = torch.empty_like(weight)
    for i in reversed(range(len(lower))):
        code = torch.addcmul(weight[i], pending[i], per_diagonal[i]).mul_(inverse[i]).round_().clamp_(CODE_MIN, CODE_MAX)
        torch.addcmul(weight[i], code, steps[i], value=-1, out=lost[i])
        codes[:, i] = code
        pending[:i].addr_(lower[i, :i], lost[i])
    return lost.t()
