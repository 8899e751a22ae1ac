"""What custom nodes do to a FLUX MODEL, in our words, on a MODEL in 4 bits: named by the technique."""

import copy

import comfy.ldm.flux.layers
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from comfyui_svdquant.quant.metrics import relative_error

from .comfy_models import HIDDEN, sample

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
    """A block made of another's parts, with something added to the attention, as IP-Adapters have it."""

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
    """As step caches have it: the blocks' part of an earlier call is used again."""
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
def test_does_what_it_does_to_the_16_bit_model(plain, twin, drift, technique, lora):
    before = sample(twin)
    exact, quantized = (sample(technique(with_lora(patcher) if lora else patcher)) for patcher in (plain, twin))
    effect = relative_error(exact, sample(with_lora(plain) if lora else plain))
    error = relative_error(quantized, exact)
    assert error < 2 * drift and effect > 0.02, (error, drift, effect)
    assert torch.equal(sample(twin), before)


def test_a_deep_copy_keeps_its_lora(plain, twin):
    try:
        copy.deepcopy(plain)
    except TypeError:
        pytest.skip("this ComfyUI can't copy a MODEL of any kind")
    patched = with_lora(twin)
    before, expected = sample(twin), sample(patched)
    assert torch.equal(sample(copy.deepcopy(patched)), expected)
    assert torch.equal(sample(twin), before)
