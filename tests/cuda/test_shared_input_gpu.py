"""Layers with one input and one smoothing: the kernels give the bits of the layers' own calls, where sums are exact."""

import pytest
import torch
from comfyui_svdquant.cuda import ops, shared_input

from .layers import random_input, relative_error, with_lora
from .test_ops_gpu import integer_layer

pytestmark = pytest.mark.gpu
LORAS = {"no LoRA": (None, None, None), "LoRAs": ((16,), (16,), (16,)), "one of parts": (None, (8, 24, 16), (128,))}


def poison():
    """Fill memory that the next calls will get with NaN, so that an element that isn't written shows."""
    torch.full((1 << 28,), -1, dtype=torch.int8, device="cuda")


def layers_of(k, ns, ranks, act_bits, dtype, loras, exact):
    """exact: whether every sum of x, in whole numbers, and proj_down is exact."""
    found, g = [], torch.Generator().manual_seed(k)
    smooth = torch.exp2(torch.randint(-2, 3, (k,), generator=g)).to("cuda", dtype)
    for i, (n, rank, lora) in enumerate(zip(ns, ranks, loras)):
        layer = integer_layer(n, k, rank, None, i != 1, dtype, i, act_bits)._replace(smooth=smooth.clone())
        if exact:
            layer = layer._replace(proj_down=(torch.randint(-4, 5, (k, rank), generator=g) * 2.0**-8).to("cuda", dtype))
        if lora:
            layer = with_lora(layer, lora, 768 if len(lora) > 1 else 0, seed=i)
            if exact:
                down = torch.randint(-4, 5, layer.lora_down.shape, generator=g) * 2.0**-8
                layer = layer._replace(lora_down=torch.cat((layer.proj_down.t(), down[rank:].to("cuda", dtype))))
        found.append(layer)
    return found


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(shared_input, "_agreed", {})


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loras", LORAS)
@pytest.mark.parametrize(("m", "k"), [(1, 256), (37, 1088), (4096, 3072), (256, 3072), (1000, 3840)])
def test_have_the_bits_of_the_layers_own_calls(m, k, loras, dtype, act_bits):
    layers = layers_of(k, (768, 2304, 512), (32, 32, 64), act_bits, dtype, LORAS[loras], exact=True)
    x = torch.randint(-6, 7, (1, m, k), generator=torch.Generator().manual_seed(m)).to("cuda", dtype)
    expected = shared_input.by_kernels(x, layers)  # the first call's are the layers' own
    assert all(torch.equal(y, ops.svdquant_linear(x, layer)) for y, layer in zip(expected, layers))
    assert len(shared_input._agreed) == 1 and all(shared_input._agreed.values())
    for _ in range(3):
        poison()
        found = shared_input.by_kernels(x, layers)
        assert all(torch.equal(y, wanted) and y.isfinite().all() for y, wanted in zip(found, expected, strict=True))
    launch = shared_input.cached_launch(x, layers)
    assert (launch is None) is (loras != "no LoRA")
    if launch:
        poison()
        found = launch(x, [layer.proj_down for layer in layers])
        assert all(torch.equal(y, wanted) and y.isfinite().all() for y, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("loras", LORAS)
def test_another_order_of_the_branchs_sums_is_the_only_difference(act_bits, loras):
    """Of random numbers: the branch's product is then rounded elsewhere, by half a unit in the last place at most."""
    layers = layers_of(3072, (768, 2304, 512), (32, 32, 64), act_bits, torch.bfloat16, LORAS[loras], exact=False)
    x = random_input(700, 3072, torch.bfloat16).cuda()[None]
    shared_input.by_kernels(x, layers)
    for y, layer in zip(shared_input.by_kernels(x, layers), layers):
        assert relative_error(y, ops.svdquant_linear(x, layer)) < 0.002
    without = [layer._replace(proj_up=torch.zeros_like(layer.proj_up), lora_up=None if layer.lora_up is None else torch.zeros_like(
        layer.lora_up)) for layer in layers]
    assert all(torch.equal(y, ops.svdquant_linear(x, layer)) for y, layer in zip(shared_input.by_kernels(x, without), without))


def test_a_cuda_graph_has_the_same_bits():
    layers = layers_of(3072, (768, 2304, 512), (32, 32, 64), 8, torch.bfloat16, LORAS["LoRAs"], exact=False)
    x = random_input(300, 3072, torch.bfloat16).cuda()[None]

    def together(x):
        return torch.cat(shared_input.svdquant_linears(x, layers), dim=-1)

    together(x)
    expected, graph = together(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = together(x)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
