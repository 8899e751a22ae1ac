"""Patches outside the packed weights (biases, norms, 16-bit layers) while the memory that a model may take changes: each is applied once.

ComfyUI patches a parameter in place if its module is on the device, and at every call if it is not. The tests compare histories of loads
with different budgets, by clones with different LoRAs, with a load of the whole model.
"""

import random as python_random

import comfy.hooks
import comfy.model_management
import pytest
import torch
from comfyui_svdquant.quant.host import operations
from comfyui_svdquant.quant.host.saving import stored_tensors
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import sample
from ..conftest import load
from ..lora_tensors import FC1, LINEAR1, effective, generic, layer_of, load_lora, random, shapes
from .test_lora import control_lora

pytestmark = pytest.mark.usefixtures("inference_mode")
HISTORIES, EVENTS = 36, 5
EXTRAS = ("img_in", "txt_in", "final_layer.linear", "vector_in.in_layer")  # in 16 bits


def with_biases(patcher, seed):
    """A LoRA on all packed layers and some in 16 bits, with their biases and two norms."""
    model = patcher.model.diffusion_model
    sizes = shapes(patcher) | {name: model.get_submodule(name).weight.shape for name in EXTRAS}
    tensors = generic(*sizes.items(), rank=2 + seed)
    tensors |= {f"diffusion_model.{name}.diff_b": random(n, seed=seed) for name, (n, _) in sizes.items()}
    norms = [name.removesuffix(".weight") for name in model.state_dict() if "_norm." in name]
    return tensors | {f"diffusion_model.{norm}.set_weight": 1 + 0.3 * random(128, seed=seed) for norm in norms[::2]}


@pytest.fixture
def loras(plain, quantized_model):
    """The last one patches every weight, bias and norm, and widens img_in."""
    return with_biases(quantized_model, 1), with_biases(quantized_model, 2), control_lora(plain)


def clones(patcher, loras):
    first, second, widening = loras
    return [patcher, load_lora(patcher, first), load_lora(load_lora(patcher, second, 0.6), first, -0.4), load_lora(patcher, widening)]


def hooked(patcher, tensors):
    """Hooks as from Create Hook LoRA, registered as by a sampler."""
    group = comfy.hooks.create_hook_lora(tensors, 0.5, 0)
    patcher.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    return group


def in_effect(patcher):
    """{key: float32 tensor}: the parameters outside packed weights as the next call uses them, and the weights of two packed layers."""
    found = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.dtype.is_floating_point and not part.startswith("weight_"):
                tensor = parameter.float().clone()
                for function in getattr(module, f"{part}_function", ()):
                    tensor = function(tensor)
                found[f"{name}.{part}"] = tensor
    return found | {name: effective(layer_of(patcher, name)) for name in (FC1, LINEAR1)}


def differences(found, expected):
    return {key: relative_error(found[key].cpu(), tensor.cpu()) if found[key].shape == tensor.shape else 1.0
            for key, tensor in expected.items()}


def put_on(patcher, budget, current):
    """Load like ComfyUI's load_models_gpu and LoadedModel, with `budget` bytes for weights."""
    if current is not None and current is not patcher:
        current.detach(unpatch_all=False)
    patcher.partially_load(patcher.load_device, budget - patcher.loaded_size() or 0.1)
    return patcher


# Two 16-bit roundings of a weight, one before a hook's patch and one after.
ROUNDINGS = 0.008


def test_a_history_of_budgets_has_the_result_of_a_full_load(pair_files, quantized_model, loras):
    original = {name: tensor.clone() for name, tensor in stored_tensors(quantized_model).items()}
    patchers, fresh, expected = clones(quantized_model, loras), clones(load(pair_files[1]), loras), {}

    def whole(which, hook):
        if (which, hook) not in expected:
            fresh[which].partially_load(fresh[which].load_device, 1e32)
            if hook:
                fresh[which].apply_hooks(hooked(fresh[which], loras[1]))
            expected[which, hook] = in_effect(fresh[which])
            fresh[which].clean_hooks()
            fresh[which].restore_hook_patches()
        return expected[which, hook]

    wrong = []
    for seed in range(HISTORIES):
        dice, current, history = python_random.Random(seed), None, []
        for _ in range(EVENTS):
            event = dice.choice(["draw", "draw", "draw with a hook", "make room", "save"])
            if event == "save":
                history.append(event)
                assert all(torch.equal(tensor, original[name]) for name, tensor in stored_tensors(quantized_model).items()), (seed, history)
            elif event == "make room" and current is not None:
                history.append((event, room := dice.randrange(current.model_size())))
                current.partially_unload(current.offload_device, room)
            elif event.startswith("draw"):
                which, budget = dice.choice([0, 1, 1, 2, 3]), int(dice.uniform(0, 1.3) * quantized_model.model_size())
                history.append((event, which, budget))
                current = put_on(patchers[which], budget, current)
                hook = event.endswith("hook")
                if hook:
                    current.apply_hooks(hooked(current, loras[1]))
                off = differences(in_effect(current), whole(which, hook))
                current.clean_hooks()
                current.restore_hook_patches()
                worst = max(off, key=off.get)
                if off[worst] > ROUNDINGS:
                    wrong.append(f"{seed}: {worst} is {off[worst]:.1%} off after {history}")
                    break
        quantized_model.detach()
        assert all(torch.equal(tensor, original[name]) for name, tensor in stored_tensors(quantized_model).items()), (seed, history)
    assert not wrong, "\n".join([f"{len(wrong)} of {HISTORIES}", *wrong])


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_img_in_is_widened_while_it_is_offloaded(quantized_model, loras, monkeypatch, part):
    """ComfyUI selects the model's input channels by img_in's width."""
    patcher = clones(quantized_model, loras)[3]
    expected, without = sample(patcher), sample(quantized_model)
    patcher.detach()
    monkeypatch.setattr(comfy.model_management, "load_models_gpu",
                        lambda *args, **kwargs: put_on(patcher, int(part * patcher.model_size()), None))
    assert torch.equal(sample(patcher), expected) and relative_error(without, expected) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_offloaded_bias_is_patched_in_comfyuis_type(quantized_model, monkeypatch, dtype):
    """Newer ComfyUI adds patches in fp16 on most GPUs; the bits are those of a loaded layer only in the same type."""
    monkeypatch.setattr(comfy.model_management, "lora_compute_dtype", lambda device: dtype, raising=False)
    layer, seen = layer_of(quantized_model, FC1), []
    layer.bias_function = [lambda bias: seen.append(bias.dtype) or bias + 1]
    found = layer.at(torch.zeros(1, device=layer.bias.device))["bias"]
    assert seen == [dtype] and torch.equal(found, (layer.bias.to(dtype) + 1).to(layer.bias.dtype))


def test_comfyui_that_names_no_type_patches_in_float32(monkeypatch):
    monkeypatch.delattr(comfy.model_management, "lora_compute_dtype", raising=False)
    assert operations.patched_in(torch.device("cpu")) == torch.float32
