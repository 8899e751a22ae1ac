"""A layer's output, times a gate, added to a residual: the op on the CPU, and the kernels' arguments."""

import pytest
import torch
from comfyui_svdquant.cuda import gated_linear, ops, reference, targets

from .launches import addresses, aligned, recorded
from .layers import random_input, random_layer, with_codes, with_lora, with_row_scale

M, N, K = 70, 384, 256


@pytest.fixture
def tensors():
    """x, a residual, and a gate that is a part of a longer vector."""
    g = torch.Generator().manual_seed(0)
    residual, gates = (torch.randn(1, *shape, generator=g).bfloat16() for shape in ((M, N), (1, 3 * N)))
    return aligned(random_input(M, K, torch.bfloat16))[None], aligned(residual), gates.chunk(3, dim=-1)[1]


@pytest.mark.parametrize("lora", [None, (8,)])
@pytest.mark.parametrize("batch", [1, 2])
def test_is_the_reference_of_both_passes(tensors, lora, batch):
    x, residual, gate = (torch.cat(batch * [t]) for t in tensors)
    layer = random_layer(N, K, 32)
    layer = with_lora(layer, lora) if lora else layer
    expected, _ = reference.modulate(residual, reference.svdquant_linear(x, layer), gate)
    z = gated_linear.gated_linear(x, layer, residual, gate)
    assert torch.equal(z, expected) and z.dtype == x.dtype
    torch.library.opcheck(torch.ops.svdquant.gated_linear.default, (x, residual, gate, *layer.flat()))


@pytest.mark.parametrize("lora", [None, (8,)])
def test_a_branch_in_8_bits_is_expanded_within_the_op(tensors, lora):
    x, residual, gate = tensors
    layer = random_layer(N, K, 32)
    narrow, wide = with_codes(with_lora(layer, lora) if lora else layer)
    expected = gated_linear.gated_linear(x, wide, residual, gate)
    assert torch.equal(gated_linear.gated_linear(x, narrow, residual, gate), expected)
    assert torch.equal(torch.ops.svdquant.gated_linear(x, residual, gate, *narrow.flat()), expected)
    torch.library.opcheck(torch.ops.svdquant.gated_linear.default, (x, residual, gate, *narrow.flat()))


@pytest.mark.parametrize("lora", [None, (8,)])
@pytest.mark.parametrize(("number", "act_bits"), [(90, 8), (89, 8), (89, 4)])
def test_the_kernels_arguments(tensors, monkeypatch, lora, number, act_bits):
    """A layer's two launches take the residual and the gate as they are."""
    x, residual, gate = tensors
    layer = with_row_scale(random_layer(N, K, 32)) if act_bits == 8 else random_layer(N, K, 32)
    layer = with_lora(layer, lora) if lora else layer
    with recorded(monkeypatch) as calls, monkeypatch.context() as patch:
        patch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
        z = gated_linear.gated_linear(x, layer, residual, gate)
        ops.svdquant_linear(x, layer)
    gated, plain = calls
    assert gated.items() >= addresses(x=x, y=z, residual=residual, gate=gate, weight=layer.weight, bias=layer.bias).items()
    assert gated.keys() - plain.keys() == {"residual", "gate"} and z.shape == residual.shape and ("lora_up" in gated) is bool(lora)


@pytest.mark.parametrize("change", ["two gates", "another dtype of the gate", "a residual in wider rows", "an unaligned residual",
                                    "an unaligned gate", "ranks of no kernel", "4 bits in bytes"])
def test_what_takes_a_pass_of_its_own(tensors, monkeypatch, change):
    x, residual, gate = tensors
    layer = random_layer(N, K, 24 if change == "ranks of no kernel" else 32)
    layer = layer if change == "4 bits in bytes" else with_row_scale(layer)
    if change == "two gates":
        x, residual, gate = (torch.cat((t, t)) for t in tensors)
    elif change == "another dtype of the gate":
        gate = gate.float()
    elif change == "a residual in wider rows":
        residual = torch.cat((residual, residual), dim=-1)[..., :N]
    elif change == "an unaligned residual":
        residual = aligned(torch.cat((residual.new_zeros(1), residual.flatten())))[1:].view(residual.shape)
    elif change == "an unaligned gate":
        gate = torch.cat((gate[..., :1], gate), dim=-1)[..., 1:]
    passes = []
    monkeypatch.setattr(gated_linear.block_ops, "gated_residual", lambda *args: passes.append(args) or args[0])
    with recorded(monkeypatch):
        gated_linear.gated_linear(x, layer, residual, gate)
    assert len(passes) == 1
    assert passes[0][0] is residual and passes[0][2] is gate
