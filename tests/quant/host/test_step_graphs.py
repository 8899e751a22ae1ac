"""Recorded steps of a quantized model. Recording needs a GPU; the rules for it don't."""

import copy
import functools
import gc
import types
import weakref

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.model_management
import comfy.sample
import comfy.weight_adapter
import pytest
import torch
from comfyui_svdquant.quant.host import loader, step_graphs
from comfyui_svdquant.quant.layers.lora_branch import LoRABranch
from safetensors.torch import save_file

from ..comfy_models import CONTEXT, POOLED, save
from ..family_cases import QWEN_IMAGE, Z_IMAGE

attention = comfy.ldm.flux.layers.attention


def arguments(x, **more):
    return {"x": x, "timestep": torch.ones(1, device=x.device), "context": torch.ones(1, 5, 8, device=x.device), "control": None,
            "transformer_options": {}, "kwargs": {}} | more


def test_equal_descriptions_mean_equal_calls():
    x = torch.zeros(1, 16, 8, 8)

    def description(**more):
        return step_graphs.described(arguments(x) | more, [])

    assert description() == description(timestep=torch.zeros(1)) == description(transformer_options={"sigmas": x})
    others = [description(x=x[..., :4]), description(context=None), description(y=x), description(kwargs={"attention_mask": x}),
              description(x=x.half()), description(ref_latents=[x]), description(ref_latents=[x, x]), description(kwargs={"method": "a"})]
    assert None not in others and len({description(), *others}) == len(others) + 1
    assert description(kwargs={"other": types.SimpleNamespace()}) is None
    tensors = []
    step_graphs.described(arguments(x, ref_latents=[x + 1]), tensors)
    rebuilt = step_graphs.rebuilt(arguments(x, ref_latents=[x]), iter(tensors))
    assert rebuilt["x"] is tensors[0] and rebuilt["ref_latents"][0] is tensors[-1]


def test_a_model_on_the_cpu_draws_as_ever(quantized_model):
    model = quantized_model.model.diffusion_model
    assert isinstance(model, step_graphs._Graphed) and type(model).__name__ == type(model).host_class.__name__
    assert model.is_the_hosts() and not step_graphs.ModelState(model).can_be_recorded()  # nothing is on a GPU
    assert not step_graphs.allowed(arguments(torch.zeros(1, 16, 8, 8)))
    step_graphs.graphs_of(model).steps["a"] = step_graphs.Step(None)
    assert not step_graphs.graphs_of(copy.deepcopy(model)).steps
    step_graphs.release(model)
    assert not step_graphs.graphs_of(model).steps


def test_graphs_keep_no_model_alive():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    step_graphs.graphs_of(model).steps["a"] = step_graphs.Step(step_graphs.ModelState(model))
    weight = weakref.ref(model[0].weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ("forward", "_forward", "forward_orig"))
@pytest.mark.parametrize("of_class", (True, False), ids=("of the class", "of the model"))
def test_a_replaced_function_is_seen(quantized_model, monkeypatch, name, of_class):
    model = quantized_model.model.diffusion_model
    monkeypatch.setattr(type(model).host_class if of_class else model, name, lambda *args, **kwargs: "another", raising=False)
    assert not model.is_the_hosts()


CHANGES = {  # {name: a function that changes what a step reads from the model; arguments: model, block, layer}
    "hook": lambda model, block, layer: block.register_forward_hook(lambda *_: None),
    "pre-hook": lambda model, block, layer: layer.register_forward_pre_hook(lambda *_: None),
    "forward": lambda model, block, layer: setattr(layer, "forward", lambda x: x),
    "parameter": lambda model, block, layer: setattr(layer, "bias", torch.nn.Parameter(layer.bias.clone(), requires_grad=False)),
    "memory": lambda model, block, layer: setattr(layer.bias, "data", layer.bias.data.clone()),
    "module": lambda model, block, layer: setattr(block.img_attn, "norm", copy.deepcopy(block.img_attn.norm)),
    "new module": lambda model, block, layer: block.add_module("more", torch.nn.Identity()),
    "patch": lambda model, block, layer: setattr(model.img_in, "weight_function", [lambda weight: weight]),
    "activation bits": lambda model, block, layer: setattr(layer, "act_bits", 8),
    "LoRA": lambda model, block, layer: layer.set_lora_branch(LoRABranch.of((), (768, 256), torch.bfloat16, "cpu")),
    "row scale": lambda model, block, layer: layer.row_scale(layer.weight_scale)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_seen(quantized_model, name):
    model = quantized_model.model.diffusion_model
    state = step_graphs.ModelState(model)
    assert state.unchanged()
    block = model.double_blocks[0]
    CHANGES[name](model, block, block.img_attn.qkv)
    assert not state.unchanged()


def test_a_module_in_a_container_that_was_empty_is_seen():
    model = torch.nn.ModuleList([torch.nn.ModuleList()])
    state = step_graphs.ModelState(model)
    model[0].append(torch.nn.Identity())
    assert not state.unchanged()


# --- The rules for recording and forgetting, with a stand-in for graphs on the CPU ------------------------------------


class Graph:
    """Replays a call as a CUDA graph does: with the tensors that the model had when it was recorded. Raises AssertionError where a graph
    would read memory that is no longer the model's."""

    def __init__(self, model, forward, arguments):
        self.model, self.forward, self.arguments, self.addresses = model, forward, arguments, self.now(model)
        self.replays = 0

    @staticmethod
    def now(model):
        return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]

    def replay(self, tensors):
        assert self.now(self.model) == self.addresses, "the graph reads memory that is no longer the model's"
        self.replays += 1
        return step_graphs.call(self.forward, step_graphs.rebuilt(self.arguments, iter(tensors)))


@pytest.fixture
def stand_ins(on_cpu, monkeypatch):
    """Graph in place of CUDA graphs, on the CPU, where models that are loaded from now on are."""
    def recorded(step, forward, arguments, tensors):
        step.graph = Graph(forward.args[0], forward, arguments)
        return step.graph.replay(tensors)

    def timed(step, forward, arguments):
        step.timed = step.pays = True
        return step_graphs.call(forward, arguments)

    for name, value in (("DEVICE", "cpu"), ("recorded", recorded), ("timed", timed), ("has_room", lambda device: True),
                        ("replayed", lambda step, tensors: step.graph.replay(tensors))):
        monkeypatch.setattr(step_graphs, name, value)


@pytest.fixture
def recording(stand_ins, quantized_model):
    """(a function that runs the loaded model and returns its output, the patcher, a function that returns the Graphs)"""
    draw = draws(quantized_model, "cpu")
    with torch.inference_mode():
        yield draw, quantized_model, functools.partial(recorded_graphs, quantized_model)


def recorded_graphs(patcher):
    steps = step_graphs.graphs_of(patcher.model.diffusion_model).steps
    return [step.graph for step in steps.values() if step.graph is not None]


def draws(quantized_model, device):
    generator, dtype = torch.Generator().manual_seed(0), torch.float32 if device == "cpu" else torch.bfloat16
    x, context, y = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((2, 16, 8, 10), (2, 12, CONTEXT), (2, POOLED)))

    def draw(patcher=quantized_model, scale=1.0, width=10, **more):
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        timestep = torch.full((2,), 0.5, device=device, dtype=dtype)
        return patcher.model.diffusion_model(x[..., :width] * scale, timestep, context, y, timestep, **more)

    return draw


def lora(patcher, strength, rank=8):
    """A clone with a LoRA on its first W4A4 layer."""
    clone, generator = patcher.clone(), torch.Generator().manual_seed(1)
    name, layer = next((name, layer) for name, layer in patcher.packed_layers().items() if layer.takes_lora)
    factors = (torch.randn(shape, generator=generator) for shape in ((layer.out_features, rank), (rank, layer.in_features)))
    adapter = comfy.weight_adapter.LoRAAdapter(set(), (*factors, float(rank), None, None, None))
    clone.add_patches({f"diffusion_model.{name}.weight": adapter}, strength)
    return clone


def test_the_third_equal_call_is_recorded(recording):
    draw, _, graphs = recording
    plain = draw()
    assert torch.equal(draw(), plain) and not graphs()
    for replays in (1, 2, 3):
        assert torch.equal(draw(), plain) and [graph.replays for graph in graphs()] == [replays]
    assert not torch.equal(draw(scale=0.5), plain) and graphs()[0].replays == 4
    for width in (8, 6, 4, 2):  # other sizes take the places of the oldest
        for _ in range(3):
            draw(width=width)
    assert len(graphs()) == step_graphs.GRAPHS
    draw()
    assert len(graphs()) == step_graphs.GRAPHS - 1  # the first size is a new one again


def test_a_change_of_the_model_is_recorded_anew(recording, monkeypatch):
    draw, patcher, graphs = recording
    with monkeypatch.context() as patch:
        patch.setenv(step_graphs.VARIABLE, "0")
        models = {strength: lora(patcher, strength) for strength in (1.0, 0.5)} | {0: patcher}
        expected = {strength: draw(model) for strength, model in models.items()}
        assert not graphs() and not torch.equal(expected[1.0], expected[0]) and not torch.equal(expected[1.0], expected[0.5])
    for strength in (0, 1.0, 0.5, 1.0, 0, 0.5, 0):
        for _ in range(4):
            assert torch.equal(draw(models[strength]), expected[strength])
        assert graphs() and graphs()[-1].replays >= 2
    patcher.detach()
    assert not graphs()
    for _ in range(4):
        assert torch.equal(draw(), expected[0])


def test_a_replaced_lora_takes_no_memory(recording):
    draw, patcher, graphs = recording
    model = lora(patcher, 1.0)
    for _ in range(3):
        draw(model)
    branch = next(weakref.ref(layer.lora_branch.lora_up) for layer in patcher.packed_layers().values() if layer.lora_branch)
    assert graphs()
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    del model
    gc.collect()
    assert branch() is None and not graphs()


def test_the_next_picture_uses_the_graphs_of_the_last_one(recording):
    draw, patcher, graphs = recording
    for _ in range(3):
        draw()
    comfy.model_management.load_models_gpu([patcher.clone()], force_full_load=True)
    draw(patcher.clone())
    assert graphs()[0].replays == 2


@pytest.mark.parametrize("change", ("hook", "patch", "control", "rope", "attention"))
def test_what_a_replay_would_leave_out_is_not_recorded(recording, monkeypatch, change):
    check_left_out(*recording, monkeypatch, change)


def check_left_out(draw, patcher, graphs, monkeypatch, change):
    model, seen, more = patcher.model.diffusion_model, [], {}
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    handle = model.img_in.register_forward_hook(lambda *_: seen.append(1)) if change == "hook" else None
    if change == "patch":
        more["transformer_options"] = {"patches": {"post_input": [lambda out: seen.append(1) or out]}}
    elif change == "control":
        more["control"] = {"input": [], "output": []}
    elif change == "rope":
        more["transformer_options"] = {"rope_options": {"scale_x": 2.0}}
    elif change == "attention":
        monkeypatch.setattr(comfy.ldm.flux.layers, "attention", lambda *args, **kwargs: seen.append(1) or attention(*args, **kwargs))
    try:
        for _ in range(5):
            draw(**more)
    finally:
        if handle:
            handle.remove()
    blocks = len(model.double_blocks) + len(model.single_blocks)
    assert not graphs() and len(seen) == {"hook": 5, "patch": 5, "attention": 5 * blocks}.get(change, 0)


# --- Families whose class names fewer of its arguments --------------------------------------------------------------------


@pytest.fixture(scope="module", params=(QWEN_IMAGE, Z_IMAGE), ids=str)
def of_family(request, tmp_path_factory):
    """(Case, the file of its quantized model)"""
    case, folder = request.param, tmp_path_factory.mktemp("models")
    save_file(case.tensors(), folder / "16bit.safetensors")
    with torch.inference_mode():
        return case, save(case.quantized(loader.load_model(str(folder / "16bit.safetensors")), "data-free")[0], folder / "4bit.safetensors")


def draws_of(case, patcher, device="cpu"):
    """As draws()."""
    generator, dtype = torch.Generator().manual_seed(0), torch.float32 if device == "cpu" else torch.bfloat16
    shape = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(case.latent)).shape
    x, context = (torch.randn(size, generator=generator).to(device, dtype) for size in (shape, (1, 12, CONTEXT)))

    def draw(**more):
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        return patcher.model.diffusion_model(x, torch.full((1,), 0.5, device=device, dtype=dtype), context, **case.more, **more)

    return draw


@pytest.mark.parametrize("change", (None, "patch", "control", "rope", "attention"))
def test_steps_of_a_family_are_recorded(of_family, stand_ins, monkeypatch, change):
    case, path = of_family
    patcher, more = loader.load_model(path), {}
    draw = draws_of(case, patcher)
    with torch.inference_mode():
        plain = draw(transformer_options={})
        for _ in range(4):
            assert torch.equal(draw(transformer_options={"sigmas": plain}), plain)
        assert [graph.replays for graph in recorded_graphs(patcher)] == [3]
        seen, first = [], step_graphs.first_blocks(patcher.model.diffusion_model)
        if change == "patch":
            more = {"transformer_options": {"patches": {"double_block": [lambda out: seen.append(1) or out]}}}
        elif change == "control":
            more = {"control": {"input": []}}
        elif change == "rope":
            more = {"transformer_options": {"rope_options": {"scale_x": 2.0}}}
        elif change == "attention":
            module, name = first[0].attends
            own = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs))
        for _ in range(2):
            draw(**{"transformer_options": {}} | more)
    assert [graph.replays for graph in recorded_graphs(patcher)] == [3 if change else 5] and (seen or change != "attention")


@pytest.mark.gpu
def test_a_familys_graph_draws_the_same_bits(of_family, monkeypatch):
    case, path = of_family
    monkeypatch.setenv(step_graphs.VARIABLE, "1")
    patcher = loader.load_model(path)
    draw = draws_of(case, patcher, "cuda")
    with torch.inference_mode():
        exact = without_graphs(draw, monkeypatch)
        for _ in range(5):
            assert torch.equal(draw(), exact)
    assert len(recorded_graphs(patcher)) == 1


# --- On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawing(quantized_model, monkeypatch):
    """As `recording`, with CUDA graphs."""
    monkeypatch.setenv(step_graphs.VARIABLE, "1")
    with torch.inference_mode():
        yield draws(quantized_model, "cuda"), quantized_model, functools.partial(recorded_graphs, quantized_model)


def without_graphs(draw, monkeypatch, *args, **more):
    with monkeypatch.context() as patch:
        patch.setenv(step_graphs.VARIABLE, "0")
        return draw(*args, **more)


@pytest.mark.gpu
def test_a_graph_draws_the_same_bits(drawing, monkeypatch):
    draw, _, graphs = drawing
    exact = {scale: without_graphs(draw, monkeypatch, scale=scale) for scale in (1.0, 0.5)}
    for scale in (1.0, 1.0, 1.0, 0.5, 1.0, 0.5):
        assert torch.equal(draw(scale=scale), exact[scale])
    assert len(graphs()) == 1
    held = draw()
    draw(scale=0.5)
    assert torch.equal(held, exact[1.0])  # a later step doesn't write to an earlier one's result


@pytest.mark.gpu
def test_a_graph_follows_the_models_changes(drawing, monkeypatch):
    draw, patcher, graphs = drawing
    models = {strength: lora(patcher, strength) for strength in (1.0, 0.5)} | {0: patcher}
    expected = {strength: without_graphs(draw, monkeypatch, model) for strength, model in models.items()}
    assert not torch.equal(expected[1.0], expected[0]) and not torch.equal(expected[1.0], expected[0.5])
    for strength in (0, 1.0, 0.5, 1.0, 0):
        for _ in range(4):
            assert torch.equal(draw(models[strength]), expected[strength])
        assert graphs()
    patcher.detach()
    assert not graphs()
    for _ in range(4):
        assert torch.equal(draw(), expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("change", ("hook", "patch", "control", "rope", "attention"))
def test_what_a_graph_would_leave_out_is_not_recorded(drawing, monkeypatch, change):
    check_left_out(*drawing, monkeypatch, change)


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_runs_as_ever(drawing, monkeypatch):
    draw, _, graphs = drawing
    optimized = comfy.ldm.flux.math.optimized_attention

    def waits(q, *args, **kwargs):
        q.flatten()[0].item()
        return optimized(q, *args, **kwargs)

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", waits)
    expected = without_graphs(draw, monkeypatch)
    for _ in range(5):
        assert torch.equal(draw(), expected)
    assert not graphs()
