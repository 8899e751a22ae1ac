"""The W4A16 kernel against float64, and the bandwidth at which it reads its weights.

    python -m pytest tests/cuda/test_awq_gpu.py -s        prints the timings too
"""

import functools
import itertools

import pytest
import torch
from comfyui_svdquant.cuda import awq, int4, reference
from machine import graph_time

from .test_quantize_activation_gpu import poisoned

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
FLUX = [(3072, 18432), (3072, 9216)]  # (K, N): a double block's modulation, a single block's


def random_case(m, n, k, dtype=torch.bfloat16, seed=0, bias=True):
    """x and a layer's tensors on the GPU: all sixteen codes, zeros as large as the weights themselves."""
    g = torch.Generator("cuda").manual_seed(seed + m + n + k)
    codes = torch.randint(0, 16, (n, k), generator=g, device="cuda")
    scale = torch.exp2(torch.rand(k // 64, n, generator=g, device="cuda") * 2 - 6).to(dtype)
    zeros = (torch.randn(k // 64, n, generator=g, device="cuda") * 0.1).to(dtype)
    x = torch.randn(m, k, generator=g, device="cuda").to(dtype)
    return x, int4.pack(codes), scale, zeros, torch.randn(n, generator=g, device="cuda").to(dtype) if bias else None


def excess(y, x, weight, scale, zeros, bias):
    """(M, N): the error relative to its bound, which is half a unit in the result's last place for the last rounding, plus 2^-18 of the
    terms' absolute sum for the fp32 sums."""
    dense = reference.dequantize_awq(weight, scale, zeros, torch.float64)
    exact = x.double() @ dense.t() + (0 if bias is None else bias.double())
    # The kernel adds (code - 8) scale and the zero separately: two terms per weight.
    parts = (reference.dequantize_awq(weight, scale, torch.zeros_like(zeros), torch.float64).abs()
             + zeros.double().abs().t().repeat_interleave(64, dim=1))
    bound = exact.abs() * torch.finfo(x.dtype).eps / 2 * 1.01 + x.double().abs() @ parts.t() * 2**-18 + 2**-24
    return (y.double() - exact).abs() / bound


def linear(x, *layer):
    """The kernel with choose()'s tiles."""
    return awq.linear(awq.fastest_tiles(x.numel() // x.shape[-1]), x, *layer)


def check(x, *layer, run=linear):
    y = run(x, *layer)
    assert y.shape == (*x.shape[:-1], layer[0].shape[0]) and y.dtype == x.dtype
    worst = excess(y, x, *layer).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 33])
def test_tokens(m, dtype, monkeypatch):
    poisoned(monkeypatch)
    check(*random_case(m, 176, 320, dtype))


@pytest.mark.parametrize("n, k", [(16, 64), (48, 128), (16, 448), (160, 512), (64, 576), (32, 3072), (32, 3136), (16, 8192),
                                  (18432, 3072), (9216, 3072)])
def test_shapes(n, k, monkeypatch):
    """Shapes with fewer groups than warps, with one group more than a ring holds, and FLUX's."""
    poisoned(monkeypatch)
    for m in (1, 5):
        for bias in (True, False):
            check(*random_case(m, n, k, bias=bias))


@pytest.mark.parametrize("tiles", awq.TILES)
@pytest.mark.parametrize("m", [1, 8, 17, 40])
def test_variants_agree(m, tiles):
    """A token's bits depend neither on the variant nor on the other tokens."""
    x, *layer = random_case(m, 64, 640)
    y = check(x, *layer, run=functools.partial(awq.linear, tiles))
    alone = torch.cat([linear(x[i : i + 1], *layer) for i in range(m)])
    assert torch.equal(y, alone)


def test_same_bits_again():
    x, *layer = random_case(8, 9216, 3072)
    first = linear(x, *layer)
    for _ in range(20):
        assert torch.equal(linear(x, *layer), first)


def test_one_wrong_value_fails():
    """The bound is tight enough to detect a scale or a zero of one group of one row that is off by 5 %, or one wrong nibble."""
    x, weight, scale, zeros, bias = random_case(8, 64, 640, torch.float16)
    zeros[3, 5] = 0.1
    for spoil in ("nothing", "scale", "zero", "nibble"):
        tensors = [weight.clone(), scale.clone(), zeros.clone()]
        if spoil == "nibble":
            tensors[0][5, 17] ^= 0x10
        elif spoil != "nothing":
            tensors[1 if spoil == "scale" else 2][3, 5] *= 1.05
        wrong = (excess(linear(x, *tensors, bias), x, weight, scale, zeros, bias) > 1).any(dim=0)
        assert wrong.nonzero().flatten().tolist() == ([] if spoil == "nothing" else [5]), spoil


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_rows(bad, dtype):
    x, *layer = random_case(12, 64, 640, dtype)
    clean = linear(x, *layer)
    x[3, 100] = bad
    x[9, 639] = bad
    y = linear(x, *layer)
    rows = torch.arange(12, device="cuda")
    hit = (rows == 3) | (rows == 9)
    assert not y[hit].isfinite().any()
    assert torch.equal(y[~hit], clean[~hit])


def test_extremes():
    """Zeros give the bias, denormals and large values are computed, and a result beyond fp16 becomes Inf."""
    x, weight, scale, zeros, bias = random_case(6, 64, 640, torch.float16)
    x[0] = 0
    x[1] *= 2**-24
    x[2] = 1
    x[3] = 0
    x[3, 77] = 60000
    y = check(x[:3], weight, scale, zeros, bias)
    assert torch.equal(y[0], bias)
    y = linear(x[3:4], weight, scale, zeros, bias)
    exact = x[3:4].double() @ reference.dequantize_awq(weight, scale, zeros, torch.float64).t() + bias.double()
    assert torch.equal(y.isinf(), exact.abs() >= 65520) and not y.isnan().any()


def test_strided_and_shifted_inputs():
    x, *layer = random_case(6, 64, 640)
    expected = linear(x, *layer)
    wide = torch.full((6, 704), float("nan"), dtype=x.dtype, device="cuda")
    for first in (0, 8, 3):  # 3: not on 16 bytes
        wide[:, first : first + 640] = x
        assert torch.equal(linear(wide[:, first : first + 640], *layer), expected)
    weight, scale, zeros, bias = layer
    shifted = torch.empty(weight.numel() + 1, dtype=torch.int8, device="cuda")[1:].view_as(weight).copy_(weight)
    assert torch.equal(linear(x.view(2, 3, 640), shifted, scale, zeros, bias), expected.view(2, 3, 64))
    assert linear(x[:0], *layer).shape == (0, 64)


def test_cuda_graph():
    x, *layer = random_case(2, 160, 640)
    expected = linear(x, *layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, *layer)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    x.neg_()
    graph.replay()
    assert torch.equal(y, linear(x, *layer))


def test_other_stream():
    x, *layer = random_case(2, 9216, 3072)
    expected = linear(x, *layer)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x2 = torch.empty_like(x)
        torch.cuda._sleep(20_000_000)  # a launch on another stream would read x2 before it is written
        x2.copy_(x)
        y = linear(x2, *layer)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_bandwidth():
    """Time and GB/s at FLUX's shapes in a CUDA graph, with weights that are not in L2; and those of a copy."""
    print()
    source, target = torch.empty(2, 1 << 28, dtype=torch.uint8, device="cuda")
    copy = 2 * source.numel() / graph_seconds([lambda: target.copy_(source)])
    print(f"copy of 256 MiB: {copy / 1e9:.0f} GB/s, reads and writes")
    for k, n in FLUX:
        for m in (1, 2, 8, 16, 32):
            x, weight, scale, zeros, bias = random_case(m, n, k)
            layer_bytes = weight.numel() + 4 * scale.numel()
            copies = [[t.clone() for t in (weight, scale, zeros)] for _ in range(-(-(400 << 20) // layer_bytes))]
            seconds = graph_seconds([lambda c=c: linear(x, *c, bias) for c in copies])
            rate = (layer_bytes + 2 * (x.numel() + n + m * n)) / seconds
            print(f"K {k:5d} N {n:6d} M {m:3d}: {seconds * 1e6:7.2f} us {rate / 1e9:6.0f} GB/s = {rate / copy:5.1%} of the copy")


def graph_seconds(calls):
    """Seconds per call, with all calls recorded back to back in one CUDA graph."""
    cycle = itertools.cycle(calls)
    return graph_time(lambda: next(cycle)(), len(calls)) / 1e6
