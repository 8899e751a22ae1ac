"""Quantizing a MODEL whose LoRA widens img_in, as FLUX.1 Canny's and Depth's do: the quantized model has the widened img_in."""

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.host import build, quantize
from comfyui_svdquant.quant.host.saving import stored_tensors
from comfyui_svdquant.quant.quantizer import presets
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import HIDDEN, LATENT, Progress, prompts, sample
from ..conftest import load
from ..lora_tensors import MARGIN, load_lora, named, random
from .test_lora import control_lora

pytestmark = pytest.mark.usefixtures("inference_mode")


def controlled(seed=7):
    """A prompt with the control LoRA's picture, as from InstructPixToPixConditioning."""
    ((prompt, extras),) = prompts(1)
    return [[prompt, extras | {"concat_latent_image": 50 * random(1, 16, 8, 8, seed=seed)}]]


def quantized(patcher, preset="data-free"):
    calibrated = preset != "data-free"
    return quantize.quantize(patcher, presets.make_recipe(preset, 16), controlled() if calibrated else None,
                             LATENT if calibrated else None, 2, 0, Progress())[0]


@pytest.mark.parametrize("preset", ["data-free", "fast"])
@pytest.mark.parametrize("loaded_before", [False, True])
def test_a_control_lora_is_baked_in(plain, drift, preset, loaded_before):
    patched = load_lora(plain, control_lora(plain))
    exact, other = (sample(patched, cond=controlled(seed)) for seed in (7, 8))
    assert relative_error(other, exact) > 2 * drift, "the control has too small an effect here"
    if not loaded_before:
        patched.detach()
    quantized_model = quantized(patched, preset)
    assert quantized_model.model.diffusion_model.img_in.weight.shape == (HIDDEN, 128)
    assert relative_error(sample(quantized_model, cond=controlled()), exact) < MARGIN * drift
    patched.detach()
    assert plain.model.diffusion_model.img_in.weight.shape == (HIDDEN, 64)


def test_its_file_records_the_width_and_loads_to_the_bit(plain, tmp_path):
    quantized_model, path = quantized(load_lora(plain, control_lora(plain))), tmp_path / "canny.safetensors"
    config = build.stored_config(quantized_model.model)
    assert config["in_channels"] == 32 and build.stored_config(plain.model)["in_channels"] == 16
    specs = {name: layer.spec for name, layer in quantized_model.packed_layers().items()}
    native.save(str(path), stored_tensors(quantized_model), specs, config, quantized_model.recipe, quantized_model.source)
    again = load(str(path))
    state = quantized_model.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    assert torch.equal(sample(again, cond=controlled()), sample(quantized_model, cond=controlled()))
    wider = load_lora(again, {"diffusion_model.img_in.reshape_weight": torch.tensor([HIDDEN, 384])}
                      | named("diffusion_model.img_in", HIDDEN, 384))
    assert torch.isfinite(sample(wider)).all()


def test_a_copy_for_another_device_has_the_width(plain):
    quantized_model = quantized(load_lora(plain, control_lora(plain)))
    copied = build.copied(quantized_model.model, quantized_model.backup)
    assert torch.equal(sample(copied, cond=controlled()), sample(quantized_model, cond=controlled()))


@pytest.mark.parametrize(("layer", "shape"), [("txt_in", (HIDDEN, 256)), ("double_blocks.0.img_attn.qkv", (3 * HIDDEN, 512)),
                                              ("img_in", (HIDDEN, 66)), ("img_in", (2 * HIDDEN, 64))])
def test_a_shape_that_the_model_can_not_have_is_refused_before_the_run(plain, layer, shape):
    name, progress = f"diffusion_model.{layer}", Progress()
    tensors = {f"{name}.reshape_weight": torch.tensor(shape)} | named(name, *shape)
    with pytest.raises(ValueError, match=rf"^[^\n]*{layer}\.weight[^\n]*\.$"):
        quantize.quantize(load_lora(plain, tensors), presets.make_recipe("fast", 16), prompts(), LATENT, 2, 0, progress)
    assert not progress.texts, "nothing was sampled or quantized"
