"""The pipeline: from a 16-bit linear and what it sees to a packed layer, and the record of what that cost."""

from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from ..cuda import int4, reference
from . import layout, lowrank, rounding, smoothing
from .metrics import relative_error

MIN_RANK, MAX_RANK, RANK_STEP = 16, 256, 16
SMALL_LAYER = 1 << 22  # elements of a weight up to which one CPU thread is as fast as many


@dataclass(frozen=True)
class Recipe:
    """What a quantization run does. smooth: "search" (calibrated), "weights" (no calibration) or "none"."""

    preset: str
    rank: int
    smooth: str
    activations: int = 4  # bits of the activations that the report's errors are measured with

    def as_dict(self):
        return asdict(self)


PRESETS = {
    "fast": "search",  # smoothing search on calibration data, SVD branch, round to nearest
    "data-free": "weights",  # smoothing from the weights alone, SVD branch, round to nearest
    "naive": "none",  # plain round to nearest, no smoothing, no branch: the baseline to compare with
}


def recipe(preset, rank):
    """The Recipe of a preset. Raises ValueError on an unknown preset or a rank outside 16..256 in steps of 16."""
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    if not MIN_RANK <= rank <= MAX_RANK or rank % RANK_STEP:
        raise ValueError(f"Rank {rank} is not possible; choose {MIN_RANK} to {MAX_RANK} in steps of {RANK_STEP}.")
    return Recipe(preset, 0 if preset == "naive" else rank, PRESETS[preset])


@dataclass(frozen=True)
class LayerRecord:
    """One line of the report."""

    name: str
    format: str
    error: float  # relative output error on the sample; of the weight itself where no input was seen
    measured_on: str  # "outputs" or "weights"
    smoothing: str
    tokens: int
    bytes_before: int  # of the layer in 16 bits, whatever the model at hand stores it in
    bytes_after: int


def choose_smoothing(weight, stats, spec, recipe, check):
    """The smoothing factor of a layer, each part of its columns (before and from unsigned_from) on its own.

    weight: (N, K) float32. Returns factor (K,) float32 and a label for the report.
    """
    factors, labels = [], []
    sample = stats.sample() if recipe.smooth == "search" else None
    for start, stop in ((0, spec.unsigned_from), (spec.unsigned_from, spec.in_features)):
        if start == stop:
            continue
        part = weight[:, start:stop]
        if recipe.smooth == "search":
            part_spans = {kind: span[start:stop] for kind, span in stats.spans().items()}
            unsigned = start == spec.unsigned_from
            found = smoothing.search(part, sample[:, start:stop], part_spans, recipe.rank, unsigned, spec.dtype, check)
            factors.append(found.factor)
            labels.append(found.label)
        elif recipe.smooth == "weights":
            factors.append(smoothing.data_free(smoothing.spans(part)))
            labels.append("absmax(W)^-0.5")
        else:
            factors.append(torch.ones(stop - start, device=weight.device))
            labels.append("1")
    return torch.cat(factors), " / ".join(labels)


def pack_svdquant(weight, bias, factor, spec):
    """Split a smoothed weight into branch and 4-bit residual.

    weight: (N, K) float32; bias: (N,) float32 or None; factor: (K,) float32. Returns {parameter name: tensor}, shapes
    and dtypes as spec.tensors().
    """
    dtype = spec.dtype
    smooth = factor.to(dtype)
    smoothed = weight * smooth.float()
    up, down = lowrank.low_rank(smoothed, spec.rank)
    # The branch reads the raw x, so it takes 1/smooth. What it loses by being stored in 16 bits goes into the
    # residual: the residual is what is left of the weight beside the stored branch, not beside the exact one.
    up, down = up.to(dtype), (down / smooth.float().unsqueeze(-1)).to(dtype)
    residual = smoothed - up.float() @ (down.float() * smooth.float().unsqueeze(-1)).t()
    scales = rounding.absmax_scales(residual, dtype)
    codes = rounding.round_to_nearest(residual, scales)
    tensors = {"weight": int4.pack(codes), "weight_scale": scales, "weight_proj_down": down.contiguous(),
               "weight_proj_up": up.contiguous(), "weight_smooth_factor": smooth}
    if bias is not None:
        tensors["bias"] = fold_shift(bias, tensors, spec).to(dtype)
    return tensors


def fold_shift(bias, tensors, spec):
    """The bias less what the GELU shift of the unsigned columns adds to the output. Returns (N,) float32."""
    if spec.unsigned_from == spec.in_features:
        return bias
    packed = reference.dequantize_weight(tensors["weight"], tensors["weight_scale"])
    smooth = tensors["weight_smooth_factor"].float()
    return bias - int4.GELU_SHIFT * (packed / smooth)[:, spec.unsigned_from:].sum(dim=-1)


def pack_awq(weight, bias, spec):
    """A W4A16 layer: {parameter name: tensor} as spec.tensors(). weight: (N, K) float32, bias: (N,) float32 or None."""
    codes, scales, zeros = rounding.awq_round(weight, spec.dtype)
    tensors = {"weight": int4.pack(codes), "weight_scale": scales, "weight_zeros": zeros}
    if bias is not None:
        tensors["bias"] = bias.to(spec.dtype)
    return tensors


def layer_error(weight, bias, tensors, stats, spec):
    """(relative error, "outputs" or "weights") of a packed layer against the 16-bit one."""
    if spec.format == layout.AWQ:
        packed = reference.dequantize_awq(tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"])
        return relative_error(packed, weight), "weights"
    if stats is None:
        smooth = tensors["weight_smooth_factor"].float()
        packed = reference.dequantize_weight(tensors["weight"], tensors["weight_scale"]) / smooth
        branch = tensors["weight_proj_up"].float() @ tensors["weight_proj_down"].float().t()
        return relative_error(packed + branch, weight), "weights"
    x = stats.sample()
    exact = torch.nn.functional.linear(x, weight, bias)
    estimate = reference.svdquant_linear(
        x, tensors["weight"], tensors["weight_scale"], tensors["weight_proj_down"], tensors["weight_proj_up"],
        tensors["weight_smooth_factor"], tensors.get("bias"), spec.unsigned_from)
    return relative_error(estimate, exact), "outputs"


@contextmanager
def threads_for(weight):
    """One thread while a small layer is worked on by the CPU: LAPACK meets its threads thousands of times on the way,
    and each meeting costs a time slice where the cores are busy with something else (measured: 20 s in place of 0.3)."""
    before = torch.get_num_threads()
    if weight.device.type == "cpu" and weight.numel() <= SMALL_LAYER:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_finite(name, weight, bias, stats):
    """Raise ValueError naming the layer where its weight, its bias or the input seen holds NaN or Inf."""
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"Layer {name} has NaN or Inf in its {part}: the model file is damaged or was merged "
                             "wrongly; load a sound copy of the model.")
    if stats is not None and not torch.isfinite(stats.spans()["absmax"]).all():
        raise ValueError(f"Layer {name} saw NaN or Inf during calibration; check that the model draws with these "
                         "settings, or load it with another compute dtype.")


def quantize_layer(name, weight, bias, stats, spec, recipe, check=lambda: None):
    """Quantize one linear.

    weight: (N, K), bias: (N,) or None, any float dtype, on the device that is to do the work; stats: InputStats or
    None; check: called often, to cancel. Returns ({parameter name: tensor}, LayerRecord).
    """
    bytes_before = 2 * (weight.numel() + (0 if bias is None else bias.numel()))
    weight = weight.float()
    bias = None if bias is None else bias.float()
    check_finite(name, weight, bias, stats)
    with threads_for(weight):
        if spec.format == layout.AWQ:
            tensors, label = pack_awq(weight, bias, spec), "-"
        else:
            factor, label = choose_smoothing(weight, stats, spec, recipe, check)
            tensors = pack_svdquant(weight, bias, factor, spec)
        check()
        error, measured_on = layer_error(weight, bias, tensors, stats, spec)
    tokens = 0 if stats is None else stats.tokens
    return tensors, LayerRecord(name, spec.format, error, measured_on, label, tokens, bytes_before, spec.nbytes())
