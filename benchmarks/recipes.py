"""Published recipes, implemented from their formulas on this pack's building blocks, and this pack's own recipe.

Each takes a Layer and a rank, and returns {parameter name: tensor} of a packed SVDQuant layer.
"""

from contextlib import contextmanager, nullcontext
from functools import lru_cache
from unittest import mock

import torch
from comfyui_svdquant.cuda import int4, reference
from comfyui_svdquant.cuda.operands import LayerOperands
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import gptq, lowrank, pipeline, presets, rounding, smoothing
from comfyui_svdquant.quant.quantizer.calibration import InputStats
from comfyui_svdquant.quant.quantizer.metrics import relative_error

DTYPE = torch.bfloat16
DEEPCOMPRESSOR_GRID = [(0.0, 0.0), *((i / 20, b) for i in range(1, 20) for b in (0.0, 1 - i / 20))]  # (alpha, beta), 39 pairs
DEEPCOMPRESSOR_ROUNDS = 100
DEEPCOMPRESSOR_DAMPING = 0.01
DEEPCOMPRESSOR_TOKENS = 8192  # on which the outputs are compared
OUR_CODES = ", activations to -8"  # in a row's name: a published recipe, measured with this pack's activation codes


@contextmanager
def published_activations():
    """A context in which 4-bit activations have the codes -7..7 of published SVDQuant, for the published recipes."""
    with mock.patch.object(reference, "activation_scales", reference.symmetric_scales):
        yield


def spec_of(layer, rank):
    n, k = layer.weight.shape
    return layout.svdquant_spec(k, n, rank, 0 if layer.unsigned else k, True, DTYPE)


def evenly_spaced_rows(x, most):
    """At most `most` evenly spaced rows of x."""
    return x[smoothing.evenly_spaced_indices(len(x), most).to(x.device)]


def output(x, tensors, spec, act_bits=4):
    return reference.svdquant_linear(x, LayerOperands(
        tensors["weight"], tensors["weight_scale"], tensors["weight_proj_down"], tensors["weight_proj_up"],
        tensors["weight_smooth_factor"], tensors["bias"], spec.unsigned_from, act_bits))


def error(layer, tensors, spec, act_bits=4):
    """Relative output error on the held-out tokens."""
    return relative_error(output(layer.held_out, tensors, spec, act_bits), layer.held_out @ layer.weight.t())


def pack(spec, smooth, up, down, codes, scales):
    """{parameter name: tensor} as stored: the branch reads the raw x, and the bias is only the GELU shift correction."""
    tensors = {"weight": int4.pack(codes), "weight_scale": scales, "weight_smooth_factor": smooth,
               "weight_proj_up": up.to(DTYPE), "weight_proj_down": (down / smooth.float().unsqueeze(-1)).to(DTYPE)}
    bias = torch.zeros(spec.out_features, device=codes.device)
    return tensors | {"bias": pipeline.gelu_shift_corrected(bias, tensors, spec)}


def one_shot(layer, spec, factor):
    """The branch is an SVD of the smoothed weight; the residual is rounded to nearest with absmax scales."""
    smooth = factor.to(DTYPE)
    smoothed = layer.weight * smooth.float()
    up, down = lowrank.low_rank(smoothed, spec.rank)
    residual = smoothed - up @ down.t()
    scales = rounding.absmax_scales(residual, DTYPE)
    return pack(spec, smooth, up, down, rounding.round_to_nearest(residual, scales), scales)


def power_smoothing(layer, alpha, beta):
    """s = absmax(x)^alpha / absmax(w)^beta."""
    factor = layer.calibration.abs().amax(0).pow(alpha) / layer.weight.abs().amax(0).pow(beta)
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)


def naive(layer, rank):
    return one_shot(layer, spec_of(layer, 0), torch.ones(layer.weight.shape[1], device=layer.weight.device))


def smoothquant(layer, rank):
    """SmoothQuant, alpha 0.5, no branch."""
    return one_shot(layer, spec_of(layer, 0), power_smoothing(layer, 0.5, 0.5))


def svdquant_one_shot(layer, rank):
    """SVDQuant with alpha 0.5 and no iteration."""
    return one_shot(layer, spec_of(layer, rank), power_smoothing(layer, 0.5, 0.5))


@lru_cache(maxsize=1)
@published_activations()
def deepcompressor_state(layer, rank):
    """DeepCompressor's default recipe before packing. A search over 39 smoothing factors, each with its branch, minimizes the output error.
    Then branch and rounding alternate up to 100 times, until the output error first rises. Returns spec, smooth and the best round."""
    spec = spec_of(layer, rank)
    x = evenly_spaced_rows(layer.calibration, DEEPCOMPRESSOR_TOKENS)
    exact = x @ layer.weight.t()
    factors = [power_smoothing(layer, a, b) for a, b in DEEPCOMPRESSOR_GRID]
    found = min(factors, key=lambda f: relative_error(output(x, one_shot(layer, spec, f), spec), exact))
    smooth = found.to(DTYPE)
    smoothed, packed, best, least = layer.weight * smooth.float(), 0, None, float("inf")
    for _ in range(DEEPCOMPRESSOR_ROUNDS):
        up, down = lowrank.low_rank(smoothed - packed, rank)
        residual = smoothed - up @ down.t()
        scales = rounding.absmax_scales(residual, DTYPE)
        codes = rounding.round_to_nearest(residual, scales)
        packed = reference.scaled_codes(codes.float(), scales.float().t())
        left = relative_error(output(x, pack(spec, smooth, up, down, codes, scales), spec), exact)
        if left >= least:
            break
        best, least = (up, down, codes, scales, residual), left
    return spec, smooth, best


def deepcompressor(layer, rank):
    spec, smooth, (up, down, codes, scales, _) = deepcompressor_state(layer, rank)
    return pack(spec, smooth, up, down, codes, scales)


def deepcompressor_gptq(layer, rank):
    """The default with GPTQ on the residual, damping 1 %. If the default ran just before, this takes only the time of GPTQ."""
    spec, smooth, (up, down, _, scales, residual) = deepcompressor_state(layer, rank)
    x = layer.calibration / smooth.float()
    cholesky = gptq.damped_cholesky(x.t() @ x / len(x), DEEPCOMPRESSOR_DAMPING)
    return pack(spec, smooth, up, down, gptq.gptq_round(residual, scales, cholesky), scales)


def ours(preset, **changes):
    """This pack's pipeline as the node runs it. `changes` replace fields of the recipe."""

    def run(layer, rank):
        spec, stats = spec_of(layer, rank), InputStats(1, with_gram=True)
        stats.add(layer.calibration)
        recipe = presets.Recipe(preset, rank, **(presets.PRESETS[preset] | changes))
        bias = torch.zeros(spec.out_features, device=layer.weight.device)
        return pipeline.quantize_layer(layer.kind, layer.weight, bias, stats, spec, recipe)[0]

    return run


OTHERS = {
    "naive rounding": naive,
    "SmoothQuant": smoothquant,
    "SVDQuant, one shot": svdquant_one_shot,
    "DeepCompressor default": deepcompressor,
    "DeepCompressor + GPTQ": deepcompressor_gptq,
}
RECIPES = OTHERS | {
    "DeepCompressor default" + OUR_CODES: deepcompressor,
    "ours: data-free": ours("data-free"),
    "ours: fast": ours("fast"),
    "ours: best, free scales": ours("best", scales="free"),
    "ours: best": ours("best"),
    "ours: slow": ours("slow"),
}


def activations(name):
    """The context in which the layers of a recipe or row are measured, with the activation codes that belong to it."""
    return published_activations() if name in OTHERS else nullcontext()
