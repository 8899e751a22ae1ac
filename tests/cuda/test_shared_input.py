"""Layers with one input and one smoothing: the results on the CPU, and the kernels' arguments."""

import pytest
import torch
from comfyui_svdquant.cuda import ops, quantize_activation, shared_input, targets
from comfyui_svdquant.cuda.activation_layout import RANK_BLOCK
from comfyui_svdquant.cuda.operands import NO_LORA, LoRASizes

from .launches import WORK, addresses, aligned, recorded
from .layers import random_input, random_layer, with_lora, with_row_scale

M, K, ROWS = 70, 256, 80  # ROWS: M, padded to 16
BLOCK = ROWS * RANK_BLOCK * 2  # bytes of a block of ranks


def layers_of(act_bits=8, ranks=(32, 64, 32), loras=(None, None, None), ns=(384, 768, 384)):
    first = random_layer(ns[0], K, ranks[0])
    found = []
    for i, (n, rank, lora) in enumerate(zip(ns, ranks, loras)):
        layer = random_layer(n, K, rank, bias=i != 1, seed=i)._replace(smooth=first.smooth.clone())
        layer = with_row_scale(layer) if act_bits == 8 else layer
        found.append(with_lora(layer, lora, seed=i) if lora else layer)
    return found


@pytest.fixture
def x():
    return aligned(random_input(M, K, torch.bfloat16))[None]


@pytest.mark.parametrize("loras", [(None, None, None), ((8,), None, (16, 8))], ids=["no LoRA", "LoRAs"])
def test_are_the_layers_on_the_cpu(x, loras):
    layers = layers_of(4, loras=loras)
    assert all(torch.equal(y, ops.svdquant_linear(x, layer)) for y, layer in zip(shared_input.svdquant_linears(x, layers), layers))


@pytest.fixture
def agreed(monkeypatch):
    """As if all kinds of layers had agreed before."""
    monkeypatch.setattr(shared_input, "compared", lambda kind, *args: shared_input.launched(*args))


@pytest.mark.usefixtures("agreed")
@pytest.mark.parametrize(("number", "act_bits"), [(90, 8), (89, 8), (89, 4)])
def test_each_gemm_reads_the_codes_and_its_own_ranks(x, monkeypatch, number, act_bits):
    layers, products = layers_of(act_bits), []
    multiplied = quantize_activation.multiplied
    monkeypatch.setattr(quantize_activation, "multiplied", lambda *args: products.append(multiplied(*args)) or products[-1])
    with recorded(monkeypatch, 3) as calls, monkeypatch.context() as patch:
        patch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
        outputs = shared_input.svdquant_linears(x, layers)
    [call] = calls
    for i, (layer, y) in enumerate(zip(layers, outputs)):
        assert y.shape == (1, M, layer.weight.shape[0])
        wanted = addresses(y=y, weight=layer.weight, weight_scale=layer.weight_scale, row_scale=layer.row_scale, proj_up=layer.proj_up,
                           bias=layer.bias)
        assert call.items() >= {f"{name}{i}": address for name, address in wanted.items()}.items()
    assert call["x"] == x.data_ptr() and call["smooth"] == layers[0].smooth.data_ptr() and call["act"] >= WORK
    assert [call[f"lora_act{i}"] - call["lora_act0"] for i in range(3)] == [0, BLOCK, 3 * BLOCK]
    for product, in products:
        assert torch.equal(product, x[0] @ torch.cat([layer.proj_down for layer in layers], dim=1))
    assert (not products) is (number == 89), "quantize.cu computes up to 128 ranks on Ada"


@pytest.mark.usefixtures("agreed")
def test_loras_ranks_lie_behind_their_layers_own(x, monkeypatch):
    """The other layers' own ranks are parts of the first one's LoRA, with strengths of 1."""
    layers, products = layers_of(loras=((8,), None, (16, 40))), []
    multiplied = quantize_activation.multiplied
    monkeypatch.setattr(quantize_activation, "multiplied", lambda *args: products.append(args) or multiplied(*args))
    with recorded(monkeypatch, 3) as calls:
        shared_input.svdquant_linears(x, layers)
    [call], [(tokens, _, down, strength)] = calls, products
    assert [call[f"lora_act{i}"] - call["lora_act0"] for i in range(3)] == [0, 2 * BLOCK, 4 * BLOCK]
    assert torch.equal(down, torch.cat((layers[0].lora_down, layers[1].proj_down.t(), layers[2].lora_down)))
    ones = torch.ones(64), torch.ones(32)
    assert torch.equal(strength, torch.cat((layers[0].lora_strength, ones[0], ones[1], layers[2].lora_strength)))
    assert call["lora_up0"] == layers[0].lora_up.data_ptr() and call["lora_up2"] == layers[2].lora_up.data_ptr()
    assert len(tokens) == M and call["lora_strength"] == strength.data_ptr()


@pytest.mark.parametrize("wrong", ["nothing", "a layer", "not a number", "captured"])
def test_the_first_call_is_compared_with_the_layers_own(x, monkeypatch, caplog, wrong):
    layers, calls = layers_of(4), []
    exact = [torch.full((1, M, 8), torch.nan if wrong == "not a number" else 1.0) for _ in layers]

    def launched(*args):
        calls.append(1)
        return [y * (1.1 if i == 1 and wrong == "a layer" else 1.001) for i, y in enumerate(exact)]

    monkeypatch.setattr(shared_input, "launched", launched)
    monkeypatch.setattr(shared_input, "one_by_one", lambda x, layers: exact)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: wrong == "captured")
    with recorded(monkeypatch, 3):
        outputs = [shared_input.svdquant_linears(x, layers) for _ in range(3)]
    # The first call returns what later ones return, since the same seed draws the same picture.
    assert [outputs[i] is exact for i in (0, 2)] == [wrong in ("a layer", "captured")] * 2
    assert len(calls) == {"nothing": 3, "a layer": 1, "not a number": 3, "captured": 0}[wrong]
    assert ("gave other results than one by one" in caplog.text) is (wrong == "a layer")


def test_joined_sizes():
    lora = LoRASizes((16, 8), 768)
    assert shared_input.joined_sizes((32, 32), (NO_LORA, NO_LORA)) == NO_LORA
    assert shared_input.joined_sizes((32, 64), (lora, LoRASizes((24,)))).ranks == (16, 8, 64, 24)
    assert shared_input.joined_sizes((32, 64), (NO_LORA, lora)).ranks == (64, 16, 8)
    assert shared_input.joined_sizes((32,) * 4, (lora,) * 4) is None, "eleven parts"


@pytest.mark.parametrize("change", ["ranks of half a block", "other bits", "another dtype", "float32", "columns apart", "unaligned"])
def test_what_runs_layer_by_layer(x, monkeypatch, change):
    layers = layers_of(ranks=(32, 48, 32) if change == "ranks of half a block" else (32, 64, 32))
    if change == "other bits":
        layers[1] = layers[1]._replace(act_bits=4)
    elif change == "another dtype":
        layers[2] = layers[2]._replace(weight_scale=layers[2].weight_scale.half())
    elif change == "float32":
        x = x.float()
    elif change == "columns apart":
        x = torch.stack((x, x), dim=-1)[..., 0]
    elif change == "unaligned":
        x = aligned(torch.cat((x.new_zeros(1), x.flatten())))[1:].view(x.shape)
    called = []
    monkeypatch.setattr(ops, "svdquant_linear", lambda x, layer: called.append(layer))
    with recorded(monkeypatch, 3) as calls:
        shared_input.svdquant_linears(x, layers)
    assert not calls and list(map(id, called)) == list(map(id, layers))
