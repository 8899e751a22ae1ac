"""LoRAs on a quantized FLUX under ComfyUI's model management: clones, offloading, torch.compile, hooks and schedules."""

import comfy.hooks
import pytest
import torch
from comfyui_svdquant.cuda.operands import RANK_STEP
from comfyui_svdquant.quant.host import loader, lora
from comfyui_svdquant.quant.layers import linear
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import HIDDEN, prompts, sample
from ..lora_tensors import FC1, LINEAR1, QKV, RANK, generic, layer_of, load_lora, loaded, margin, random, shapes

pytestmark = pytest.mark.usefixtures("inference_mode", "device")


def test_clones_share_one_model(quantized_model, pair_files):
    first, second = (generic(*shapes(quantized_model).items(), **options) for options in ({}, {"rank": 2, "size": 0.3}))
    one, other = (load_lora(quantized_model, tensors) for tensors in (first, second))
    patchers = [quantized_model, one, other, load_lora(one, second, -1.0)]
    alone = []
    for loras in ((), ((first, 1.0),), ((second, 1.0),), ((first, 1.0), (second, -1.0))):
        patcher = loader.load_model(pair_files[1])
        for tensors, strength in loras:
            patcher = load_lora(patcher, tensors, strength)
        alone.append(sample(patcher))
    for i in (1, 0, 2, 3, 1, 1, 0, 3, 2):
        assert torch.equal(sample(patchers[i]), alone[i]), i


def test_a_lora_survives_offloading(quantized_model):
    tensors = generic(*shapes(quantized_model).items())
    patched = load_lora(quantized_model, tensors | {f"diffusion_model.{FC1}.diff_b": random(4 * HIDDEN)})
    whole = sample(patched)
    patched.unpatch_model(patched.offload_device)
    patched.patch_model(patched.load_device, lowvram_model_memory=patched.model_size() // 2)
    assert patched.model.model_lowvram and torch.equal(sample(patched), whole)
    patched.partially_load(patched.load_device, patched.model_size())
    assert torch.equal(sample(patched), whole)
    assert patched.partially_unload(patched.offload_device, patched.model_size() // 2) > 0
    assert torch.equal(sample(patched), whole)
    patched.detach()
    assert not any(layer.lora_branch for layer in patched.packed_layers().values())
    assert torch.equal(sample(patched), whole)


def test_branches_that_share_no_memory_with_their_layers_are_counted_whole(quantized_model, monkeypatch):
    """Each has its layer's proj_down a second time, as on a computer without a GPU."""
    monkeypatch.setattr(linear, "SHARING", set())
    size = quantized_model.model_size()
    patched = loaded(load_lora(quantized_model, generic(*shapes(quantized_model).items())))
    added = sum(layer.lora_branch.nbytes() for layer in patched.packed_layers().values())
    assert patched.model_size() == patched.loaded_size() == size + added


@pytest.mark.usefixtures("shared_memory")
def test_lora_branches_are_counted_as_memory(quantized_model):
    size = quantized_model.model_size()
    patched = load_lora(quantized_model, generic(*shapes(quantized_model).items()))
    rank = RANK + -RANK % RANK_STEP  # as the kernels take it
    added = sum(2 * rank * (n + k) + 4 * rank for n, k in shapes(quantized_model).values())
    # The kernels read a layer's own proj_down beside the LoRA's, in 16 bits.
    added += sum(2 * layer.in_features * layer.spec.rank for layer in quantized_model.packed_layers().values() if layer.takes_lora)
    assert patched.model_size() == patched.clone().model_size() == patched.clone().clone().model_size() == size + added
    loaded(patched)
    assert sum(layer.lora_branch.nbytes() for layer in patched.packed_layers().values()) == added
    assert patched.loaded_size() == size + added
    assert quantized_model.model_size() == size
    # No memory is reserved for patching packed weights in 32 bits.
    offload, = (entry[0] for entry in patched._load_list() if entry[2] == f"diffusion_model.{LINEAR1}")
    offload_without, = (entry[0] for entry in quantized_model.clone()._load_list() if entry[2] == f"diffusion_model.{LINEAR1}")
    assert offload == offload_without


def test_a_failing_load_leaves_no_lora_branch(quantized_model, monkeypatch):
    before = sample(quantized_model)
    patched = load_lora(quantized_model, generic(*shapes(quantized_model).items()))
    layers = iter(range(5))
    build_branch = lora.build

    def fail(*args):
        if next(layers, None) is None:
            raise MemoryError
        return build_branch(*args)

    monkeypatch.setattr(lora, "build", fail)
    with pytest.raises(MemoryError):
        sample(patched)
    monkeypatch.undo()
    assert torch.equal(sample(quantized_model), before)


def test_the_lora_branch_is_traced_into_one_graph(quantized_model):
    patched = loaded(load_lora(quantized_model, generic((LINEAR1, shapes(quantized_model)[LINEAR1]), (FC1, shapes(quantized_model)[FC1]))))
    for name in (LINEAR1, FC1, QKV):
        layer = layer_of(patched, name)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        x = random(3, layer.in_features).to(patched.load_device)
        assert torch.equal(compiled(x), layer(x))


# --- hooks ---------------------------------------------------------------------------------------------------------


def hooked(tensors, strength=1.0, keyframes=()):
    """prompts(1) with the hooks of Create Hook LoRA and Create Hook Keyframe."""
    hooks = comfy.hooks.create_hook_lora(tensors, strength, 0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for factor, start in keyframes:
            group.add(comfy.hooks.HookKeyframe(factor, start_percent=start))
        hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(prompts(1), hooks)


def test_a_hook_lora_has_the_loras_effect(quantized_model):
    tensors = generic(*shapes(quantized_model).items()) | {f"diffusion_model.{FC1}.diff_b": random(4 * HIDDEN)}
    before, expected = sample(quantized_model), sample(load_lora(quantized_model, tensors, 0.6))
    assert torch.equal(sample(quantized_model, cond=hooked(tensors, 0.6)), expected)
    assert torch.equal(sample(quantized_model), before)
    # On top of a LoRA on the MODEL.
    other = generic((LINEAR1, shapes(quantized_model)[LINEAR1]))
    both = sample(load_lora(load_lora(quantized_model, other), tensors, 0.6))
    assert torch.equal(sample(load_lora(quantized_model, other), cond=hooked(tensors, 0.6)), both)
    assert torch.equal(sample(quantized_model), before)


def test_hook_schedules(plain, quantized_model):
    tensors = generic(*shapes(quantized_model).items())
    schedule = [(1.0, 0.0), (0.2, 0.5)]
    before, y = sample(quantized_model, steps=4), sample(quantized_model, steps=4, cond=hooked(tensors, 1.0, schedule))
    exact = sample(plain, steps=4, cond=hooked(tensors, 1.0, schedule))
    assert relative_error(y, exact) < margin() * relative_error(before, sample(plain, steps=4))
    assert relative_error(y, sample(load_lora(quantized_model, tensors), steps=4)) > 0.01
    assert torch.equal(sample(quantized_model, steps=4), before)


def test_two_prompts_with_separate_hooks(plain, quantized_model, drift):
    """The LoRA branches alternate within a step, and are kept for the next step."""
    first, second = generic(*shapes(quantized_model).items()), generic(*shapes(quantized_model).items(), rank=2)
    before = sample(quantized_model)
    y, exact = (sample(p, cond=hooked(first) + hooked(second, -0.5) + prompts(1)) for p in (quantized_model, plain))
    assert relative_error(y, exact) < margin() * drift
    assert torch.equal(sample(quantized_model), before) and not quantized_model.model.svdquant_unhooked
