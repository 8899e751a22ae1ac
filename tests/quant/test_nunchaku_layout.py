"""Nunchaku's byte order, against tensors that its own packers packed (tests/data/nunchaku), to the bit and both ways."""

from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import int4, reference
from comfyui_svdquant.quant.checkpoint import nunchaku_layout as order
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parents[1] / "data" / "nunchaku"


def vectors(name):
    return load_file(DATA / f"{name}.safetensors")


def parts(tensors, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def test_a_linear_both_ways():
    v = vectors("int4_linear_n256_k256_r32")
    for name, ours, unpack, pack in (
        ("qweight", int4.pack(v["in.weight_q"]), order.unpack_codes, order.pack_codes),
        ("wscales", v["in.wscales"].t().contiguous(), order.unpack_scales, order.pack_scales),
        ("bias", v["in.bias"], order.unpack_vector, order.pack_vector),
        ("smooth", v["in.smooth"], order.unpack_vector, order.pack_vector),
        ("lora_down", v["in.lora_down"].t().contiguous(), order.unpack_down, order.pack_down),
        ("lora_up", v["in.lora_up"], order.unpack_up, order.pack_up),
    ):
        theirs = v[f"out.{name}"]
        assert torch.equal(unpack(theirs), ours), name
        assert torch.equal(pack(ours), theirs), name


def test_all_sixteen_codes_survive():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(128, 8)
    assert torch.equal(int4.unpack_signed(order.unpack_codes(order.pack_codes(int4.pack(codes)))), codes)


def test_a_shifted_layer_by_the_documented_formulas():
    """W = Wq / smooth + up down, and the bias holds the shift, in float64 against the layer it was made from."""
    v = vectors("int4_convert_shifted")
    packed, scales = order.unpack_codes(v["out.qweight"]), order.unpack_scales(v["out.wscales"])
    smooth, bias = order.unpack_vector(v["out.smooth"]).double(), order.unpack_vector(v["out.bias"]).double()
    down, up = order.unpack_down(v["out.lora_down"]).double(), order.unpack_up(v["out.lora_up"]).double()
    quantized = reference.dequantize_weight(packed, scales, torch.float64)
    assert torch.equal(smooth, v["in.smooth"].double()) and torch.equal(up, v["in.lora_b"].double())
    # lora_down is lora_a / smooth, rounded to bf16 once.
    assert torch.allclose(down.t() * smooth, v["in.lora_a"].double(), rtol=2**-8)
    # The codes are those of in.weight, the residual in the smoothed domain.
    step = v["in.scale"].double().repeat_interleave(64, dim=1)
    assert ((quantized - v["in.weight"].double()) / step).abs().max() < 0.52
    # in.bias already lacks shift * W of the whole weight; the packer gave back the branch's part, which reads the raw x.
    folded = v["in.bias"].double() + int4.GELU_SHIFT * (up @ down.sum(dim=0, keepdim=True).t()).squeeze(1)
    assert float(v["in.shift"]) == int4.GELU_SHIFT and (bias - folded).abs().max() < 2**-7


@pytest.mark.parametrize(("name", "chunks"), [("awq_adanorm_zero_oc384_ic256", 6), ("awq_adanorm_single_oc192_ic256", 3)])
def test_a_modulation_layer_both_ways(name, chunks):
    v = vectors(name)
    theirs = parts(v, "out.")
    ours = order.unpack_awq(theirs["qweight"], theirs["wscales"], theirs["wzeros"], theirs["bias"], chunks)
    scale = v["in.scale"].double()  # in the layer's own order, not the file's
    assert torch.equal(ours["weight_scale"].double(), scale.t())
    weight = reference.dequantize_awq(ours["weight"], ours["weight_scale"], ours["weight_zeros"], torch.float64)
    steps = (weight - v["in.weight"].double()) / scale.repeat_interleave(64, dim=1)
    # Half a step of rounding, plus bf16's rounding of 7 s (in the file) and of z + 8 s (here).
    assert steps.abs().max() < 0.5 + 7 * 2**-8 + 2**-8
    diff = ours["bias"].double() - v["in.bias"].double()
    assert diff.abs().max() <= 2**-8 * (v["in.bias"].double().abs().max() + 1)  # 1 was added in bf16, and taken off
    again = order.pack_awq(*(ours[part] for part in ("weight", "weight_scale", "weight_zeros", "bias")), chunks)
    assert again.keys() == theirs.keys()
    for part, tensor in again.items():
        assert torch.equal(tensor, theirs[part]), part


def test_rounding_of_the_zeros_is_far_below_a_step():
    """Our w = (code - 8) s + z' against their w = code s + z: the step's share that the 16-bit z' costs."""
    theirs = parts(vectors("awq_adanorm_zero_oc384_ic256"), "out.")
    ours = order.unpack_awq(theirs["qweight"], theirs["wscales"], theirs["wzeros"], theirs["bias"], 6)
    scale, zeros = theirs["wscales"][:4].double(), theirs["wzeros"][:4].double()
    exact = order._deinterleave((zeros + 8 * scale).t(), 6).t()
    error = ((ours["weight_zeros"].double() - exact) / ours["weight_scale"].double()).abs().max()
    assert error < 1 / 500, f"{error:.4f} of a step"
