"""The stages of the quantizer, each against a baseline that it must never be worse than."""

import pytest
import torch
from comfyui_svdquant.cuda import int4, reference
from comfyui_svdquant.cuda.operands import LayerOperands
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import gptq, group_scales, lowrank, pipeline, presets, rounding, smoothing
from comfyui_svdquant.quant.quantizer.calibration import InputStats
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st


def weight(n, k, seed=0):
    """A matrix with a falling spectrum and a few large columns, as trained ones have."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) / k**0.5
    w += 2 * torch.randn(n, 4, generator=g) @ torch.randn(4, k, generator=g) / k**0.5 / 2
    w[:, torch.randperm(k, generator=g)[: max(1, k // 40)]] *= 3
    return w


def tokens(m, k, seed=1):
    """Inputs with a few outlier channels, which are the same for every seed."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, :: max(1, k // 8)] *= 20
    return x


def stats_of(x):
    stats = InputStats(1, with_gram=True)
    stats.add(x)
    return stats


# --- branch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_the_randomized_svd_is_within_a_third_of_a_percent_of_the_full_one(rank):
    w = weight(192, 320)
    up, down = lowrank.low_rank(w, rank)
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    full = float(s[rank:].norm() / s.norm())
    error = relative_error(up @ down.t(), w)
    assert error < 1.003 * full, f"residual {error:.5f}, of the full SVD {full:.5f}"


def test_low_rank_is_deterministic_and_leaves_the_generator_alone():
    w = weight(96, 128)
    before = torch.get_rng_state()
    first = lowrank.low_rank(w, 16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, lowrank.low_rank(w, 16)))


def test_a_matrix_smaller_than_the_rank_is_reproduced():
    w = weight(20, 64)
    up, down = lowrank.low_rank(w, 32)
    assert up.shape == (20, 32) and down.shape == (64, 32)
    assert relative_error(up @ down.t(), w) < 1e-5


# --- rounding ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=50, deadline=None)
def test_round_to_nearest_is_within_half_a_step(n, groups, seed, dtype):
    w = torch.randn(n, 64 * groups, generator=torch.Generator().manual_seed(seed))
    scales = rounding.absmax_scales(w, dtype)
    codes = rounding.round_to_nearest(w, scales)
    assert codes.min() >= -8 and codes.max() <= 7
    step = scales.float().t().repeat_interleave(64, dim=1)
    # Half a step, plus the error of the largest code when its scale is rounded down to 8 bits of mantissa.
    assert ((codes * step - w).abs() <= step * (0.5 + 7 * 2**-8)).all()


def test_rounding_a_group_of_zeros_gives_zeros():
    w = torch.zeros(3, 64)
    scales = rounding.absmax_scales(w, torch.bfloat16)
    assert not rounding.round_to_nearest(w, scales).any() and not scales.any()


def awq_values(w, codes, scales, zeros):
    return (codes.float() - 8) * scales.float().t().repeat_interleave(64, 1) + zeros.float().t().repeat_interleave(64, 1)


@pytest.mark.parametrize("offset", [0, 3])
def test_awq_is_better_than_the_whole_range_in_every_group(offset):
    w = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).pow(3) + offset
    low, high = w.unflatten(-1, (-1, 64)).aminmax(dim=-1)
    scales = ((high - low) / 15).half().t()
    zeros = ((low + high) / 2 + (high - low) / 30).half().t()
    steps = scales.float().t().repeat_interleave(64, 1)
    codes = ((w - zeros.float().t().repeat_interleave(64, 1)) / steps).round().add(8).clamp(0, 15)
    plain = (awq_values(w, codes, scales, zeros) - w).unflatten(-1, (-1, 64)).square().sum(-1)
    least = (awq_values(w, *rounding.awq_plain(w, torch.float16)) - w).unflatten(-1, (-1, 64)).square().sum(-1)
    assert torch.allclose(least.sum(), plain.sum(), rtol=0.01), "the baseline equals naive rounding"
    found = rounding.awq_round(w, torch.float16)
    assert 0 <= found[0].min() and found[0].max() <= 15
    searched = (awq_values(w, *found) - w).unflatten(-1, (-1, 64)).square().sum(-1)
    assert (searched <= plain * 1.0001).all()
    assert searched.sum() < 0.9 * plain.sum(), f"{searched.sum() / plain.sum() - 1:+.1%} squared error"


@pytest.mark.parametrize("seed", range(3))
def test_awq_weighted_by_input_energy_is_never_worse_than_the_whole_range_and_better_than_unweighted(seed):
    w, energy = weight(96, 256, seed), tokens(400, 256).square().mean(0)
    plain, blind, found = ((awq_values(w, *csz) - w).square().mul(energy).unflatten(-1, (-1, 64)).sum(-1) for csz in (
        rounding.awq_plain(w, torch.bfloat16), rounding.awq_round(w, torch.bfloat16), rounding.awq_round(w, torch.bfloat16, energy)))
    assert (found <= plain * 1.0001).all()
    assert found.sum() < 0.8 * blind.sum(), f"{found.sum() / blind.sum() - 1:+.1%} weighted squared error"


@pytest.mark.parametrize("dead", [slice(0, 64), slice(10, 20), slice(0, 128)])
def test_awq_with_dead_inputs_is_finite_and_equal_energies_change_nothing(dead):
    w, energy = weight(32, 128), torch.rand(128, generator=torch.Generator().manual_seed(0))
    energy[dead] = 0
    assert all(torch.isfinite(tensor).all() for tensor in rounding.awq_round(w, torch.float16, energy))
    same = rounding.awq_round(w, torch.float16, torch.full((128,), 2.0))
    assert all(map(torch.equal, same, rounding.awq_round(w, torch.float16)))


def test_awq_keeps_constant_groups_and_zeros():
    w = torch.zeros(3, 128)
    w[0], w[1, :64] = 1.5, -0.25
    assert torch.equal(awq_values(w, *rounding.awq_round(w, torch.float16)), w)


# --- scales --------------------------------------------------------------------------------------------------------


def weighted_error(w, found, energy):
    steps = found.float().t().unsqueeze(-1)
    groups = w.unflatten(-1, (-1, 64))
    codes = (groups / steps).round().clamp(-8, 7)
    return float(((codes * steps - groups).square() * energy.view(-1, 64)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("integer", [False, True])
def test_searched_scales_leave_less_than_absmax(seed, integer):
    w, energy = weight(96, 256, seed), tokens(400, 256).square().mean(0)
    absmax = weighted_error(w, rounding.absmax_scales(w, torch.bfloat16), energy)
    found = weighted_error(w, group_scales.search(w, energy, torch.bfloat16, integer), energy)
    assert found < 0.95 * absmax, f"weighted squared error {found:.4g}, with absmax {absmax:.4g}"


def test_integer_scales_cost_little():
    w, energy = weight(256, 512), tokens(400, 512).square().mean(0)
    free, integer = (weighted_error(w, group_scales.search(w, energy, torch.bfloat16, i), energy) for i in (False, True))
    assert integer < 1.03 * free, f"weighted squared error {integer:.5g} with integer scales, {free:.5g} with free ones"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integer_scales_factor_exactly(dtype):
    """Each row's scales are c * i with integers that fit the kernels' 8-bit arithmetic; read back from the 16-bit tensor."""
    w = weight(64, 512, 5)
    w[7], w[3, :64] = 0, 0
    found = group_scales.search(w, None, dtype).float().t()  # (N, G)
    for row in found:
        fits = []
        for i in range(1, 17):
            integers = row / (row.abs().max() / i)
            whole = torch.equal(integers, integers.round())
            fits.append(whole and integers.max() <= 16 and integers.min() >= -15)
        assert any(fits), row


def test_a_negative_scale_reaches_minus_eight():
    w = torch.linspace(-1, 1, 64).repeat(4, 1)
    w[:, -1] = 2.0
    found = group_scales.search(w, None, torch.bfloat16, integer=False)
    codes = rounding.round_to_nearest(w, found)
    assert (found < 0).all() and codes.min() == -8 and codes.max() <= 7


# --- gptq and refit ------------------------------------------------------------------------------------------------


def output_error(w, codes, found, x):
    return relative_error(x @ reference.scaled_codes(codes.float(), found.float().t()).t(), x @ w.t())


def correlated_tokens(m, k, seed=1):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(9)) * torch.linspace(1, 0.05, k)
    return torch.randn(m, k, generator=g) @ mix.t() / k**0.5 + 0.1 * torch.randn(m, k, generator=g)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_never_worse_than_rounding_and_better_on_fresh_tokens(seed):
    w, x = weight(96, 256, seed), correlated_tokens(2048, 256)
    factor = gptq.damped_cholesky(x.t() @ x / len(x), 0.1)
    found = group_scales.search(w, x.square().mean(0), torch.bfloat16)
    nearest, better = rounding.round_to_nearest(w, found), gptq.gptq_round(w, found, factor)
    assert better.min() >= -8 and better.max() <= 7 and better.shape == w.shape
    for tokens_, margin in ((x, 0.9), (correlated_tokens(500, 256, 2), 0.95)):
        errors = output_error(w, better, found, tokens_), output_error(w, nearest, found, tokens_)
        assert errors[0] < margin * errors[1], f"GPTQ {errors[0]:.4f}, nearest {errors[1]:.4f}"


def test_gptq_on_independent_inputs_is_rounding_to_nearest():
    w = weight(32, 128)
    found = rounding.absmax_scales(w, torch.bfloat16)
    assert torch.equal(gptq.gptq_round(w, found, gptq.damped_cholesky(torch.eye(128), 0.1)), rounding.round_to_nearest(w, found))


def test_gptq_ignores_groups_without_a_scale():
    """A group of zeros has scale 0, so that its codes have no effect."""
    w, x = 100 * weight(32, 128), correlated_tokens(500, 128)
    w[:, 64:] = 0
    found, factor = rounding.absmax_scales(w, torch.bfloat16), gptq.damped_cholesky(x.t() @ x / len(x), 0.1)
    codes = gptq.gptq_round(w, found, factor)
    assert not codes[:, 64:].any()
    nearest = output_error(w, rounding.round_to_nearest(w, found), found, x)
    assert output_error(w, codes, found, x) < nearest


def test_gptq_of_one_row_is_the_textbook_recursion():
    """The definition in float64: column by column with the explicit inverse of the remaining matrix, without Cholesky."""
    w, x = weight(3, 64), correlated_tokens(500, 64)
    gram = x.t() @ x / len(x) + 0.05 * torch.eye(64)
    found = rounding.absmax_scales(w, torch.float32)
    codes = gptq.gptq_round(w, found, gptq.damped_cholesky(gram, 0))
    rest, left, expected = w.double().clone(), gram.diagonal().argsort(descending=True).tolist(), torch.zeros(3, 64)
    while left:
        inverse = torch.linalg.inv(gram.double()[left][:, left])
        j = left[0]
        expected[:, j] = (rest[:, j] / found[0].double()).round().clamp(-8, 7)
        lost = (rest[:, j] - expected[:, j] * found[0].double()) / inverse[0, 0]
        rest[:, left] -= lost.unsqueeze(1) * inverse[0]
        left = left[1:]
    assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("damp_tokens", [10, 5000])
def test_refit_never_increases_the_metric(damp_tokens):
    w, x = weight(96, 128), correlated_tokens(1000, 128)
    factor = gptq.damped_cholesky(x.t() @ x / len(x), gptq.damping(damp_tokens, 128))
    up, down = lowrank.low_rank(w, 16)
    found = rounding.absmax_scales(w - up @ down.t(), torch.bfloat16)
    residual = reference.scaled_codes(rounding.round_to_nearest(w - up @ down.t(), found).float(), found.float().t())
    refit_up, refit_down = lowrank.refit(w - residual, 16, factor)

    def metric(left):
        return float((left[:, factor.order] @ factor.lower).norm())

    before, after = metric(w - residual - up @ down.t()), metric(w - residual - refit_up @ refit_down.t())
    assert after < before, f"metric {after:.5f} after the refit, {before:.5f} before"
    least = float(torch.linalg.svdvals((w - residual)[:, factor.order] @ factor.lower)[16:].norm())
    assert after < 1.005 * least, f"metric {after:.5f} after the refit, {least:.5f} is possible"


def test_statistics_of_too_few_tokens_still_give_a_factor():
    x = tokens(5, 128)
    factor = gptq.damped_cholesky(x.t() @ x / 5, gptq.damping(5, 128))
    assert torch.isfinite(factor.lower).all()
    with pytest.raises(ValueError, match="Cholesky"):
        gptq.damped_cholesky(-torch.eye(4), 0.1)


# --- smoothing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_never_worse_than_no_smoothing_and_helps_where_there_are_outliers(seed, unsigned):
    w, x = weight(128, 256, seed), tokens(300, 256, seed + 10)
    x = torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x
    found = smoothing.search(w, x, smoothing.spans(x), 16, unsigned, torch.bfloat16)
    assert found.error <= found.error_unsmoothed
    assert found.error < 0.8 * found.error_unsmoothed, f"{found.error:.4f} with {found.label}, {found.error_unsmoothed:.4f} without"


def test_dead_channels_do_not_break_the_factor():
    w, x = weight(64, 128), tokens(50, 128)
    x[:, 3], w[:, 5], x[:, 6], w[:, 6] = 0, 0, 0, 0
    for _, factor in smoothing.candidates(smoothing.spans(x), smoothing.spans(w)):
        assert torch.isfinite(factor).all() and (factor > 0).all()
    zeros = dict.fromkeys(smoothing.SPANS, torch.zeros(128))
    assert all((factor == 1).all() for _, factor in smoothing.candidates(zeros, smoothing.spans(w)))


def test_parts_are_balanced_to_the_same_energy_and_keep_their_shape():
    g = torch.Generator().manual_seed(0)
    rms = [torch.rand(64, generator=g) + 0.1, 300 * torch.rand(128, generator=g) + 1]
    factors = [torch.linspace(0.5, 2, 64), torch.linspace(0.2, 3, 128)]
    joined = smoothing.balanced(factors, rms)
    energies = [float((span / part).square().mean()) for span, part in zip(rms, joined.split([64, 128]))]
    assert energies[0] == pytest.approx(energies[1], rel=1e-4) and float(joined.log().mean()) == pytest.approx(0, abs=1e-5)
    for before, after in zip(factors, joined.split([64, 128])):
        assert torch.allclose(after / before, (after / before)[0])
    assert torch.isfinite(smoothing.balanced(factors, [torch.zeros(64), rms[1]])).all()


def test_balanced_parts_make_the_joint_branch_better():
    """A layer whose two parts differ in scale by 30: without the balance, the branch approximates only one of them."""
    w, x = weight(160, 256), tokens(600, 256)
    w[:, 128:] *= 30
    x = torch.cat((x[:, :128], torch.nn.functional.gelu(x[:, 128:], approximate="tanh") / 30), dim=1)
    spec = layout.svdquant_spec(256, 160, 32, 128, True, torch.bfloat16)
    recipe, stats = presets.make_recipe("best", 32), stats_of(x)
    balanced, _ = pipeline.choose_smoothing(w, stats, spec, recipe, lambda: None)
    apart = torch.cat([part / part.log().mean().exp() for part in balanced.split(128)])
    errors = []
    for factor in (balanced, apart):
        tensors = pipeline.pack_svdquant(w, torch.zeros(160), factor, spec, recipe, stats)
        errors.append(pipeline.layer_error(w, torch.zeros(160), tensors, stats, spec)[0])
    assert errors[0] < 0.95 * errors[1], f"error {errors[0]:.4f} balanced, {errors[1]:.4f} not"


def test_the_search_can_be_cancelled():
    def check():
        raise KeyboardInterrupt

    x = tokens(20, 64)
    with pytest.raises(KeyboardInterrupt):
        smoothing.search(weight(16, 64), x, smoothing.spans(x), 16, False, torch.bfloat16, check)


# --- a layer -------------------------------------------------------------------------------------------------------


def quantized(preset, name="layer", unsigned_from=256, dtype=torch.bfloat16, seed=0):
    """(record, error on fresh tokens) of one layer under a preset."""
    w, bias = weight(160, 256, seed), torch.randn(160, generator=torch.Generator().manual_seed(seed))
    gelu = torch.arange(256) >= unsigned_from

    def inputs(m, seed):
        x = tokens(m, 256, seed)
        return torch.where(gelu, torch.nn.functional.gelu(x, approximate="tanh"), x)

    recipe = presets.make_recipe(preset, 32)
    spec = layout.svdquant_spec(256, 160, recipe.rank, unsigned_from, True, dtype)
    tensors, record = pipeline.quantize_layer(name, w, bias, stats_of(inputs(512, 1)), spec, recipe)
    assert {part: (tuple(t.shape), t.dtype) for part, t in tensors.items()} == spec.tensors()
    fresh = inputs(200, 2)
    y = reference.svdquant_linear(fresh, LayerOperands(
        tensors["weight"], tensors["weight_scale"], tensors["weight_proj_down"], tensors["weight_proj_up"],
        tensors["weight_smooth_factor"], tensors["bias"], unsigned_from))
    return record, relative_error(y, fresh @ w.t() + bias)


@pytest.mark.parametrize("unsigned_from", [0, 64, 256])
def test_svdquant_beats_naive_rounding_by_a_wide_margin(unsigned_from):
    _, naive = quantized("naive", unsigned_from=unsigned_from)
    _, fast = quantized("fast", unsigned_from=unsigned_from)
    record, best = quantized("best", unsigned_from=unsigned_from)
    # These inputs are independent, so that GPTQ can't be better here, and must not be worse.
    assert best < 1.02 * fast < 0.6 * naive, f"error {best:.4f}, without GPTQ {fast:.4f}, naive {naive:.4f}"
    assert record.measured_on == "outputs" and abs(record.error - best) < 0.3 * best


def test_the_gelu_shift_costs_nothing_on_average():
    """The GELU shift correction in the bias cancels the shift: the mean of the error is far below its deviation."""
    w, bias = weight(64, 128), torch.zeros(64)
    x = torch.nn.functional.gelu(torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)), approximate="tanh")
    spec = layout.svdquant_spec(128, 64, 16, 0, True, torch.float32)
    t, _ = pipeline.quantize_layer("fc2", w, bias, stats_of(x), spec, presets.make_recipe("fast", 16))
    y = reference.svdquant_linear(x, LayerOperands(t["weight"], t["weight_scale"], t["weight_proj_down"], t["weight_proj_up"],
                                                   t["weight_smooth_factor"], t["bias"], 0, act_bits=8))
    exact = x @ w.t()
    drift = (y - exact).mean(dim=0).norm() / exact.mean(dim=0).norm()
    assert drift < 0.05, f"mean of the output is off by {drift:.3f}"


def test_storing_the_branch_in_16_bits_costs_little():
    """The codes compensate for the branch's rounding; only the rounding of the last refit remains."""
    _, bf16 = quantized("best", dtype=torch.bfloat16)
    _, f32 = quantized("best", dtype=torch.float32)
    assert bf16 < 1.05 * f32, f"error {bf16:.5f} in bf16, {f32:.5f} in float32"


def conditions(times, seed, prompts=8, k=256):
    """(times * prompts, k) inputs like those of modulation layers: a curve over time and a few directions of the prompts."""
    g = torch.Generator().manual_seed(9)
    curve, directions, mean = torch.randn(8, k, generator=g), torch.randn(6, k, generator=g), torch.randn(k, generator=g)
    prompt = torch.randn(prompts, 6, generator=torch.Generator().manual_seed(seed)) @ directions / 3
    waves = torch.linspace(0, 1, times).outer(torch.arange(1.0, 5.0))
    time = torch.cat((waves.sin(), waves.cos()), dim=1) @ curve / 2
    return torch.nn.functional.silu(time.unsqueeze(0) + prompt.unsqueeze(1) + mean).flatten(0, 1)


def modulation(preset, stats, seed=0, bias=True):
    """(tensors, record, error of the output for given inputs) of a W4A16 layer under a preset."""
    w, b = weight(160, 256, seed), torch.randn(160, generator=torch.Generator().manual_seed(seed)) / 10
    spec = layout.LayerSpec(layout.AWQ, 256, 160, bias=bias)
    tensors, record = pipeline.quantize_layer("mod", w, b if bias else None, stats, spec, presets.make_recipe(preset, 16))
    assert {part: (tuple(t.shape), t.dtype) for part, t in tensors.items()} == spec.tensors()
    assert record.format == layout.AWQ and record.bytes_after == spec.nbytes()

    def error(x):
        y = reference.awq_linear(x, tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"],
                                 tensors["bias"].float() if bias else None)
        return relative_error(y, torch.nn.functional.linear(x, w, b if bias else None))

    return tensors, record, error


def calls_of(x):
    """InputStats of calls with one row each."""
    stats = InputStats(len(x), with_gram=True, tokens_per_input=4)
    for row in x:
        stats.add(row.view(1, 1, -1))
    return stats


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_modulation_layers_are_rounded_for_their_inputs_and_similar_ones(seed, bias):
    seen, fresh = conditions(4, 1), conditions(7, 2, prompts=30)
    blind, fast, best = (modulation(preset, stats, seed, bias) for preset, stats in (
        ("best", None), ("fast", calls_of(seen)), ("best", calls_of(seen))))
    summary = " ".join(f"{name} {error(seen):.2%} seen, {error(fresh):.2%} fresh;"
                    for name, (_, _, error) in (("without inputs", blind), ("fast", fast), ("best", best)))
    assert best[2](seen) < 0.3 * fast[2](seen) and best[2](fresh) < 0.7 * fast[2](fresh), summary
    assert fast[2](seen) < 0.9 * blind[2](seen) and fast[2](fresh) < 0.9 * blind[2](fresh), summary
    for _, record, error in (fast, best):
        assert record.measured_on == "outputs" and record.tokens == 32
        assert record.error == pytest.approx(error(seen), rel=1e-3) and record.error < 0.7 * record.error_naive


@pytest.mark.parametrize("preset", ["best", "slow", "fast", "data-free", "naive"])
def test_modulation_layers_without_inputs_are_searched_by_their_weights(preset):
    w = weight(160, 256)
    codes, found, zeros = rounding.awq_round(w, torch.bfloat16)
    plain = relative_error(awq_values(w, *rounding.awq_plain(w, torch.bfloat16)), w)
    for stats in (None, calls_of(torch.zeros(8, 256))):
        tensors, record, error = modulation(preset, stats)
        assert torch.equal(tensors["weight"], int4.pack(codes))
        assert torch.equal(tensors["weight_scale"], found) and torch.equal(tensors["weight_zeros"], zeros)
        if stats is None:
            assert record.measured_on == "weights" and record.error_naive == pytest.approx(plain) and record.error < plain < 0.13
        else:
            assert record.measured_on == "outputs" and record.error < 2**-8, "only the rounding of the bias to 16 bits"


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_modulation_layers_of_the_same_inputs_have_the_same_bytes(preset):
    first, again = (modulation(preset, calls_of(conditions(4, 1)))[0] for _ in range(2))
    assert all(torch.equal(first[part], again[part]) for part in first)


@pytest.mark.parametrize("preset", ["best", "fast", "data-free"])
@pytest.mark.parametrize("case", ["zero input", "nearly dead input", "nearly dead weight", "zero weight"])
def test_extreme_channels_give_finite_layers_in_fp16(preset, case):
    w, x = weight(64, 128), tokens(300, 128)
    if case == "zero input":
        x = torch.zeros_like(x)
    elif case == "nearly dead input":
        x[:, 3] *= 1e-9
    elif case == "nearly dead weight":
        w[:, 3] = 1e-12
    else:
        w[:] = 0
    spec = layout.svdquant_spec(128, 64, 16, 128, True, torch.float16)
    tensors, record = pipeline.quantize_layer("layer", w, torch.zeros(64), stats_of(x), spec, presets.make_recipe(preset, 16))
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert record.error < 0.2, f"{case}: error {record.error:.3f}"


def test_nearly_dead_gelu_channels_do_not_spoil_their_groups():
    """A channel at zero is quantized as the shift, which a smoothing factor near zero must not magnify."""
    w, errors = weight(96, 256), []
    for dead in (0, 40):
        x = torch.nn.functional.gelu(tokens(1200, 256) / 4, approximate="tanh")
        x[:, :dead] *= 1e-4
        spec = layout.svdquant_spec(256, 96, 16, 0, True, torch.bfloat16)
        tensors, record = pipeline.quantize_layer("fc2", w, torch.zeros(96), stats_of(x), spec, presets.make_recipe("best", 16))
        errors.append(record.error)
    assert errors[1] < 1.15 * errors[0], f"error {errors[1]:.4f} with dead channels, {errors[0]:.4f} without"


def test_the_search_measures_a_real_error_at_the_highest_rank(monkeypatch):
    monkeypatch.setattr(smoothing, "EXPONENTS", (0.5,))  # one candidate per pair of spans is enough here
    w, x = weight(1200, 320), tokens(400, 320)
    found = smoothing.search(w, x, smoothing.spans(x), 256, False, torch.bfloat16)
    assert found.error > 1e-3, f"search error {found.error:.1e}: the branch is exact on the rows searched"


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_layer_is_named(part, bad):
    w, bias = weight(64, 128), torch.zeros(64)
    (w if part == "weight" else bias).view(-1)[5] = bad
    spec = layout.svdquant_spec(128, 64, 16, 128, True, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"Layer double_blocks.0.img_attn.qkv has NaN or Inf in its {part}"):
        pipeline.quantize_layer("double_blocks.0.img_attn.qkv", w, bias, None, spec, presets.make_recipe("data-free", 16))


@pytest.mark.parametrize(("preset", "rank"), [("best-ever", 32), ("fast", 0), ("fast", 24), ("fast", 512)])
def test_impossible_recipes_are_refused(preset, rank):
    with pytest.raises(ValueError, match="choose"):
        presets.make_recipe(preset, rank)


@pytest.mark.parametrize(("dtype", "preset", "size"), [(torch.bfloat16, "best", 1e30), (torch.bfloat16, "naive", 1e30),
                                                       (torch.float16, "fast", 1e12)])
def test_finite_weights_that_overflow_are_named_with_their_size(dtype, preset, size):
    """Such weights were once accepted with an error of NaN, or ended in LAPACK's message."""
    name, w, recipe = "double_blocks.0.img_attn.qkv", weight(128, 128), presets.make_recipe(preset, 16)
    w[3, 5] = size
    stats = InputStats(1, recipe.needs_gram())
    stats.add(tokens(256, 128))
    says = f"Layer {name} can't be quantized: its weights reach {size:.0e} and its inputs".replace("+", r"\+")
    with pytest.raises(ValueError, match=says):
        pipeline.quantize_layer(name, w, None, stats, layout.svdquant_spec(128, 128, recipe.rank, 128, False, dtype), recipe)


# --- tokens --------------------------------------------------------------------------------------------------------


def test_the_default_number_of_tokens_is_better_on_fresh_inputs_than_a_quarter_of_it():
    """The Gram matrix of few tokens fits these tokens and not the others."""
    k, usual = 128, presets.make_recipe("best", 16).tokens
    errors = {usual // 4: 0.0, usual: 0.0}
    for seed in range(4):
        mixed = torch.randn(k, k, generator=torch.Generator().manual_seed(seed)) / k**0.5 + torch.eye(k)
        seen, fresh = tokens(32 * k, k, seed) @ mixed, tokens(2048, k, seed + 10) @ mixed
        w, spec = weight(160, k, seed), layout.svdquant_spec(k, 160, 16, k, False, torch.bfloat16)
        for count in errors:
            stats = InputStats(1, with_gram=True, tokens_per_input=count)
            stats.add(seen)
            made, _ = pipeline.quantize_layer("x", w, None, stats, spec, presets.make_recipe("best", 16))
            operands = LayerOperands(made["weight"], made["weight_scale"], made["weight_proj_down"], made["weight_proj_up"],
                                     made["weight_smooth_factor"], None, k, 8)
            errors[count] += relative_error(reference.svdquant_linear(fresh, operands), fresh @ w.t())
    assert errors[usual] < 0.998 * errors[usual // 4], errors
