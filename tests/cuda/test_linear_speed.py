"""The linears whose speed the doctor shows, on the CPU."""

import pytest
import torch
from comfyui_svdquant.cuda import linear_speed, ops, reference
from comfyui_svdquant.cuda.choose import Layer
from comfyui_svdquant.cuda.errors import KernelsUnavailable

CPU = torch.device("cpu")
LAYER = Layer(40, 192, 128, 32, 128, 8, torch.bfloat16)


def test_sixteen_bits():
    run = linear_speed.sixteen_bits(LAYER, CPU)
    results = [run() for _ in range(linear_speed.COPIES + 1)]
    assert results[0].shape == (40, 192) and results[0].dtype == torch.bfloat16
    assert torch.equal(results[0], results[-1]) and not torch.equal(results[0], results[1]), "the copies take turns"


def test_fp8():
    """As PyTorch multiplies on the CPU, where the arithmetic is the same."""
    y = linear_speed.fp8(LAYER, CPU)()
    assert y.shape == (40, 192) and y.dtype == torch.bfloat16 and 5 < float(y.float().std()) < 20  # sqrt(128 + 1)


def test_by_kernels(monkeypatch):
    ran = []
    monkeypatch.setattr(ops, "chosen", lambda layer, device: "kernels")
    monkeypatch.setattr(ops, "svdquant_linear", lambda x, operands: ran.append(operands) or reference.svdquant_linear(x, operands))
    run = linear_speed.by_kernels(LAYER, CPU)
    assert run().shape == (40, 192) and run().shape == (40, 192) and ran[0] is not ran[1] and ran[0].act_bits == 8


def test_the_reference_is_never_timed(monkeypatch):
    monkeypatch.setattr(ops, "chosen", lambda layer, device: None)
    with pytest.raises(KernelsUnavailable, match="No kernel computes this layer"):
        linear_speed.by_kernels(LAYER, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [linear_speed.sixteen_bits, linear_speed.by_kernels])
def test_the_time_of_a_linear(way):
    device = torch.device("cuda", torch.cuda.current_device())
    layer = LAYER._replace(m=4096, n=9216, k=3072, unsigned_from=3072, act_bits=ops.best_act_bits(device))
    with torch.inference_mode():
        assert 1e-5 < linear_speed.seconds(way(layer, device), device) < 1
