"""Chroma, the second family: FLUX.1's features on a small random model in a real ComfyUI."""

import comfy.ldm.chroma.model
import comfy.model_base
import comfy.sd
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer
from comfyui_svdquant.quant.families.chroma import FAMILY
from comfyui_svdquant.quant.host import build, loader
from comfyui_svdquant.quant.host.checks import check_conditioning, check_model
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import load_file, save_file

from ..comfy_models import CONTEXT, HIDDEN, quantized, sample, save
from ..random_chroma import chroma_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")


def prompts(count=2, width=CONTEXT):
    """Chroma's only text encoder, T5, has no pooled output."""
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(1, 12, width, generator=g), {"pooled_output": None}] for _ in range(count)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "chroma.safetensors"
    save_file(chroma_tensors(), path)
    return str(path)


@pytest.fixture(scope="module")
def pair(file):
    """(the model in 16 bits, quantized)."""
    with torch.inference_mode():
        plain = loader.load_model(file)
        return plain, quantized(plain, conditioning=prompts())[0]


def test_it_loads_in_16_bits_on_the_hosts_own_class(file):
    patcher = loader.load_model(file)
    model = patcher.model.diffusion_model
    assert type(model) is comfy.ldm.chroma.model.Chroma and type(patcher.model) is comfy.model_base.Chroma
    assert (model.params.hidden_size, model.params.depth, model.params.depth_single_blocks) == (HIDDEN, 1, 2)
    assert check_model(patcher) is FAMILY
    assert torch.isfinite(sample(patcher, cond=prompts(1))).all()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_with_a_prefix_and_those_of_newer_hosts_are_the_same_model(file, tmp_path, prefix):
    renamed = {f"{prefix}{name.replace('.scale', '.weight')}": tensor for name, tensor in load_file(file).items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    first, second = (sample(loader.load_model(path), cond=prompts(1)) for path in (file, str(tmp_path / "renamed.safetensors")))
    assert torch.equal(first, second)


def test_its_blocks_are_packed_and_nothing_else(pair):
    _, model = pair
    layers = model.packed_layers()
    assert len(layers) == 8 + 2 * 2 and all(name.startswith(("double_blocks.", "single_blocks.")) for name in layers)
    assert {layer.gelu_from for name, layer in layers.items() if name.endswith((".linear1", "_mlp.0"))} == {0, 3 * HIDDEN}


def test_4_bits_stay_close(pair):
    exact, estimate = (sample(model, cond=prompts(1)) for model in pair)
    error = relative_error(estimate, exact)
    assert 0.001 < error < 0.3, f"relative error of the latent {error:.3f}"


def test_saved_and_loaded_it_has_the_same_bits(pair, tmp_path):
    _, model = pair
    path = save(model, tmp_path / "chroma_4bit.safetensors")
    loaded = loader.load_model(path)
    first, second = (m.model.diffusion_model.state_dict() for m in (model, loaded))
    assert first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
    assert torch.equal(sample(model, cond=prompts(1)), sample(loaded, cond=prompts(1)))
    metadata = read_header(path).metadata
    assert metadata["modelspec.architecture"] == "chroma" and '"image_model": "chroma"' in metadata["svdquant.config"]


def test_a_lora_has_its_effect_and_is_removed_completely(pair):
    plain, model = pair
    g = torch.Generator().manual_seed(3)
    lora = {}
    for name, n, k in (("single_blocks_0_linear1", 7 * HIDDEN, HIDDEN), ("double_blocks_0_img_mlp_2", HIDDEN, 4 * HIDDEN)):
        lora[f"lora_unet_{name}.lora_up.weight"] = torch.randn(n, 8, generator=g) / 8**0.5
        lora[f"lora_unet_{name}.lora_down.weight"] = torch.randn(8, k, generator=g) / k**0.5
    before = sample(model, cond=prompts(1))
    exact, estimate = (sample(comfy.sd.load_lora_for_models(m, None, lora, 1.0, 0.0)[0], cond=prompts(1)) for m in (plain, model))
    assert relative_error(sample(plain, cond=prompts(1)), exact) > 0.05, "the LoRA changes something"
    error = relative_error(estimate, exact)
    assert error < 0.3, f"relative error of the latent with a LoRA {error:.3f}"
    assert torch.equal(sample(model, cond=prompts(1)), before)


def test_inspect_knows_it(pair, file, tmp_path):
    saved = save(pair[1], tmp_path / "chroma_4bit.safetensors")
    for path in (file, saved):
        facts = inspection.inspect(read_header(path))
        assert facts["family"] == "Chroma" and facts["model"] == build.stored_config(pair[1].model)
        assert "Chroma: 1 double and 2 single blocks, hidden size 256, 64 channels in" in inspection.text(facts).splitlines()


def test_files_that_do_not_fit_it_are_refused_in_a_sentence(pair, file, tmp_path):
    plain, model = pair
    with pytest.raises(ValueError, match=r"^The conditioning is 64 wide and this Chroma model takes 128; [^.]+\.$"):
        check_conditioning(FAMILY, plain, prompts(width=64))
    with pytest.raises(ValueError, match="^This MODEL is quantized already"):
        check_model(model)
    tensors = {name: tensor for name, tensor in model.model.diffusion_model.state_dict().items()}
    specs = {name: layer.spec for name, layer in model.packed_layers().items()}
    with pytest.raises(CheckpointError, match="^Nunchaku's layout has no place for Chroma models; choose layout native.$"):
        writer.save(str(tmp_path / "x.safetensors"), tensors, specs, build.stored_config(model.model), {}, "")
    save_file({name: t for name, t in load_file(file).items() if "layers.1.in_layer.weight" not in name}, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"^cut.safetensors lacks tensor distilled_guidance_layer.layers.1.in_layer.weight; "):
        loader.load_model(str(tmp_path / "cut.safetensors"))
    save_file(load_file(file) | {"nerf_blocks.0.norm.scale": torch.ones(1)}, tmp_path / "radiance.safetensors")
    with pytest.raises(CheckpointError, match=r"^radiance.safetensors is a Chroma Radiance model; "):
        loader.load_model(str(tmp_path / "radiance.safetensors"))
