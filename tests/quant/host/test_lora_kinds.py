"""Adapters that are not plain LoRAs on a quantized FLUX, against ComfyUI's own dense arithmetic."""

import logging

import pytest
import torch
from comfyui_svdquant.quant.host import lora
from comfyui_svdquant.quant.layers.lora_branch import Dense, Kronecker
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import sample
from ..lora_tensors import (
    FC1,
    FC2,
    LINEAR1,
    LINEAR2,
    MOD,
    RANK,
    ROUNDING,
    change,
    factors,
    layer_of,
    load_lora,
    loaded,
    output,
    random,
    rounding,
    shapes,
    without_gelu,
)

pytestmark = pytest.mark.usefixtures("inference_mode", "device")


def adapter_tensors(what, n, k):
    up, down = factors(n, k)
    eye = up @ down
    a, c = 8, n // 8
    b, d = 8, k // 8
    return {
        "LoKr": {"lokr_w1": random(a, b) / 8, "lokr_w2": random(c, d, seed=1) / d**0.5},
        "LoKr of low rank": {"lokr_w1": random(a, b) / 8, "lokr_w2_a": random(c, 2) / 2, "lokr_w2_b": random(2, d, seed=1) / d**0.5,
                             "alpha": torch.tensor(1.0)},
        "LoKr with DoRA": {"lokr_w1": random(a, b) / 8, "lokr_w2": random(c, d, seed=1) / d**0.5,
                           "dora_scale": 1 + 0.1 * random(n, 1)},
        "LoHa": {"hada_w1_a": random(n, 2), "hada_w1_b": random(2, k, seed=1) / k**0.5, "hada_w2_a": random(n, 2, seed=2),
                 "hada_w2_b": random(2, k, seed=3) / 4, "alpha": torch.tensor(1.0)},
        "DoRA": {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": 1 + 0.2 * random(n, 1), "alpha": torch.tensor(2.0)},
        "DoRA over inputs": {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": (n / k)**0.5 + 0.2 * random(1, k)},
        "difference": {"diff": eye},
        "full difference": {"diff": random(n, k) / k**0.5},
        "GLoRA": {"a1.weight": random(k, RANK) / k**0.5, "a2.weight": random(RANK, k, seed=1) / k**0.5, "b1.weight": up,
                  "b2.weight": down},
        "OFT": {"oft_blocks": 0.2 * random(n // 32, 32, 32)},
        "BOFT": {"oft_blocks": 0.2 * random(2, n // 32, 32, 32), "alpha": torch.tensor(0.0)},
        "replacement": {"set_weight": random(n, k) / k**0.5},
    }[what]


# {adapter: (its name in the log, the error bound)}; an SVD that keeps 99 % of the energy has an error of 10 %.
KINDS = {
    "LoKr": ("LoKr", ROUNDING), "LoKr of low rank": ("LoKr", ROUNDING), "DoRA": ("LoRA with DoRA", ROUNDING),
    "LoHa": ("LoHa", 0.1), "LoKr with DoRA": ("LoKr with DoRA", 0.1), "DoRA over inputs": ("LoRA with DoRA", 0.1),
    "difference": ("weight difference", 0.1), "full difference": ("weight difference", ROUNDING), "GLoRA": ("GLoRA", 0.1),
    "OFT": ("OFT", 0.1), "BOFT": ("BOFT", 0.1), "replacement": ("replaced weight", ROUNDING),
}


@pytest.mark.parametrize("name", [LINEAR1, FC2, MOD])
@pytest.mark.parametrize("what", KINDS)
def test_other_adapters(quantized_model, caplog, what, name):
    kind, allowed = KINDS[what]
    n, k = shapes(quantized_model)[name]
    tensors = {f"diffusion_model.{name}.{part}": t.contiguous() for part, t in adapter_tensors(what, n, k).items()}
    patched = load_lora(quantized_model, tensors, 0.7)
    with caplog.at_level(logging.INFO):
        loaded(patched)
    error, exact = change(patched, name)
    assert exact.norm() > 0.01 * layer_of(patched, name).dense("cpu").norm()
    assert error < allowed + ROUNDING, f"{what} on {name} is {error:.3f} off"
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("SVDQuant: "))
    assert line.startswith(f"SVDQuant: {kind} on 1 packed layers, "), line
    branch = layer_of(patched, name).lora_branch
    others = [type(term) for term in branch.terms]
    joined = branch.lora_up is not None
    assert {"LoKr": [Kronecker], "LoKr of low rank": [Kronecker], "DoRA": [], "LoHa": [], "difference": [], "full difference": [Dense],
            "replacement": [Dense]}.get(what, others) == others and joined == (not others)
    assert torch.isfinite(sample(patched)).all()


@pytest.mark.parametrize("name", [LINEAR1, FC2, LINEAR2, MOD])
def test_a_gain_scales_the_weight_but_not_the_bias(quantized_model, name):
    """In layers that read a GELU, the stored bias also holds the GELU shift correction, which scales with W."""
    n, k = shapes(quantized_model)[name]
    patched = quantized_model.clone()
    patched.add_patches({f"diffusion_model.{name}.weight": (None,)}, 0.0, 0.5)  # a patch that scales the weight and adds nothing
    x = random(64, k)
    spec = layer_of(quantized_model, name).spec
    x[:, spec.unsigned_from:] = torch.nn.functional.gelu(x[:, spec.unsigned_from:], approximate="tanh")
    before = output(loaded(without_gelu(quantized_model)), name, x).double()
    layer = layer_of(loaded(patched), name)
    bias = layer.bias.cpu().double() - layer.gelu_shift_correction("cpu").double()
    expected = 0.5 * (before - bias) + bias
    assert relative_error(output(patched, name, x).double(), expected) < ROUNDING + rounding(before) / expected.norm()


def test_stacks_of_different_kinds(quantized_model):
    """Each patch applies to the result of the earlier patches, as in ComfyUI's own arithmetic."""
    n, k = shapes(quantized_model)[FC1]
    patched = quantized_model
    for what in ("LoKr", "DoRA", "difference", "OFT"):
        tensors = {f"diffusion_model.{FC1}.{part}": t.contiguous() for part, t in adapter_tensors(what, n, k).items()}
        patched = load_lora(patched, tensors, 0.5)
    patched.add_patches({f"diffusion_model.{FC1}.weight": (None,)}, 0.0, 0.9)
    assert change(loaded(patched), FC1)[0] < 0.1


def test_another_strength_needs_no_second_svd(quantized_model, monkeypatch):
    n, k = shapes(quantized_model)[FC1]
    tensors = {f"diffusion_model.{FC1}.{part}": t for part, t in adapter_tensors("LoHa", n, k).items()}
    loaded(load_lora(quantized_model, tensors, 1.0))
    monkeypatch.setattr(lora, "truncated_svd", lambda difference: pytest.fail("a second SVD"))
    assert change(loaded(load_lora(quantized_model, tensors, -0.3)), FC1)[0] < 0.1 + ROUNDING
