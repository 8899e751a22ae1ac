"""Random layers for the tests of the ops, and random tokens."""

import torch
from comfyui_svdquant.cuda import int4, quantize_activation, reference, row_scales, targets
from comfyui_svdquant.cuda.operands import LayerOperands, LoRASizes


def random_layer(n, k, rank, unsigned_from=None, bias=True, dtype=torch.bfloat16, seed=0, act_bits=4, gelu_from=None):
    """LayerOperands on the CPU with all sixteen codes, scales over two octaves and smoothing factors over six; without a row_scale."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=g)
    scale = torch.exp2(torch.rand(k // 64, n, generator=g) * 2 - 6).to(dtype)
    smooth = torch.exp2(torch.rand(k, generator=g) * 6 - 3).to(dtype)
    down = (torch.randn(k, rank, generator=g) / k**0.5).to(dtype)
    up = torch.randn(n, rank, generator=g).to(dtype)
    return LayerOperands(int4.pack(codes), scale, down, up, smooth, torch.randn(n, generator=g).to(dtype) if bias else None,
                         k if unsigned_from is None else unsigned_from, act_bits, gelu_from=gelu_from)


def with_lora(layer, ranks, part_rows=0, seed=0):
    """The layer with a random LoRA of these LoRASizes, which adds about as much to the output as proj_up."""
    g, k, n = torch.Generator().manual_seed(seed + 100), layer.proj_down.shape[0], layer.proj_up.shape[0]
    lora = LoRASizes(ranks, part_rows)
    down = torch.cat((layer.proj_down.t().cpu().float(), torch.randn(sum(ranks), k, generator=g) / k**0.5))
    up = torch.randn(sum((stop - start) * rank for (start, stop), rank in zip(lora.rows(n), ranks)), generator=g)
    strength = torch.linspace(0.5, 1.5, sum(ranks)).to(layer.smooth.device)
    return layer._replace(lora_down=down.to(layer.smooth), lora_up=up.to(layer.smooth), lora_strength=strength, lora=lora)


def with_codes(layer, seed=0):
    """(the layer with a random low-rank branch in 8 bits, the layer with that branch expanded), with the same LoRA if it has one."""
    g, (k, rank), n = torch.Generator().manual_seed(seed + 200), layer.proj_down.shape, layer.proj_up.shape[0]
    codes, scale = torch.randint(-127, 128, (k + n, rank), generator=g, dtype=torch.int8), torch.rand(k + n, generator=g) / 64 / k**0.5
    down, up, scale = (tensor.to(layer.weight.device) for tensor in (codes[:k].clone(), codes[k:].clone(), scale.bfloat16()))
    factors = reference.expand_branch(torch.cat((down, up)), scale, layer.weight_scale.dtype)
    if layer.lora_down is not None:
        layer = layer._replace(lora_down=torch.cat((factors[:k].t(), layer.lora_down[rank:])))
    return layer._replace(proj_down=down, proj_up=up, proj_scale=scale), layer._replace(proj_down=factors[:k], proj_up=factors[k:])


def with_row_scale(layer):
    """The layer with 8-bit activations, and with the row_scale that its kernels need."""
    return layer._replace(act_bits=8, row_scale=row_scales.row_scale(layer.weight_scale))


def on_cuda(layer):
    return layer._replace(**{name: t.cuda() for name, t in layer._asdict().items() if isinstance(t, torch.Tensor)})


def plans_here(m, k, rank, storage, **cut):
    """quantize_activation.plans_for this machine's GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    return quantize_activation.plans_for(m, k, rank, storage, targets.for_device(device), targets.multiprocessors(device), **cut)


def random_input(m, k, dtype=torch.float32, outliers=True, seed=1):
    """Tokens with a few channels forty times as large as the rest, like FLUX's."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    if outliers:
        x[:, torch.randperm(k, generator=g)[: max(1, k // 50)]] *= 40
    return x.to(dtype)


def decided(x, layer):
    """(M,) bool: tokens without a value so near the border of two codes that float32 may round it differently.
    x: (M, K), 16-bit numbers."""
    codes, scales = reference.quantize_activation(x, layer.smooth, layer.unsigned_from, layer.act_bits, torch.float64)
    shift = int4.GELU_SHIFT * (torch.arange(x.shape[1], device=x.device) >= layer.unsigned_from)
    exact = ((x.double() + shift) / layer.smooth.double()).unflatten(-1, (-1, int4.GROUP_SIZE)) / scales.unsqueeze(-1)
    return ((exact - exact.floor() - 0.5).abs() > 1e-4).flatten(1).all(dim=1)


def check_in_graphs(model, x):
    """Check that model(x) has the same bits as one graph of torch.compile and in a CUDA graph. Returns them."""
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
