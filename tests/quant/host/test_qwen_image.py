"""Qwen-Image's own: separate q, k and v, GELUs inside a module of the host's, Edit-2511 and Layered."""

import inspect

import comfy.ldm.qwen_image.model
import pytest
import torch
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.inspection import inspect as described
from comfyui_svdquant.quant.families.qwen_image import FAMILY
from comfyui_svdquant.quant.host import build, loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import save
from ..family_cases import QWEN_IMAGE

pytestmark = pytest.mark.usefixtures("inference_mode")
HOST_GELU = comfy.ldm.qwen_image.model.GELU
KNOWS_2511 = "default_ref_method" in inspect.signature(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel).parameters


def file_of(path, **changes):
    save_file(QWEN_IMAGE.tensors(depth=1, **changes), path)
    return str(path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = file_of(tmp_path_factory.mktemp("models") / "qwen.safetensors")
    with torch.inference_mode():
        plain = loader.load_model(path)
        return plain, QWEN_IMAGE.quantized(plain, exceptions="*.attn.to_k")[0]


def test_layers_apply_the_gelus_of_the_hosts_modules(pair):
    plain, model = pair
    block = model.model.diffusion_model.transformer_blocks[0]
    ups = [block.img_mlp.net[0].proj, block.txt_mlp.net[0].proj]
    assert [up.gelu_from for up in ups] == [0, 0] and not any(isinstance(module, HOST_GELU) for module in block.modules())
    assert {block.img_mlp.net[2].spec.unsigned_from, block.txt_mlp.net[2].spec.unsigned_from} == {0}
    assert sum(isinstance(module, HOST_GELU) for module in plain.model.diffusion_model.modules()) == 2
    y = QWEN_IMAGE.sample(model)
    hooks = [up.register_forward_hook(lambda *_: None) for up in ups]  # now the model applies them
    assert [up.activates_from() for up in ups] == [None, None]
    assert relative_error(QWEN_IMAGE.sample(model), y) < 1e-3
    for hook in hooks:
        hook.remove()


def test_another_activation_of_the_hosts_module_stays(pair):
    model = build.copied(pair[1].model, {}).model.diffusion_model
    block = model.transformer_blocks[0]
    exact = HOST_GELU(256, 1024, approximate="none", operations=torch.nn)
    exact.proj = block.img_mlp.net[0].proj
    exact.proj.gelu_from, block.img_mlp.net[0] = None, exact
    build.take_over_activations(FAMILY, model)
    assert block.img_mlp.net[0] is exact and exact.proj.gelu_from is None


def test_a_layer_that_is_kept_leaves_the_shared_smoothing_to_the_others(pair):
    layers = pair[1].packed_layers()
    q, v = (layers[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_v"))
    assert "transformer_blocks.0.attn.to_k" not in layers and torch.equal(q.weight_smooth_factor, v.weight_smooth_factor)


def test_an_edit_reads_its_reference_image(pair):
    reference = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    [[text, extras]] = QWEN_IMAGE.prompts(1)
    edit = [[text, extras | {"reference_latents": [reference]}]]
    exact, estimate = (QWEN_IMAGE.sample(model, cond=edit) for model in pair)
    assert relative_error(QWEN_IMAGE.sample(pair[0]), exact) > 0.001, "the reference changes the image"
    assert relative_error(estimate, exact) < 0.3


@pytest.mark.parametrize(("change", "name", "method"), [
    ("marked", "Qwen-Image-Edit-2511", "index_timestep_zero"), ("layered", "Qwen-Image-Layered", "negative_index")])
def test_edit_2511_and_layered_keep_their_way_to_read_references(tmp_path, change, name, method):
    path = file_of(tmp_path / "qwen.safetensors", **{change: True})
    assert described(read_header(path))["model"]["default_ref_method"] == method
    if not KNOWS_2511:
        with pytest.raises(CheckpointError, match=f"^qwen.safetensors is a {name}, whose default_ref_method = {method} this ComfyUI does "):
            loader.load_model(path)
        return
    patcher, summary = loader.load_described(path)
    assert summary.startswith(f"{name}, not quantized")
    model, _ = QWEN_IMAGE.quantized(patcher, preset="data-free")
    loaded, summary = loader.load_described(save(model, tmp_path / "qwen_4bit.safetensors"))
    assert summary.startswith(f"4-bit {name}, SVDQuant layout") and loaded.model.diffusion_model.default_ref_method == method
    [[text, extras]] = QWEN_IMAGE.prompts(1)
    edit = [[text, extras | {"reference_latents": [torch.ones(1, 16, 1, 4, 4)]}]]
    assert torch.equal(QWEN_IMAGE.sample(loaded, cond=edit), QWEN_IMAGE.sample(model, cond=edit))
    assert relative_error(QWEN_IMAGE.sample(model, cond=edit), QWEN_IMAGE.sample(patcher, cond=edit)) < 0.3
