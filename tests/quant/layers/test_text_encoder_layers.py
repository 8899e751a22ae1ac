"""The layers of packed text encoders, and the quantization of their weights."""

import pytest
import torch
from comfyui_svdquant.cuda import int4, reference
from comfyui_svdquant.quant.layers import layout, token_linear
from comfyui_svdquant.quant.layers.lora_branch import Dense, LoRABranch, LowRank
from comfyui_svdquant.quant.layers.packed_embedding import EmbeddingSpec, PackedEmbedding
from comfyui_svdquant.quant.quantizer import text_encoder
from comfyui_svdquant.quant.quantizer.metrics import relative_error


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(n, k, bias=True, dtype=torch.bfloat16):
    """(TokenLinear, its weight before it was packed)."""
    weight, spec = random(n, k) / k ** 0.5, layout.LayerSpec(layout.AWQ, k, n, bias=bias, dtype=dtype)
    tensors, _ = text_encoder.pack(weight, random(n, seed=1) if bias else None, spec)
    layer = token_linear.TokenLinear(spec)
    layer.load_state_dict(tensors, assign=True)
    return layer, weight


@pytest.mark.parametrize("chunk", [1 << 25, 7 * 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dequantized_weight_is_the_references(monkeypatch, dtype, chunk):
    monkeypatch.setattr(token_linear, "CHUNK", chunk)
    codes = torch.arange(16).repeat(48 * 192 // 16).view(48, 192)[:, torch.randperm(192, generator=torch.Generator().manual_seed(4))]
    weight, scale, zeros = int4.pack(codes), random(3, 48).bfloat16(), random(3, 48, seed=1).bfloat16()
    expected = reference.dequantize_awq(weight, scale, zeros)
    found = token_linear.dequantized(weight, scale, zeros, dtype)
    assert found.dtype == dtype and found.shape == (48, 192)
    # In 16 bits each value is rounded once, relative to the largest of its addends.
    bound = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * (8 * scale.abs() + zeros.abs()).float().max()
    assert (found.float() - expected).abs().max() <= bound + 1e-6


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear(rows, dtype):
    layer, weight = linear(80, 192)
    x = random(2, rows, 192, seed=2).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, rows, 80)
    exact = x.float() @ layer.dense("cpu").t() + layer.bias.float()
    assert relative_error(y.float(), exact) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert 0.05 < relative_error(layer.dense("cpu"), weight) < 0.095, "asymmetric codes of Gaussian groups, with searched scales"


def test_values_beyond_fp16_stay_finite():
    """T5's MLPs have such inputs."""
    layer, _ = linear(16, 64, bias=False)
    x = random(3, 64) * 1e6
    assert relative_error(layer(x), x @ layer.dense("cpu").t()) < 1e-5


def test_the_search_is_better_than_the_whole_range():
    weight = random(64, 256) ** 3
    spec = layout.LayerSpec(layout.AWQ, 256, 64, bias=False)
    _, found = text_encoder.pack(weight, None, spec)
    low, high = weight.unflatten(1, (-1, 64)).aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    plain = ((weight.unflatten(1, (-1, 64)) - low) / step).round() * step + low
    assert found < relative_error(plain.flatten(1), weight) - 0.005


def embedding(v=200, d=64):
    """(PackedEmbedding, its table before it was packed)."""
    table = random(v, d) * torch.linspace(0.01, 30, v).unsqueeze(1)
    table[5] = 0
    layer = PackedEmbedding.of(torch.nn.Embedding(v, d), EmbeddingSpec(d, v))
    layer.load_state_dict(text_encoder.pack_embedding(table)[0], assign=True)
    layer.forward = layer.forward_comfy_cast_weights  # as ComfyUI's own forward does
    return layer, table


def test_an_embedding(monkeypatch):
    layer, table = embedding()
    ids = torch.tensor([[0, 5, 199], [7, 7, 3]])
    rows = layer(ids, out_dtype=torch.float32)
    assert rows.shape == (2, 3, 64) and layer(ids).dtype == torch.bfloat16
    assert (rows - table[ids]).abs().max() <= (table[ids].abs().amax(dim=-1).max() / 127) / 2 + 1e-6
    assert not rows[0, 1].any() and torch.equal(rows, layer.dense("cpu")[ids])
    assert layer.weight.nbytes + layer.weight_scale.nbytes == 200 * 68 == layer.spec.nbytes()
    monkeypatch.setattr(text_encoder, "row_chunks", lambda weight: [slice(0, 90), slice(90, None)])
    parts, error = text_encoder.pack_embedding(table)
    assert torch.equal(parts["weight"], layer.weight) and error == pytest.approx(relative_error(layer.dense("cpu"), table), rel=1e-4)


def test_the_whole_table_for_tied_weights():
    """ComfyUI's text generation casts `weight`, and calls the functions in weight_function; its patcher replaces the list."""
    layer, _ = embedding()
    layer.weight_function = []
    weight = layer.weight.to(torch.float32)
    for function in layer.weight_function:
        weight = function(weight)
    assert torch.equal(weight, layer.dense("cpu"))


@pytest.mark.parametrize("gain", [None, 0.5])
def test_loras_on_an_embedding(gain):
    layer, _ = embedding()
    terms = [LowRank((0, 200), (0, 64), random(200, 4), random(4, 64), 0.7), LowRank((50, 100), (0, 64), random(50, 2), random(2, 64)),
             Dense((10, 20), (32, 64), random(10, 32))]
    factor = None if gain is None else torch.full((200,), gain)
    layer.set_lora_branch(LoRABranch.of(terms, (200, 64), torch.float32, torch.device("cpu"), 0, factor, torch.zeros(200)))
    expected = layer.dense("cpu") * (1 if gain is None else gain)
    for term in terms:
        expected[slice(*term.rows), slice(*term.cols)] += term.dense()
    ids = torch.tensor([0, 12, 55, 99, 199, 12])
    assert relative_error(layer(ids, out_dtype=torch.float32), expected[ids]) < 1e-5
    [decoded] = layer.weight_function
    assert relative_error(decoded(layer.weight.float()), expected) < 1e-5


@pytest.mark.parametrize("spec", [layout.LayerSpec(layout.AWQ, 64, 16, bias=False), EmbeddingSpec(64, 16)], ids=["linear", "embedding"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(spec, value):
    weight = random(16, 64)
    weight[3, 3] = value
    with pytest.raises(ValueError, match="^holds NaN or Inf$"):
        text_encoder.pack(weight, None, spec)
