"""The low-rank branch: the part of a smoothed weight that stays in 16 bits (arXiv 2411.05007, section 4.2).

Singular vectors come from a randomized subspace iteration. It orthonormalizes by small Gram matrices, so that all of it is matrix
products and runs in batches; on a GPU, the QR decomposition of a tall matrix takes ten times as long.
"""

import torch

OVERSAMPLING = 16  # extra sketch columns
POWER_ITERATIONS = 6  # the residual is within 0.3 % of a full SVD's, even for the flattest spectra
WARM_ITERATIONS = 2  # if the singular vectors of nearly the same matrix are known
SEARCH_ITERATIONS = 6  # without oversampling: within 1 %, which is enough to compare candidates
RIDGE = 1e-12  # times a Gram matrix's trace: a missing direction becomes a short vector instead of NaN


def random_like(matrix, *shape, seed):
    """Standard normal numbers on the matrix's device, reproducible for a seed."""
    return torch.randn(*shape, generator=torch.Generator(matrix.device).manual_seed(seed), device=matrix.device)


def orthonormal(columns):
    """An orthonormal basis of the span of the columns. columns: (..., rows, q) float32, q at most rows. Returns the same shape.

    It is a Cholesky QR, which squares the condition number, and therefore runs in float64. If the columns are linearly dependent, some of
    the result are shorter than 1.
    """
    exact = columns.double()
    gram = exact.mT @ exact
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.sum(dim=-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, exact, upper=True, left=False).float()


def randomized_svd(matrix, rank, iterations, seed, start=None):
    """U (N, R), S (R), V (K, R) of the largest singular values, R = rank or the matrix's smaller side. Deterministic for a seed.

    matrix: (N, K) float32; start: (K, any), whose columns approximately span the first right singular vectors, or None.
    """
    q = min(rank + OVERSAMPLING, *matrix.shape)
    right = random_like(matrix, matrix.shape[1], q, seed=seed)
    if start is not None:
        right[:, :start.shape[1]] = start[:, :q]
        right = orthonormal(right)
    for _ in range(iterations):
        right = orthonormal(matrix.t() @ orthonormal(matrix @ right))
    left = matrix @ right
    # On the CPU, since a GPU takes longer for a matrix this small.
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
    u, s, v = randomized_svd(weight, rank, iterations, seed, start)
    # A matrix with a side below `rank` has fewer singular vectors; the other columns stay zero.
    missing = rank - s.numel()
    return torch.nn.functional.pad(u * s.sqrt(), (0, missing)), torch.nn.functional.pad(v * s.sqrt(), (0, missing))


def left_bases(matrices, rank, seed=0):
    """Orthonormal bases U of the largest left singular vectors of a batch of wide matrices: U U^T matrix is a matrix's best
    approximation of rank `rank`. They are accurate enough to compare the matrices' residuals.

    matrices: (B, N, K) float32. Returns (B, N, R), R = rank or N.
    """
    grams = matrices @ matrices.mT
    bases = random_like(matrices, matrices.shape[1], min(rank, matrices.shape[1]), seed=seed).expand(len(matrices), -1, -1)
    for _ in range(SEARCH_ITERATIONS):
        bases = orthonormal(grams @ bases)
    return bases


def refit(error, rank, factor, seed=0):
    """The branch that leaves the least output error while the rest of the layer is fixed: the best rank-`rank` approximation of `error`
    in the metric of the inputs (QERA, arXiv 2410.06040), in closed form.

    error: (N, K) float32, the smoothed weight minus the dequantized codes; factor: gptq.Factor of the inputs. Returns up (N, R) and down
    (K, R), float32.
    """
    up, weighted = low_rank(error[:, factor.order] @ factor.lower, rank, seed=seed)
    down = torch.empty_like(weighted)
    down[factor.order] = torch.linalg.solve_triangular(factor.lower.t(), weighted, upper=True)
    return up, down
