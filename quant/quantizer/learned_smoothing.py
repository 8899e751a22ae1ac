"""The smoothing factor learned by gradient descent, starting from the result of the search.

The search chooses two exponents per layer; here every channel has its own factor. Rounding has no useful derivative, so the loss is the
expected output error. A group's step is its largest magnitude divided by 8 (by 15 for unsigned codes, by 7 for weights). The error of a
number in the group is taken as uniformly distributed, with mean square step^2 / 12. A number far below the step rounds to zero, so its
error is its own square. The loss adds two terms: the activation's error times the energy of the residual's columns, and the weight's
error times the energy of the inputs.

The loss includes the branch without an SVD per step: the branch spans the largest right singular vectors of W diag(s), and one power
iteration per step tracks them. No gradient goes through them, because the residual's norm is stationary there.
"""

from dataclasses import dataclass

import torch

from ...cuda.int4 import GELU_SHIFT, GROUP_SIZE, SIGNED_MAX, SIGNED_MIN, UNSIGNED_MAX
from . import lowrank, smoothing

ROWS = 2048  # rows of W that represent all of them, which bounds the memory
STRETCHES = 8  # parts into which the tokens are cut; every second one is held out
STEPS = 60
CHECKED_EVERY = 15  # steps between two measurements of the real error
RATE = 0.03  # Adam's learning rate of log s; decays to zero along a cosine
BETAS = (0.9, 0.95)  # Adam's
UNIFORM = 1 / 12  # variance of the rounding error for a step of 1


@dataclass(frozen=True)
class Learned:
    """factor: (K,) float32; error: the layer's relative output error on the held-out tokens; error_before: the same with the factor from
    which learning started."""

    factor: torch.Tensor
    error: float
    error_before: float


def expected_error(rows, tokens, log_factor, basis, unsigned_from):
    """The expected squared error of the outputs, averaged over the tokens and summed over the rows; differentiable in log_factor.

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
    # step^2 / 12 for numbers of about a step or more, the number's own square for those that round to zero.
    act_error = steps * square / (steps + square / UNIFORM).clamp_min(torch.finfo(torch.float32).tiny)
    from_act = (act_error.mean(dim=0).flatten() * residual.square().sum(dim=0)).sum()
    weight_steps = residual.unflatten(-1, (-1, GROUP_SIZE)).abs().amax(dim=-1) / SIGNED_MAX  # (N, G)
    energy = (tokens / factor).square().mean(dim=0).unflatten(-1, (-1, GROUP_SIZE)).sum(dim=-1)  # (G,)
    return from_act + (weight_steps.square().sum(dim=0) * energy).sum() * UNIFORM


def measured_error(rows, tokens, factor, rank, unsigned_from, dtype):
    """smoothing.output_error under `factor`, with the branch that belongs to it."""
    up = lowrank.left_bases((rows * factor).unsqueeze(0), rank)[0]
    return smoothing.output_error(rows, tokens, factor, up, unsigned_from, dtype)


def split(tokens):
    """(learning tokens, held-out tokens), in alternating stretches, because neighbours come from the same prompt or noise level."""
    stretches = tokens.tensor_split(STRETCHES)
    return torch.cat(stretches[::2]), torch.cat(stretches[1::2])


def learn(weight, x, start, rank, unsigned_from, dtype, check=lambda: None):
    """Learn the smoothing factor of one layer.

    weight: (N, K) float32; x: (M, K) float32 sample of the input; start: (K,) float32, the initial factor; unsigned_from: int, the first
    column that comes out of a GELU; dtype: of the scales; check: called at every step, to cancel. Returns Learned, with the factor that
    has the smallest error on the held-out tokens; it is `start` if none is better.
    """
    # ComfyUI runs nodes in inference mode. Autograd does not accept tensors made in it, but copies made here are ordinary tensors.
    with torch.inference_mode(False), torch.enable_grad():
        rows = weight.detach()[smoothing.evenly_spaced_indices(weight.shape[0], ROWS).to(weight.device)]
        (tokens, held_out), best_factor = split(x), start.clone()
        before = best = measured_error(rows, held_out, best_factor, rank, unsigned_from, dtype)
        log_factor = best_factor.log().requires_grad_()
        adam = torch.optim.Adam([log_factor], lr=RATE, betas=BETAS)
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
                # A factor common to all channels has no effect, so its drift is removed.
                moved = log_factor.detach() - start.log()
                factor = (start * (moved - moved.mean()).exp()).clamp(1 / smoothing.LARGEST, smoothing.LARGEST)
                error = measured_error(rows, held_out, factor, rank, unsigned_from, dtype)
                if error < best:
                    best, best_factor = error, factor
    return Learned(best_factor, best, before)
