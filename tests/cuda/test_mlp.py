"""The op of an MLP's two layers: its results, its graph under torch.compile, and the arguments of its launches."""

import pytest
import torch
from comfyui_svdquant.cuda import gemm_mma, kernel_loader, mlp, ops, quantize_activation, reference, runtime, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage
from comfyui_svdquant.cuda.errors import KernelsUnavailable

from .launches import addresses, aligned, recorded, recorder
from .layers import random_input, random_layer, with_codes

K, HIDDEN, N = 128, 256, 96


def layers(first_rank=16, second_rank=32, bias=True, hidden=HIDDEN, dtype=torch.bfloat16):
    """Two layers' LayerOperands."""
    return (random_layer(hidden, K, first_rank, bias=bias, dtype=dtype, gelu_from=0),
            random_layer(N, hidden, second_rank, 0, bias, dtype, seed=1))


def one_by_one(x, first, second):
    return reference.svdquant_linear(reference.svdquant_linear(x, first), second)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    torch.library.opcheck(torch.ops.svdquant.mlp.default, (random_input(5, K, torch.bfloat16), *mlp.flat(*layers(bias=bias))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_op_is_the_two_layers(dtype):
    args, x = layers(), random_input(10, K, dtype).view(2, 5, K)
    y = mlp.svdquant_mlp(x, *args)
    assert y.shape == (2, 5, N) and y.dtype == dtype and torch.equal(y, one_by_one(x, *args))
    assert torch.equal(y, torch.ops.svdquant.mlp(x, *mlp.flat(*args)))


@pytest.mark.parametrize("which", [(0, 0), (0, 1), (1, 0)], ids=["both", "the first", "the second"])
def test_branches_in_8_bits_are_expanded_within_the_op(which):
    x, pairs = random_input(5, K, torch.bfloat16), [with_codes(layer) for layer in layers()]
    expected = mlp.svdquant_mlp(x, *(wide for _, wide in pairs))
    args = [pair[i] for pair, i in zip(pairs, which)]
    assert torch.equal(mlp.svdquant_mlp(x, *args), expected)
    assert torch.equal(torch.ops.svdquant.mlp(x, *mlp.flat(*args)), expected)
    torch.library.opcheck(torch.ops.svdquant.mlp.default, (x, *mlp.flat(*args)))


def test_one_graph_under_torch_compile():
    args, x = layers(), random_input(5, K)

    def model(x):
        return mlp.svdquant_mlp(x, *args) * 2

    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.fixture
def launched(monkeypatch):
    """A fake GPU: a list of ({name: address}, the steps of the chain), one for each call."""
    calls = []
    mlp._launches.cache_clear()
    with recorded(monkeypatch), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "chain", recorder(lambda *call: calls.append(call), 4))
        patch.setattr(targets, "for_device", lambda device: targets.TARGETS[89])
        yield calls
    mlp._launches.cache_clear()


@pytest.fixture
def patch(launched):
    """A monkeypatch that is undone before `launched` is."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("m", "first_rank", "second_rank"), [(37, 16, 32), (1000, 0, 64), (5, 160, 16)])
def test_the_kernels_arguments(launched, m, first_rank, second_rank):
    """Every argument is the right tensor's address, and each part of the work memory is as large as its contents."""
    first, second = layers(first_rank, second_rank, bias=m != 37)
    x = aligned(random_input(m, K, torch.bfloat16)).view(1, m, K)
    y = mlp.svdquant_mlp(x, first, second)
    (at, steps), = launched
    assert at["x"] == x.data_ptr() and at["y"] == y.data_ptr() and at["nothing"] == 0 and y.shape == (1, m, N)
    for number, layer in (("1", first), ("2", second)):
        expected = addresses(**{name + number: tensor for name, tensor in zip(mlp.LAYER, layer.tensors, strict=True)})
        if first_rank == 160:  # cuBLAS multiplies
            expected.pop("proj_down1", None)
            assert at["proj_down1"] != first.proj_down.data_ptr()
        assert at.items() >= expected.items()
    grid, block = steps[1][0].head[0], steps[1][0].head[3]
    rows, tile = -(-m // 16) * 16, next(tile for tile in gemm_mma.next_tiles_of(CodeStorage.INT4_NIBBLES)
                                        if tile.threads == block and -(-m // tile.tokens) * HIDDEN // tile.rows == grid)
    ranks = -(-second_rank // 32) * 32
    sizes = {"act1": rows * K // 2, "act_scale1": rows * K // 16, "lora_act1": rows * -(-first_rank // 32) * 64,
             "lora_act_scale1": rows * 4, "act2": rows * HIDDEN // 2, "act_scale2": rows * HIDDEN // 16, "lora_act2": rows * ranks * 2,
             "lora_act_scale2": rows * 4, "partial_sums": HIDDEN // tile.rows * rows * ranks * 4}
    assert (at["lora_act1"] == 0) is (at["lora_act_scale1"] == 0) is (first_rank == 0)
    parts = sorted((at[name], size) for name, size in sizes.items() if at[name])
    assert all(begin + size <= following for (begin, size), (following, _) in zip(parts, parts[1:]))
    assert [launcher.sizes for launcher, _ in steps[1:]] == [
        (m, HIDDEN, K, first_rank, K, second_rank, 0), (m, HIDDEN // tile.rows), (m, N, HIDDEN, second_rank, 0)]


@pytest.mark.parametrize(("number", "options"), [
    (75, {}), (89, {"second_rank": 80}), (89, {"second_rank": 0}), (89, {"second_rank": 24}), (89, {"first_rank": 24}),
    (89, {"hidden": 320})])
def test_layers_that_the_kernels_do_not_take(launched, patch, number, options):
    """Then two layers run one after the other, and the test records them."""
    calls = []
    patch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
    patch.setattr(ops, "svdquant_linear", lambda x, operands: calls.append(operands) or x)
    first, second = layers(**options, dtype=targets.TARGETS[number].dtypes[0])
    mlp.svdquant_mlp(aligned(random_input(5, K, first.smooth.dtype)), first, second)
    assert calls[0] is first and calls[1] is second and len(calls) == 2 and not launched


@pytest.mark.parametrize("options", [{}, {"second_rank": 80}])
def test_preparing_builds_all_kernels_of_a_call(launched, patch, options):
    """For an MLP that the kernels take, and for one whose layers run one after the other."""
    asked, kernel = [], kernel_loader.kernel
    patch.setattr(kernel_loader, "kernel", lambda *args: asked.append(args[:3]) or kernel(*args))
    first, second = layers(**options)
    x = aligned(random_input(37, K, torch.bfloat16))
    mlp.prepare(37, K, HIDDEN, N, first.proj_up.shape[1], second.proj_up.shape[1], first.unsigned_from, second.unsigned_from, x.dtype,
                x.device)
    fused = ["NEXT" in dict(defines) for _, _, defines in asked]
    assert any(fused) is (not options)
    del asked[:]
    mlp.svdquant_mlp(x, first, second)
    assert not asked and len(launched) == (not options)


def test_inputs_that_the_kernels_do_not_take(launched, patch):
    calls = []
    patch.setattr(ops, "svdquant_linear", lambda x, operands: calls.append(x) or x)
    x = aligned(random_input(5, K, torch.bfloat16))
    for other in (x.half(), x.float(), x.t().contiguous().t(), aligned(torch.cat((x, x)).flatten())[1:5 * K + 1].view(5, K)):
        mlp.svdquant_mlp(other, *layers())
    assert len(calls) == 8 and not launched
    mlp.svdquant_mlp(x, *layers())
    assert len(calls) == 8 and len(launched) == 1


def test_without_kernels_it_is_two_layers(launched, patch):
    def refuse(*args):
        raise KernelsUnavailable("none")

    patch.setattr(kernel_loader, "kernel", refuse)
    ops.warn_once.cache_clear()
    quantize_activation.launcher.cache_clear()
    args, x = layers(), aligned(random_input(5, K, torch.bfloat16))
    assert torch.equal(mlp.svdquant_mlp(x, *args), one_by_one(x, *args))
