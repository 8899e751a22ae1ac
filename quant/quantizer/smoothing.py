"""The smoothing factor: how much of the activation's outliers each input channel moves into the weight.

A layer multiplies x / s by W diag(s), so s moves outliers from the activation to the weight, where the low-rank branch absorbs them.
The search tries a grid of s = x_span^a / w_span^(1-a) and keeps the one whose layer, with branch, 4-bit weights and 4-bit activations, is
closest to the 16-bit layer (arXiv 2411.05007, section 4.2, here with spans of two kinds).
"""

import itertools
from dataclasses import dataclass

import torch

from ...cuda.int4 import GELU_SHIFT
from ...cuda.reference import quantize_activation, scaled_codes
from . import lowrank, rounding
from .metrics import relative_error

EXPONENTS = tuple(i / 10 for i in range(1, 11))
SPANS = ("absmax", "rms")
SEARCH_ROWS = 256  # rows of W that represent all of them: more change nothing (measured against the whole matrix)
ROWS_PER_RANK = 4  # a branch with as many ranks as rows would be exact on them, and hide the error of the others
LARGEST = 2.0**12  # bound of a factor and its inverse: fp16 can store both, and the branch divided by the factor
SEARCH_TOKENS = 512
BATCH_ELEMENTS = 1 << 25  # elements of the candidates whose branches are computed together


@dataclass(frozen=True)
class Smoothing:
    """A smoothing factor and how it was found."""

    factor: torch.Tensor  # (K,) float32
    label: str  # "1", or "absmax^0.7 : rms^0.3": span of x and its exponent, span of w and its exponent
    error: float  # relative output error of the candidate layer on the search's rows and tokens
    error_unsmoothed: float  # the same with s = 1


def spans(values):
    """(rows, K) -> {"absmax": (K,), "rms": (K,)}, over the rows."""
    return {"absmax": values.abs().amax(dim=0), "rms": values.square().mean(dim=0).sqrt()}


def candidate(x_span, w_span, exponent):
    """s = x_span^a / w_span^(1-a), (K,), scaled to a geometric mean of 1; dead channels get 1."""
    factor = x_span.pow(exponent) / w_span.pow(1 - exponent)
    alive = torch.isfinite(factor) & (factor > 0)
    if not alive.any():
        return torch.ones_like(factor)
    return torch.where(alive, factor / factor[alive].log().mean().exp(), 1.0).clamp(1 / LARGEST, LARGEST)


def candidates(x_spans, w_spans):
    """Yield (label, factor) for s = 1 and the grid; the spans as from `spans`."""
    yield "1", torch.ones_like(x_spans["absmax"])
    for x_kind in SPANS:
        for w_kind in SPANS:
            for a in EXPONENTS:
                yield f"{x_kind}^{a:g} : {w_kind}^{1 - a:.2g}", candidate(x_spans[x_kind], w_spans[w_kind], a)


def balanced(factors, x_rms):
    """The factors of a layer's parts, joined so that every part's smoothed input has the same mean square.

    The branch is fitted to all columns at once, as if their inputs were alike, but the search of one part determines its factor only up to
    a constant. factors, x_rms: for each part one (K,). Returns (sum of K,), with a geometric mean of 1.
    """
    energies = [(rms / factor).square().mean() for factor, rms in zip(factors, x_rms)]
    scaled = torch.cat([factor * (energy.sqrt() if energy > 0 else 1) for factor, energy in zip(factors, energies)])
    return (scaled / scaled.log().mean().exp()).clamp(1 / LARGEST, LARGEST)


def data_free(w_spans):
    """s from the weight alone, s = absmax(W)^(-1/2), for layers without calibration."""
    ones = torch.ones_like(w_spans["absmax"])
    return candidate(ones, w_spans["absmax"], 0.5)


def output_error(weight, x, factor, up, unsigned_from, dtype):
    """Relative output error ‖y - ŷ‖ / ‖y‖ of a W4A4 layer with branch under smoothing `factor`.

    weight: (N, K) float32, x: (M, K) float32, factor: (K,), up: (N, R), lowrank.left_bases of weight * factor; unsigned_from:
    int, the first column that comes out of a GELU.
    """
    smoothed = weight * factor
    down = smoothed.t() @ up
    residual = smoothed - up @ down.t()
    scales = rounding.absmax_scales(residual, dtype)
    dequantized = scaled_codes(rounding.round_to_nearest(residual, scales).float(), scales.float().t())
    act = scaled_codes(*quantize_activation(x, factor, unsigned_from))
    # The shift's constant contribution goes into the bias, so it does not count as an error.
    shift = GELU_SHIFT * (dequantized / factor)[:, unsigned_from:].sum(dim=-1)
    estimate = act @ dequantized.t() + (x / factor) @ down @ up.t() - shift
    return relative_error(estimate, x @ weight.t())


def search(weight, x, x_spans, rank, unsigned, dtype, check=lambda: None):
    """The best smoothing factor of the grid for one layer, or one part of a layer's columns.

    weight: (N, K) float32; x: (M, K) float32 sample of the input, of which at most SEARCH_TOKENS rows are used; x_spans: spans of all the
    recorded input; unsigned: whether the columns come out of a GELU; dtype: of the scales; check: called between candidates, to cancel.
    Returns Smoothing; never worse than s = 1 on its own objective, since s = 1 is a candidate.
    """
    w_spans = spans(weight)
    rows = weight[evenly_spaced_indices(weight.shape[0], max(SEARCH_ROWS, ROWS_PER_RANK * rank)).to(weight.device)]
    tokens = x[evenly_spaced_indices(x.shape[0], SEARCH_TOKENS).to(x.device)]
    best = None
    for label, factor, up in with_branches(candidates(x_spans, w_spans), rows, rank):
        check()
        error = output_error(rows, tokens, factor, up, 0 if unsigned else x.shape[-1], dtype)
        if best is None:
            best = Smoothing(factor, label, error, error)
        elif error < best.error:
            best = Smoothing(factor, label, error, best.error_unsmoothed)
    return best


def with_branches(labels_and_factors, weight, rank):
    """Yield (label, factor, the branch's up (N, R) for weight * factor)."""
    remaining = iter(labels_and_factors)
    while batch := list(itertools.islice(remaining, max(1, BATCH_ELEMENTS // weight.numel()))):
        smoothed = weight * torch.stack([factor for _, factor in batch]).unsqueeze(1)
        for (label, factor), up in zip(batch, lowrank.left_bases(smoothed, rank)):
            yield label, factor, up


def evenly_spaced_indices(count, most):
    """Indices of at most `most` of `count` rows, evenly spaced, so that every part of the matrix is represented."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()
