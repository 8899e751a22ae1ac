"""Layers that read one tensor: when they share its quantization, and that they compute the same."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.cuda import ops
from comfyui_svdquant.cuda import shared_input as kernels
from comfyui_svdquant.cuda.operands import NO_LORA
from comfyui_svdquant.quant.layers import layout, linear, shared_input
from comfyui_svdquant.quant.layers.lora_branch import Dense, LoRABranch, LowRank

from ...cuda.launches import aligned, groups, recorded

K, N = 128, 64


def layer_of(seed, smooth=1.0, branch_bits=16, rank=16, act_bits=0, dtype=torch.bfloat16):
    spec = replace(layout.svdquant_spec(K, N, rank, K, True, dtype), branch_bits=branch_bits)
    layer, g = linear.SVDQuantLinear(spec, "cpu"), torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.data.copy_(torch.randint(-8, 8, p.shape, generator=g) if p.dtype == torch.int8 else torch.rand(p.shape, generator=g) + 0.5)
    layer.weight_smooth_factor.data.copy_(torch.linspace(0.5, 2, K) * smooth)
    layer.act_bits = act_bits
    return layer


@pytest.fixture
def layers():
    return [layer_of(seed) for seed in range(3)]


@pytest.fixture
def x():
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(9)).bfloat16()


@pytest.fixture
def shared(monkeypatch):
    """The operands of every call of the op."""
    calls, op = [], kernels.svdquant_linears
    monkeypatch.setattr(kernels, "svdquant_linears", lambda x, layers: calls.append(layers) or op(x, layers))
    return calls


def lora(*terms):
    return LoRABranch.of(terms, (N, K), torch.bfloat16, "cpu", own=16)


LOW_RANK = LowRank((0, N), (0, K), torch.ones(N, 8) / 8, torch.ones(8, K) / 8)


@pytest.mark.parametrize("change", ["nothing", "GELU", "LoRA", "8 bits", "branch in 8 bits"])
def test_share_one_quantization(layers, x, shared, change):
    if change == "GELU":
        layers[1].gelu_from = 0
    elif change == "LoRA":
        layers[2].set_lora_branch(lora(LOW_RANK))
    elif change == "8 bits":
        for layer in layers:
            layer.act_bits = 8
    elif change == "branch in 8 bits":
        layers[1] = layer_of(1, branch_bits=8)
    wanted = [layer(x) for layer in layers]
    assert all(torch.equal(y, own) for y, own in zip(shared_input.outputs(layers, x), wanted))
    [found] = shared
    assert [operands.weight is layer.weight for operands, layer in zip(found, layers)] == [True] * 3
    assert [operands.proj_up is layer.weight_proj_up for operands, layer in zip(found, layers)] == [True] * 3
    assert [operands.proj_scale is None for operands in found] == [True, change != "branch in 8 bits", True]
    assert [operands.act_bits for operands in found] == [8 if change == "8 bits" else 4] * 3
    assert (found[1].gelu_from == 0) is (change == "GELU") and (found[2].lora_up is not None) is (change == "LoRA")


@pytest.mark.parametrize("change", ["smoothing", "hook", "pre-hook", "forward", "a term of its own", "bits", "unsigned inputs", "16 bits",
                                    "traced"])
def test_run_one_by_one(layers, x, shared, change, monkeypatch):
    if change == "smoothing":
        layers[1] = layer_of(1, smooth=2.0)
    elif change == "hook":
        layers[2].register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "pre-hook":
        layers[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif change == "forward":
        forward = layers[0].forward
        layers[0].forward = lambda x: forward(2 * x)
    elif change == "a term of its own":
        layers[2].set_lora_branch(lora(Dense((0, N), (0, K), torch.ones(N, K) / K)))
    elif change == "bits":
        layers[0].act_bits = 8
    elif change == "unsigned inputs":
        layers[0].spec = replace(layers[0].spec, unsigned_from=64)
    elif change == "16 bits":
        layers[1] = torch.nn.Linear(K, N, dtype=torch.bfloat16)
    elif change == "traced":
        monkeypatch.setattr(shared_input.dispatch, "plain", lambda x: False)
    wanted = [layer(x) for layer in layers]
    assert all(torch.equal(y, own) for y, own in zip(shared_input.outputs(layers, x), wanted)) and not shared


def test_new_smoothing_factors_are_seen(layers, x, shared):
    shared_input.outputs(layers, x)
    with torch.no_grad():
        layers[0].weight_smooth_factor.mul_(2)
    shared_input.outputs(layers, x)
    assert len(shared) == 1
    for layer in layers:
        layer.weight_smooth_factor = torch.nn.Parameter(torch.full((K,), 1.0, dtype=torch.bfloat16), requires_grad=False)
    shared_input.outputs(layers, x)
    assert len(shared) == 2


def test_a_layer_that_is_gone_takes_no_memory(layers, x):
    gc.collect()
    before = len(shared_input._digests)
    shared_input.outputs(layers, x)
    assert len(shared_input._digests) == before + 3
    layers.clear()
    gc.collect()
    assert len(shared_input._digests) == before


def test_what_prepares_the_kernels_keeps_no_layer(layers, monkeypatch):
    """ops.warm_up remembers what it has run."""
    prepared = []
    monkeypatch.setattr(kernels, "prepare", lambda *args: prepared.append(args))
    jobs = shared_input.preparations(layers, (96, 32), torch.bfloat16, torch.device("cpu"))
    gone = weakref.ref(layers[0])
    layers.clear()
    gc.collect()
    assert gone() is None and len(set(map(ops._identity, jobs))) == 2
    for job in jobs:
        job()
    assert [args[0] for args in prepared] == [96, 32] and {args[1:] for args in prepared} == {
        (K, ((N, 16, None, NO_LORA),) * 3, K, 4, torch.bfloat16, torch.device("cpu"))}
    assert shared_input.preparations([torch.nn.Linear(K, N)], (96,), torch.bfloat16, torch.device("cpu")) == []


# --- Cached launches -----------------------------------------------------------------------------------------------------


@pytest.fixture
def group(monkeypatch):
    """(layers whose kernels run together, with 8-bit activations, {name: address} of each call of them, the operands of each general
    call)"""
    layers, general = [layer_of(seed, rank=32, act_bits=8) for seed in range(3)], groups(monkeypatch)
    with recorded(monkeypatch, 3) as calls:
        yield layers, calls, general


def random_tokens(*shape):
    return aligned(torch.randn(*shape, K, generator=torch.Generator().manual_seed(9)).bfloat16())


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_later_calls_look_nothing_up(group, shape):
    (layers, calls, general), new = group, {"x", "proj_down", "y0", "y1", "y2"}
    for step in range(4):
        x = random_tokens(*shape)
        ys = shared_input.outputs(layers, x)
        assert [(y.shape, y.dtype, y.is_contiguous()) for y in ys] == [((*shape, N), torch.bfloat16, True)] * 3
        assert len(calls) == step + 1 and len(general) == 1 and calls[-1]["x"] == x.data_ptr()
        assert [calls[-1][f"y{i}"] for i in range(3)] == [y.data_ptr() for y in ys]
        assert {name: address for name, address in calls[-1].items() if name not in new} == {
            name: address for name, address in calls[0].items() if name not in new}


@pytest.mark.parametrize("change", ["hook", "LoRA", "bias", "scale in place", "smoothing in place", "bits", "patch", "GELU",
                                    "another layer", "fewer layers", "type of x", "layout of x", "shape of x", "branch"])
def test_a_change_is_looked_up(group, change):
    (layers, calls, general), x = group, random_tokens(6)
    for _ in range(2):
        shared_input.outputs(layers, x)
    if change == "hook":
        layers[2].register_forward_hook(lambda module, args, output: output)
    elif change == "LoRA":
        layers[1].set_lora_branch(LoRABranch.of([LOW_RANK], (N, K), torch.bfloat16, "cpu", own=32))
    elif change == "bias":
        layers[1].bias = torch.nn.Parameter(torch.ones(N).bfloat16(), requires_grad=False)
    elif change == "scale in place":
        layers[2].weight_scale.mul_(2)
    elif change == "smoothing in place":
        layers[0].weight_smooth_factor.mul_(2)
    elif change == "bits":
        layers[0].act_bits = 4
    elif change == "patch":
        layers[0].bias_function = [lambda bias: bias]
    elif change == "GELU":
        layers[0].gelu_from = 0
    elif change == "another layer":
        layers[2] = layer_of(7, rank=32, act_bits=8)
    elif change == "fewer layers":
        del layers[2]
    elif change == "type of x":
        x = x.float()
    elif change == "layout of x":
        x = random_tokens(12)[::2]
    elif change == "shape of x":
        x = random_tokens(5)
    else:
        layers[0].weight_proj_up.data = layers[0].weight_proj_up.data.clone()
    seen, launched = len(general), len(calls)
    alone = change in ("hook", "smoothing in place", "bits")
    shared_input.outputs(layers, x)
    assert len(general) == seen + (not alone) and (len(calls) > launched or alone or change in ("fewer layers", "type of x"))


def test_layers_of_another_type_take_no_launch_of_these(group):
    """A model whose file has 16-bit floats of another type than its states computes layer by layer, also beside one that doesn't."""
    (layers, calls, _), x = group, random_tokens(6)
    for _ in range(2):
        shared_input.outputs(layers, x)
    others, launched = [layer_of(seed, rank=32, act_bits=8, dtype=torch.float16) for seed in range(3)], len(calls)
    for _ in range(3):
        shared_input.outputs(others, x)
    assert launched == 2 and len(calls) == launched and not shared_input._launches.get(others[0])


def test_a_cached_launch_keeps_no_layer(group):
    layers, _, _ = group
    shared_input.outputs(layers, random_tokens(6))
    assert layers[0] in shared_input._launches
    before, gone = len(shared_input._launches), [weakref.ref(each) for layer in layers for each in (layer, layer.weight)]
    group[2].clear()
    layers.clear()
    gc.collect()
    assert len(shared_input._launches) == before - 1 and all(each() is None for each in gone)
