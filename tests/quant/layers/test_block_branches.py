"""The branches in 8 bits of a block's layers by one launch, on the CPU, whose memory passes for a GPU's."""

import contextlib
import gc

import pytest
import torch
import torch.utils.flop_counter
from comfyui_svdquant.cuda import expand_branch, ops
from comfyui_svdquant.quant.layers import block_branches, layout, linear, shared_input

from ...cuda.launches import expanding, groups, memory, recorded
from .test_int8_branch_layer import RANK, K, N, lora_branch, pair, tokens


class Block(torch.nn.Module):
    """A block of layers, with a forward as of a fused class."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        with block_branches.expanded(self):
            return [layer(x) for layer in self.layers]


@pytest.fixture
def found(monkeypatch):
    """(addresses of each layer's call, launches of expand_branch.cu)"""
    with recorded(monkeypatch) as calls, expanding(monkeypatch) as launches:
        yield calls, launches


def pairs(count):
    """(layers with a branch in 8 bits, the same in 16), no two alike"""
    narrow, wide = zip(*(pair() for _ in range(count)))
    for i, (of_8, of_16) in enumerate(zip(narrow, wide)):
        of_8.weight_proj_scale.mul_(2.0 ** i)
        of_16.weight_proj_down.mul_(2.0 ** i), of_16.weight_proj_up.mul_(2.0 ** i)
    return narrow, wide


def check(calls, wide, down=True):
    """Whether each call's kernels got the expanded branch."""
    assert len(calls) == len(wide)
    for call, layer in zip(calls, wide):
        assert torch.equal(memory(call["proj_up"], torch.bfloat16, N, RANK), layer.weight_proj_up)
        assert not down or torch.equal(memory(call["proj_down"], torch.bfloat16, K, RANK), layer.weight_proj_down)
    calls.clear()


@pytest.mark.parametrize("kind", ["none", "lora", "other", "gain"])
def test_a_block_expands_by_one_launch(found, kind):
    """In first calls and in cached launches, and after a layer's branch has moved or has other numbers."""
    (calls, launches), (narrow, wide) = found, pairs(3)
    block = Block(*narrow)
    for layer in narrow:
        layer.set_lora_branch(lora_branch(kind))
    for step in range(6):
        if step == 2:
            narrow[1].weight_proj_up.data = narrow[1].weight_proj_up.data.neg()
            wide[1].weight_proj_up.data.neg_()
        if step == 4:
            narrow[2].weight_proj_scale.mul_(2)
            wide[2].weight_proj_up.data.mul_(2), wide[2].weight_proj_down.data.mul_(2)
        block(tokens())
        check(calls, wide, kind in ("none", "gain"))
        assert launches == [3] * (step + 1)
    narrow[0](tokens())
    assert launches.pop() == 1, "outside the block a layer expands its own"


@pytest.mark.parametrize("op", ["linear", "gated_linear"])
def test_an_op_through_the_dispatcher_finds_its_branch(found, op):
    """As from a compiled part of a block; outside the block it expands its own."""
    (calls, launches), (narrow, wide) = found, pairs(2)
    block, x, residual = Block(*narrow), tokens(), torch.zeros(1, 5, N, dtype=torch.bfloat16)
    args = (x,) if op == "linear" else (x[None], residual, residual[:, :1])
    with block_branches.expanded(block):
        for layer in narrow:
            getattr(torch.ops.svdquant, op)(*args, *linear.operands(layer._parameters, layer.bias, K, 4).flat())
    check(calls, wide)
    assert launches == [2]
    getattr(torch.ops.svdquant, op)(*args, *linear.operands(narrow[0]._parameters, narrow[0].bias, K, 4).flat())
    check(calls, wide[:1])
    assert launches == [2, 1]


@pytest.mark.parametrize("in_block", [True, False])
def test_layers_that_share_an_input_find_their_branches(monkeypatch, in_block):
    """In the first call and in cached launches."""
    narrow, wide = pairs(2)
    narrow[1].weight_smooth_factor.data.copy_(narrow[0].weight_smooth_factor)
    general, block = groups(monkeypatch), Block(*narrow)
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **more: joined.append(cat(*args, **more)) or joined[-1])
    with recorded(monkeypatch, 2) as calls, expanding(monkeypatch) as launches:
        for step in range(6):
            if step == 3:
                narrow[1].weight_proj_scale.mul_(2)
                wide[1].weight_proj_up.data.mul_(2), wide[1].weight_proj_down.data.mul_(2)
            with block_branches.expanded(block) if in_block else contextlib.nullcontext():
                shared_input.outputs(narrow, tokens())
            for i, layer in enumerate(wide):
                assert torch.equal(memory(calls[-1][f"proj_up{i}"], torch.bfloat16, N, RANK), layer.weight_proj_up)
            assert torch.equal(joined[-1], cat([layer.weight_proj_down for layer in wide], dim=1))
            assert launches == ([2] if in_block else [1, 1]) * (step + 1) and len(general) == 1


def test_without_the_kernel_such_layers_keep_no_launch(monkeypatch):
    narrow, _ = pairs(2)
    narrow[1].weight_smooth_factor.data.copy_(narrow[0].weight_smooth_factor)

    def none(*args):
        raise ops.KernelsUnavailable("The kernel failed its self-test.")

    general = groups(monkeypatch)
    with recorded(monkeypatch, 2), expanding(monkeypatch) as launches:
        monkeypatch.setattr(expand_branch, "_kernel", none)
        for _ in range(3):
            shared_input.outputs(narrow, tokens())
        assert len(general) == 3 and not launches


@pytest.mark.parametrize("change", ["elsewhere", "type", "gone", "one left"])
def test_other_layers_expand_their_own(found, change):
    (calls, launches), (narrow, wide) = found, pairs(3)
    block = Block(*narrow)
    block(tokens())
    launches.clear(), calls.clear()
    if change == "elsewhere":
        narrow[0].weight_proj_scale = torch.nn.Parameter(narrow[0].weight_proj_scale.to("meta"), requires_grad=False)
    elif change == "type":
        narrow[2].weight_scale.data = narrow[2].weight_scale.data.half()
    else:
        del block.layers[1 if change == "one left" else 2:], narrow
        gc.collect()
    with block_branches.expanded(block):
        expected = [] if change == "one left" else [2]
        assert launches == expected
        if change in ("gone", "one left"):
            for layer in block.layers:
                layer(tokens())
            check(calls, wide[:len(block.layers)])
            assert launches == (expected or [1])


def test_blocks_without_such_branches_launch_nothing(found, monkeypatch):
    _, launches = found
    spec = layout.LayerSpec(layout.SVDQUANT, K, N, RANK, K)
    assert block_branches.expanded(Block(linear.SVDQuantLinear(spec, "cpu"))) is block_branches.NOTHING
    block = Block(*pairs(2)[0])
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # each layer's op expands its own
        assert block_branches.expanded(block) is block_branches.NOTHING

    def none(*args):
        raise ops.KernelsUnavailable("no CuPy")

    monkeypatch.setattr(expand_branch, "_kernel", none)
    assert block_branches.expanded(block) is block_branches.NOTHING and not launches


def test_a_plan_keeps_no_layer_and_no_block(found):
    block = Block(*pairs(2)[0])
    block(tokens())
    before = len(block_branches._plans)
    alive = [weak for weak in block_branches._plans[block].layers]
    del block
    gc.collect()
    assert len(block_branches._plans) == before - 1 and all(weak() is None for weak in alive)
