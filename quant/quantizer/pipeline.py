"""The pipeline: turns a 16-bit linear and the statistics of its inputs into a packed layer and a record of its error."""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ...cuda import int4, reference
from ...cuda.operands import LayerOperands
from ..layers import layout
from . import branch_codes, gptq, group_scales, learned_smoothing, lowrank, noise, rounding, smoothing
from .metrics import relative_error
from .presets import MIN_RANK, make_recipe

KEPT = "16 bit"  # the format, in its record, of a layer that is left as it is
BRANCH = "weight_proj_down", "weight_proj_up"
SMALL_LAYER = 1 << 22  # elements of a weight up to which one CPU thread is as fast as many


@dataclass(frozen=True)
class LayerRecord:
    """One line of the report."""

    name: str
    format: str
    rank: int
    error: float  # relative error of the outputs on the sampled inputs; of the weight if there are none
    error_naive: float  # the same for plain rounding to nearest, without smoothing, branch or search
    measured_on: str  # "outputs" or "weights"
    smoothing: str
    scales: tuple  # from scale_statistics
    tokens: int
    seconds: float
    bytes_before: int  # of the layer in 16 bits, whatever type the model stores it in
    bytes_after: int
    notes: tuple = ()  # sentences about unusual events
    act_bits: int = 0  # as in LayerSpec


def choose_smoothing(weight, stats, spec, recipe, check):
    """The smoothing factor of a layer, found separately for its columns before unsigned_from and for those from it on.

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
                # The layer quantizes x + shift, which is not small where x is nearly 0. A factor from a smaller span would magnify it.
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


def shared_smoothing(weights, stats, specs, recipe, check=lambda: None):
    """One smoothing factor for layers that read the same input, so that the input is quantized once for all of them.

    weights: {layer name: (N, K)}, any float dtype; stats: InputStats of their input, or None; specs: {layer name: LayerSpec}. Every output
    counts alike, whatever the size of its layer's weights. Returns what choose_smoothing does. Raises ValueError as quantize_layer does.
    """
    for name, weight in weights.items():
        check_finite(name, weight, None, stats)
    joint = torch.cat([weight.float() * (len(weight) ** 0.5 / weight.float().norm().clamp_min(1e-30)) for weight in weights.values()])
    first = specs[next(iter(weights))]
    spec = replace(first, out_features=len(joint), rank=sum(specs[name].rank for name in weights))
    with threads_for(joint):
        try:
            factor, label = choose_smoothing(joint, stats, spec, recipe, check)
        except torch.linalg.LinAlgError:
            name, weight = next(iter(weights.items()))
            raise too_large(name, weight, stats) from None
    return factor, f"{label}, shared"


@dataclass(frozen=True)
class Metric:
    """The importance of the smoothed inputs. energy: (K,) their mean squares; factor: the Factor of their damped Gram matrix; noise: (K,)
    the mean square of the rounding errors for which the codes account, included in the other two, or None."""

    energy: torch.Tensor | None = None
    factor: gptq.Factor | None = None
    noise: torch.Tensor | None = None


def input_metric(stats, smooth, spec, recipe, notes):
    """The Metric of a layer's smoothed inputs; empty if nothing was calibrated. notes: a list that receives sentences about unusual events.

    The shift of unsigned columns is left out, because the bias compensates for what it adds to the output, the weight's error included.
    """
    if not knows_inputs(stats, recipe):
        return Metric()
    energy = (stats.spans()["rms"] / smooth).square()
    if not recipe.needs_gram():
        return Metric(energy)
    rounding_noise = None
    if recipe.quiet:
        rounding_noise = noise.SHARE * noise.activation_noise(stats.sample(), smooth, spec.unsigned_from)
        energy = energy + rounding_noise
    return Metric(energy, input_factor(stats, notes, smooth, rounding_noise), rounding_noise)


def knows_inputs(stats, recipe):
    """Whether a layer's codes can be fitted to its inputs: the recipe is calibrated, and the recorded inputs are not all zero."""
    return stats is not None and recipe.smooth == "search" and bool(stats.spans()["absmax"].any())


def input_factor(stats, notes, smooth=None, rounding_noise=None):
    """The gptq.Factor of the inputs, divided by `smooth`, with `rounding_noise` added to their energy. notes: as in input_metric."""
    gram = stats.gram()
    damping = gptq.damping(stats.gram_tokens, len(gram))
    factor = gptq.damped_cholesky(gram, damping, smooth, rounding_noise)
    if factor.damping > damping:
        notes.append(f"The Gram matrix of its inputs is singular; damping was raised from {damping:g} to {factor.damping:g}.")
    return factor


def find_scales(residual, metric, dtype, recipe):
    """(G, N) scales by the recipe's rule. residual: (N, K) float32."""
    if recipe.scales == "absmax":
        return rounding.absmax_scales(residual, dtype)
    return group_scales.search(residual, metric.energy, dtype, integer=recipe.scales == "integer")


def stored_branch(up, down, smooth, spec, factor=None):
    """The branch as the layer stores it, and the matrix that it contributes to the smoothed weight. factor: gptq.Factor of the smoothed
    inputs, or None.

    The branch reads the raw x, so down is divided by smooth. Later stages work on the weight minus the stored branch, so they
    compensate for its rounding to 16 or 8 bits. Returns {parameter name: tensor} and (N, K) float32.
    """
    down = down / smooth.unsqueeze(-1)
    # The two vectors of each rank get the same norm, so that both stay within the range of fp16. Their product does not change.
    ratio = (down.norm(dim=0) / up.norm(dim=0)).sqrt()
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    up, down = up * ratio, down / ratio
    if spec.branch_bits == 8:
        tensors = branch_codes.coded(up, down, smooth, factor)
    else:
        tensors = {"weight_proj_down": down.to(spec.dtype).contiguous(), "weight_proj_up": up.to(spec.dtype).contiguous()}
    down, up = (factor.float() for factor in layout.branch_of(tensors, spec.dtype))
    return tensors, up @ (down * smooth.unsqueeze(-1)).t()


def alternate(smoothed, metric, spec, recipe, check):
    """Fit branch and codes to each other, L = SVD(W - Q) and Q = round(W - L), and keep the round with the smallest error.

    smoothed: (N, K) float32. Returns up (N, R), down (K, R), float32.
    """
    best, least, dequantized = None, float("inf"), None
    up, down = lowrank.low_rank(smoothed, spec.rank)
    if recipe.rounds == 1:
        return up, down
    for _ in range(recipe.rounds):
        check()
        if dequantized is not None:
            up, down = lowrank.low_rank(smoothed - dequantized, spec.rank, lowrank.WARM_ITERATIONS, start=down)
        residual = torch.addmm(smoothed, up, down.t(), alpha=-1)
        found = find_scales(residual, metric, spec.dtype, recipe)
        dequantized = rounding.rounded(residual, found)
        left = float(residual.sub_(dequantized).norm())
        if left < least:
            best, least = (up, down), left
    return best


def pack_svdquant(weight, bias, factor, spec, recipe, stats=None, check=lambda: None, notes=None):
    """Split a smoothed weight into branch and 4-bit residual.

    weight: (N, K) float32; bias: (N,) float32 or None; factor: (K,) float32; stats: InputStats or None; check: called
    often, to cancel; notes: as in input_metric, or None. Returns {parameter name: tensor}, with shapes and dtypes as in spec.tensors().
    """
    stored = factor.to(spec.dtype)
    smooth = stored.float()
    smoothed = weight * smooth
    metric = input_metric(stats, smooth, spec, recipe, [] if notes is None else notes)
    factors, branch = stored_branch(*alternate(smoothed, metric, spec, recipe, check), smooth, spec, metric.factor)
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
            factors, branch = stored_branch(*lowrank.refit(error, spec.rank, metric.factor), smooth, spec, metric.factor)
    tensors = {"weight": int4.pack(codes), "weight_scale": found, **factors, "weight_smooth_factor": stored}
    if bias is not None:
        tensors["bias"] = gelu_shift_corrected(bias, tensors, spec).to(spec.dtype)
    return tensors


def gelu_shift_corrected(bias, tensors, spec):
    """The bias minus the constant that the GELU shift of the unsigned columns adds to the output. Returns (N,) float32."""
    if spec.unsigned_from == spec.in_features:
        return bias
    dequantized = reference.dequantize_weight(tensors["weight"], tensors["weight_scale"])
    smooth = tensors["weight_smooth_factor"].float()
    return bias - int4.GELU_SHIFT * (dequantized / smooth)[:, spec.unsigned_from:].sum(dim=-1)


def pack_awq(weight, bias, spec, recipe, stats=None, check=lambda: None, notes=None):
    """A W4A16 layer. Arguments and result are those of pack_svdquant, without a smoothing factor.

    Such a layer has few inputs, one row per image, and they are similar, so nearly all of the codes' error can be compensated. Measured
    on the small trained FLUX, for prompts and steps outside the calibration, the modulations' outputs have an error of 1.55 % if the
    search ignores the inputs, of 0.80 % if it uses their energy and the bias corrects the mean, and of 0.61 % with GPTQ as well.
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
    """{parameter name: tensor} of a W4A16 layer, from the result of rounding.awq_round and the bias, (N,) or None."""
    tensors = {"weight": int4.pack(codes), "weight_scale": scales, "weight_zeros": zeros}
    return tensors if bias is None else tensors | {"bias": bias.to(spec.dtype)}


def awq_weight(tensors):
    """(N, K) float32: the dequantized weight of a W4A16 layer."""
    return reference.dequantize_awq(tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"])


def layer_error(weight, bias, tensors, stats, spec):
    """(relative error of a packed layer, "outputs" or "weights"): of its outputs on the sampled inputs, with spec.act_bits
    or else 4 bits of activations; of its weight without stats."""
    if spec.format == layout.AWQ:
        dequantized = awq_weight(tensors)
        if stats is None:
            return relative_error(dequantized, weight), "weights"
        x, linear = stats.sample(), torch.nn.functional.linear
        stored = None if bias is None else tensors["bias"].float()
        return relative_error(linear(x, dequantized, stored), linear(x, weight, bias)), "outputs"
    if stats is None:
        smooth = tensors["weight_smooth_factor"].float()
        dequantized = reference.dequantize_weight(tensors["weight"], tensors["weight_scale"]) / smooth
        down, up = (factor.float() for factor in layout.branch_of(tensors, spec.dtype))
        return relative_error(dequantized + up @ down.t(), weight), "weights"
    x = stats.sample()
    exact = torch.nn.functional.linear(x, weight, bias)
    estimate = reference.svdquant_linear(x, LayerOperands(
        tensors["weight"], tensors["weight_scale"], *layout.branch_of(tensors, spec.dtype), tensors["weight_smooth_factor"],
        tensors.get("bias"), spec.unsigned_from, spec.act_bits or 4))
    return relative_error(estimate, exact), "outputs"


@contextmanager
def threads_for(weight):
    """A context in which the CPU processes a small layer with one thread. LAPACK synchronizes its threads thousands of times, and each
    time costs a time slice if the cores are busy with other work (measured: 20 s instead of 0.3)."""
    before = torch.get_num_threads()
    if weight.device.type == "cpu" and weight.numel() <= SMALL_LAYER:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_finite(name, weight, bias, stats):
    """Raise ValueError with the layer's name if its weight, its bias or its recorded inputs have NaN or Inf."""
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"Layer {name} has NaN or Inf in its {part}: the model file is damaged or was merged "
                             "incorrectly; load an intact copy of the model.")
    if stats is not None and not torch.isfinite(stats.spans()["absmax"]).all():
        raise ValueError(f"Layer {name} had NaN or Inf in its inputs during calibration; check that the model samples images with these "
                         "settings, or load it with another compute dtype.")


def too_large(name, weight, stats):
    """The ValueError for a layer whose own numbers are finite, but not the results computed from them."""
    seen = "" if stats is None else f" and its inputs {float(stats.spans()['absmax'].max()):.0e}"
    return ValueError(f"Layer {name} can't be quantized: its weights reach {float(weight.abs().max()):.0e}{seen}, so large that the "
                      "computation overflows; load an intact copy of the model, or keep the layer in 16 bits with the input exceptions.")


def quantize_layer(name, weight, bias, stats, spec, recipe, check=lambda: None, smoothing=None):
    """Quantize one linear.

    weight: (N, K), bias: (N,) or None, any float dtype, on the device that does the work; stats: InputStats or None; check: called
    often, to cancel; smoothing: from shared_smoothing, or None for a factor of the layer's own. Returns ({parameter name: tensor},
    LayerRecord); without tensors if the error exceeds recipe.largest_error, and the layer has to stay as it is. Raises ValueError if a
    number is not finite, or too large for the layer's dtype.
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
                factor, label = smoothing or choose_smoothing(weight, stats, spec, recipe, check)
                tensors = pack_svdquant(weight, bias, factor, spec, recipe, stats, check, notes)
        except torch.linalg.LinAlgError:  # for matrices that are not finite
            raise too_large(name, weight, stats) from None
        check()
        computed = tensors if spec.format == layout.AWQ else tensors | dict(zip(BRANCH, layout.branch_of(tensors, spec.dtype)))
        overflown = [part for part, tensor in computed.items() if not torch.isfinite(tensor).all()]
        if overflown:
            raise ValueError(f"Layer {name} does not fit {spec.dtype}: its {overflown[0]} overflows; quantize a bf16 version of "
                             f"the model, or keep the layer in 16 bits with the input exceptions.")
        error, measured_on = layer_error(weight, bias, tensors, stats, spec)
        if not math.isfinite(error):
            raise too_large(name, weight, stats)
        naive = naive_error(weight, bias, stats, spec)
        scales = scale_statistics(tensors["weight_scale"])
    form, rank, bytes_after = spec.format, spec.rank, spec.nbytes()
    if error > recipe.largest_error:
        notes.append(f"It stays in 16 bits: in 4 bits its error would be {error:.0%}.")
        tensors, form, rank, bytes_after, error = {}, KEPT, 0, bytes_before, 0.0
    return tensors, LayerRecord(name, form, rank, error, naive, measured_on, label, scales, 0 if stats is None else stats.tokens,
                                round(time.perf_counter() - start, 3), bytes_before, bytes_after, tuple(notes), spec.act_bits)


def naive_error(weight, bias, stats, spec):
    """The layer_error of plain rounding, with which the report compares."""
    if spec.format == layout.AWQ:
        return layer_error(weight, bias, awq_tensors(*rounding.awq_plain(weight, spec.dtype), bias, spec), stats, spec)[0]
    plain = replace(spec, rank=0, branch_bits=16)
    ones = torch.ones(spec.in_features, device=weight.device)
    tensors = pack_svdquant(weight, bias, ones, plain, make_recipe("naive", MIN_RANK))
    return layer_error(weight, bias, tensors, stats, plain)[0]


def scale_statistics(group_scales):
    """(smallest, median, largest magnitude, fraction of negative ones) of (G, N) scales, as floats."""
    magnitudes = group_scales.float().abs()
    negative = (group_scales < 0).float().mean()
    smallest, largest = magnitudes.aminmax()
    return tuple(round(float(v), 8) for v in (smallest, magnitudes.median(), largest, negative))
