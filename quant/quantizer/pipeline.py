"""The pipeline: from a 16-bit linear and what it sees to a packed layer, and the record of what that cost."""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ...cuda import int4, reference
from ...cuda.operands import LayerOperands
from ..layers import layout
from . import gptq, group_scales, learned_smoothing, lowrank, noise, rounding, smoothing
from .metrics import relative_error
from .presets import MIN_RANK, make_recipe

KEPT = "16 bit"  # the format of a layer that is left as it was, in its record
SMALL_LAYER = 1 << 22  # elements of a weight up to which one CPU thread is as fast as many


@dataclass(frozen=True)
class LayerRecord:
    """One line of the report."""

    name: str
    format: str
    rank: int
    error: float  # relative output error on the sample; of the weight itself where no input was seen
    error_naive: float  # the same for plain rounding to nearest, without smoothing, branch or search
    measured_on: str  # "outputs" or "weights"
    smoothing: str
    scales: tuple  # smallest, median and largest magnitude of the group scales, and the share that is negative
    tokens: int
    seconds: float
    bytes_before: int  # of the layer in 16 bits, whatever the model at hand stores it in
    bytes_after: int
    notes: tuple = ()  # sentences: what was unusual


def choose_smoothing(weight, stats, spec, recipe, check):
    """The smoothing factor of a layer, found for each part of its columns (before and from unsigned_from) on its own.

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
            if unsigned:
                # What is quantized is x + shift, so a channel that is nearly dead is not small, and must not be taken for it.
                part_spans = {kind: span.clamp_min(int4.GELU_SHIFT) for kind, span in part_spans.items()}
            found = smoothing.search(part, sample[:, start:stop], part_spans, spec.rank, unsigned, spec.dtype, check)
            factors.append(found.factor)
            labels.append(found.label)
        elif recipe.smooth == "weights":
            factors.append(smoothing.data_free(smoothing.spans(part)))
            labels.append("absmax(W)^-0.5")
        else:
            factors.append(torch.ones(stop - start, device=weight.device))
            labels.append("1")
    factor, label = torch.cat(factors), " / ".join(labels)
    if recipe.smooth == "search":
        factor = smoothing.balanced(factors, stats.spans()["rms"].split([len(part) for part in factors]))
    if recipe.learned:
        learned = learned_smoothing.learn(weight, sample, factor, spec.rank, spec.unsigned_from, spec.dtype, check)
        if learned.error < learned.error_before:
            factor, label = learned.factor, f"{label}, learned"
    return factor, label


@dataclass(frozen=True)
class Metric:
    """How much each smoothed input matters. energy: (K,) its mean square; factor: of the damped Gram matrix; noise: (K,) what the
    codes allow for of its rounding's mean square, which is in the other two, or None."""

    energy: torch.Tensor | None = None
    factor: gptq.Factor | None = None
    noise: torch.Tensor | None = None


def input_metric(stats, smooth, spec, recipe, notes):
    """The Metric of a layer's smoothed inputs; empty where nothing was calibrated. notes: a list that takes what was unusual.

    The shift of unsigned columns is left out: what it adds to the output goes into the bias, with the weight's own error.
    """
    if not knows_inputs(stats, recipe):
        return Metric()
    energy = (stats.spans()["rms"] / smooth).square()
    if not recipe.needs_gram():
        return Metric(energy)
    allowed = None
    if recipe.quiet:
        allowed = noise.SHARE * noise.activation_noise(stats.sample(), smooth, spec.unsigned_from)
        energy = energy + allowed
    return Metric(energy, input_factor(stats, notes, smooth, allowed), allowed)


def knows_inputs(stats, recipe):
    """Whether the codes of a layer can go by its inputs: the recipe is calibrated, and some were seen that are not all zero."""
    return stats is not None and recipe.smooth == "search" and bool(stats.spans()["absmax"].any())


def input_factor(stats, notes, smooth=None, allowed=None):
    """The gptq.Factor of the inputs, divided by `smooth`, with `allowed` added to their energy. notes: as input_metric."""
    gram = stats.gram()
    damping = gptq.damping(stats.gram_tokens, len(gram))
    factor = gptq.damped_cholesky(gram, damping, smooth, allowed)
    if factor.damping > damping:
        notes.append(f"The Gram matrix of its inputs is singular; damping was raised from {damping:g} to {factor.damping:g}.")
    return factor


def find_scales(residual, metric, dtype, recipe):
    """(G, N) scales by the recipe's rule. residual: (N, K) float32."""
    if recipe.scales == "absmax":
        return rounding.absmax_scales(residual, dtype)
    return group_scales.search(residual, metric.energy, dtype, integer=recipe.scales == "integer")


def stored_branch(up, down, smooth, dtype):
    """The branch as the layer stores it, and what it adds to the smoothed weight.

    The branch reads the raw x, so down takes 1/smooth. Whatever rounding to 16 bits does to it is seen by the stages that
    come after, which work on the weight less the stored branch. Returns up (N, R), down (K, R) in `dtype`, and (N, K) float32.
    """
    down = down / smooth.unsqueeze(-1)
    # Each rank's two vectors get the same length: the product is what it was, and neither leaves the range of fp16.
    ratio = (down.norm(dim=0) / up.norm(dim=0)).sqrt()
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    up, down = (up * ratio).to(dtype), (down / ratio).to(dtype)
    return up, down, up.float() @ (down.float() * smooth.unsqueeze(-1)).t()


def alternate(smoothed, metric, spec, recipe, check):
    """Fit branch and codes to each other, keeping the round that leaves least: L = SVD(W - Q), Q = round(W - L).

    smoothed: (N, K) float32. Returns up (N, R), down (K, R), float32.
    """
    best, least, packed = None, float("inf"), None
    up, down = lowrank.low_rank(smoothed, spec.rank)
    if recipe.rounds == 1:
        return up, down
    for _ in range(recipe.rounds):
        check()
        if packed is not None:
            up, down = lowrank.low_rank(smoothed - packed, spec.rank, lowrank.WARM_ITERATIONS, start=down)
        residual = torch.addmm(smoothed, up, down.t(), alpha=-1)
        found = find_scales(residual, metric, spec.dtype, recipe)
        packed = rounding.rounded(residual, found)
        left = float(residual.sub_(packed).norm())
        if left < least:
            best, least = (up, down), left
    return best


def pack_svdquant(weight, bias, factor, spec, recipe, stats=None, check=lambda: None, notes=None):
    """Split a smoothed weight into branch and 4-bit residual.

    weight: (N, K) float32; bias: (N,) float32 or None; factor: (K,) float32; stats: InputStats or None; notes: a list that takes
    what was unusual, or None. Returns {parameter name: tensor}, shapes and dtypes as spec.tensors().
    """
    stored = factor.to(spec.dtype)
    smooth = stored.float()
    smoothed = weight * smooth
    metric = input_metric(stats, smooth, spec, recipe, [] if notes is None else notes)
    up, down, branch = stored_branch(*alternate(smoothed, metric, spec, recipe, check), smooth, spec.dtype)
    for _ in range(recipe.passes):
        residual = smoothed - branch
        if metric.noise is not None:
            residual = noise.quiet_target(residual, metric.noise, metric.factor)
        found = find_scales(residual, metric, spec.dtype, recipe)
        check()
        if recipe.gptq and metric.factor is not None:
            codes = gptq.gptq_round(residual, found, metric.factor, check)
        else:
            codes = rounding.round_to_nearest(residual, found)
        if recipe.refit and metric.factor is not None:
            del residual
            error = torch.sub(smoothed, reference.scaled_codes(codes.float(), found.float().t()), out=branch)
            up, down, branch = stored_branch(*lowrank.refit(error, spec.rank, metric.factor), smooth, spec.dtype)
    tensors = {"weight": int4.pack(codes), "weight_scale": found, "weight_proj_down": down.contiguous(),
               "weight_proj_up": up.contiguous(), "weight_smooth_factor": stored}
    if bias is not None:
        tensors["bias"] = gelu_shift_corrected(bias, tensors, spec).to(spec.dtype)
    return tensors


def gelu_shift_corrected(bias, tensors, spec):
    """The bias minus the constant that the GELU shift of the unsigned columns adds to the output. Returns (N,) float32."""
    if spec.unsigned_from == spec.in_features:
        return bias
    packed = reference.dequantize_weight(tensors["weight"], tensors["weight_scale"])
    smooth = tensors["weight_smooth_factor"].float()
    return bias - int4.GELU_SHIFT * (packed / smooth)[:, spec.unsigned_from:].sum(dim=-1)


def pack_awq(weight, bias, spec, recipe, stats=None, check=lambda: None, notes=None):
    """A W4A16 layer; arguments and result as those of pack_svdquant, without a smoothing factor.

    Its inputs are few, a row a picture, and close to each other, so that what the codes get wrong of them can nearly all be made up
    for. Measured on the small trained FLUX, for prompts and steps that it was not calibrated on: the modulations' outputs are off by
    1.55 % where the search knows no inputs, 0.80 % where it knows their energy and the bias makes up for the mean, 0.61 % with GPTQ too.
    """
    known = knows_inputs(stats, recipe)
    codes, scales, zeros = rounding.awq_round(weight, spec.dtype, stats.spans()["rms"].square() if known else None)
    check()
    if known and recipe.gptq:
        factor = input_factor(stats, [] if notes is None else notes)
        target = weight - zeros.float().t().repeat_interleave(int4.GROUP_SIZE, dim=-1)
        codes = gptq.gptq_round(target, scales, factor, check) - int4.SIGNED_MIN
    tensors = awq_tensors(codes, scales, zeros, bias, spec)
    if known and bias is not None:
        lost = weight - awq_weight(tensors)
        tensors["bias"] = (bias + torch.mv(lost, stats.sample().mean(dim=0))).to(spec.dtype)
    return tensors


def awq_tensors(codes, scales, zeros, bias, spec):
    """{parameter name: tensor} of a W4A16 layer from what rounding.awq_round gives, and its bias (N,) or None."""
    tensors = {"weight": int4.pack(codes), "weight_scale": scales, "weight_zeros": zeros}
    return tensors if bias is None else tensors | {"bias": bias.to(spec.dtype)}


def awq_weight(tensors):
    """(N, K) float32: what a W4A16 layer's tensors stand for."""
    return reference.dequantize_awq(tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"])


def layer_error(weight, bias, tensors, stats, spec):
    """(relative error, "outputs" or "weights") of a packed layer against the 16-bit one."""
    if spec.format == layout.AWQ:
        packed = awq_weight(tensors)
        if stats is None:
            return relative_error(packed, weight), "weights"
        x, linear = stats.sample(), torch.nn.functional.linear
        stored = None if bias is None else tensors["bias"].float()
        return relative_error(linear(x, packed, stored), linear(x, weight, bias)), "outputs"
    if stats is None:
        smooth = tensors["weight_smooth_factor"].float()
        packed = reference.dequantize_weight(tensors["weight"], tensors["weight_scale"]) / smooth
        branch = tensors["weight_proj_up"].float() @ tensors["weight_proj_down"].float().t()
        return relative_error(packed + branch, weight), "weights"
    x = stats.sample()
    exact = torch.nn.functional.linear(x, weight, bias)
    estimate = reference.svdquant_linear(x, LayerOperands(
        tensors["weight"], tensors["weight_scale"], tensors["weight_proj_down"], tensors["weight_proj_up"],
        tensors["weight_smooth_factor"], tensors.get("bias"), spec.unsigned_from))
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
                             "incorrectly; load an intact copy of the model.")
    if stats is not None and not torch.isfinite(stats.spans()["absmax"]).all():
        raise ValueError(f"Layer {name} had NaN or Inf in its inputs during calibration; check that the model samples images with these "
                         "settings, or load it with another compute dtype.")


def too_large(name, weight, stats):
    """ValueError of a layer whose numbers are finite, and what is computed of them is not."""
    seen = "" if stats is None else f" and its inputs {float(stats.spans()['absmax'].max()):.0e}"
    return ValueError(f"Layer {name} can't be quantized: its weights reach {float(weight.abs().max()):.0e}{seen}, out of which nothing "
                      "finite can be computed; load an intact copy of the model, or keep the layer in 16 bits with the input exceptions.")


def quantize_layer(name, weight, bias, stats, spec, recipe, check=lambda: None):
    """Quantize one linear.

    weight: (N, K), bias: (N,) or None, any float dtype, on the device that is to do the work; stats: InputStats or
    None; check: called often, to cancel. Returns ({parameter name: tensor}, LayerRecord); no tensors where the error would be larger
    than the recipe's, so that the layer has to stay as it is.
    """
    start = time.perf_counter()
    notes = []
    bytes_before = 2 * (weight.numel() + (0 if bias is None else bias.numel()))
    weight = weight.float()
    bias = None if bias is None else bias.float()
    check_finite(name, weight, bias, stats)
    with threads_for(weight):
        try:
            if spec.format == layout.AWQ:
                tensors, label = pack_awq(weight, bias, spec, recipe, stats, check, notes), "-"
            else:
                factor, label = choose_smoothing(weight, stats, spec, recipe, check)
                tensors = pack_svdquant(weight, bias, factor, spec, recipe, stats, check, notes)
        except torch.linalg.LinAlgError:  # of matrices that are not finite
            raise too_large(name, weight, stats) from None
        check()
        overflown = [part for part, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if overflown:
            raise ValueError(f"Layer {name} does not fit {spec.dtype}: its {overflown[0]} overflows; quantize a bf16 version of "
                             f"the model, or keep the layer in 16 bits with the input exceptions.")
        error, measured_on = layer_error(weight, bias, tensors, stats, spec)
        if not math.isfinite(error):
            raise too_large(name, weight, stats)
        naive = naive_error(weight, bias, stats, spec)
        spread = scale_statistics(tensors["weight_scale"])
    form, rank, bytes_after = spec.format, spec.rank, spec.nbytes()
    if error > recipe.largest_error:
        notes.append(f"It stays in 16 bits: in 4 bits its error would be {error:.0%}.")
        tensors, form, rank, bytes_after, error = {}, KEPT, 0, bytes_before, 0.0
    return tensors, LayerRecord(name, form, rank, error, naive, measured_on, label, spread, 0 if stats is None else stats.tokens,
                                round(time.perf_counter() - start, 3), bytes_before, bytes_after, tuple(notes))


def naive_error(weight, bias, stats, spec):
    """What layer_error would be under plain rounding: the "before" of the report."""
    if spec.format == layout.AWQ:
        return layer_error(weight, bias, awq_tensors(*rounding.awq_plain(weight, spec.dtype), bias, spec), stats, spec)[0]
    plain = replace(spec, rank=0)
    ones = torch.ones(spec.in_features, device=weight.device)
    tensors = pack_svdquant(weight, bias, ones, plain, make_recipe("naive", MIN_RANK))
    return layer_error(weight, bias, tensors, stats, plain)[0]


def scale_statistics(group_scales):
    """(smallest, median, largest magnitude, share of negative ones) of (G, N) scales, as floats."""
    magnitudes = group_scales.float().abs()
    negative = (group_scales < 0).float().mean()
    smallest, largest = magnitudes.aminmax()
    return tuple(round(float(v), 8) for v in (smallest, magnitudes.median(), largest, negative))
