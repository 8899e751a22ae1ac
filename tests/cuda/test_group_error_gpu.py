"""The kernel of the search for scales against plain PyTorch in float64, and the search with the kernel against the search without it."""

import pytest
import torch
from comfyui_svdquant.cuda import group_error as kernel
from comfyui_svdquant.quant.quantizer import group_scales

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("n", "k"), [(1, 64), (3, 192), (700, 320), (3072, 15360)])
def test_is_the_error_of_rounding(n, k):
    g = torch.Generator("cuda").manual_seed(n)
    weight = torch.randn(n, k // 64, 64, generator=g, device="cuda")
    energy = torch.rand(k // 64, 64, generator=g, device="cuda")
    steps = weight.abs().amax(-1) / 7 * torch.where(torch.rand(n, k // 64, generator=g, device="cuda") < 0.5, -0.8, 1.0)
    assert kernel.available(weight)
    error = kernel.group_error(weight, steps, energy)
    assert torch.equal(error, kernel.group_error(weight, steps, energy)), "two runs differ"
    codes = (weight.double() / steps.double().unsqueeze(-1)).round().clamp(-8, 7)
    exact = ((codes * steps.double().unsqueeze(-1) - weight.double()).square() * energy).sum(-1)
    # A weight on the border between two codes has the same error with either.
    assert float((error - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("integer", [False, True])
def test_the_search_finds_the_same_scales_with_it(integer, monkeypatch):
    weight = torch.randn(500, 640, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    energy = torch.rand(640, device="cuda")
    found = group_scales.search(weight, energy, torch.bfloat16, integer)
    monkeypatch.setattr(kernel, "available", lambda weight: False)
    plain = group_scales.search(weight, energy, torch.bfloat16, integer)
    assert float((found != plain).float().mean()) < 0.01, "only candidates with equal errors may differ"
