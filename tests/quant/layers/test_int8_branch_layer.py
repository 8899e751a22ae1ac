"""A packed layer whose low-rank branch is in 8 bits, against the layer with the expanded branch in 16 bits."""

from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.cuda import expand_branch, ops, targets
from comfyui_svdquant.quant.host import lora
from comfyui_svdquant.quant.layers import layout, linear, preparation
from comfyui_svdquant.quant.layers.lora_branch import LoRABranch
from torch._dynamo.backends.common import aot_autograd

from ...cuda.launches import aligned, expanding, memory, recorded
from . import test_linear
from .test_linear import added, filled

KINDS = ("none", "lora", "other", "gain")
K, N, RANK = 256, 208, 32
SPEC = layout.LayerSpec(layout.SVDQUANT, K, N, RANK, K)


def pair(act_bits=4):
    """(a layer with a branch in 8 bits, the same with the expanded branch in 16)"""
    torch.manual_seed(0)
    wide, narrow = filled(linear.SVDQuantLinear(SPEC, "cpu")), linear.SVDQuantLinear(replace(SPEC, branch_bits=8), "cpu")
    codes = {"weight_proj_down": torch.randint(-127, 128, (K, RANK), dtype=torch.int8),
             "weight_proj_up": torch.randint(-127, 128, (N, RANK), dtype=torch.int8),
             "weight_proj_scale": torch.exp2(torch.rand(K + N) * 4 - 12).bfloat16()}
    for name, p in narrow._parameters.items():
        p.data.copy_(codes[name] if name in codes else wide._parameters[name])
    for name, factor in zip(("weight_proj_down", "weight_proj_up"), layout.branch_of(codes, torch.bfloat16)):
        wide._parameters[name].data.copy_(factor)
    wide.act_bits = narrow.act_bits = act_bits
    return narrow, wide


def lora_branch(kind, **how):
    torch.manual_seed(1)
    return test_linear.lora_branch(kind, **how)


@pytest.fixture
def layers():
    return pair()


def tokens(m=5):
    return aligned(torch.randn(m, K, generator=torch.Generator().manual_seed(m)).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_the_expanded_one(layers, kind):
    narrow, wide = layers
    for module in layers:
        module.set_lora_branch(lora_branch(kind))
    x = tokens()
    assert torch.equal(narrow(x), wide(x)) and torch.equal(narrow(x.float()), wide(x.float()))
    assert torch.equal(narrow.dense(x.device), wide.dense(x.device))
    residual, gate = torch.randn(1, 5, N).bfloat16(), torch.randn(1, 1, N).bfloat16()
    results = [module.add_gated(x[None], residual, gate) for module in layers]
    assert results == [None, None] if kind in ("other", "gain") else torch.equal(*results)


@pytest.mark.parametrize("change", ["state dict", "to"])
def test_a_branch_follows_the_layer(layers, change):
    """The rows of a LoRA's factor for the layer's own ranks are copies: the layer's branch has other numbers after a load."""
    for module in layers:
        module.set_lora_branch(lora_branch("lora"))
    (narrow, wide), (other, other_wide) = layers, pair()
    if change == "state dict":
        other.weight_proj_down.data.neg_()
        other_wide.weight_proj_down.data.neg_()
        narrow.load_state_dict(other.state_dict())
        wide.load_state_dict(other_wide.state_dict())
    else:
        narrow.to("cpu"), wide.to("cpu")
    assert torch.equal(narrow(tokens()), wide(tokens()))
    assert torch.equal(narrow.lora_branch.lora_down[:RANK], wide.weight_proj_down.t())


def test_a_branch_of_loras_has_the_own_ranks_besides(layers, monkeypatch):
    monkeypatch.setattr(linear, "SHARING", {"cpu"})
    sizes = []
    for module in layers:
        module.set_lora_branch(lora_branch("lora"))
        sizes.append(module.lora_branch.nbytes())
    assert sizes[0] - sizes[1] == K * RANK * 2
    guessed = [lora.branch_size(module, [], torch.device("cpu")) for module in layers]
    assert guessed == [K * RANK * 2, 0]
    layers[0].set_lora_branch(None)
    assert layers[0].weight_proj_down.dtype == torch.int8


def test_its_scales_stay_as_they_are_in_fp16(layers, monkeypatch):
    """As products in fp16 they would lose bits; the factors that they give are in the layer's type."""
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[75])
    targets.compute_dtype.cache_clear()
    narrow, _ = layers
    before = narrow.weight_proj_scale.clone()
    preparation.compute_in(torch.nn.Sequential(narrow), torch.bfloat16, torch.device("cuda", 7))
    targets.compute_dtype.cache_clear()
    assert narrow.weight_scale.dtype == torch.float16 and torch.equal(narrow.weight_proj_scale, before)
    assert {factor.dtype for factor in narrow.branch("cpu")} == {torch.float16}
    given = linear.operands(narrow.at(tokens()), None, K, 4)
    assert expand_branch.in_16_bits(given).proj_up.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act_bits", [4, 8])
def test_one_graph_under_torch_compile(act_bits, kind):
    """The layer is one op there, as the expanded one."""
    layers, targets = pair(act_bits), []
    for layer in layers:
        layer.set_lora_branch(lora_branch(kind))
        layer.prepare(torch.device("cpu"))

    def noted(graph, example_inputs):
        targets.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    with torch.inference_mode():
        expected = layers[1](tokens())
        for layer in layers:
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=noted))
            assert torch.equal(compiled(tokens()), expected)
    assert targets[0] == targets[1] and targets[0].count("svdquant.linear.default") == 1


def test_a_warm_up_prepares_the_kernel_once_a_type(layers, monkeypatch):
    asked, made = [], []
    monkeypatch.setattr(ops, "warm_up", lambda found, device, others: asked.extend(others))
    monkeypatch.setattr(expand_branch, "_kernel", lambda *kind: made.append(kind))
    device = torch.device("cuda", 0)
    preparation.warm_up(torch.nn.Sequential(*layers, pair()[0]), device, torch.float16, (5,))
    assert len(asked) == 1
    for number, dtype in ((89, torch.bfloat16), (75, torch.float16)):
        monkeypatch.setattr(targets, "for_device", lambda device, number=number: targets.TARGETS[number])
        targets.compute_dtype.cache_clear()
        expand_branch.prepare(torch.bfloat16, torch.bfloat16, device)
        assert made == [(dtype, 1, device), (dtype, expand_branch.LAYERS, device)]
        made.clear()
    targets.compute_dtype.cache_clear()


# --- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_get_the_expanded_branch(layers, monkeypatch, kind):
    """In the first call, in cached launches, and after the layer's branch has moved or has other numbers."""
    (narrow, wide), general = layers, []
    narrow.set_lora_branch(lora_branch(kind))
    x, op = tokens(), ops.svdquant_linear
    monkeypatch.setattr(ops, "svdquant_linear", lambda *args: general.append(args) or op(*args))
    with recorded(monkeypatch) as calls, expanding(monkeypatch) as launches:
        for step in range(7):
            if step == 3:
                narrow.weight_proj_up.data = narrow.weight_proj_up.data.neg()
                wide.weight_proj_up.data.neg_()
            if step == 5:
                narrow.weight_proj_scale.data = narrow.weight_proj_scale.data.mul(2)
                wide.weight_proj_up.data.mul_(2), wide.weight_proj_down.data.mul_(2)
                if kind != "none":
                    narrow.set_lora_branch(lora_branch(kind))
            before = len(general)
            narrow(x)
            assert len(calls) == step + 1
            assert (len(general) > before) is (step in (0, 3, 5) or kind == "gain"), step
            assert torch.equal(memory(calls[-1]["proj_up"], torch.bfloat16, N, RANK), wide.weight_proj_up)
            if kind in ("none", "gain"):
                assert torch.equal(memory(calls[-1]["proj_down"], torch.bfloat16, K, RANK), wide.weight_proj_down)
            else:
                assert torch.equal(narrow.lora_branch.lora_down[:RANK], wide.weight_proj_down.t())
            assert launches == [1] * (step + 1)


def test_the_second_gated_call_looks_nothing_up(monkeypatch):
    narrow, wide = pair(8)
    x = tokens(70)[None]
    residual, gate = added(x)
    with recorded(monkeypatch) as calls, expanding(monkeypatch):
        for _ in range(3):
            assert narrow.add_gated(x, residual, gate) is not None
            assert torch.equal(memory(calls[-1]["proj_up"], torch.bfloat16, N, RANK), wide.weight_proj_up)
        assert len(calls) == 3 and len(narrow._launches) == 1


def test_without_the_kernel_pytorch_expands_in_each_call(layers, monkeypatch):
    def none(*args):
        raise ops.KernelsUnavailable("no CuPy")

    narrow, wide = layers
    monkeypatch.setattr(expand_branch, "launcher", none)
    x = tokens()
    with recorded(monkeypatch) as calls:
        narrow(x), narrow(x)
        assert len(calls) == 2 and not narrow._launches
    assert torch.equal(narrow(x), wide(x))


def test_a_branch_for_another_rank_is_refused(layers):
    with pytest.raises(ValueError, match="of rank 16; this one has rank 32"):
        layers[0].set_lora_branch(lora_branch("lora", rank=16))
    assert layers[0].lora_branch is None or isinstance(layers[0].lora_branch, LoRABranch)
