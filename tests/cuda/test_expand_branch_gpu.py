"""expand_branch.cu against the reference, and layers with a branch in 8 bits against the same layers with the expanded branch, bit for
bit."""

import gc
import threading
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.cuda import dispatch, expand_branch, gated_linear, mlp, ops, reference
from comfyui_svdquant.quant.layers import block_branches, layout, linear
from comfyui_svdquant.quant.layers.lora_branch import Dense, LoRABranch, LowRank

from .layers import check_in_graphs, on_cuda, random_input, random_layer, with_codes, with_lora, with_row_scale
from .test_gated_linear_gpu import added
from .test_ops_gpu import module_of

BFLOAT, HALF = torch.bfloat16, torch.float16
pytestmark = pytest.mark.gpu


def branch(k, n, rank, seed=0):
    """(proj_down codes, proj_up codes, scale) with all codes."""
    g = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(-128, 128, (k + n, rank), generator=g, device="cuda", dtype=torch.int8)
    scale = torch.exp2(torch.rand(k + n, generator=g, device="cuda") * 12 - 16).bfloat16()
    return codes[:k].contiguous(), codes[k:].contiguous(), scale


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize(("k", "n", "rank"), [(64, 1, 16), (192, 80, 48), (3072, 9216, 64), (15360, 3072, 128), (1, 37, 240)])
def test_the_kernel_has_the_references_bits(k, n, rank, dtype):
    codes = branch(k, n, rank)
    down, up = expand_branch.expanded(*codes, dtype)
    assert down.dtype == up.dtype == dtype
    assert torch.equal(torch.cat((down, up)), reference.expand_branch(torch.cat(codes[:2]), codes[2], dtype))
    assert expand_branch.launcher(k, n, rank, dtype, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("count", [2, 16, 35])
def test_a_launch_for_many_has_the_references_bits(count, dtype):
    sizes = [(64, 1, 16), (192, 80, 48), (3072, 9216, 64), (1, 37, 240)] * count
    branches = [branch(*size, seed) for seed, size in enumerate(sizes[:count])]
    found = expand_branch.expand_by(branches, lambda count: torch.full((count,), torch.nan, dtype=dtype, device="cuda"), 16)
    assert len(found) == count
    for codes, y in zip(branches, found):
        assert torch.equal(y, reference.expand_branch(torch.cat(codes[:2]), codes[2], dtype))


# --- Ops -----------------------------------------------------------------------------------------------------------------


def operands_pair(n, k, rank, act_bits=4, lora=(), dtype=BFLOAT, **changes):
    """(LayerOperands with a branch in 8 bits, those with the expanded branch)"""
    layer = random_layer(n, k, rank, dtype=dtype, **changes)
    layer = with_row_scale(layer) if act_bits == 8 else layer
    return map(on_cuda, with_codes(with_lora(layer, lora) if lora else layer))


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("lora", [(), (24,)])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_the_ops_expand_the_branch(act_bits, lora, dtype):
    """Called directly and through the dispatcher, with an input of the layer's type and of another one."""
    narrow, wide = operands_pair(384, 256, 32, act_bits, lora, dtype)
    x, (residual, gate) = random_input(70, 256, dtype).cuda()[None], added(70, 384, dtype)
    for each in (x, x.float()):
        expected = ops.svdquant_linear(each, wide)
        assert torch.equal(ops.svdquant_linear(each, narrow), expected)
        assert torch.equal(torch.ops.svdquant.linear(each, *narrow.flat()), expected)
    expected = gated_linear.gated_linear(x, wide, residual, gate)
    assert torch.equal(gated_linear.gated_linear(x, narrow, residual, gate), expected)
    assert torch.equal(torch.ops.svdquant.gated_linear(x, residual, gate, *narrow.flat()), expected)
    torch.library.opcheck(torch.ops.svdquant.linear.default, (x, *narrow.flat()))
    torch.library.opcheck(torch.ops.svdquant.gated_linear.default, (x, residual, gate, *narrow.flat()))


def test_the_op_of_an_mlp_expands_both_branches():
    first, second = operands_pair(512, 256, 32, gelu_from=0), operands_pair(192, 512, 48, unsigned_from=0, seed=1)
    x, (narrow, wide) = random_input(70, 256, BFLOAT).cuda(), zip(first, second)
    expected = mlp.svdquant_mlp(x, *wide)
    assert torch.equal(mlp.svdquant_mlp(x, *narrow), expected)
    assert torch.equal(torch.ops.svdquant.mlp(x, *mlp.flat(*narrow)), expected)
    torch.library.opcheck(torch.ops.svdquant.mlp.default, (x, *mlp.flat(*narrow)))


def test_an_op_in_graphs():
    narrow, wide = operands_pair(384, 256, 32, 8)
    x = random_input(70, 256, BFLOAT).cuda()
    assert torch.equal(check_in_graphs(lambda x: 2 * ops.svdquant_linear(x, narrow), x), 2 * ops.svdquant_linear(x, wide))


# --- Layers --------------------------------------------------------------------------------------------------------------


def pair(n, k, rank, act_bits, **changes):
    """(a layer with a branch in 8 bits, the layer with the expanded branch in 16)"""
    wide = module_of(n, k, rank, act_bits)
    narrow = linear.SVDQuantLinear(replace(wide.spec, branch_bits=8), "cuda")
    codes = dict(zip(("weight_proj_down", "weight_proj_up", "weight_proj_scale"), branch(k, n, rank)))
    for name, p in narrow._parameters.items():
        p.data.copy_(codes[name] if name in codes else wide._parameters[name])
    for name, factor in zip(("weight_proj_down", "weight_proj_up"), layout.branch_of(codes, BFLOAT)):
        wide._parameters[name].data.copy_(factor)
    for module in (wide, narrow):
        module.act_bits = act_bits
        for name, value in changes.items():
            setattr(module, name, value)
    return narrow, wide


def lora(n, k, rank, other=False):
    g = torch.Generator().manual_seed(n)
    terms = [LowRank((0, n), (0, k), torch.randn(n, 12, generator=g), torch.randn(12, k, generator=g) / 16, 0.7)]
    terms += [Dense((0, 16), (0, k), torch.randn(16, k, generator=g) / 16)] * other
    return lambda: LoRABranch.of(terms, (n, k), BFLOAT, "cuda", rank)


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(70, 384, 256, 32), (300, 256, 1024, 64), (40, 208, 320, 128), (4096, 3072, 3072, 64)])
def test_a_layer_has_the_bits_of_the_expanded_one(m, n, k, rank, act_bits):
    """By the op, by cached launches, with LoRAs that come and go, and at other addresses."""
    narrow, wide = pair(n, k, rank, act_bits)
    for make in (lambda: None, lora(n, k, rank), lora(n, k, rank, other=True), lambda: None):
        for module in (narrow, wide):
            module.set_lora_branch(make())
        for seed in (1, 2, 1):
            x = random_input(m, k, BFLOAT, seed=seed).cuda()
            assert torch.equal(narrow(x), wide(x))
        assert len(narrow._launches) == len(wide._launches) == 1
    x = random_input(m, k, BFLOAT).cuda()
    before = narrow(x)
    narrow.weight_proj_up.data = -narrow.weight_proj_up.data.clamp(-127)  # a new address
    wide.weight_proj_up.data = layout.branch_of(narrow._parameters, BFLOAT)[1]
    assert torch.equal(narrow(x), wide(x)) and not torch.equal(narrow(x), before)
    narrow.weight_proj_scale.mul_(2)  # at the same address
    wide.weight_proj_down.mul_(2), wide.weight_proj_up.mul_(2)
    assert torch.equal(narrow(x), wide(x))


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_gated_layer_and_graphs(act_bits):
    narrow, wide = pair(384, 256, 32, act_bits)
    x, (residual, gate) = random_input(70, 256, BFLOAT).cuda()[None], added(70, 384, BFLOAT)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(narrow.add_gated(x, residual, gate), wide.add_gated(x, residual, gate))
        assert torch.equal(check_in_graphs(narrow, x), wide(x))


def test_an_offloaded_layer():
    narrow, wide = pair(384, 256, 32, 8)
    x = random_input(70, 256, BFLOAT).cuda()
    expected = wide(x)
    narrow.to("cpu")
    assert torch.equal(narrow(x), expected) and not narrow._launches
    narrow.to("cuda")
    for _ in range(2):
        assert torch.equal(narrow(x), expected)


def test_float32_inputs_and_the_reference_path(monkeypatch):
    narrow, wide = pair(384, 256, 32, 4)
    x = random_input(70, 256).cuda()
    assert torch.equal(narrow(x), wide(x))
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: False)
    assert torch.equal(narrow(x), wide(x))


def growth(module, x):
    """Bytes of GPU memory that twenty calls leave behind. What earlier tests left may be freed meanwhile, so it can be negative."""
    for _ in range(5):
        module(x)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        module(x)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


def test_the_memory_of_the_expanded_branch_is_given_back():
    narrow, _ = pair(3072, 3072, 64, 8)
    assert growth(narrow, random_input(64, 3072, BFLOAT).cuda()) <= 0


# --- The layers of a block -----------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Layers with one input, in a forward as of a fused block."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        with block_branches.expanded(self):
            return torch.cat([layer(x) for layer in self.layers], dim=1)


def blocks(act_bits):
    return [Block(layers) for layers in zip(*(pair(n, 256, rank, act_bits) for n, rank in ((384, 32), (192, 64), (80, 128), (1024, 16))))]


@pytest.fixture
def found(monkeypatch):
    """Whether each layer found its branch expanded."""
    answers, find = [], expand_branch._found

    def noted(*args):
        answers.append(find(*args))
        return answers[-1]

    monkeypatch.setattr(expand_branch, "_found", noted)
    return answers


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_block_has_the_bits_of_the_expanded_one(act_bits, found):
    """In first calls and cached launches, with a LoRA that comes and goes, and with other numbers at the same and at other addresses."""
    narrow, wide = blocks(act_bits)
    x = random_input(70, 256, BFLOAT).cuda()
    for make in (lambda: None, lora(192, 256, 64), lambda: None):
        for block in (narrow, wide):
            block.layers[1].set_lora_branch(make())
        for _ in range(3):
            assert torch.equal(narrow(x), wide(x))
    narrow.layers[2].weight_proj_scale.mul_(2)
    wide.layers[2].weight_proj_down.mul_(2), wide.layers[2].weight_proj_up.mul_(2)
    assert torch.equal(narrow(x), wide(x))
    narrow.layers[0].weight_proj_up.data = narrow.layers[0].weight_proj_up.data.roll(1, 0)
    wide.layers[0].weight_proj_up.data = layout.branch_of(narrow.layers[0]._parameters, BFLOAT)[1]
    for _ in range(2):
        assert torch.equal(narrow(x), wide(x))
    assert len(found) >= 12 * 4 and all(each is not None for each in found)


def test_ops_find_the_blocks_branches(found):
    """Also through the dispatcher, as from a compiled part of a block."""
    narrow, wide = blocks(4)
    x = random_input(70, 256, BFLOAT).cuda()
    with block_branches.expanded(narrow):
        for of_8, of_16 in zip(narrow.layers, wide.layers):
            operands = linear.operands(of_8._parameters, of_8.bias, of_8.spec.unsigned_from, 4)
            assert torch.equal(torch.ops.svdquant.linear(x, *operands.flat()), of_16(x))
    assert len(found) == 4 and all(each is not None for each in found)


def test_a_block_in_a_cuda_graph(found):
    """A replay expands the branches anew."""
    narrow, wide = blocks(8)
    x = random_input(70, 256, BFLOAT).cuda()
    narrow(x), narrow(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = narrow(x)
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, wide(x))
        narrow.layers[1].weight_proj_scale.mul_(2)
        wide.layers[1].weight_proj_down.mul_(2), wide.layers[1].weight_proj_up.mul_(2)
    assert all(each is not None for each in found)


def test_other_streams_and_threads_expand_their_own(found):
    narrow, wide = blocks(8)
    x = random_input(70, 256, BFLOAT).cuda()
    expected, results = wide(x), [narrow(x)]
    found.clear()
    torch.cuda.synchronize()
    with block_branches.expanded(narrow), torch.cuda.stream(torch.cuda.Stream()):
        results.append(torch.cat([layer(x) for layer in narrow.layers], dim=1))
        thread = threading.Thread(target=lambda: results.append(torch.cat([layer(x) for layer in narrow.layers], dim=1)))
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 3 and all(torch.equal(y, expected) for y in results)
    assert found == [None] * 2 * len(narrow.layers)


def test_a_block_gives_its_memory_back():
    narrow, _ = blocks(8)
    assert growth(narrow, random_input(70, 256, BFLOAT).cuda()) <= 0
