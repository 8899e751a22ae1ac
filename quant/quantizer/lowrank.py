"""The low-rank branch: the part of a smoothed weight that stays in 16 bits (arXiv 2411.05007, section 4.2).

Singular vectors come from a randomized subspace iteration. It is orthonormalised through small Gram matrices, so that all of it is
matrix products and runs in batches; LAPACK's QR of a tall matrix takes a GPU ten times as long.
"""

import torch

OVERSAMPLING = 16  # extra sketch columns
POWER_ITERATIONS = 6  # the residual is within 0.3 % of a full SVD's, also for the flattest spectra
WARM_ITERATIONS = 2  # where the singular vectors of nearly the same matrix are known
SEARCH_ITERATIONS = 6  # without oversampling within 1 %, which is enough to compare candidates
RIDGE = 1e-12  # of a Gram matrix's trace: a direction that is not there becomes a short vector, not NaN


def random_like(matrix, *shape, seed):
    """Standard normal numbers, the same for a seed, on the matrix's device."""
    return torch.randn(*shape, generator=torch.Generator(matrix.device).manual_seed(seed), device=matrix.device)


def orthonormal(columns):
    """An orthonormal basis of what the columns span. columns: (..., rows, q) float32, q at most rows. Returns the same shape.

    Cholesky QR, whose squared condition number float64 takes in. Where the columns depend on each other, some come out shorter.
    """
    exact = columns.double()
    gram = exact.mT @ exact
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.sum(dim=-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, exact, upper=True, left=False).float()


def truncated_svd(matrix, rank, iterations, seed, start=None):
    """U (N, R), S (R), V (K, R) of the largest singular values, R = rank or the smaller side; randomized, deterministic.

    start: (K, any) that the first right singular vectors are believed to lie in, or None.
    """
    q = min(rank + OVERSAMPLING, *matrix.shape)
    right = random_like(matrix, matrix.shape[1], q, seed=seed)
    if start is not None:
        right[:, :start.shape[1]] = start[:, :q]
        right = orthonormal(right)
    for _ in range(iterations):
        right = orthonormal(matrix.t() @ orthonormal(matrix @ right))
    left = matrix @ right
    # On the CPU: of a matrix this small, a GPU takes longer.
    values, vectors = torch.linalg.eigh((left.double().t() @ left.double()).cpu())
    s = values.flip(0)[:rank].clamp_min(0).sqrt().float().to(matrix.device)
    rotation = vectors.flip(1)[:, :rank].float().to(matrix.device)
    u = left @ rotation / s.clamp_min(torch.finfo(torch.float32).tiny)
    return u, s, right @ rotation


def low_rank(weight, rank, iterations=POWER_ITERATIONS, seed=0, start=None):
    """The best rank-`rank` approximation of `weight`, by a randomized SVD.

    weight: (N, K) float32; start: `down` of nearly the same matrix, or None. Returns up (N, R) and down (K, R), float32,
    weight ~ up down^T; the singular values are split evenly between the two, so that neither overflows fp16. Deterministic
    for a seed.
    """
    if rank == 0:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(weight.shape[1], 0)
    u, s, v = truncated_svd(weight, rank, iterations, seed, start)
    # A matrix with a side below `rank` has fewer singular vectors; the other columns stay zero.
    missing = rank - s.numel()
    return torch.nn.functional.pad(u * s.sqrt(), (0, missing)), torch.nn.functional.pad(v * s.sqrt(), (0, missing))


def left_bases(matrices, rank, seed=0):
    """Orthonormal bases of the largest left singular vectors of a batch of wide matrices: the best rank-`rank` approximation of one
    is U U^T matrix. Near enough to compare matrices by what is left of them.

    matrices: (B, N, K) float32. Returns (B, N, R), R = rank or N.
    """
    grams = matrices @ matrices.mT
    bases = random_like(matrices, matrices.shape[1], min(rank, matrices.shape[1]), seed=seed).expand(len(matrices), -1, -1)
    for _ in range(SEARCH_ITERATIONS):
        bases = orthonormal(grams @ bases)
    return bases


def refit(error, rank, factor, seed=0):
    """The branch that leaves the least error in the output, where the rest of the layer is fixed: the best rank-`rank`
    approximation of `error` in the metric of the inputs (QERA, arXiv 2410.06040), in closed form.

    error: (N, K) float32, weight less what its codes stand for; factor: gptq.Factor of the inputs. Returns up (N, R) and down
    (K, R), float32.
    """
    up, weighted = low_rank(error[:, factor.order] @ factor.lower, rank, seed=seed)
    down = torch.empty_like(weighted)
    down[factor.order] = torch.linalg.solve_triangular(factor.lower.t(), weighted, upper=True)
    return up, down
