"""PSNR and SSIM, against known values."""

import math

import pytest
import torch
from comfyui_svdquant.quant import picture_metrics


def random_pictures(n=2, side=24, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_difference():
    exact = random_pictures() * 0.5
    assert picture_metrics.psnr(exact + 0.1, exact).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert picture_metrics.psnr(exact, exact).tolist() == pytest.approx([120.0, 120.0])


def test_ssim_of_two_grays_is_its_luminance_term():
    x, y = torch.full((1, 3, 16, 16), 0.25), torch.full((1, 3, 16, 16), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert float(picture_metrics.ssim(x, y)) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_one_window_by_its_definition():
    """A picture as large as the window has one position, so that SSIM is a formula of weighted moments."""
    x, y = (random_pictures(1, 11, seed)[:, :1] for seed in (1, 2))
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))

    def moment(values):
        return sum(w / total * v for row, line in zip(weights, values) for w, v in zip(row, line))

    a, b = x[0, 0].double(), y[0, 0].double()
    mx, my = moment(a.tolist()), moment(b.tolist())
    vx, vy, cov = (moment(v.tolist()) - m for v, m in ((a * a, mx * mx), (b * b, my * my), (a * b, mx * my)))
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    assert float(picture_metrics.ssim(x, y)) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_equal_pictures_is_one():
    exact = random_pictures()
    assert picture_metrics.ssim(exact, exact).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
