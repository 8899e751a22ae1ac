"""A bypass LoRA, which other nodes put beside a layer: its effect is a loaded LoRA's, and the layer is as before once it is gone."""

import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import HIDDEN
from ..lora_tensors import FC1, FC2, LINEAR1, QKV, generic, load_lora, random, shapes

pytestmark = pytest.mark.usefixtures("inference_mode", "device")
newer = pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="of newer ComfyUI")


def by_hand(patcher, tensors):
    """A bypass LoRA as in ComfyUI, for older versions that have none: it replaces a layer's forward, and when it is removed it leaves the
    forward of the layer's class on the instance."""
    names = {key.removeprefix("diffusion_model.").rpartition(".lora_")[0] for key in tensors}
    own = {}

    def inject(target):
        for name in names:
            layer = target.model.diffusion_model.get_submodule(name)
            own[name] = layer.forward
            up, down = (tensors[f"diffusion_model.{name}.lora_{part}.weight"] for part in ("up", "down"))
            layer.forward = lambda x, f=layer.forward, up=up, down=down: (
                f(x) + (x.float() @ down.to(x.device).t() @ up.to(x.device).t()).to(x.dtype))

    def eject(target):
        for name in names:
            target.model.diffusion_model.get_submodule(name).forward = own[name]

    bypassed = patcher.clone()
    bypassed.set_injections("bypass_lora", [PatcherInjection(inject, eject)])
    return bypassed


def by_comfyui(patcher, tensors):
    return comfy.sd.load_bypass_lora_for_models(patcher, None, dict(tensors), 1.0, 0)[0]


@pytest.mark.parametrize("bypass", [by_hand, pytest.param(by_comfyui, marks=newer)])
def test_a_bypass_lora_is_added_before_the_gelu(quantized_model, bypass):
    """After its removal, the layer and the MLP's op are the same as before."""
    model, sizes = quantized_model.model.diffusion_model, shapes(quantized_model)
    tensors = generic(*((name, sizes[name]) for name in (FC1, FC2, LINEAR1, QKV)))
    mlp, block, x = model.double_blocks[0].img_mlp, model.single_blocks[0], random(5, HIDDEN, seed=7).to(quantized_model.load_device)
    fuses = mlp.fuses(x.device)

    def outputs(patcher):
        patcher.patch_model(patcher.load_device)
        patcher.inject_model()
        hidden = block.linear1(x)[..., 3 * HIDDEN:]
        found = [mlp(x), block.mlp_act(hidden)]
        patcher.eject_model()
        patcher.unpatch_model(patcher.offload_device)
        return found

    before = outputs(quantized_model)
    bypassed, loaded = outputs(bypass(quantized_model, tensors)), outputs(load_lora(quantized_model, tensors))
    for beside, expected, without in zip(bypassed, loaded, before):
        assert relative_error(beside, expected) < 0.02 < 0.1 < relative_error(expected, without)
    assert all(map(torch.equal, outputs(quantized_model), before)) and mlp.fuses(x.device) is fuses
