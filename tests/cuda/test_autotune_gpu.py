"""The autotune on a GPU: the fastest choice with the same bits, within its time. It is switched on for every GPU here."""

import time

import pytest
import torch
from comfyui_svdquant.cuda import autotune, gemm_mma, mlp, ops, self_test, targets
from comfyui_svdquant.cuda.choose import MLP, W4A16, Layer
from comfyui_svdquant.cuda.gemm_mma import LARGE, MEDIUM, SMALL

from .broken import new_process
from .layers import random_input
from .test_ops_gpu import integer_layer
from .test_self_test_gpu import FLUX

pytestmark = pytest.mark.gpu
BFLOAT, DEVICE = torch.bfloat16, torch.device("cuda", 0)
LAYER = Layer(2048, 3072, 3072, 32, 3072, 4, BFLOAT)


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A new process that measures on this GPU."""
    monkeypatch.setenv(autotune.VARIABLE, "1")
    with new_process(tmp_path / "kernels"):
        yield


def tune(runners=None):
    autotune.tune(DEVICE, runners or ops.runners, ops.choose_again)


@pytest.mark.parametrize("slow", ["cost model", "kernel"])
def test_the_fastest_tile_is_found(process, monkeypatch, slow):
    """The default is slow because the cost model is wrong, or because its kernel is slow on this GPU."""
    fastest = ops.chosen(LAYER, DEVICE).tile
    ops.choose_again()
    autotune._pending.clear()
    runners = dict(ops.runners)
    if slow == "cost model":
        monkeypatch.setattr(gemm_mma, "fastest_tile", lambda tiles, sms, m, n: SMALL)
    else:
        def run(kernels, *args):
            if kernels.tile == fastest:
                torch.cuda._sleep(2_000_000)
            return ops.runners[Layer](kernels, *args)
        runners[Layer] = run
    before = ops.chosen(LAYER, DEVICE)
    assert before.tile == (SMALL if slow == "cost model" else fastest)
    tune(runners)
    after = ops.chosen(LAYER, DEVICE)
    assert after.tile != before.tile and after == before._replace(tile=after.tile, plans=after.plans)


def test_a_fast_wrong_tile_is_no_candidate(process, monkeypatch):
    """A kernel that leaves out work is the fastest, and one with another rounding has other bits."""
    monkeypatch.setattr(gemm_mma, "fastest_tile", lambda tiles, sms, m, n: SMALL)
    left_out = torch.full((LAYER.m, LAYER.n), 1.0, dtype=BFLOAT, device=DEVICE)

    def run(kernels, *args):
        if kernels.tile == LARGE:
            return left_out.clone()
        y = ops.runners[Layer](kernels, *args)
        if kernels.tile == MEDIUM:
            y[-1, -1] += y[-1, -1] * 2**-7
        return y

    ops.chosen(LAYER, DEVICE)
    tune(ops.runners | {Layer: run})
    assert ops.chosen(LAYER, DEVICE).tile == SMALL and not autotune._pending[DEVICE]


@pytest.mark.parametrize("act_bits", [4, 8])
def test_every_choice_has_the_same_bits(process, act_bits):
    """A layer's output doesn't depend on whether it was measured."""
    for m, n, k, unsigned_from in ((513, 1040, 1024, 1024), (2048, 3072, 3072, 3072), (300, 3072, 1536, 1024)):
        layer, x = integer_layer(n, k, 32, unsigned_from, act_bits=act_bits), random_input(m, k, BFLOAT).cuda()
        x[:, unsigned_from:] = torch.nn.functional.gelu(x[:, unsigned_from:], approximate="tanh")
        before = ops.svdquant_linear(x, layer)
        size = Layer(m, n, k, 32, unsigned_from, act_bits, BFLOAT)
        kernels = ops.chosen(size, DEVICE)
        values = autotune.alternatives(kernels, size, targets.for_device(DEVICE))
        same = {field: 0 for field in values}
        for field, options in values.items():
            for value in options:
                same[field] += torch.equal(ops._run(kernels._replace(**{field: value}), x, layer), before)
        print(f"\n{m, n, k} {act_bits} bits: " + ", ".join(f"{same[field]} of {len(values[field])} {field}" for field in values))
        assert same["tile"] == len(values["tile"])
        tune()
        assert torch.equal(ops.svdquant_linear(x, layer), before)


def test_an_mlp(process):
    layers = mlp.layers(1024, 3072, 12288, 3072, 32, 32, 3072, 0, BFLOAT)
    before = ops.chosen(layers, DEVICE)
    tune()
    assert ops.chosen(layers, DEVICE)._replace(tile=before.tile, second_tile=before.second_tile, plans=before.plans) == before
    assert MLP in ops.runners and not autotune._pending[DEVICE]


@pytest.mark.parametrize("act_bits", [4, 8])
def test_the_time_of_a_first_load(process, act_bits):
    """The layers of FLUX.1-dev at 1024 x 1024, in warm_up's threads. Beside compilation the measurements take BUDGET at most; they are in
    later processes' records."""
    layers = [(m, n, k, 32, unsigned, act_bits, BFLOAT, gelu) for m, n, k, unsigned, gelu in FLUX]
    layers += [(1, n, 3072, 0, 3072, W4A16, BFLOAT) for n in (9216, 18432)]
    begin = time.perf_counter()
    for future in ops.warm_up(layers, DEVICE):
        future.result()
    whole, spent = time.perf_counter() - begin, autotune._spent[DEVICE]
    for layer in layers:
        kernels = ops.chosen(Layer(*layer), DEVICE)
        print(f"\n{layer[:3]}: {getattr(kernels, 'tile', getattr(kernels, 'tiles', None))}", end="")
    left = len(autotune._pending[DEVICE])
    print(f"\nW4A{act_bits}: {whole:.2f} s in all, {spent:.2f} s measured, {left} layers left")
    assert spent < autotune.BUDGET + 0.2 and self_test.failed(DEVICE) == frozenset()


def test_hopper_is_not_measured(process, monkeypatch):
    monkeypatch.delenv(autotune.VARIABLE)
    if not targets.for_device(DEVICE).measured:
        pytest.skip("this GPU's generation was not measured")
    ops.chosen(LAYER, DEVICE)
    assert not autotune._pending[DEVICE]
