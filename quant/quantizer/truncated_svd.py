"""The approximation of a matrix by the fewest singular vectors that keep 99 % of its energy."""

import torch

from .lowrank import SEARCH_ITERATIONS, low_rank

KEPT_ENERGY = 0.99
SKETCH_RANKS = (64, 256)  # tried before a full decomposition, which takes far longer


def truncated_svd(matrix):
    """The approximation of least rank that keeps 99 % of a matrix's energy, which is the sum of its squares.

    matrix: (n, k) float32. Returns up (n, R) and down (R, k), or None if they are no smaller than the matrix.
    """
    n, k = matrix.shape
    needed = KEPT_ENERGY * matrix.square().sum()
    if needed == 0:
        return matrix.new_zeros(n, 1), matrix.new_zeros(1, k)
    for rank in SKETCH_RANKS:
        if rank < min(n, k) / 2:
            up, down = low_rank(matrix, rank, SEARCH_ITERATIONS)
            # The singular values are split evenly, so a column's squared norm is one of them.
            energy = up.square().sum(dim=0).square().cumsum(dim=0)
            if energy[-1] >= needed:
                kept = int((energy < needed).sum()) + 1
                return up[:, :kept], down[:, :kept].t()
    wide = n < k
    gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
    values, vectors = torch.linalg.eigh(gram)  # ascending
    energy = values.flip(0).clamp_min(0).cumsum(dim=0)
    kept = min(int((energy < needed).sum()) + 1, len(values))
    if kept * (n + k) >= n * k:
        return None
    basis = vectors[:, -kept:]
    return (basis, basis.t() @ matrix) if wide else (matrix @ basis, basis.t())
