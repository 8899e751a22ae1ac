"""Recorded steps of a quantized model. Recording needs a GPU; the rules for it don't."""

import copy
import types

import comfy.ldm.flux.math
import comfy.model_management
import comfy.weight_adapter
import pytest
import torch
from comfyui_svdquant.quant.host import step_graphs
from comfyui_svdquant.quant.layers.lora_branch import LoRABranch

from ..comfy_models import CONTEXT, POOLED


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
    model.step_graphs.steps["a"] = step_graphs.Step(None)
    assert not copy.deepcopy(model).step_graphs.steps
    step_graphs.release(model)
    assert not model.step_graphs.steps


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


# --- On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawing(quantized_model, monkeypatch):
    """(a function that runs the loaded model and returns its output, the patcher). Every recorded step replays; `graphs` counts them."""
    monkeypatch.setenv(step_graphs.VARIABLE, "1")
    generator = torch.Generator().manual_seed(0)
    x, context, y = (torch.randn(shape, generator=generator).cuda().bfloat16() for shape in ((2, 16, 8, 10), (2, 12, CONTEXT), (2, POOLED)))

    def draw(patcher=quantized_model, scale=1.0, **more):
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        timestep = torch.full((2,), 0.5, device="cuda").bfloat16()
        return patcher.model.diffusion_model(x * scale, timestep, context, y, timestep, **more)

    with torch.inference_mode():
        yield draw, quantized_model


def graphs(patcher):
    return sum(step.graph is not None for step in patcher.model.diffusion_model.step_graphs.steps.values())


def without_graphs(draw, monkeypatch, *args, **more):
    with monkeypatch.context() as patch:
        patch.setenv(step_graphs.VARIABLE, "0")
        return draw(*args, **more)


@pytest.mark.gpu
def test_a_graph_draws_the_same_bits(drawing, monkeypatch):
    draw, patcher = drawing
    exact = {scale: without_graphs(draw, monkeypatch, scale=scale) for scale in (1.0, 0.5)}
    for scale in (1.0, 1.0, 1.0, 0.5, 1.0, 0.5):
        assert torch.equal(draw(scale=scale), exact[scale])
    assert graphs(patcher) == 1
    held = draw()
    draw(scale=0.5)
    assert torch.equal(held, exact[1.0])  # a later step doesn't write to an earlier one's result


@pytest.mark.gpu
def test_a_graph_goes_when_the_model_changes(drawing, monkeypatch):
    draw, patcher = drawing
    plain = without_graphs(draw, monkeypatch)
    for _ in range(4):
        draw()
    before = graphs(patcher)
    name, layer = next((name, layer) for name, layer in patcher.packed_layers().items() if layer.takes_lora)
    up, down = torch.randn(layer.out_features, 8), torch.randn(8, layer.in_features)
    adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 8.0, None, None, None))
    for strength in (1.0, 0.5):
        changed = patcher.clone()
        changed.add_patches({f"diffusion_model.{name}.weight": adapter}, strength)
        expected = without_graphs(draw, monkeypatch, changed)
        assert not torch.equal(expected, plain)
        for _ in range(4):
            assert torch.equal(draw(changed), expected)
    for _ in range(4):
        assert torch.equal(draw(), plain)
    patcher.detach()
    assert before == 1 and graphs(patcher) == 0
    for _ in range(4):
        assert torch.equal(draw(), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("change", ("hook", "patch", "control", "scale"))
def test_what_a_replay_would_leave_out_is_never_recorded(drawing, change):
    draw, patcher = drawing
    model, seen, more = patcher.model.diffusion_model, [], {}
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    handle = None
    if change == "hook":
        handle = model.img_in.register_forward_hook(lambda *_: seen.append(1))
    elif change == "patch":
        more["transformer_options"] = {"patches": {"post_input": [lambda out: seen.append(1) or out]}}
    elif change == "control":
        more["control"] = {"input": [], "output": []}
    else:
        more["transformer_options"] = {"rope_options": {"scale_x": 2.0}}
    try:
        for _ in range(5):
            draw(**more)
    finally:
        if handle:
            handle.remove()
    assert graphs(patcher) == 0 and len(seen) == (5 if change in ("hook", "patch") else 0)


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_runs_as_ever(drawing, monkeypatch):
    draw, patcher = drawing
    attention = comfy.ldm.flux.math.optimized_attention

    def waits(q, *args, **kwargs):
        q.flatten()[0].item()
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", waits)
    expected = without_graphs(draw, monkeypatch)
    for _ in range(5):
        assert torch.equal(draw(), expected)
    assert graphs(patcher) == 0
