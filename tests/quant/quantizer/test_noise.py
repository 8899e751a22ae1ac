"""Codes that account for the activation's rounding, against the definitions."""

import pytest
import torch
from comfyui_svdquant.cuda import reference
from comfyui_svdquant.cuda.operands import LayerOperands
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import gptq, noise, pipeline, presets
from comfyui_svdquant.quant.quantizer.calibration import InputStats
from comfyui_svdquant.quant.quantizer.metrics import relative_error


def inputs(m, k, seed):
    """Correlated inputs with little variance in most directions, as after a trained layer."""
    mix = torch.randn(k, k, generator=torch.Generator().manual_seed(9)) * torch.arange(1, k + 1).pow(-0.7)
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) @ mix.t()


@pytest.mark.parametrize("unsigned_from", [0, 64, 128])
def test_activation_noise_is_the_references_rounding_error(unsigned_from):
    x = torch.nn.functional.gelu(inputs(200, 128, 1), approximate="tanh")
    smooth = torch.linspace(0.5, 2, 128)
    codes, scales = reference.quantize_activation(x, smooth, unsigned_from)
    seen = (codes.unflatten(-1, (-1, 64)) * scales.unsqueeze(-1)).flatten(-2)
    exact = (x + torch.where(torch.arange(128) >= unsigned_from, 0.171875, 0.0)) / smooth
    assert torch.allclose(noise.activation_noise(x, smooth, unsigned_from), (seen - exact).square().mean(0), rtol=1e-3, atol=1e-9)


def test_the_target_is_the_minimum_in_closed_form():
    """The target equals float64 with explicit inverses, and no step away from it lowers the error."""
    k = 96
    residual, x = torch.randn(8, k, generator=torch.Generator().manual_seed(0)), inputs(400, k, 1)
    variance = torch.rand(k, generator=torch.Generator().manual_seed(2)) * 0.1
    gram = x.t() @ x / len(x) + 0.05 * torch.eye(k)
    target = noise.quiet_target(residual, variance, gptq.damped_cholesky(gram, 0, noise=variance))
    h, s, r = gram.double(), torch.diag(variance.double()), residual.double()
    assert torch.allclose(target.double(), r @ h @ torch.linalg.inv(h + s), atol=1e-4)

    def left(q):
        return float(torch.trace((r - q) @ h @ (r - q).t()) + torch.trace(q @ s @ q.t()))

    for seed in range(3):
        step = 0.05 * torch.randn(8, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert left(target.double()) < left(target.double() + step)
    assert left(target.double()) < left(r)


@pytest.mark.parametrize(("unsigned_from", "bits", "most"), [(256, 4, 0.995), (256, 8, 1.0), (0, 4, 1.0), (128, 4, 1.0)])
def test_quiet_codes_and_a_second_pass_are_better_on_fresh_tokens(unsigned_from, bits, most):
    w, stats = torch.randn(192, 256, generator=torch.Generator().manual_seed(0)), InputStats(1, with_gram=True)

    def seen(m, seed):
        x = inputs(m, 256, seed)
        return torch.where(torch.arange(256) >= unsigned_from, torch.nn.functional.gelu(x, approximate="tanh"), x)

    stats.add(seen(4096, 1))
    fresh, errors = seen(1000, 2), []
    spec = layout.svdquant_spec(256, 192, 16, unsigned_from, True, torch.bfloat16)
    for changes in ({}, {"passes": 2, "quiet": True}):
        recipe = presets.Recipe("best", 16, **(presets.PRESETS["best"] | changes))
        t, _ = pipeline.quantize_layer("layer", w, torch.zeros(192), stats, spec, recipe)
        y = reference.svdquant_linear(fresh, LayerOperands(t["weight"], t["weight_scale"], t["weight_proj_down"], t["weight_proj_up"],
                                                           t["weight_smooth_factor"], t["bias"], unsigned_from, bits))
        errors.append(relative_error(y, fresh @ w.t()))
    assert errors[1] < most * errors[0], f"error {errors[1]:.5f}, of one plain pass {errors[0]:.5f}"
