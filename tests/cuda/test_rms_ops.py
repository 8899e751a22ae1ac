"""The elementwise work of blocks with RMSNorms, on the CPU: the ops are PyTorch's own functions one after the other."""

import pytest
import torch
from comfyui_svdquant.cuda import rms_ops
from torch.nn.functional import rms_norm, silu


@pytest.fixture
def tensors():
    """x, y, y_weight, gate, weight, scale"""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in ((2, 5, 64), (2, 5, 64), (64,), (2, 1, 64), (64,), (1, 1, 64))]


@pytest.mark.parametrize("modulated", [True, False])
def test_an_update_its_norm_gate_and_residual_and_the_norm_after_it(tensors, modulated):
    x, y, y_weight, gate, weight, scale = tensors
    gate, scale = (gate, scale) if modulated else (None, None)
    z, m = rms_ops.gated_residual_norm(x, y, y_weight, gate, weight, scale, 1e-5)
    one = torch.ones(()) if gate is None else gate
    torch.testing.assert_close(z, x + one * rms_norm(y, (64,), y_weight, 1e-5))
    torch.testing.assert_close(m, rms_norm(z, (64,), weight, 1e-5) * (1 if scale is None else 1 + scale))
    assert torch.equal(rms_ops.gated_residual(x, y, y_weight, gate, 1e-5), z)
    assert torch.equal(rms_ops.norm_modulate(z, weight, scale, 1e-5), m)
    torch.library.opcheck(torch.ops.svdquant.rms_modulate.default, (x, y, y_weight, gate, weight, scale, 1e-5))


def test_swiglu(tensors):
    gate, up = (t.bfloat16() for t in tensors[:2])
    assert torch.equal(rms_ops.swiglu(gate, up), (silu(gate.float()) * up.float()).bfloat16())
    torch.library.opcheck(torch.ops.svdquant.swiglu.default, (gate, up))
