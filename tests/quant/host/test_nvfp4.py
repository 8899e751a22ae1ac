"""Nunchaku's NVFP4 models in a real ComfyUI: loaded, sampled, saved in this pack's layout, with LoRAs, and offloaded."""

import re

import pytest
import torch
from comfyui_svdquant.nodes import load_model
from comfyui_svdquant.quant.checkpoint.header import read_header
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.layers.linear import NVFP4Linear
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import HIDDEN, sample, save
from ..lora_tensors import FC2, LINEAR1, LINEAR2, MARGIN, ROUNDING, change, generic, layer_of, load_lora, loaded, output, random, shapes
from ..nunchaku_nvfp4 import write_nvfp4

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(Nunchaku's file, its 16-bit source model)."""
    folder = tmp_path_factory.mktemp("models")
    save_file(write_nvfp4(folder / "svdq-fp4_r16-flux.safetensors", hidden=HIDDEN), folder / "flux.safetensors")
    return str(folder / "svdq-fp4_r16-flux.safetensors"), str(folder / "flux.safetensors")


@pytest.fixture
def plain(files):
    return loader.load_model(files[1])


@pytest.fixture
def quantized_model(files):
    return loader.load_model(files[0])


def test_its_pictures_are_close_to_the_16_bit_models(plain, quantized_model):
    layers = quantized_model.packed_layers()
    assert sum(isinstance(layer, NVFP4Linear) for layer in layers.values()) == 10 and len(layers) == 13
    assert quantized_model.recipe["preset"] == "Nunchaku NVFP4"
    exact = sample(plain)
    error = relative_error(sample(quantized_model), exact)
    assert 0.001 < error < 0.15, f"relative error of the latent {error:.3f}"


def test_it_stays_in_4_bits(files, quantized_model):
    header = read_header(files[0])
    stored = sum(info.stop - info.start for name, info in header.tensors.items() if not name.endswith("smooth_orig"))
    # The branches of a single block's halves are joined with zeros between them, and second scales are float32.
    assert quantized_model.model_size() < 1.1 * stored
    for compute_dtype in (torch.bfloat16, torch.float16):
        assert torch.isfinite(sample(loader.load_model(files[0], compute_dtype))).all()


def test_the_load_node_shows_that_its_activations_stay_nvfp4(files, monkeypatch):
    """The user selects int8 activations, which these layers do not have."""
    said = []
    monkeypatch.setattr(load_model.NodeProgress, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(load_model.model_folder, "existing_path", lambda name: dict(zip(("nvfp4", "plain"), files))[name])
    drawn = [sample(load_model.SVDQuantLoadModel.execute("nvfp4", "auto", activations).result[0]) for activations in ("auto", "int8")]
    assert torch.equal(*drawn)
    load_model.SVDQuantLoadModel.execute("plain", "auto", "int8")
    auto, int8, plain = said
    assert re.fullmatch(r"4-bit FLUX.1, Nunchaku layout, NVFP4, [\d.]+ MB; PyTorch, slow, since there are no kernels for NVFP4", auto)
    assert int8 == f"{auto}; its activations are always NVFP4, so activations = int8 has no effect"
    assert plain.startswith("FLUX.1, not quantized, ")


def test_saved_and_reloaded_gives_the_same_bits(quantized_model, tmp_path):
    path = save(quantized_model, tmp_path / "native.safetensors")
    again = loader.load_model(path)
    assert {name: layer.spec for name, layer in again.packed_layers().items()} == {
        name: layer.spec for name, layer in quantized_model.packed_layers().items()}
    first, second = (patcher.model.diffusion_model.state_dict() for patcher in (quantized_model, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
    assert torch.equal(sample(again), sample(quantized_model))
    assert again.recipe == quantized_model.recipe and again.source == quantized_model.source
    assert layout.decode_conf(read_header(path).read_bytes(f"{LINEAR2}.comfy_quant"))["format"] == layout.NVFP4


def test_guidance_and_width_come_from_the_file(tmp_path):
    path = tmp_path / "svdq-fp4.safetensors"
    write_nvfp4(path, hidden=HIDDEN, guidance=False, in_channels=96, depth_single=0)
    params = loader.load_model(str(path)).model.diffusion_model.params
    assert (params.guidance_embed, params.in_channels, params.depth_single_blocks) == (False, 96, 0)


# --- LoRAs ---------------------------------------------------------------------------------------------------------


def test_a_lora_has_the_effect_that_it_has_on_the_16_bit_model(plain, quantized_model):
    before, drift = sample(quantized_model), relative_error(sample(quantized_model), sample(plain))
    tensors = generic(*shapes(quantized_model).items())
    patched = load_lora(quantized_model, tensors, 0.8)
    exact = sample(load_lora(plain, tensors, 0.8))
    assert relative_error(sample(plain), exact) > drift
    assert relative_error(sample(patched), exact) < MARGIN * drift
    for name in shapes(quantized_model):
        assert change(loaded(patched), name)[0] < ROUNDING, name
    assert torch.equal(sample(quantized_model), before)


@pytest.mark.parametrize("name", [LINEAR1, LINEAR2, FC2])
def test_dora_and_weight_scaling_of_a_bias_without_gelu_shift_correction(quantized_model, name):
    n, k = shapes(quantized_model)[name]
    tensors = {f"diffusion_model.{name}.{part}": t for part, t in (
        ("lora_up.weight", random(n, 4) / 8), ("lora_down.weight", random(4, k) / k**0.5), ("dora_scale", 1 + 0.2 * random(n, 1)))}
    assert change(loaded(load_lora(quantized_model, tensors, 0.7)), name)[0] < ROUNDING
    x = random(8, k)
    before, bias = output(loaded(quantized_model), name, x), layer_of(quantized_model, name).bias.float().cpu()
    halved = quantized_model.clone()
    halved.add_patches({f"diffusion_model.{name}.weight": (None,)}, 0.0, 0.5)
    assert relative_error(output(loaded(halved), name, x), 0.5 * (before - bias) + bias) < 1e-5


@pytest.mark.parametrize("bias", ["diff_b", "bias.set_weight"])
def test_its_biases_may_be_changed_and_replaced(quantized_model, bias):
    x = random(4, 4 * HIDDEN)
    before, old = output(loaded(quantized_model), FC2, x), layer_of(quantized_model, FC2).bias.float().cpu().clone()
    patched = loaded(load_lora(quantized_model, {f"diffusion_model.{FC2}.{bias}": random(HIDDEN)}))
    expected = before + random(HIDDEN) - (old if bias.startswith("bias") else 0)
    assert relative_error(output(patched, FC2, x), expected) < 0.005


def test_it_can_be_merged_into_a_16_bit_model(plain, quantized_model):
    merged = plain.clone()
    for key, patch in quantized_model.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 1.0, 0.0)
    assert relative_error(sample(merged), sample(quantized_model)) < 0.15


# --- memory --------------------------------------------------------------------------------------------------------


def test_offloaded_layers_give_the_same_picture(quantized_model):
    whole = sample(quantized_model)
    quantized_model.unpatch_model(quantized_model.offload_device)
    quantized_model.patch_model(quantized_model.load_device, lowvram_model_memory=1)
    assert quantized_model.model.model_lowvram and torch.equal(sample(quantized_model), whole)


def test_a_layer_is_one_graph(quantized_model):
    layer, x = layer_of(quantized_model, LINEAR1), random(3, HIDDEN)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
