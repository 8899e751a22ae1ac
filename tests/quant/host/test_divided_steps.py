"""Divided forwards that are recorded, with a real worker process and stand-ins for CUDA graphs."""

import os
import signal
import sys
import threading
import types

import comfy.ldm.flux.layers
import pytest
import torch
from comfyui_svdquant.quant.host import loader, several_gpus, step_graphs
from comfyui_svdquant.quant.host.divided_steps import DividedSteps
from comfyui_svdquant.quant.layers import preparation
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import sample
from ..lora_tensors import generic, load_lora, shapes
from . import stand_in_graphs
from .stand_in_graphs import Graph
from .test_several_gpus import NAME, SHIM, model, path, wrapper  # noqa: F401

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def two(model, monkeypatch):  # noqa: F811
    """The MODEL on two processes that record, in 8 bits: see test_several_gpus."""
    monkeypatch.delenv(step_graphs.VARIABLE, raising=False)
    for name in ("DEVICE", "has_room", "captured"):
        monkeypatch.setattr(step_graphs, name, getattr(step_graphs, name))  # so that they are put back
    stand_in_graphs.install(step_graphs, stand_in_graphs.captured)
    monkeypatch.setattr(step_graphs, "timed", lambda step, forward, arguments: step_graphs.call(forward, arguments))
    monkeypatch.setattr(several_gpus, "PROGRAM", [sys.executable, stand_in_graphs.__file__, several_gpus.PROGRAM[-1]])
    monkeypatch.setattr(Graph, "made", [])
    preparation.set_act_bits(model.model, 8)
    several = several_gpus.several_gpus(model, 2)
    yield several
    wrapper(several).crew.close()


def replays():
    return [graph.replays for graph in Graph.made]


def test_recorded_steps_draw_the_same_bits_until_something_changes(two, model, monkeypatch):  # noqa: F811
    lora = generic(*shapes(model).items())
    with monkeypatch.context() as patch:
        patch.setenv(step_graphs.VARIABLE, "0")
        ordinary, with_lora = sample(two), sample(load_lora(model, lora, 0.5))
        assert not Graph.made and relative_error(ordinary, sample(model)) < 0.01 and relative_error(with_lora, ordinary) > 0.05
    assert torch.equal(sample(two), ordinary) and replays() == [1], "the second of two steps"
    assert torch.equal(sample(two), ordinary) and replays() == [3]
    check_a_change_of_attention(two, ordinary, monkeypatch)
    patched = load_lora(two, lora, 0.5)
    for _ in range(2):
        assert relative_error(sample(patched), with_lora) < 0.01
    assert len(Graph.made) == 2 and replays()[0] == 3 and replays()[1] > 1
    assert torch.equal(sample(two), ordinary) and len(Graph.made) == 3
    check_a_lost_worker(two, ordinary)


def check_a_change_of_attention(two, ordinary, monkeypatch):
    seen, attention = [], comfy.ldm.flux.layers.attention
    with monkeypatch.context() as patch:
        patch.setattr(comfy.ldm.flux.layers, "attention", lambda *args, **kwargs: seen.append(1) or attention(*args, **kwargs))
        assert torch.equal(sample(two), ordinary) and seen and replays() == [3]


def check_a_lost_worker(two, ordinary):
    worker, graph = wrapper(two).crew.processes[0], Graph.made[-1]
    run = graph.run
    graph.run = lambda: worker.kill() or run()
    with pytest.raises(RuntimeError, match="has ended in the middle of a step"):
        sample(two)
    assert graph.destroyed, "NCCL would wait for it"
    assert torch.equal(sample(two), ordinary), "the next run works"
    assert not Graph.made[-1].destroyed and Graph.made[-1] is not graph


def test_a_step_is_recorded_by_all_processes_or_by_none(monkeypatch):
    """What another process says: whether it may record, and whether it could."""
    monkeypatch.setattr(Graph, "made", [])
    graphs, x = set(), torch.zeros(1)
    for others, fit, could in (((True, True), True, True), ((True, False), True, True), ((True, True), True, False), ((False,), True, True),
                               ((True,), False, True)):
        answers = iter(others)
        monkeypatch.setattr(step_graphs, "captured", stand_in_graphs.captured if could else lambda run, device: None)
        every = types.SimpleNamespace(graphs=graphs, gathered=lambda own: [own, next(answers)], send_from_first=lambda message: None)
        found = DividedSteps(every, None).recorded(None, {"x": x}, [x], fit)
        assert (found is not None) == (all(others) and fit and could) and not list(answers)
    assert len(graphs) == len(Graph.made) == 2


# --- On two GPUs -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_with_exchanges_draw_the_same_bits_and_a_stopped_worker_ends_them(path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(several_gpus, "PROGRAM", [sys.executable, str(SHIM), several_gpus.PROGRAM[-1]])
    monkeypatch.delenv(step_graphs.VARIABLE, raising=False)
    two = several_gpus.several_gpus(loader.load_model(path, name=NAME), 2)
    with monkeypatch.context() as patch:
        patch.setenv(step_graphs.VARIABLE, "0")
        one_by_one = sample(two, steps=4)
    drawing = wrapper(two)
    assert not drawing.steps.every.graphs and (drawing.steps.every.peers.rooms or not torch.cuda.can_device_access_peer(0, 1))
    ordinary = sample(two, steps=4)
    assert len(drawing.steps.every.graphs) == 1 and relative_error(ordinary, one_by_one) < 0.01
    assert torch.equal(sample(two, steps=4), ordinary)
    worker, numbers = drawing.crew.processes[0], drawing.steps.every.numbers

    def stopped(*announced):
        """The worker stops, and this process waits for it in the graph, until the worker is killed."""
        os.kill(worker.pid, signal.SIGSTOP)
        threading.Timer(1, worker.kill).start()
        return numbers(*announced)

    monkeypatch.setattr(drawing.steps.every, "numbers", stopped)
    with pytest.raises(RuntimeError, match="has ended in the middle of a step"):
        sample(two, steps=4)
    assert torch.equal(sample(two, steps=4), ordinary) and len(drawing.steps.every.graphs) == 1
    drawing.crew.close()
