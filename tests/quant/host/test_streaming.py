"""Streamed layers under ComfyUI's model management: what is pinned, what is counted, and the same picture at every budget."""

import gc

import comfy.model_management
import pytest
import torch
from comfyui_svdquant.quant.host import patcher as patcher_module
from comfyui_svdquant.quant.layers.streaming import block_bytes, offload_order, ring_bytes

from ..comfy_models import HIDDEN, sample
from ..conftest import load
from ..layers.test_streaming import GPU
from ..lora_tensors import FC1, generic, load_lora, random, shapes
from .test_lora_memory import hooked

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def pinned(monkeypatch):
    """{address: bytes} of pinned memory, by ComfyUI or by this pack, on a host that pretends to have a GPU."""
    found = {}

    def pin(tensor):
        if tensor.data_ptr() in found:
            return False
        found[tensor.data_ptr()] = tensor.nbytes
        return True

    def unpin(tensor):
        return found.pop(tensor.data_ptr(), None) is not None

    monkeypatch.setattr(comfy.model_management, "pin_memory", pin)
    monkeypatch.setattr(comfy.model_management, "unpin_memory", unpin)
    monkeypatch.setattr(patcher_module.SVDQuantModelPatcher, "_streams", lambda self: True)
    return found


def on_simulated_gpu(patcher):
    patcher.model.svdquant_stream.gpu = GPU()
    return patcher


def offloaded(patcher):
    return {name for name, layer in patcher.packed_layers().items() if not getattr(layer, "comfy_patched_weights", False)}


def put_on(patcher, budget):
    patcher.partially_load(patcher.load_device, budget - patcher.loaded_size() or 0.1)


def ring(patcher):
    return ring_bytes(patcher.packed_layers().values())


def test_the_layers_that_are_offloaded_are_spread_over_the_blocks(quantized_model):
    order = offload_order({name: block_bytes(layer) for name, layer in quantized_model.packed_layers().items()})
    before = set()
    for part in (0.9, 0.7, 0.5, 0.3):
        put_on(quantized_model, int(part * quantized_model.model_size()))
        found = offloaded(quantized_model)
        assert before <= found
        before = found
        quantized_model.detach()
    assert set(order[:3]) <= before


def test_offloaded_layers_are_pinned_once_and_the_ring_is_counted(quantized_model, pinned):
    patcher = on_simulated_gpu(quantized_model)
    budget = int(0.8 * patcher.model_size())
    put_on(patcher, budget)
    layers = patcher.packed_layers()
    assert {name for name, layer in layers.items() if layer.streamed} == offloaded(patcher) != set()
    assert {layer.streamed.memory.data_ptr() for layer in layers.values() if layer.streamed} <= set(pinned)
    resident = sum(p.nbytes for name, layer in layers.items() if name not in offloaded(patcher) for p in layer.parameters())
    assert patcher.model.svdquant_stream.size == ring(patcher) > 0
    assert resident + ring(patcher) <= patcher.loaded_size() <= budget
    for part in (0.8, 0.7, 0.9, 0.75):  # the ring is counted once, however often ComfyUI asks
        put_on(patcher, int(part * patcher.model_size()))
        assert patcher.loaded_size() <= part * patcher.model_size()
        assert {name for name, layer in layers.items() if layer.streamed} == offloaded(patcher)
    put_on(patcher, 2 * patcher.model_size())
    assert patcher.loaded_size() == patcher.model_size() and not any(layer.streamed for layer in layers.values())
    in_16_bits = {p.data_ptr() for name, module in patcher.model.named_modules() if name.removeprefix("diffusion_model.") not in layers
                  for p in module._parameters.values() if p is not None}
    assert set(pinned) <= in_16_bits  # ComfyUI keeps those that it has pinned until the model is detached
    patcher.detach()
    assert patcher.loaded_size() == 0 and not pinned


def test_making_room_counts_the_ring(quantized_model, pinned):
    patcher = on_simulated_gpu(quantized_model)
    put_on(patcher, 2 * patcher.model_size())
    room = patcher.model_size() // 8
    freed = patcher.partially_unload(patcher.offload_device, room)
    assert freed >= room and patcher.loaded_size() == patcher.model_size() - freed
    loaded, freed = patcher.loaded_size(), patcher.partially_unload(patcher.offload_device, 1)
    assert patcher.loaded_size() == loaded - freed
    patcher.detach()
    assert not pinned


def test_a_clone_that_goes_unpins_nothing(quantized_model, pinned):
    patcher = on_simulated_gpu(quantized_model)
    put_on(patcher, int(0.7 * patcher.model_size()))
    before = dict(pinned)
    clone = patcher.clone()
    del clone
    gc.collect()
    assert {address: pinned.get(address) for layer in patcher.packed_layers().values() if layer.streamed
            for address in [layer.streamed.memory.data_ptr()]}.items() <= before.items()
    assert any(layer.streamed for layer in patcher.packed_layers().values())


def test_a_model_that_goes_unpins_its_layers(pair_files, pinned):
    patcher = on_simulated_gpu(load(pair_files[1]))
    put_on(patcher, int(0.7 * patcher.model_size()))
    blocks = {layer.streamed.memory.data_ptr() for layer in patcher.packed_layers().values() if layer.streamed}
    assert blocks and blocks <= set(pinned)
    del patcher
    gc.collect()
    assert not blocks & set(pinned)


def test_unpinning_waits_for_the_models_own_gpu(quantized_model, pinned, monkeypatch):
    """Not for the current device, which may be another GPU."""
    patcher, waited = on_simulated_gpu(quantized_model), []
    monkeypatch.setattr(patcher.model.svdquant_stream.gpu, "synchronize", waited.append, raising=False)
    put_on(patcher, int(0.7 * patcher.model_size()))
    patcher.detach()
    assert set(waited) == {patcher.load_device} and not pinned


def test_without_pinned_memory_nothing_is_streamed(quantized_model, pinned, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "pin_memory", lambda tensor: False)
    patcher = on_simulated_gpu(quantized_model)
    put_on(patcher, int(0.7 * patcher.model_size()))
    assert offloaded(patcher) and not any(layer.streamed for layer in patcher.packed_layers().values()) and not patcher.pinned


@pytest.mark.parametrize("share", [4, 100])
def test_lora_branches_are_counted_where_they_are(quantized_model, pinned, monkeypatch, share):
    monkeypatch.setattr(patcher_module, "BRANCH_SHARE", share)
    patcher = on_simulated_gpu(load_lora(quantized_model, generic(*shapes(quantized_model).items(), rank=8)))
    for part in (0.9, 0.8):
        put_on(patcher, int(part * patcher.model_size()))
        assert offloaded(patcher) and patcher.loaded_size() <= part * patcher.model_size()
        layers = patcher.packed_layers()
        branches = {name: layer.lora_branch.nbytes() for name, layer in layers.items()}
        resident = sum(p.nbytes for name, layer in layers.items() if name not in offloaded(patcher) for p in layer.parameters())
        stay = patcher.model.svdquant_branches_stay
        assert stay == (share == 4)
        assert patcher.loaded_size() >= resident + ring(patcher) + sum(
            size for name, size in branches.items() if stay or name not in offloaded(patcher))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "lora", "hook"])
def test_the_same_picture_at_every_budget(quantized_model, monkeypatch, kind):
    tensors = generic(*shapes(quantized_model).items())
    patcher = load_lora(quantized_model, tensors) if kind == "lora" else quantized_model
    tensors[f"diffusion_model.{FC1}.diff_b"] = random(4 * HIDDEN)  # patched in place, also where it is offloaded
    cond = hooked(tensors, 1.0, [(1.0, 0.0), (0.2, 0.5)]) if kind == "hook" else None
    whole = sample(patcher, steps=4, cond=cond)
    for part in (0.9, 0.6, 0.3, 0.0, 0.7):
        patcher.detach()
        monkeypatch.setattr(comfy.model_management, "load_models_gpu",
                            lambda *args, **kwargs: put_on(patcher, int(part * patcher.model_size())))
        assert torch.equal(sample(patcher, steps=4, cond=cond), whole), part
        assert {name for name, layer in patcher.packed_layers().items() if layer.streamed} == offloaded(patcher)
        assert (patcher.model.svdquant_stream._ring is not None) == bool(offloaded(patcher))
    patcher.detach()
    assert patcher.model.svdquant_stream._ring is None and not comfy.model_management.PINNED_MEMORY


@pytest.mark.gpu
def test_a_whole_model_that_no_longer_fits_is_streamed(quantized_model):
    put_on(quantized_model, 2 * quantized_model.model_size())
    patcher = load_lora(quantized_model, generic(*shapes(quantized_model).items()))
    put_on(patcher, int(0.7 * patcher.model_size()))
    assert {name for name, layer in patcher.packed_layers().items() if layer.streamed} == offloaded(patcher) != set()
    if patcher.model.svdquant_branches_stay:
        assert all(buffer.is_cuda for layer in patcher.packed_layers().values() for buffer in layer.lora_branch.buffers())
    patcher.detach()
    assert not comfy.model_management.PINNED_MEMORY
