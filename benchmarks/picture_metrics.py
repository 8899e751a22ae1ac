"""The error of latents, and the confidence interval of a mean over pictures. quant/picture_metrics.py has PSNR and SSIM."""

import torch

RESAMPLES = 10_000


def latent_error(latents, exact):
    """(n,) ||x - y|| / ||y|| of n latents."""
    return (latents - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def interval(differences):
    """(low, high): 95 % interval of the mean of paired differences, by bootstrap with a fixed seed."""
    values = torch.tensor(differences, dtype=torch.float64)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
