"""FLUX.2's own: klein, edits with reference images, modulations for all blocks, empty latents made for other models."""

import comfy.sample
import pytest
import torch
from comfyui_svdquant.quant.checkpoint.header import read_header
from comfyui_svdquant.quant.families.flux2 import FAMILY
from comfyui_svdquant.quant.host import build, calibrate, loader
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import save
from ..family_cases import FLUX2

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "klein.safetensors"
    save_file(FLUX2.tensors(guidance=False, depth_single=1), path)
    with torch.inference_mode():
        plain = loader.load_model(str(path))
        return plain, FLUX2.quantized(plain, preset="data-free")[0]


def test_a_klein_has_no_guidance(klein, tmp_path):
    exact, estimate = map(FLUX2.sample, klein)
    assert 0.001 < relative_error(estimate, exact) < 0.3
    path = save(klein[1], tmp_path / "klein_4bit.safetensors")
    assert torch.equal(FLUX2.sample(loader.load_model(path)), estimate)
    assert not any(name.endswith(".bias") or name.startswith("guidance_in") for name in read_header(path).tensors)


def test_the_modulations_of_all_blocks_are_w4a16_and_joined_layers_have_two_ranks(klein):
    specs = {name: layer.spec for name, layer in klein[1].packed_layers().items()}
    w4a16 = {name for name, spec in specs.items() if spec.format == layout.AWQ}
    assert w4a16 == {"double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin",
                     "final_layer.adaLN_modulation.1", "time_in.out_layer"}
    assert {spec.rank for name, spec in specs.items() if "linear" in name} == {32}
    assert {spec.rank for name, spec in specs.items() if "double_blocks" in name} == {16}
    assert all(spec.unsigned_from == spec.in_features for spec in specs.values()), "SwiGLU's outputs have both signs"


def test_an_edit_reads_its_reference_image(klein):
    reference = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(7))
    [[text, extras]] = FLUX2.prompts(1)
    edit = [[text, extras | {"reference_latents": [reference]}]]
    exact, estimate = (FLUX2.sample(model, cond=edit) for model in klein)
    assert relative_error(FLUX2.sample(klein[0]), exact) > 0.001, "the reference changes the image"
    assert relative_error(estimate, exact) < 0.3


@pytest.mark.parametrize(("config", "name"), [
    ((6144, 8, 48), "FLUX.2-dev"), ((3072, 5, 20), "FLUX.2-klein-4B"), ((4096, 8, 24), "FLUX.2-klein-9B"), ((256, 1, 2), "FLUX.2")])
def test_published_models_are_called_by_their_names(config, name):
    assert FAMILY.variant(dict(zip(("hidden_size", "depth", "depth_single_blocks"), config))) == name


def test_an_empty_latent_for_another_model_is_resized_as_the_hosts_samplers_do(klein):
    """An Empty Latent Image is made for models whose latents have twice FLUX.2's resolution; newer nodes note that beside it."""
    given = {"samples": torch.zeros(1, 4, 16, 16)}
    if "downscale_ratio_spacial" in comfy.sample.fix_empty_latent_channels.__code__.co_varnames:
        assert calibrate.sized(klein[0], given | {"downscale_ratio_spacial": 8}).shape == (1, 128, 8, 8)
    assert calibrate.sized(klein[0], given).shape == (1, 128, 16, 16)


def test_layers_whose_inputs_do_not_fit_stay_in_16_bits_and_are_named(klein, tmp_path):
    config = build.stored_config(klein[0].model) | {"mlp_ratio": 2.625}  # SwiGLU's output is 672 wide
    model = build.empty_like(klein[0].model, {}, None, config)  # computes in ComfyUI's choice of a type, as the loaded file will
    g = torch.Generator().manual_seed(0)
    build.fill(model, {build.stored_name(model, name): torch.randn(tensor.shape, generator=g).bfloat16() / tensor.shape[-1] ** 0.5
                       for name, tensor in model.diffusion_model.state_dict().items()})
    quantized_model, records = FLUX2.quantized(build.make_patcher(model, type(klein[0])))
    names = ["double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear2"]
    assert not set(names) & quantized_model.packed_layers().keys() and not set(names) & {record.name for record in records}
    assert quantized_model.recipe["notes"] == [
        f"{names[0]} and {names[1]} can't be packed in 4 bits and stay in 16: each has 672 input columns, which is not a multiple of 64.",
        f"{names[2]} can't be packed in 4 bits and stays in 16: it has 928 input columns, which is not a multiple of 64."]
    path = save(quantized_model, tmp_path / "odd_4bit.safetensors")
    assert torch.equal(FLUX2.sample(loader.load_model(path)), FLUX2.sample(quantized_model))
