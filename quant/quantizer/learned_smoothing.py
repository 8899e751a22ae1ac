"""The smoothing factor learned by gradient, from where the search ends.

The search knows two exponents a layer; here every channel has a factor of its own. Rounding has no useful derivative, so what is
lowered is the output error that rounding leaves on average: a group's step is its largest magnitude over 8 (15 without a sign; 7 of
the weight) and
the error of each number in it that of a uniform one, step^2 / 12, or the number's own square where that is far below the step.
Both sides count: the activation's error goes through the energy of the residual's columns, the weight's through that of the inputs.

The branch takes part without an SVD a step: it holds the largest right singular vectors of W diag(s), which one power iteration a
step follows. No gradient goes through them: the residual's norm is stationary there.
"""

from dataclasses import dataclass

import torch

from ...cuda.int4 import GELU_SHIFT, GROUP_SIZE, SIGNED_MAX, SIGNED_MIN, UNSIGNED_MAX
from . import lowrank, smoothing

ROWS = 2048  # of W that stand for all, which bounds the memory
STRETCHES = 8  # that the tokens are cut into; every second one is not learned from, but judges
STEPS = 60
CHECKED_EVERY = 15  # steps between two measurements of the real error
RATE = 0.03  # Adam's, of log s; falls to zero as half a cosine
DECAYS = (0.9, 0.95)  # of Adam's two averages
UNIFORM = 1 / 12  # variance of a number rounded to whole ones


@dataclass(frozen=True)
class Learned:
    """factor: (K,) float32; error: relative output error of the layer on the tokens that judge; error_before: the same of the factor
    that learning began with."""

    factor: torch.Tensor
    error: float
    error_before: float


def expected_error(rows, tokens, log_factor, basis, unsigned_from):
    """What rounding leaves on average of the outputs' squares, over the tokens, summed over the rows; differentiable in log_factor.

    rows: (N, K), tokens: (M, K), log_factor: (K,), basis: (K, R) orthonormal, the branch's right singular vectors; float32.
    unsigned_from: int, the first column that comes out of a GELU.
    """
    factor = log_factor.exp()
    smoothed = rows * factor
    residual = smoothed - (smoothed @ basis) @ basis.t()
    columns = torch.arange(len(factor), device=factor.device)
    shift = torch.where(columns < unsigned_from, 0.0, GELU_SHIFT)
    largest = torch.where(columns < unsigned_from, -SIGNED_MIN, UNSIGNED_MAX)[::GROUP_SIZE].unsqueeze(-1)  # (G, 1)
    groups = ((tokens + shift) / factor).unflatten(-1, (-1, GROUP_SIZE))  # (M, G, 64)
    square = groups.square()
    steps = (groups.abs().amax(dim=-1, keepdim=True) / largest).square()
    # step^2 / 12 for numbers of a step and more, the number's square for those that are rounded away.
    act_error = steps * square / (steps + square / UNIFORM).clamp_min(torch.finfo(torch.float32).tiny)
    from_act = (act_error.mean(dim=0).flatten() * residual.square().sum(dim=0)).sum()
    weight_steps = residual.unflatten(-1, (-1, GROUP_SIZE)).abs().amax(dim=-1) / SIGNED_MAX  # (N, G)
    energy = (tokens / factor).square().mean(dim=0).unflatten(-1, (-1, GROUP_SIZE)).sum(dim=-1)  # (G,)
    return from_act + (weight_steps.square().sum(dim=0) * energy).sum() * UNIFORM


def measured_error(rows, tokens, factor, rank, unsigned_from, dtype):
    """smoothing.output_error with the branch of its own."""
    up = lowrank.left_bases((rows * factor).unsqueeze(0), rank)[0]
    return smoothing.output_error(rows, tokens, factor, up, unsigned_from, dtype)


def split(tokens):
    """Tokens to learn from and tokens to judge by, in alternating stretches: neighbours come from one prompt or noise level."""
    stretches = tokens.tensor_split(STRETCHES)
    return torch.cat(stretches[::2]), torch.cat(stretches[1::2])


def learn(weight, x, start, rank, unsigned_from, dtype, check=lambda: None):
    """A better factor than `start` for one layer, where there is one.

    weight: (N, K) float32; x: (M, K) float32 sample of the input; start: (K,) float32; unsigned_from: int, the first column that
    comes out of a GELU; dtype: of the scales; check: called at every step, to cancel. Returns Learned: what measured best on
    tokens that it was not learned from, `start` among it.
    """
    # ComfyUI runs nodes in inference mode, whose tensors autograd does not take; these copies are ordinary ones.
    with torch.inference_mode(False), torch.enable_grad():
        rows = weight.detach()[smoothing.evenly_spaced_indices(weight.shape[0], ROWS).to(weight.device)]
        (tokens, judges), best_factor = split(x), start.clone()
        before = best = measured_error(rows, judges, best_factor, rank, unsigned_from, dtype)
        log_factor = best_factor.log().requires_grad_()
        adam = torch.optim.Adam([log_factor], lr=RATE, betas=DECAYS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        basis = lowrank.orthonormal(lowrank.low_rank(rows * best_factor, rank)[1])
        for step in range(1, STEPS + 1):
            check()
            with torch.no_grad():
                smoothed = rows * log_factor.exp()
                basis = lowrank.orthonormal(smoothed.t() @ (smoothed @ basis))
            adam.zero_grad()
            expected_error(rows, tokens, log_factor, basis, unsigned_from).clamp_min(torch.finfo(torch.float32).tiny).log().backward()
            adam.step()
            schedule.step()
            if step % CHECKED_EVERY == 0:
                # A common factor changes nothing, and is kept from drifting.
                moved = log_factor.detach() - start.log()
                factor = (start * (moved - moved.mean()).exp()).clamp(1 / smoothing.LARGEST, smoothing.LARGEST)
                error = measured_error(rows, judges, factor, rank, unsigned_from, dtype)
                if error < best:
                    best, best_factor = error, factor
    return Learned(best_factor, best, before)
