"""The techniques of custom nodes for FLUX MODELs, reimplemented here, on a MODEL in 4 bits."""

import copy

import comfy.ldm.flux.layers
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.host import build
from comfyui_svdquant.quant.host.saving import stored_tensors
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import HIDDEN, sample
from ..conftest import load

pytestmark = pytest.mark.usefixtures("inference_mode")
QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"


def with_lora(patcher):
    g = torch.Generator().manual_seed(3)
    patched, patches = patcher.clone(), {}
    for name, rows in ((QKV, 3), (LINEAR1, 7)):
        up, down = torch.randn(rows * HIDDEN, 4, generator=g) / 4, torch.randn(4, HIDDEN, generator=g) / 4
        patches[f"diffusion_model.{name}.weight"] = LoRAAdapter(set(), (up, down, None, None, None, None))
    assert len(patched.add_patches(patches)) == 2
    return patched


def layer(patcher, name):
    return patcher.model.diffusion_model.get_submodule(name)


# --- blocks of their own -------------------------------------------------------------------------------------------


class DoubledSingle(torch.nn.Module):
    """A block made of another block's parts, with an addition to the attention, as in IP-Adapters."""

    def __init__(self, block):
        super().__init__()
        self.block_size, self.heads = block.hidden_size, block.num_heads
        self.linear1, self.linear2, self.norm = block.linear1, block.linear2, block.norm
        self.pre_norm, self.modulation, self.mlp_act, self.mlp_width = block.pre_norm, block.modulation, block.mlp_act, block.mlp_hidden_dim

    def forward(self, x, vec, pe, **_):
        mod, _ = self.modulation(vec)
        qkv, mlp = self.linear1((1 + mod.scale) * self.pre_norm(x) + mod.shift).split([3 * self.block_size, self.mlp_width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = comfy.ldm.flux.layers.attention(*self.norm(q, k, v), v, pe=pe)
        return x + mod.gate * self.linear2(torch.cat((1.5 * attention, self.mlp_act(mlp)), 2))


def blocks_of_its_own(patcher):
    patched = patcher.clone()
    patched.add_object_patch("diffusion_model.single_blocks.0", DoubledSingle(layer(patcher, "single_blocks.0")))
    return patched


class Damped(comfy.ldm.flux.layers.SingleStreamBlock):
    def forward(self, x, *args, **kwargs):
        return x + 0.5 * (super().forward(x.clone(), *args, **kwargs) - x)


def another_class(patcher):
    patched = patcher.clone()
    patched.add_object_patch("diffusion_model.single_blocks.0.__class__", Damped)
    return patched


def forward_of_its_own(patcher):
    """A step cache: it reuses the blocks' output of an earlier call."""
    patched = patcher.clone()
    model, residuals = patcher.model.diffusion_model, []
    forward = model.forward_orig

    def cached(img, *args, **kwargs):
        if not residuals:
            residuals.append(forward(img, *args, **kwargs))
        return residuals[0]

    patched.add_object_patch("diffusion_model.forward_orig", cached)
    return patched


@pytest.mark.parametrize("technique", [blocks_of_its_own, another_class, forward_of_its_own])
@pytest.mark.parametrize("lora", [False, True])
def test_has_the_effect_that_it_has_on_the_16_bit_model(plain, quantized_model, drift, technique, lora):
    before = sample(quantized_model)
    exact, quantized = (sample(technique(with_lora(patcher) if lora else patcher)) for patcher in (plain, quantized_model))
    effect = relative_error(exact, sample(with_lora(plain) if lora else plain))
    error = relative_error(quantized, exact)
    assert error < 2 * drift and effect > 0.02, (error, drift, effect)
    assert torch.equal(sample(quantized_model), before)


def test_a_deep_copy_keeps_its_lora(plain, quantized_model):
    try:
        copy.deepcopy(plain)
    except TypeError:
        pytest.skip("this ComfyUI can't copy a MODEL of any kind")
    patched = with_lora(quantized_model)
    before, expected = sample(quantized_model), sample(patched)
    assert torch.equal(sample(copy.deepcopy(patched)), expected)
    assert torch.equal(sample(quantized_model), before)


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".single_blocks.0"])
def test_a_lora_stays_if_a_module_is_replaced_by_its_compiled_form(quantized_model, name):
    """With torch.compile as an object patch the modules' names are longer, and ComfyUI loses a 16-bit model's LoRA."""
    patched = with_lora(quantized_model)
    target = f"diffusion_model{name}"
    patched.add_object_patch(target, torch.compile(patched.get_model_object(target), backend="eager"))
    comfy.model_management.load_models_gpu([patched])
    single = layer(quantized_model, LINEAR1)
    assert single.lora_branch is not None
    patched.detach()
    assert single.lora_branch is None


def own_partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
    """A load function that iterates over the layers itself, as nodes that spread a model over devices do."""
    self.unpatch_model(self.offload_device, unpatch_weights=True)
    self.patch_model(load_weights=False)
    for *_, name, module, _parameters in self._load_list():
        module.to(device_to)
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in self.patches:
                self.patch_weight_to_device(key, device_to=device_to)
    self.model.current_weight_patches_uuid, self.model.device = self.patches_uuid, device_to
    return 0


def test_a_lora_stays_if_other_code_loads_the_layers(quantized_model, monkeypatch):
    patched = with_lora(quantized_model)
    before, expected = sample(quantized_model), sample(patched)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", own_partially_load)
    assert torch.equal(sample(patched), expected)
    assert torch.equal(sample(quantized_model), before)
    assert torch.equal(sample(patched), expected)


# --- changes to the model itself -----------------------------------------------------------------------------------


def hung_into(patcher):
    """Add modules and a forward to the diffusion model itself, as a node that never removes them."""
    model = patcher.model.diffusion_model
    model.faces = torch.nn.ModuleList([torch.nn.Linear(HIDDEN, HIDDEN)])
    model.double_blocks[0].processor = torch.nn.Linear(4, 4)


def compiled_in_its_place(patcher):
    patched = patcher.clone()
    patched.add_object_patch("diffusion_model.single_blocks.0", torch.compile(layer(patcher, "single_blocks.0"), backend="eager"))
    comfy.model_management.load_models_gpu([patched])


@pytest.mark.parametrize("technique", [hung_into, compiled_in_its_place])
def test_is_not_saved(quantized_model, pair_files, tmp_path, technique):
    expected = sample(load(pair_files[1]))
    technique(quantized_model)
    tensors, path = stored_tensors(quantized_model), str(tmp_path / "saved.safetensors")
    native.save(path, tensors, {name: module.spec for name, module in quantized_model.packed_layers().items()},
                build.stored_config(quantized_model.model), quantized_model.recipe, quantized_model.source)
    assert torch.equal(sample(load(path)), expected)


def test_a_model_that_lacks_a_tensor_is_not_saved(quantized_model):
    quantized_model.model.diffusion_model.single_blocks[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"has single_blocks\.0\..*; load the MODEL again"):
        stored_tensors(quantized_model)
