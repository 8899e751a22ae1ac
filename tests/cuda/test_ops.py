"""The custom ops: registered rightly, opaque to torch.compile, and the reference underneath."""

import pytest
import torch
from comfyui_svdquant.cuda import int4, ops, reference

from .layers import random_input, random_layer


def awq_layer():
    weight = int4.pack(torch.randint(0, 16, (96, 128)))
    return weight, torch.rand(2, 96), torch.randn(2, 96), torch.randn(96)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    layer = random_layer(96, 128, 16, 64, bias)
    torch.library.opcheck(torch.ops.svdquant.linear.default, (random_input(5, 128, torch.bfloat16), *layer.args(), 4))
    weight, scale, zeros, awq_bias = awq_layer()
    torch.library.opcheck(torch.ops.svdquant.awq_linear.default, (random_input(2, 128), weight, scale, zeros, awq_bias if bias else None))


def test_the_op_is_the_reference():
    layer, x = random_layer(96, 128, 16), random_input(5, 128, torch.float16)
    for act_bits in (4, 8):
        assert torch.equal(ops.svdquant_linear(x, *layer.args(), act_bits), reference.svdquant_linear(x, *layer.args(), act_bits))


def test_one_graph_under_torch_compile():
    layer, x = random_layer(96, 128, 16), random_input(5, 128).reshape(1, 5, 128)

    def model(x):
        return torch.nn.functional.gelu(ops.svdquant_linear(x, *layer.args(), 4)) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
