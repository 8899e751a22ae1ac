"""The reference against comfy-kitchen's implementation of the same contract, and against itself in float64.

comfy-kitchen's eager backend computes svdquant_w4a4 and awq_w4a16 from the same tensors. Given float32 tensors it
takes the same steps in another order, so the two agree to rounding; the error of one wrong scale or swapped nibble is 1e-3 or more. Its
4-bit activations are the published ones, so these tests use the published ones too.
"""

import pytest
import torch
from comfy_kitchen.backends.eager import awq, svdquant
from comfyui_svdquant.cuda import int4, reference
from comfyui_svdquant.cuda.operands import LayerOperands

from .layers import random_input, random_layer, relative_error

SHAPES = [(1, 16, 64, 16), (5, 48, 128, 32), (257, 80, 192, 16), (64, 128, 320, 0), (33, 144, 256, 128)]  # M, N, K, R
FP32_ROUNDING = 2e-6  # float32 sums of a few hundred terms


def kitchen(x, layer, unsigned):
    """comfy-kitchen's result in float32."""
    f32 = [t if t is None or t.dtype == torch.int8 else t.float() for t in layer.tensors]
    weight, weight_scale, down, up, smooth, bias = f32
    shifted = x + int4.GELU_SHIFT if unsigned else x
    codes, scales, low_rank = svdquant.quantize_svdquant_w4a4(shifted, smooth, down, pad_size=16, act_unsigned=unsigned, lora_x=x)
    y = svdquant.scaled_mm_svdquant_w4a4(codes, weight, scales, weight_scale, low_rank, up, bias, act_unsigned=unsigned)
    return codes[: x.shape[0]], scales[:, : x.shape[0]], y[: x.shape[0]]


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "rank"), SHAPES)
def test_svdquant_linear_is_comfy_kitchens(m, n, k, rank, unsigned, monkeypatch):
    monkeypatch.setattr(reference, "activation_scales", reference.symmetric_scales)
    layer = random_layer(n, k, rank, unsigned_from=0 if unsigned else None, bias=n != 80, seed=m)
    x = random_input(m, k, seed=n)
    x = torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x
    theirs_codes, theirs_scales, theirs = kitchen(x, layer, unsigned)
    codes, scales = reference.quantize_activation(x, layer.smooth, layer.unsigned_from)
    unpack = int4.unpack_unsigned if unsigned else int4.unpack_signed
    assert torch.equal(codes, unpack(theirs_codes).float())
    assert torch.equal(scales, theirs_scales.t())
    error = relative_error(reference.svdquant_linear(x, layer), theirs)
    assert error < FP32_ROUNDING, f"relative error {error:.2e} to comfy-kitchen at M={m} N={n} K={k} R={rank}"


@pytest.mark.parametrize(("m", "n", "k", "rank"), SHAPES)
def test_awq_linear_is_comfy_kitchens(m, n, k, rank):
    g = torch.Generator().manual_seed(m)
    weight = int4.pack(torch.randint(0, 16, (n, k), generator=g))
    scale, zeros = torch.rand(k // 64, n, generator=g) + 0.1, torch.randn(k // 64, n, generator=g)
    bias, x = torch.randn(n, generator=g), random_input(m, k, seed=n)
    theirs = awq.gemv_awq_w4a16(x, weight, scale, zeros, bias)
    error = relative_error(reference.awq_linear(x, weight, scale, zeros, bias), theirs)
    assert error < FP32_ROUNDING, f"relative error {error:.2e} to comfy-kitchen at M={m} N={n} K={k}"


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("unsigned_from", [0, 64, 256])
def test_float32_is_float64_to_rounding(unsigned_from, act_bits):
    layer = random_layer(96, 256, 32, unsigned_from, act_bits=act_bits)
    x = random_input(40, 256)
    exact = reference.svdquant_linear(x.double(), layer, torch.float64)
    error = relative_error(reference.svdquant_linear(x, layer), exact)
    # A value on the border of two codes may round either way: one code in tens of thousands, 1e-4 of the output.
    assert error < 2e-4, f"relative error {error:.2e}"


def test_the_bound_detects_one_wrong_scale_and_one_swapped_byte():
    layer, x = random_layer(48, 128, 32, seed=3), random_input(5, 128)
    right = reference.svdquant_linear(x, layer)
    layer.weight_scale[0, 0] *= 1.1
    assert relative_error(reference.svdquant_linear(x, layer), right) > 10 * FP32_ROUNDING
    layer = random_layer(48, 128, 32, seed=3)
    byte = layer.weight.view(torch.uint8)[0, 0]
    layer.weight.view(torch.uint8)[0, 0] = (byte >> 4) | (byte << 4)
    assert relative_error(reference.svdquant_linear(x, layer), right) > 10 * FP32_ROUNDING


def test_a_split_layer_is_its_two_parts_added():
    """The columns before unsigned_from are a signed layer, the others an unsigned one."""
    layer, x = random_layer(64, 320, 16, unsigned_from=128), random_input(9, 320)
    whole = reference.svdquant_linear(x, layer)
    signed = reference.svdquant_linear(x[:, :128], LayerOperands(
        layer.weight[:, :64].contiguous(), layer.weight_scale[:2], layer.proj_down[:128], layer.proj_up, layer.smooth[:128], layer.bias,
        128))
    unsigned = reference.svdquant_linear(x[:, 128:], LayerOperands(
        layer.weight[:, 64:].contiguous(), layer.weight_scale[2:], layer.proj_down[128:], layer.proj_up, layer.smooth[128:], None, 0))
    error = relative_error(signed + unsigned, whole)
    assert error < FP32_ROUNDING, f"relative error {error:.2e}"


def test_eight_bits_are_closer_than_four():
    """With equal weights only the activation's rounding differs, which is 16 times finer."""
    layer, x = random_layer(128, 256, 0, bias=False), random_input(64, 256, outliers=False)
    exact = x / layer.smooth.float() @ reference.dequantize_weight(layer.weight, layer.weight_scale).t()
    four, eight = (relative_error(reference.svdquant_linear(x, layer._replace(act_bits=bits)), exact) for bits in (4, 8))
    assert 0.02 < four < 0.2 and eight < four / 5, f"relative errors: 4 bits {four:.3f}, 8 bits {eight:.4f}"


def test_a_signed_groups_extreme_is_kept_exactly_as_minus_eight():
    x = random_input(64, 256, outliers=False)
    codes, scales = reference.quantize_activation(x, torch.ones(256), 128)
    groups, coded, signed = x.view(64, 4, 64), codes.view(64, 4, 64), slice(0, 2)
    at = groups[:, signed].abs().argmax(dim=-1, keepdim=True)
    extreme = groups[:, signed].gather(-1, at)
    assert (coded[:, signed].gather(-1, at) == -8).all() and coded[:, signed].max() == 7 and coded[:, 2:].min() == 0
    assert torch.equal(-8 * scales[:, signed].unsqueeze(-1), extreme)  # to the bit: 8 is a power of two
    assert 0.3 < (scales[:, signed] < 0).float().mean() < 0.7 and (scales[:, 2:] > 0).all()


def test_the_activations_leave_a_fifth_less_noise_than_the_published_ones(monkeypatch):
    x = random_input(512, 256, outliers=False)
    ours = reference.scaled_codes(*reference.quantize_activation(x, torch.ones(256), 256))
    monkeypatch.setattr(reference, "activation_scales", reference.symmetric_scales)
    published = reference.scaled_codes(*reference.quantize_activation(x, torch.ones(256), 256))
    ratio = float((ours - x).square().sum() / (published - x).square().sum())
    assert 0.74 < ratio < 0.82, f"{ratio:.3f} of the published noise; (7/8)^2 = 0.766 without the clipping"


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row_and_are_visible(bad, act_bits):
    layer, x = random_layer(32, 128, 16, act_bits=act_bits), random_input(6, 128)
    clean = reference.svdquant_linear(x, layer)
    x[2, 70] = bad
    y = reference.svdquant_linear(x, layer)
    assert not torch.isfinite(y[2]).any()
    rest = torch.arange(6) != 2
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("act_bits", [4, 8])
def test_zeros_huge_values_and_denormals(act_bits):
    layer = random_layer(32, 128, 16, act_bits=act_bits)
    x = random_input(4, 128)
    x[0], x[1, 5], x[2] = 0, 3e30, 1e-42
    codes, scales = reference.quantize_activation(x, layer.smooth, 128, act_bits)
    assert codes.abs().max() <= (8 if act_bits == 4 else 127)
    assert torch.isfinite(codes).all() and torch.isfinite(scales).all()
    assert torch.equal(reference.svdquant_linear(x, layer)[0], layer.bias.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_give_sixteen_bit_outputs_rounded_once(dtype):
    layer, x = random_layer(64, 128, 16, dtype=dtype), random_input(2 * 3, 128, dtype).reshape(2, 3, 128)
    y = reference.svdquant_linear(x, layer)
    exact = reference.svdquant_linear(x.float(), layer)
    assert y.dtype == dtype and y.shape == (2, 3, 64)
    assert torch.equal(y, exact.to(dtype))


def test_each_token_has_the_same_bits_at_any_position():
    layer, x = random_layer(64, 128, 16), random_input(8, 128)
    codes, scales = reference.quantize_activation(x, layer.smooth, 128)
    shuffled = torch.randperm(8)
    codes_shuffled, scales_shuffled = reference.quantize_activation(x[shuffled], layer.smooth, 128)
    assert torch.equal(codes[shuffled], codes_shuffled) and torch.equal(scales[shuffled], scales_shuffled)
