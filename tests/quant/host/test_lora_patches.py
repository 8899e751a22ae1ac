"""How SVDQuant reads ComfyUI's patches: the parts of adapters by name, unknown forms, and patches that can't be applied."""

import logging

import comfy.hooks
import comfy.lora
import pytest
import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter
from comfyui_svdquant.quant.host import patches

from ..comfy_models import HIDDEN, sample
from ..lora_tensors import FC1, change, factors, generic, load_lora, loaded, random, shapes
from .test_lora_kinds import KINDS, adapter_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")
N, K = 4 * HIDDEN, HIDDEN  # of FC1


def fc1_lora(patcher, tensors, strength=1.0):
    return load_lora(patcher, {f"diffusion_model.{FC1}.{part}": tensor.contiguous() for part, tensor in tensors.items()}, strength)


# --- parts by name -------------------------------------------------------------------------------------------------


NAMED = {"LoKr": ("w1", "lokr_w1"), "LoKr of low rank": ("w2_b", "lokr_w2_b"), "LoKr with DoRA": ("dora_scale", "dora_scale"),
         "LoHa": ("w2_b", "hada_w2_b"), "DoRA": ("down", "lora_down.weight"), "DoRA over inputs": ("dora_scale", "dora_scale"),
         "GLoRA": ("b2", "b2.weight"), "OFT": ("blocks", "oft_blocks"), "BOFT": ("blocks", "oft_blocks")}


@pytest.mark.parametrize("what", NAMED)
def test_the_names_are_those_of_the_tensors_in_a_file(quantized_model, what):
    part, suffix = NAMED[what]
    tensors = adapter_tensors(what, N, K)
    (entry,) = fc1_lora(quantized_model, tensors).patches[f"diffusion_model.{FC1}.weight"]
    patch = patches.patch_of(entry)
    assert patches.kind(patch.value) == KINDS[what][0]
    assert torch.equal(getattr(patches.parts(patch.value), part), tensors[suffix])


@pytest.mark.parametrize("adapter", [LoRAAdapter(set(), (*factors(N, K), None, None, None, None, None)),
                                     LoKrAdapter(set(), (random(8, 8), random(N // 8, K // 8)))])
def test_adapters_of_an_unknown_form_are_refused(quantized_model, adapter):
    """A newer ComfyUI may have such adapters."""
    before = sample(quantized_model)
    known = len(patches.PARTS[adapter.name]._fields)
    with pytest.raises(ValueError, match=rf"has {len(adapter.weights)} parts, and SVDQuant knows {known} \([^\n]+\); update ComfyUI-S"):
        quantized_model.clone().add_patches({f"diffusion_model.{FC1}.weight": adapter})
    assert torch.equal(sample(quantized_model), before)


# --- patches that ComfyUI can't apply ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tensors", "why"), [
    ({"hada_w1_a": random(7, 2), "hada_w1_b": random(2, 9), "hada_w2_a": random(7, 2), "hada_w2_b": random(2, 9)},
     "could not apply its LoHa"),
    ({"oft_blocks": random(3, 5, 5)}, "could not apply its OFT"),
    ({"diff": random(5, 5)}, "could not apply its weight difference"),
    (adapter_tensors("LoKr", N, K) | {"dora_scale": random(7, 1)}, "belongs to another model"),
    (adapter_tensors("DoRA over inputs", N, K) | {"dora_scale": random(1, 7)}, "belongs to another model"),
])
def test_a_patch_that_comfyui_only_logs_is_an_error(quantized_model, tensors, why):
    """It is an error even if logging is disabled."""
    before, patched = sample(quantized_model), fc1_lora(quantized_model, tensors)
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(ValueError, match=f"^A LoRA or weight patch for [^\n]+{why}[^\n]*\\.$"):
            loaded(patched)
    finally:
        logging.disable(logging.NOTSET)
    assert torch.equal(sample(quantized_model), before)


@pytest.mark.parametrize("what", ["LoHa", "difference", "OFT", "GLoRA"])
def test_a_patch_without_effect_is_ignored(quantized_model, what):
    tensors = {part: torch.zeros_like(tensor) for part, tensor in adapter_tensors(what, N, K).items()}
    assert torch.equal(sample(fc1_lora(quantized_model, tensors)), sample(quantized_model))


def test_another_modules_warning_is_ignored(quantized_model, monkeypatch):
    """The thread that builds a LoRA branch may log other warnings."""
    calculate = comfy.lora.calculate_weight

    def chatty(*args, **kwargs):
        logging.warning("the disk is nearly full")
        return calculate(*args, **kwargs)

    monkeypatch.setattr(comfy.lora, "calculate_weight", chatty)
    assert change(loaded(fc1_lora(quantized_model, adapter_tensors("LoHa", N, K))), FC1)[0] < 0.1


# --- taking patches key by key -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [False, True])
def test_adding_patches_key_by_key_walks_the_model_no_more_than_comfyuis_patcher(plain, quantized_model, monkeypatch, hook):
    """Some loaders add patches this way; at FLUX.1's depth one more walk for each of 308 keys took 4.7 s."""
    patched = load_lora(quantized_model, generic(*shapes(quantized_model).items()))
    added = {key: patches.patch_of(entries[0]).value for key, entries in patched.patches.items()}
    walks = []

    def counted(name):
        own = getattr(torch.nn.Module, name)

        def method(self, *args, **kwargs):
            if self in (plain.model, plain.model.diffusion_model, quantized_model.model, quantized_model.model.diffusion_model):
                walks.append(name)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, name, method)

    for name in ("named_modules", "named_parameters", "state_dict"):
        counted(name)
    counts = []
    for patcher in (quantized_model.clone(), plain.clone()):
        walks.clear()
        for key, value in added.items():
            if hook:
                patcher.add_hook_patches(comfy.hooks.WeightHook(), {key: value})
            else:
                patcher.add_patches({key: value})
        counts.append(len(walks))
    assert counts[0] <= counts[1] and counts[1] >= len(added)
