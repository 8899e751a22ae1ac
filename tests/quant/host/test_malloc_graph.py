"""Under ComfyUI's allocation graph nothing that a step allocates outlives it, and no step is recorded as a CUDA graph of our own."""

import contextlib
import inspect
import sys
import threading
import types

import comfy
import pytest
import torch
from comfyui_svdquant.quant.host import malloc_graph, step_graphs
from comfyui_svdquant.quant.layers import kept_memory, preparation

from .. import malloc_graphs
from ..allocations import Recorder
from ..comfy_models import sample
from ..lora_tensors import generic, load_lora, loaded, random, shapes

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def use(monkeypatch):
    """A function that puts a stand-in for comfy.model_prefetch in the place of this ComfyUI's, which may have none."""
    monkeypatch.setattr(kept_memory, "context", contextlib.nullcontext)

    def put(module):
        monkeypatch.setattr(comfy, "model_prefetch", module, raising=False)
        monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
        malloc_graph.install()
        return module

    return put


@pytest.fixture(params=malloc_graphs.VERSIONS)
def host(request, use):
    return use(request.param())


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("with_lora", [False, True])
def test_no_allocation_of_a_layer_outlives_its_step(quantized_model, host, act_bits, with_lora):
    patched = load_lora(quantized_model, generic(*shapes(quantized_model).items())) if with_lora else quantized_model
    layers = loaded(patched).packed_layers()
    for layer in layers.values():
        layer._row_scale = None
    preparation.set_act_bits(patched.model, act_bits)
    for _ in range(2):
        host.malloc_graph_begin(None)
        for layer in layers.values():
            layer(random(3, layer.in_features))
        host.malloc_graph_end()
    graph = host.graph()
    assert graph.recorder.made and graph.steps == 2 and not graph.rogues and (graph.pauses > 0) == (act_bits == 8)


def test_what_layers_keep_is_allocated_in_a_pause_of_the_hosts(host):
    with kept_memory.kept():  # outside of a step there is nothing to pause
        before = torch.ones(3)
    host.malloc_graph_begin(None)
    with kept_memory.kept():
        kept = torch.ones(3)
    host.malloc_graph_end()
    assert len(before) == len(kept) and (host.graph().pauses, host.graph().rogues) == (1, 0)


def test_evictions_for_what_layers_keep_wait_for_the_gpu_where_the_host_offers_it(use):
    for version, syncs in ((malloc_graphs.second, 0), (malloc_graphs.third, 1)):
        host = use(version())
        host.malloc_graph_begin(None)
        with kept_memory.kept():
            pass
        host.malloc_graph_end()
        assert (host.graph().pauses, host.graph().syncs) == (1, syncs)


def test_an_error_in_a_pause_ends_it(host):
    host.malloc_graph_begin(None)
    with pytest.raises(MemoryError), kept_memory.kept():
        raise MemoryError
    host.malloc_graph_end()
    assert host.graph().pauses == 1


def test_the_recorder_sees_what_outlives_a_step():
    recorder, kept = Recorder(), []
    with recorder:
        kept.append(torch.ones(3) + 1)
        torch.ones(3).view(1, 3)
        with recorder.pause():
            kept.append(torch.ones(3))
    assert len(recorder.rogues()) == 1


def test_a_comfyui_without_the_graph(use):
    use(types.ModuleType("comfy.model_prefetch"))
    assert kept_memory.context is contextlib.nullcontext and not malloc_graph.is_active()


def test_no_step_is_recorded_under_the_graph(host, monkeypatch):
    monkeypatch.setattr(step_graphs, "DEVICE", "cpu")
    call = {"x": torch.zeros(1, 16, 8, 8), "transformer_options": {}}
    assert step_graphs.allowed(call)
    host.malloc_graph_begin(None)
    assert malloc_graph.is_active() and not step_graphs.allowed(call)
    thread = threading.Thread(target=lambda: seen.append(malloc_graph.is_active()))
    seen = []
    thread.start()
    thread.join(60)
    host.malloc_graph_end()
    assert seen == [False] and not malloc_graph.is_active() and step_graphs.allowed(call)


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
        scope = comfy.model_prefetch.malloc_graph_scope
        # The first versions keep the graph with the module.
        with scope(*([quantized_model.model.diffusion_model] if len(inspect.signature(scope).parameters) > 1 else []), x.device):
            result.copy_(forward(x, *args, **kwargs))
        return result

    quantized_model.model.diffusion_model.forward = scoped
    try:
        assert torch.equal(sample(quantized_model), expected) and torch.equal(sample(quantized_model), expected)
    finally:
        del quantized_model.model.diffusion_model.forward
        comfy.model_prefetch.cleanup_prefetch_queues()
