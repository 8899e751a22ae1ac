"""GPTQ on the residual: round column by column and let the columns to come make up for what each one lost
(arXiv 2210.17323), with the group scales fixed beforehand and the most active inputs first."""

import torch

from ..cuda.int4 import GROUP_SIZE
from .rounding import round_to_nearest
from .scales import CODE_MAX, CODE_MIN

BLOCK = 128  # columns between two updates of all that follow
DAMPING = 0.1  # of the mean diagonal
DAMPING_FEW_TOKENS = 0.3  # where fewer tokens were seen than twice the columns
RETRIES = 4  # each with ten times the damping


def damping(tokens, columns):
    """How much of the mean diagonal to add: little data needs more, or GPTQ fits what is not there."""
    return DAMPING_FEW_TOKENS if tokens < 2 * columns else DAMPING


def damped_cholesky(gram, damp):
    """Lower C with C C^T = gram + λ I, λ = damp times the mean diagonal; more where that is not positive definite.

    gram: (K, K) float32, symmetric. Returns (K, K).
    """
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    damped = gram.clone()
    for attempt in range(RETRIES):
        damped.diagonal().copy_(gram.diagonal() + mean * damp * 10**attempt)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info:
            return factor
    raise ValueError("The statistics of a layer's input are not usable: no Cholesky factor. Calibrate on other prompts.")


def gptq_round(weight, scales, cholesky, check=lambda: None):
    """Codes for `weight` under fixed scales that leave less error in the output than rounding to nearest.

    weight: (N, K) float32; scales: (G, N); cholesky: (K, K), of the damped Gram matrix of the inputs; check:
    called between blocks, to cancel. Returns (N, K) int8.
    """
    if not scales.any():
        return round_to_nearest(weight, scales)
    inverse = torch.cholesky_inverse(cholesky)
    # The most active inputs go first, while many columns can still make up for them.
    order = cholesky.square().sum(dim=1).argsort(descending=True)
    upper = torch.linalg.cholesky(inverse[order][:, order], upper=True)
    steps = scales.float().t()
    steps = torch.where(steps == 0, torch.ones_like(steps), steps)[:, order // GROUP_SIZE]  # (N, K)
    rest = weight[:, order].clone()
    codes = torch.empty_like(rest)
    for start in range(0, weight.shape[1], BLOCK):
        check()
        stop = min(start + BLOCK, weight.shape[1])
        codes[:, start:stop], lost = _round_block(rest[:, start:stop], steps[:, start:stop], upper[start:stop, start:stop])
        rest[:, stop:] -= lost @ upper[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8)


def _round_block(block, steps, upper):
    """Round a block of columns one after the other. Returns its codes and the error that each column leaves to those after
    the block; all (N, columns)."""
    columns, steps = block.t().contiguous(), steps.t().contiguous()  # rows are contiguous: one column of the weight each
    codes, lost = torch.empty_like(columns), torch.empty_like(columns)
    for i in range(len(columns)):
        codes[i] = (columns[i] / steps[i]).round_().clamp_(CODE_MIN, CODE_MAX)
        lost[i] = (columns[i] - codes[i] * steps[i]) / upper[i, i]
        columns[i + 1:].addr_(upper[i, i + 1:], lost[i], alpha=-1)
    return codes.t(), lost.t()
