"""An MLP's two packed layers as one op, and every condition under which they run one after the other, without a model."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.cuda import block_ops, targets
from comfyui_svdquant.cuda.operands import NO_LORA
from comfyui_svdquant.quant.layers import layout, linear, packed_mlp, preparation
from comfyui_svdquant.quant.layers.lora_branch import LoRABranch, LowRank

K, HIDDEN, N = 128, 256, 64
SMALL = 2.0**-7  # factor of the scales, so that outputs are of order one


def filled(module):
    g = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        p.data.copy_(torch.randint(-8, 8, p.shape, generator=g) if p.dtype == torch.int8 else torch.rand(p.shape, generator=g) + 0.5)
        if name.endswith("_scale"):
            p.data.mul_(SMALL)
    return module


def packed(k, n, unsigned_from, gelu_from=None):
    module = filled(linear.SVDQuantLinear(layout.svdquant_spec(k, n, 16, unsigned_from, True, torch.bfloat16), "cpu"))
    module.act_bits, module.gelu_from = 4, gelu_from
    return module


@pytest.fixture
def mlp():
    return packed_mlp.PackedMLP(packed(K, HIDDEN, K, 0), torch.nn.Identity(), packed(HIDDEN, N, 0))


@pytest.fixture
def fused(monkeypatch):
    """The arguments of every call of the op."""
    calls, op = [], packed_mlp.mlp.svdquant_mlp
    monkeypatch.setattr(packed_mlp.mlp, "svdquant_mlp", lambda *args: calls.append(args) or op(*args))
    return calls


@pytest.fixture
def x():
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).bfloat16()


def one_by_one(mlp, x):
    return torch.nn.Sequential(*mlp)(x)


@pytest.mark.parametrize("number, expected", [(75, False), (80, True), (89, True), (90, False), (120, False)])
def test_which_gpus_run_it(monkeypatch, number, expected):
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
    assert packed_mlp.mlp.pays(torch.device("cuda", 0)) is expected and packed_mlp.mlp.pays(torch.device("cpu"))


def test_a_gpu_that_is_too_old(mlp, monkeypatch):
    """PyTorch runs it layer by layer, and a warm-up does nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (6, 1))
    device = torch.device("cuda", 7)
    assert not packed_mlp.mlp.pays(device) and not mlp.fuses(device)
    for future in preparation.warm_up(mlp, device, torch.bfloat16, tokens=(5,)):
        assert future.result() is None


def test_one_op_with_the_layers_own_tensors(mlp, fused, x):
    y = mlp(x)
    ((source, first, second),) = fused
    assert source is x and (first.unsigned_from, second.unsigned_from, first.gelu_from, second.gelu_from) == (K, 0, 0, None)
    assert first.act_bits == second.act_bits == 4
    for layer, tensors in ((mlp[0], first), (mlp[2], second)):
        expected = (layer.weight, layer.weight_scale, layer.weight_proj_down, layer.weight_proj_up, layer.weight_smooth_factor, layer.bias)
        assert all(tensor is p for tensor, p in zip(tensors.tensors, expected, strict=True))
    assert y.shape == (2, 3, N) and torch.equal(y, one_by_one(mlp, x)) and len(fused) == 1


def test_layers_that_lie_elsewhere_are_brought_to_the_input(mlp, monkeypatch, x):
    calls = []
    monkeypatch.setattr(packed_mlp.mlp, "svdquant_mlp", lambda *args: calls.append(args))
    mlp(x.to("meta"))
    ((_, first, second),) = calls
    assert {tensor.device.type for tensor in (*first.tensors, *second.tensors)} == {"meta"} and mlp[0].weight.device.type == "cpu"


# --- one after the other -------------------------------------------------------------------------------------------


def added(index, gain=False):
    def change(mlp):
        n, k = mlp[index].out_features, mlp[index].in_features
        terms = [LowRank((0, n), (0, k), torch.randn(n, 4), torch.randn(4, k))]
        gain_and_correction = (torch.rand(n) + 0.5, torch.randn(n)) if gain else ()
        mlp[index].set_lora_branch(LoRABranch.of(terms, (n, k), torch.bfloat16, "cpu", mlp[index].spec.rank, *gain_and_correction))
        return lambda: mlp[index].set_lora_branch(None)
    return change


def hooked(index, register):
    return lambda mlp: getattr(mlp[index], register)(lambda *_: None).remove


def hooked_everywhere(register):
    return lambda mlp: getattr(torch.nn.modules.module, register)(lambda *_: None).remove


def wrapped(mlp):
    """Replace a forward, as ComfyUI's bypass LoRA does."""
    forward = mlp[2].forward
    mlp[2].forward = lambda x: 2 * forward(x)
    return lambda: mlp[2].__dict__.pop("forward")


def switched(*indices):
    def change(mlp):
        for index in indices:
            mlp[index].act_bits = 8
        return lambda: [setattr(mlp[index], "act_bits", 4) for index in indices]
    return change


def of_the_file(index):
    """The file gives one of the layers 8 bits, and nobody asks for others."""
    def change(mlp):
        before = mlp[index].spec
        mlp[index].spec = replace(before, act_bits=8)
        mlp[0].act_bits = mlp[2].act_bits = 0

        def undo():
            mlp[index].spec = before
            mlp[0].act_bits = mlp[2].act_bits = 4
        return undo
    return change


def gelu(index, now):
    def change(mlp):
        before, mlp[index].gelu_from = mlp[index].gelu_from, now
        return lambda: setattr(mlp[index], "gelu_from", before)
    return change


def exchanged(index, make):
    def change(mlp):
        old, mlp[index] = mlp[index], make()
        return lambda: mlp.__setitem__(index, old)
    return change


def awq():
    return filled(linear.AWQLinear(layout.LayerSpec(layout.AWQ, HIDDEN, N), "cpu"))


def in_16_bits(k, n):
    return lambda: torch.nn.Linear(k, n, dtype=torch.bfloat16)


def handed_back(mlp):
    mlp[0].gelu_from, mlp[1] = None, torch.nn.GELU(approximate="tanh")

    def undo():
        mlp[0].gelu_from, mlp[1] = 0, torch.nn.Identity()
    return undo


def longer(mlp):
    mlp.append(torch.nn.ReLU())
    return lambda: mlp.__delitem__(3)


CHANGES = {
    "LoRA on fc1": added(0), "LoRA on fc2": added(2), "DoRA on fc1": added(0, gain=True), "DoRA on fc2": added(2, gain=True),
    **{f"{register} of {index}": hooked(index, register) for index in range(3) for register in (
        "register_forward_hook", "register_forward_pre_hook")},
    "a hook of all": hooked_everywhere("register_module_forward_hook"),
    "a hook before all": hooked_everywhere("register_module_forward_pre_hook"),
    "bypass LoRA": wrapped, "8 bits": switched(0, 2), "fc1 in 8 bits": switched(0), "fc2 in 8 bits": switched(2),
    "fc1 in 8 bits in the file": of_the_file(0), "fc2 in 8 bits in the file": of_the_file(2),
    "fc2 W4A16": exchanged(2, awq), "fc2 in 16 bits": exchanged(2, in_16_bits(HIDDEN, N)),
    "fc1 in 16 bits": exchanged(0, in_16_bits(K, HIDDEN)), "another activation": exchanged(1, torch.nn.SiLU),
    "no GELU": gelu(0, None), "half a GELU": gelu(0, HIDDEN // 2), "a GELU after fc2": gelu(2, 0),
    "the GELU's own module": handed_back, "one more module": longer,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_conditions_that_run_the_layers_separately_until_removed(mlp, fused, x, change):
    before = mlp(x)
    undo = change(mlp)
    with torch.no_grad():
        assert torch.equal(mlp(x), one_by_one(mlp, x)) and len(fused) == 1
    undo()
    assert torch.equal(mlp(x), before) and len(fused) == 2


def test_the_devices_choice_of_bits(mlp, fused, x, monkeypatch):
    preparation.set_act_bits(mlp, 0)
    mlp(x)
    assert len(fused) == 1
    monkeypatch.setattr(linear.ops, "best_act_bits", lambda device: 8)
    assert torch.equal(mlp(x), one_by_one(mlp, x)) and len(fused) == 1


# --- around it -----------------------------------------------------------------------------------------------------


def test_copies_and_parts(mlp, fused, x):
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        fused.clear()
        assert torch.equal(other(x), mlp(x)) and fused[0][1].weight is other[0].weight and fused[1][1].weight is mlp[0].weight
    fused.clear()
    assert torch.equal(mlp[:2](x), mlp[0](x)) and not fused


def test_one_op_under_torch_compile(mlp, x):
    """The graph has two ops after a LoRA is added."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "svdquant" in str(node.target)])
        return graph

    with torch.inference_mode():
        compiled, expected = torch.compile(mlp, fullgraph=True, backend=backend), mlp(x)
        assert torch.equal(compiled(x), expected) and graphs == [["svdquant.mlp.default"]]
        undo = CHANGES["LoRA on fc2"](mlp)
        assert torch.equal(compiled(x), mlp(x)) and graphs[1:] == [["svdquant.linear.default"] * 2]
        undo()
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize(("act_bits", "dtype", "together"), [
    (4, torch.bfloat16, True), (8, torch.bfloat16, False), (4, torch.float16, True), (4, torch.float32, False)])
def test_warm_up_asks_for_the_op_or_for_the_layers(mlp, monkeypatch, act_bits, dtype, together):
    """The op is for models in 16 bits whose layers compute_in has converted to that dtype."""
    asked, prepared = [], []
    monkeypatch.setattr(linear.ops, "warm_up", lambda layers, device, others: asked.extend(layers) or [job() for job in others])
    monkeypatch.setattr(packed_mlp.mlp, "prepare", lambda *args: prepared.append(args))
    monkeypatch.setattr(packed_mlp.mlp, "pays", lambda device: True)
    model, device = torch.nn.Sequential(mlp, copy.deepcopy(mlp), packed(K, HIDDEN, K, 0)), torch.device("cuda", 1)
    preparation.set_act_bits(model, act_bits)
    preparation.warm_up(model, device, dtype, tokens=(70, 5))
    computed = torch.bfloat16 if dtype == torch.float32 else dtype
    fc1, fc2 = ([(m, n, k, 16, unsigned_from, act_bits, computed, gelu_from, NO_LORA) for m in (70, 5)]
                for n, k, unsigned_from, gelu_from in ((HIDDEN, K, K, 0), (N, HIDDEN, 0, None)))
    assert asked == (fc1 if together else [fc1[0], fc2[0], fc1[1], fc2[1]])
    assert prepared == ([(m, K, HIDDEN, N, 16, 16, K, 0, dtype, device) for m in (70, 5)] if together else [])


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_gated_mlp_is_its_last_layers(mlp, x, act_bits, monkeypatch):
    """With 8 bits; with 4, both layers are one op, which has no gate. A hook on the MLP sees its own output."""
    preparation.set_act_bits(mlp, act_bits)
    residual, gate = torch.randn(2, 3, N).bfloat16(), torch.randn(2, 1, N).bfloat16()
    if act_bits == 4:
        assert mlp.add_gated(x, residual, gate) is None
        return
    expected, gated = block_ops.gated_residual(residual, mlp(x), gate), linear.gated_linear.gated_linear
    calls = []
    monkeypatch.setattr(linear.gated_linear, "gated_linear", lambda *args: calls.append(args) or gated(*args))
    assert torch.equal(mlp.add_gated(x, residual, gate), expected) and len(calls) == 1
    hook = mlp[2].register_forward_hook(lambda module, args, y: 2 * y)
    doubled = block_ops.gated_residual(residual, mlp(x), gate)
    assert torch.equal(mlp.add_gated(x, residual, gate), doubled) and not torch.equal(doubled, expected) and len(calls) == 1
    hook.remove()
    mlp.register_forward_hook(lambda *args: None)
    assert mlp.add_gated(x, residual, gate) is None
