"""The op of an MLP's two layers: the reference's two underneath, opaque to torch.compile, its launches wired as they should be."""

import pytest
import torch
from comfyui_svdquant.cuda import compiler, gemm_mma, mlp, ops, quantize, reference, runtime

from .launches import addresses, aligned, recorded, recorder
from .layers import random_input, random_layer

K, HIDDEN, N = 128, 256, 96


def layers(first_rank=16, second_rank=32, bias=True, hidden=HIDDEN, dtype=torch.bfloat16):
    """Two layers' six tensors each, and their unsigned_from."""
    first = random_layer(hidden, K, first_rank, bias=bias, dtype=dtype)
    second = random_layer(N, hidden, second_rank, 0, bias, dtype, seed=1)
    return first.args()[:-1], second.args()[:-1], first.unsigned_from, second.unsigned_from


def one_by_one(x, first, second, first_unsigned_from, second_unsigned_from):
    hidden = reference.svdquant_linear(x, *first, first_unsigned_from, 4, gelu_from=0)
    return reference.svdquant_linear(hidden, *second, second_unsigned_from, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    torch.library.opcheck(torch.ops.svdquant.mlp.default, (random_input(5, K, torch.bfloat16), *layers(bias=bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_op_is_the_two_layers(dtype):
    args, x = layers(), random_input(10, K, dtype).view(2, 5, K)
    y = mlp.svdquant_mlp(x, *args)
    assert y.shape == (2, 5, N) and y.dtype == dtype and torch.equal(y, one_by_one(x, *args))
    assert torch.equal(y, torch.ops.svdquant.mlp(x, *args))


def test_one_graph_under_torch_compile():
    args, x = layers(), random_input(5, K)

    def model(x):
        return mlp.svdquant_mlp(x, *args) * 2

    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.fixture
def launched(monkeypatch):
    """Two GPU's functions on the CPU: ({name: address}, the steps of its chain) of each call."""
    calls = []
    mlp._plan.cache_clear()
    with recorded(monkeypatch), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "chain", recorder(lambda *call: calls.append(call), 4))
        patch.setattr(compiler, "architecture", lambda device: "sm_89")
        yield calls
    mlp._plan.cache_clear()


@pytest.fixture
def patch(launched):
    """As monkeypatch, and undone before `launched` is."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("m", "first_rank", "second_rank"), [(37, 16, 32), (1000, 0, 64), (5, 160, 16)])
def test_what_the_kernels_get(launched, m, first_rank, second_rank):
    """Every tensor's address in its place, and parts of the workspace that are as large as what is written there."""
    first, second, *unsigned = layers(first_rank, second_rank, bias=m != 37)
    x = aligned(random_input(m, K, torch.bfloat16)).view(1, m, K)
    y = mlp.svdquant_mlp(x, first, second, *unsigned)
    (at, steps), = launched
    assert at["x"] == x.data_ptr() and at["y"] == y.data_ptr() and at["nothing"] == 0 and y.shape == (1, m, N)
    for number, layer in (("1", first), ("2", second)):
        expected = addresses(**{name + number: tensor for name, tensor in zip(mlp.LAYER, layer, strict=True)})
        if first_rank == 160:  # cuBLAS multiplies
            expected.pop("proj_down1", None)
            assert at["proj_down1"] != first[2].data_ptr()
        assert at.items() >= expected.items()
    rows, tile = -(-m // 16) * 16, next(tile for tile in mlp.tiles_of(gemm_mma.NIBBLES) if tile.threads == steps[1][0].head[3]
                                        and -(-m // tile.tokens) * HIDDEN // tile.rows == steps[1][0].head[0])
    ranks = -(-second_rank // 32) * 32
    sizes = {"act1": rows * K // 2, "act_scale1": rows * K // 16, "low1": rows * -(-first_rank // 32) * 64, "low_scale1": rows * 4,
             "act2": rows * HIDDEN // 2, "act_scale2": rows * HIDDEN // 16, "low2": rows * ranks * 2, "low_scale2": rows * 4,
             "shares": HIDDEN // tile.rows * rows * ranks * 4}
    assert (at["low1"] == 0) is (at["low_scale1"] == 0) is (first_rank == 0)
    parts = sorted((at[name], size) for name, size in sizes.items() if at[name])
    assert all(begin + size <= following for (begin, size), (following, _) in zip(parts, parts[1:]))
    assert [launcher.sizes for launcher, _ in steps[1:]] == [
        (m, HIDDEN, K, first_rank, K, second_rank, 0), (m, HIDDEN // tile.rows), (m, N, HIDDEN, second_rank, 0)]


@pytest.mark.parametrize(("arch", "options"), [
    ("sm_75", {}), ("sm_89", {"second_rank": 80}), ("sm_89", {"second_rank": 0}), ("sm_89", {"second_rank": 24}),
    ("sm_89", {"first_rank": 24}), ("sm_89", {"hidden": 320})])
def test_what_the_kernels_do_not_take(launched, patch, arch, options):
    """Then it is two layers one after the other; here they are written down."""
    calls = []
    patch.setattr(compiler, "architecture", lambda device: arch)
    patch.setattr(ops, "svdquant_linear", lambda x, *args, **named: calls.append((args[7], named)) or x)
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    mlp.svdquant_mlp(aligned(random_input(5, K, dtype)), *layers(**options, dtype=dtype))
    assert calls == [(4, {"gelu_from": 0}), (4, {})] and not launched


@pytest.mark.parametrize("options", [{}, {"second_rank": 80}])
def test_prepared_kernels_are_all_that_is_asked_for(launched, patch, options):
    """Of an MLP that the kernels take, and of one whose layers run one after the other."""
    asked, kernel = [], runtime.kernel
    patch.setattr(runtime, "kernel", lambda *args: asked.append(args[:3]) or kernel(*args))
    first, second, *unsigned = layers(**options)
    x = aligned(random_input(37, K, torch.bfloat16))
    mlp.prepare(37, K, HIDDEN, N, first[3].shape[1], second[3].shape[1], *unsigned, x.dtype, x.device)
    fused = ["NEXT" in dict(defines) for _, _, defines in asked]
    assert any(fused) is (not options)
    del asked[:]
    mlp.svdquant_mlp(x, first, second, *unsigned)
    assert not asked and len(launched) == (not options)


def test_inputs_that_the_kernels_do_not_take(launched, patch):
    calls = []
    patch.setattr(ops, "svdquant_linear", lambda x, *args, **named: calls.append(x) or x)
    x = aligned(random_input(5, K, torch.bfloat16))
    for other in (x.half(), x.float(), x.t().contiguous().t(), aligned(torch.cat((x, x)).flatten())[1:5 * K + 1].view(5, K)):
        mlp.svdquant_mlp(other, *layers())
    assert len(calls) == 8 and not launched
    mlp.svdquant_mlp(x, *layers())
    assert len(calls) == 8 and len(launched) == 1


def test_without_kernels_it_is_two_layers(launched, patch):
    def refuse(*args):
        raise compiler.KernelsUnavailable("none")

    patch.setattr(runtime, "kernel", refuse)
    ops.warn_once.cache_clear()
    quantize.launcher.cache_clear()
    args, x = layers(), aligned(random_input(5, K, torch.bfloat16))
    assert torch.equal(mlp.svdquant_mlp(x, *args), one_by_one(x, *args))
