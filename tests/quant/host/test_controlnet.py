"""ControlNets on a quantized FLUX.1: random ones in every file format that ComfyUI's loader knows."""

from pathlib import Path

import comfy.controlnet
import comfy.model_detection
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_controlnet import SetUnionControlNetType
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from nodes import ControlNetApplyAdvanced

from ..comfy_models import HIDDEN, prompts, quantized, sample, write_flux
from ..lora_tensors import generic, load_lora, random, shapes
from ..packed_flux import flux_tensors

VAE_FILE = Path(__file__).resolve().parents[3] / "demo" / "tiny_flux" / "tiny_vae.safetensors"

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(autouse=True)
def heads_of_any_width(monkeypatch):
    """ComfyUI before 0.9 assumes 24 heads in every FLUX, which a ControlNet of reduced size doesn't have."""
    detect = comfy.model_detection.detect_unet_config

    def detect_heads(*args, **kwargs):
        config = detect(*args, **kwargs)
        return config | {"num_heads": config["hidden_size"] // 128}

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect_heads)


def transformer(depth_single=0):
    """The part of a ControlNet that is a FLUX.1 with fewer blocks."""
    return {name: t for name, t in flux_tensors(hidden=HIDDEN, depth=2, depth_single=depth_single).items()
            if not name.startswith("final_layer")}


def linear(name, n, k, size=1.0, seed=0):
    return {f"{name}.weight": size * random(n, k, seed=seed) / k**0.5, f"{name}.bias": 0.02 * random(n, seed=seed)}


def residuals(prefix, count, leaf="", size=0.7):
    """The layers of a ControlNet's residuals, which are zero before training."""
    return {k: t for i in range(count) for k, t in linear(f"{prefix}.{i}{leaf}", HIDDEN, HIDDEN, size, seed=i).items()}


def convolutions(prefix, channels, kernels):
    tensors = {}
    for i, (n, kernel) in enumerate(zip(channels[1:], kernels)):
        k = channels[i]
        tensors |= {f"{prefix}.{2 * i}.weight": random(n, k, kernel, kernel, seed=i) * 1.5 / (k * kernel**2)**0.5,
                    f"{prefix}.{2 * i}.bias": torch.zeros(n)}
    return tensors


def xlabs():
    return (transformer() | residuals("controlnet_blocks", 2) | linear("pos_embed_input", HIDDEN, 64)
            | convolutions("input_hint_block", [3] + [16] * 8, [3] * 8))


def mistoline():
    return (transformer(1) | residuals("controlnet_blocks", 2, ".linear") | residuals("single_controlnet_blocks", 1, ".linear")
            | linear("pos_embed_input", HIDDEN, 64)
            | convolutions("input_cond_block.encoder", [3] + [16] * 10, [3, 1, 3, 3, 3, 3, 3, 3, 1, 3]))


def diffusers(tensors):
    """diffusers' names in place of FLUX.1's, with separate q, k and v."""
    names = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 1, "hidden_size": HIDDEN})
    renamed = {}
    for theirs, ours in names.items():
        ours, offset = (ours, None) if isinstance(ours, str) else ours[:2]
        ours = ours.replace("_norm.weight", "_norm.scale")  # the name in newer ComfyUI
        if ours in tensors:
            renamed[theirs] = (tensors[ours] if offset is None else tensors[ours].narrow(*offset)).contiguous()
    return renamed


def instantx(modes=0, channels=16):
    tensors = (diffusers(transformer(1) | linear("pos_embed_input", HIDDEN, channels * 4)) | residuals("controlnet_blocks", 2)
               | residuals("controlnet_single_blocks", 1))
    return tensors | ({"controlnet_mode_embedder.weight": random(modes, HIDDEN)} if modes else {})


# {form: (tensors, whether it reads a latent, mode of a union)}
FORMS = {
    "XLabs": (xlabs, False, None),
    "MistoLine": (mistoline, False, None),
    "InstantX": (instantx, True, None),
    "union": (lambda: instantx(modes=10), True, "depth"),
    "union in auto": (lambda: instantx(modes=10), True, "auto"),
    "inpainting": (lambda: instantx(channels=17), True, None),
}


def controlled(form, strength=0.8, count=1, start=0.0, end=1.0):
    """prompts(count) behind Load ControlNet, Set Union ControlNet Type and Apply ControlNet, on a random picture."""
    tensors, latent, mode = FORMS[form]
    control = comfy.controlnet.load_controlnet_state_dict({name: t.float() for name, t in tensors().items()})
    if mode is not None:
        control = SetUnionControlNetType.execute(control, mode)[0]
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_FILE))) if latent else None
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(8))
    return ControlNetApplyAdvanced().apply_controlnet(prompts(count), prompts(count), control, picture, strength, start, end, vae)[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_controlnet_has_the_effect_that_it_has_on_the_16_bit_model(plain, quantized_model, drift, caplog, form):
    cond = controlled(form)
    assert "missing" not in caplog.text
    before, exact = sample(quantized_model), sample(plain, cond=cond)
    assert relative_error(sample(plain), exact) > 2 * drift, "the ControlNet has too small an effect here"
    error = relative_error(sample(quantized_model, cond=cond), exact)
    assert error < drift, f"4 bits against 16 bits: {error:.3f} with the ControlNet, {drift:.3f} without it"
    assert torch.equal(sample(quantized_model), before)


def test_a_union_of_controls_and_a_lora(plain, quantized_model, drift):
    """Two ControlNets, each for a part of the steps, on a model with a LoRA."""
    tensors = generic(*shapes(quantized_model).items())
    cond = controlled("union", 0.5, end=0.6)
    (_, extras), = cond
    extras["control"].set_previous_controlnet(controlled("XLabs", 0.7, start=0.2)[0][1]["control"])
    exact = sample(load_lora(plain, tensors), cond=cond)
    assert relative_error(sample(load_lora(plain, tensors)), exact) > drift
    assert relative_error(sample(load_lora(quantized_model, tensors), cond=cond), exact) < drift


def test_a_model_is_calibrated_under_a_controlnet(tmp_path):
    """With a ControlNet on the prompts, the replay of the blocks adds its residuals."""
    plain = loader.load_model(write_flux(tmp_path / "flux.safetensors", depth_single=1))
    quantized_model, _ = quantized(plain, conditioning=controlled("union", count=2))
    cond = controlled("union")
    assert relative_error(sample(quantized_model, cond=cond), sample(plain, cond=cond)) < 0.2
