"""The low-rank branch: the part of a smoothed weight that stays in 16 bits (arXiv 2411.05007, section 4.2)."""

import torch

OVERSAMPLING = 16  # extra sketch columns
POWER_ITERATIONS = 6  # the residual is within 0.3 % of a full SVD's, also for the flattest spectra
SEARCH_ITERATIONS = 2  # within 2 %, which is enough to compare candidates


def low_rank(weight, rank, iterations=POWER_ITERATIONS, seed=0):
    """The best rank-`rank` approximation of `weight`, by a randomized SVD.

    weight: (N, K) float32. Returns up (N, R) and down (K, R), float32, weight ~ up down^T; the singular values are
    split evenly between the two, so that neither overflows fp16. Deterministic for a seed.
    """
    q = min(rank + OVERSAMPLING, *weight.shape)
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=q, niter=iterations)
    root = s[:rank].sqrt()
    up = torch.zeros(weight.shape[0], rank, device=weight.device)
    down = torch.zeros(weight.shape[1], rank, device=weight.device)
    # A matrix with a side below `rank` has fewer singular vectors; the other columns stay zero.
    up[:, :root.numel()] = u[:, :rank] * root
    down[:, :root.numel()] = v[:, :rank] * root
    return up, down
