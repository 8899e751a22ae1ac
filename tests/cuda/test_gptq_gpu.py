"""GPTQ's kernel on a GPU, against the plain PyTorch loop on the same numbers."""

import pytest
import torch
from comfyui_svdquant.cuda import gptq as kernel
from comfyui_svdquant.quant.quantizer import gptq, group_scales, rounding

pytestmark = pytest.mark.gpu


def case(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) * torch.linspace(1, 0.05, k)
    x = torch.randn(2 * k, k, generator=g) @ mix.t() / k**0.5
    weight = (torch.randn(n, k, generator=g) / k**0.5).cuda()
    return weight, gptq.damped_cholesky((x.t() @ x / len(x)).cuda(), 0.1), group_scales.search(weight, None, torch.bfloat16)


@pytest.mark.parametrize(("n", "k"), [(1, 64), (17, 192), (300, 320), (5000, 256), (768, 3072)])
def test_gives_the_codes_of_the_plain_loop(n, k, monkeypatch):
    weight, factor, found = case(n, k)
    assert kernel.available(weight)
    codes = gptq.gptq_round(weight, found, factor)
    assert torch.equal(codes, gptq.gptq_round(weight, found, factor)), "two runs differ"
    monkeypatch.setattr(kernel, "available", lambda weight: False)
    plain = gptq.gptq_round(weight, found, factor)
    # A sum in another order can move a target across the border between two codes, which also changes the columns after it.
    unequal = float((codes != plain).float().mean())
    assert unequal < 2e-3, f"{unequal:.2%} of the codes differ"

    def left(chosen):
        steps = found.float().t().repeat_interleave(64, 1)
        return float(((weight - chosen.float() * steps)[:, factor.order] @ factor.lower).norm())

    assert left(codes) < left(rounding.round_to_nearest(weight, found))
    assert abs(left(codes) / left(plain) - 1) < 1e-3
