"""Random layers for the tests of the ops: the packed tensors and the dense layer that they stand for."""

from dataclasses import dataclass

import torch
from comfyui_svdquant.cuda import int4, reference


@dataclass
class Layer:
    """Packed tensors as in reference.svdquant_linear, on the CPU."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    smooth: torch.Tensor
    bias: torch.Tensor | None
    unsigned_from: int

    def args(self):
        return (self.weight, self.weight_scale, self.proj_down, self.proj_up, self.smooth, self.bias, self.unsigned_from)


def random_layer(n, k, rank, unsigned_from=None, bias=True, dtype=torch.bfloat16, seed=0):
    """A layer with all sixteen codes, scales over two octaves and smoothing factors over six."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=g)
    scale = torch.exp2(torch.rand(k // 64, n, generator=g) * 2 - 6).to(dtype)
    smooth = torch.exp2(torch.rand(k, generator=g) * 6 - 3).to(dtype)
    down = (torch.randn(k, rank, generator=g) / k**0.5).to(dtype)
    up = torch.randn(n, rank, generator=g).to(dtype)
    return Layer(int4.pack(codes), scale, down, up, smooth, torch.randn(n, generator=g).to(dtype) if bias else None,
                 k if unsigned_from is None else unsigned_from)


def random_input(m, k, dtype=torch.float32, outliers=True, seed=1):
    """Tokens with a few channels forty times as large as the rest, as FLUX's are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    if outliers:
        x[:, torch.randperm(k, generator=g)[: max(1, k // 50)]] *= 40
    return x.to(dtype)


def decided(x, layer, act_bits):
    """(M,) which tokens have no code so near the border of two that float32 may round it the other way. x: (M, K), of 16-bit numbers."""
    codes, scales = reference.quantize_activation(x, layer.smooth, layer.unsigned_from, act_bits, torch.float64)
    shift = int4.GELU_SHIFT * (torch.arange(x.shape[1], device=x.device) >= layer.unsigned_from)
    exact = ((x.double() + shift) / layer.smooth.double()).unflatten(-1, (-1, int4.GROUP_SIZE)) / scales.unsqueeze(-1)
    return ((exact - exact.floor() - 0.5).abs() > 1e-4).flatten(1).all(dim=1)


def check_in_graphs(model, x):
    """model(x) as one graph of torch.compile and in a CUDA graph: the same bits, which it returns."""
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
    return expected


def relative_error(estimate, exact):
    return float((estimate.double() - exact.double()).norm() / exact.double().norm())
