"""The error of latents and the interval of a mean, against known values."""

import picture_metrics
import pytest
import torch


def test_the_latent_error_is_relative_and_of_each_picture():
    exact = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    off = exact * torch.tensor([1.1, 0.5]).view(2, 1, 1, 1)
    assert picture_metrics.latent_error(off, exact).tolist() == pytest.approx([0.1, 0.5], abs=1e-5)


def test_the_interval_is_that_of_the_normal_law():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 1
    low, high = picture_metrics.interval(values.tolist())
    half = 1.96 * float(values.std()) / 20
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.1 * half)
