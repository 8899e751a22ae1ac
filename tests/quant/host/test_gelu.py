"""The GELUs of a model in a real ComfyUI: those that 4-bit layers apply themselves, and those that stay."""

import gc
import weakref
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import build, loader, quantize
from comfyui_svdquant.quant.layers import layout, linear
from comfyui_svdquant.quant.quantizer import presets

from ..comfy_models import HIDDEN, LATENT, Progress, prompts, sample

pytestmark = pytest.mark.usefixtures("inference_mode")

TAKEN = {"double_blocks.0.img_mlp.0": 0, "double_blocks.0.txt_mlp.0": 0, "single_blocks.0.linear1": 3 * HIDDEN,
         "single_blocks.1.linear1": 3 * HIDDEN}


def taken(model):
    return {name: module.gelu_from for name, module in model.named_modules()
            if isinstance(module, linear.PackedLinear) and module.gelu_from is not None}


def gelus(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.GELU)]


def handed_back(patcher):
    """The patcher, with GELUs and MLPs as ComfyUI builds them."""
    model = patcher.model.diffusion_model
    for block in model.double_blocks:
        block.img_mlp, block.txt_mlp = (torch.nn.Sequential(*mlp) for mlp in (block.img_mlp, block.txt_mlp))
    for name in taken(model):
        model.get_submodule(name).gelu_from = None
    for name in [name for name, module in model.named_modules() if isinstance(module, build.TakenOver)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.nn.GELU(approximate="tanh"))
    return patcher


def test_layers_apply_the_gelus_of_their_outputs(native_file):
    quantized_model = loader.load_model(native_file)
    model = quantized_model.model.diffusion_model
    assert taken(model) == TAKEN and not gelus(model)
    y, apart = sample(quantized_model), handed_back(quantized_model)
    assert len(gelus(model)) == len(TAKEN)
    error = float((y - sample(apart)).norm() / y.norm())
    assert error < (0.05 if torch.cuda.is_available() else 1e-3), f"relative error of the latent {error:.2e}"


def test_quantizing_takes_nothing_from_the_16_bit_model(flux_file):
    """This holds also while its blocks run with their finished layers in 4 bits."""
    patcher = loader.load_model(flux_file)
    before, recipe = sample(patcher), replace(presets.make_recipe("fast", 16), propagate="quantized")
    quantized_model, _ = quantize.quantize(patcher, recipe, prompts(), LATENT, 2, 0, Progress())
    assert taken(quantized_model.model.diffusion_model) == TAKEN and not gelus(quantized_model.model.diffusion_model)
    assert not taken(patcher.model.diffusion_model) and len(gelus(patcher.model.diffusion_model)) == len(TAKEN)
    assert torch.equal(sample(patcher), before)


def test_a_layer_that_replaces_another(native_file, flux_file):
    """A new packed layer also applies the GELU of the packed layer that it replaces; a layer of a 16-bit model applies none."""
    for path, expected in ((native_file, TAKEN), (flux_file, {})):
        model = loader.load_model(path).model.diffusion_model
        for name in TAKEN:
            spec = layout.layer_spec(FAMILY.layer(name), name, (model.get_submodule(name).out_features, HIDDEN), 16, True, torch.bfloat16)
            build.swap(model, name, spec)
        assert taken(model) == expected and len(gelus(model)) == len(TAKEN) - len(expected)


def test_a_dropped_model_is_gone_at_once(native_file):
    """The next model may need its memory before the garbage collector runs."""
    gc.collect()
    gc.disable()
    try:
        patcher = loader.load_model(native_file)
        sample(patcher)
        comfy.model_management.unload_all_models()
        layers = [weakref.ref(patcher.model.diffusion_model.get_submodule(name)) for name in TAKEN]
        del patcher
        assert not any(layer() is not None for layer in layers)
    finally:
        gc.enable()


def gated(block):
    """Widen linear1 by a second input of a gate, as in newer models."""
    block.linear1.out_features += block.mlp_hidden_dim


def another_activation(block):
    block.mlp_act = torch.nn.GELU()


def another_format(block):
    block.linear1 = build.Operations.packed(layout.LayerSpec(layout.AWQ, HIDDEN, 7 * HIDDEN))


def in_16_bits(block):
    block.linear1 = torch.nn.Linear(HIDDEN, 7 * HIDDEN)


@pytest.mark.parametrize("change", [gated, another_activation, another_format, in_16_bits])
def test_gelus_of_other_models_stay(native_file, change):
    model = handed_back(loader.load_model(native_file)).model.diffusion_model
    block = model.single_blocks[1]
    change(block)
    activation = block.mlp_act
    build.take_over_activations(FAMILY, model)
    assert block.mlp_act is activation
    assert taken(model) == {name: start for name, start in TAKEN.items() if name != "single_blocks.1.linear1"}


def test_blocks_of_another_class_with_the_same_parts(native_file):
    """ComfyUI may rename its classes, and other nodes derive theirs from them."""
    model = handed_back(loader.load_model(native_file)).model.diffusion_model
    for block in [*model.double_blocks, *model.single_blocks]:
        block.__class__ = type("Block", (type(block),), {})
    build.take_over_activations(FAMILY, model)
    assert taken(model) == TAKEN and not gelus(model)


def test_other_activations_of_a_double_block_stay(native_file):
    model = handed_back(loader.load_model(native_file)).model.diffusion_model
    block = model.double_blocks[0]
    block.img_mlp[1], block.txt_mlp[0] = torch.nn.SiLU(), torch.nn.Linear(HIDDEN, 4 * HIDDEN)
    build.take_over_activations(FAMILY, model)
    assert type(block.img_mlp[1]) is torch.nn.SiLU and type(block.txt_mlp[1]) is torch.nn.GELU
    assert taken(model).keys() == {"single_blocks.0.linear1", "single_blocks.1.linear1"}
