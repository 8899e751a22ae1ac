"""The peers of benchmarks/flux_step.py and linears.py: their arithmetic, and the layers that they replace."""

import fp8_rowwise
import pytest
import torch

pytest.importorskip("comfy", reason="there is no ComfyUI")

import step_variants

SMALL = {"hidden_size": 128, "num_heads": 1, "depth": 1, "depth_single_blocks": 1}
pytestmark = pytest.mark.usefixtures("inference_mode")


def test_fp8_has_a_scale_for_every_token_and_channel():
    """Codes of 3 mantissa bits have a relative error of about 2.6 %; an operand whose rows shared a scale would lose its small rows."""
    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(256, 64, dtype=torch.bfloat16)
    linear.weight.data = (torch.randn(64, 256, generator=g) * torch.logspace(-4, 4, 64)[:, None]).bfloat16()
    linear.bias.data.zero_()
    x = (torch.randn(2, 16, 256, generator=g) * torch.logspace(-3, 3, 16)[:, None]).bfloat16()
    y, exact = fp8_rowwise.Linear(linear)(x), torch.nn.functional.linear(x.float(), linear.weight.float())
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    scale = x.float().norm(dim=-1, keepdim=True) * linear.weight.float().norm(dim=-1) / 16
    error = ((y.float() - exact) / scale).square().mean(dim=(0, 2)).sqrt()  # of each token
    assert 0.02 < error.min() and error.max() < 0.05


def test_fp8_adds_the_bias():
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    assert torch.equal(fp8_rowwise.Linear(linear)(torch.zeros(1, 16, 64).bfloat16())[0, 3], linear.bias)


def test_fp8_leaves_the_modulation_in_bf16():
    flux = step_variants.fp8_flux(32, SMALL)
    fp8 = [name for name, module in flux.named_modules() if isinstance(module, fp8_rowwise.Linear)]
    assert len(fp8) == 8 + 2 and not any("mod" in name for name in fp8)
    assert flux.double_blocks[0].img_mod.lin.weight.dtype == flux.img_in.weight.dtype == torch.bfloat16


def test_comfyuis_fp8_has_all_weights_in_fp8():
    assert {parameter.dtype for parameter in step_variants.comfyui_fp8_flux(32, SMALL).parameters()} == {torch.float8_e4m3fn}


def test_comfyuis_silent_16_bit_product_is_an_error(monkeypatch):
    """ComfyUI computes in 16 bits in training mode, and wherever the fp8 product fails."""
    import comfy.ops

    with monkeypatch.context() as patch:
        patch.setattr(comfy.ops.fp8_ops.Linear, "forward_comfy_cast_weights", comfy.ops.manual_cast.Linear.forward_comfy_cast_weights)
        with pytest.raises(RuntimeError, match="does not multiply in fp8"):
            step_variants.comfyui_fp8_flux(32, SMALL)
    monkeypatch.setattr(comfy.ops, "fp8_linear", lambda *args: None)
    with pytest.raises(RuntimeError, match="does not multiply in fp8"):
        step_variants.comfyui_fp8_flux(32, SMALL)
