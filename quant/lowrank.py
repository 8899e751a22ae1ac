"""The low-rank branch: the part of a smoothed weight that stays in 16 bits (arXiv 2411.05007, section 4.2)."""

import torch

OVERSAMPLING = 16  # extra sketch columns
POWER_ITERATIONS = 6  # the residual is within 0.3 % of a full SVD's, also for the flattest spectra
SEARCH_ITERATIONS = 2  # within 2 %, which is enough to compare candidates


def truncated_svd(matrix, rank, iterations, seed):
    """U (N, R), S (R), V (K, R) of the largest singular values, R = rank or the smaller side; randomized, deterministic."""
    q = min(rank + OVERSAMPLING, *matrix.shape)
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=q, niter=iterations)
    return u[:, :rank], s[:rank], v[:, :rank]


def low_rank(weight, rank, iterations=POWER_ITERATIONS, seed=0):
    """The best rank-`rank` approximation of `weight`, by a randomized SVD.

    weight: (N, K) float32. Returns up (N, R) and down (K, R), float32, weight ~ up down^T; the singular values are
    split evenly between the two, so that neither overflows fp16. Deterministic for a seed.
    """
    if rank == 0:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(weight.shape[1], 0)
    u, s, v = truncated_svd(weight, rank, iterations, seed)
    # A matrix with a side below `rank` has fewer singular vectors; the other columns stay zero.
    missing = rank - s.numel()
    return torch.nn.functional.pad(u * s.sqrt(), (0, missing)), torch.nn.functional.pad(v * s.sqrt(), (0, missing))


def refit(error, rank, cholesky, seed=0):
    """The branch that leaves the least error in the output, where the rest of the layer is fixed: the best rank-`rank`
    approximation of `error` in the metric of the inputs (QERA, arXiv 2410.06040), in closed form.

    error: (N, K) float32, weight less what its codes stand for; cholesky: (K, K) lower C with C C^T the Gram matrix of the
    inputs. Returns up (N, R) and down (K, R), float32.
    """
    up, down = low_rank(error @ cholesky, rank, seed=seed)
    return up, torch.linalg.solve_triangular(cholesky.t(), down, upper=True)
