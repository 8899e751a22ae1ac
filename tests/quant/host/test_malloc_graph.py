"""Under ComfyUI's allocation graph nothing that a step allocates outlives it, and no step is recorded as a CUDA graph of our own."""

import contextlib
import sys
import threading
import types

import comfy
import pytest
import torch
from comfyui_svdquant.quant.host import malloc_graph, step_graphs
from comfyui_svdquant.quant.layers import kept_memory, preparation

from ..allocations import Recorder
from ..comfy_models import sample
from ..lora_tensors import generic, load_lora, loaded, random, shapes

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def prefetch(monkeypatch):
    """comfy.model_prefetch, or a stand-in for it where this ComfyUI has none."""
    module = getattr(comfy, "model_prefetch", types.ModuleType("comfy.model_prefetch"))
    monkeypatch.setattr(comfy, "model_prefetch", module, raising=False)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    monkeypatch.setattr(kept_memory, "context", contextlib.nullcontext)
    return module


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("with_lora", [False, True])
def test_no_allocation_of_a_layer_outlives_its_step(quantized_model, prefetch, monkeypatch, act_bits, with_lora):
    recorder = Recorder()
    monkeypatch.setattr(prefetch, "pause_malloc_graph", recorder.pause, raising=False)
    malloc_graph.install()
    patched = load_lora(quantized_model, generic(*shapes(quantized_model).items())) if with_lora else quantized_model
    layers = loaded(patched).packed_layers()
    for layer in layers.values():
        layer._row_scale = None
    preparation.set_act_bits(patched.model, act_bits)
    with recorder:
        for layer in layers.values():
            layer(random(3, layer.in_features))
    assert recorder.made and not recorder.rogues() and (recorder.pauses > 0) == (act_bits == 8)


def test_the_recorder_sees_what_outlives_a_step():
    recorder, kept = Recorder(), []
    with recorder:
        kept.append(torch.ones(3) + 1)
        torch.ones(3).view(1, 3)
        with recorder.pause():
            kept.append(torch.ones(3))
    assert len(recorder.rogues()) == 1


def test_a_comfyui_without_the_graph(prefetch, monkeypatch):
    monkeypatch.delattr(prefetch, "pause_malloc_graph", raising=False)
    malloc_graph.install()
    assert kept_memory.context is contextlib.nullcontext and not malloc_graph.is_active()


def test_no_step_is_recorded_under_the_graph(prefetch, monkeypatch):
    monkeypatch.setattr(step_graphs, "DEVICE", "cpu")
    call = {"x": torch.zeros(1, 16, 8, 8), "transformer_options": {}}
    graph = types.SimpleNamespace(_comfy_active=True)
    assert step_graphs.allowed(call)
    monkeypatch.setattr(prefetch, "MALLOC_GRAPHS", {threading.get_ident(): graph}, raising=False)
    assert malloc_graph.is_active() and not step_graphs.allowed(call)
    graph._comfy_active = False
    assert step_graphs.allowed(call)
    monkeypatch.setattr(prefetch, "MALLOC_GRAPHS", {threading.get_ident() + 1: types.SimpleNamespace(_comfy_active=True)})
    assert step_graphs.allowed(call)


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(getattr(comfy, "model_prefetch", None), "malloc_graph_scope"), reason="without malloc_graph_scope")
def test_pictures_are_the_same_under_the_real_graph(quantized_model):
    """ComfyUI's own --assert-graph-breaks ends the process where an allocation outlives its step."""
    import comfy.model_prefetch

    preparation.set_act_bits(quantized_model.model, 8)
    expected = sample(quantized_model)
    forward = quantized_model.model.diffusion_model.forward

    def scoped(x, *args, **kwargs):
        result = torch.empty_like(x)
        with comfy.model_prefetch.malloc_graph_scope(x.device):
            result.copy_(forward(x, *args, **kwargs))
        return result

    quantized_model.model.diffusion_model.forward = scoped
    try:
        assert torch.equal(sample(quantized_model), expected) and torch.equal(sample(quantized_model), expected)
    finally:
        del quantized_model.model.diffusion_model.forward
        comfy.model_prefetch.cleanup_prefetch_queues()
