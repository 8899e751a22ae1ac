"""From numbers to 4-bit codes: the scale rules and round to nearest."""

import torch

from ..cuda.int4 import GROUP_SIZE, SIGNED_MAX, UNSIGNED_MAX
from ..cuda.reference import scaled_codes

CHUNK = 1 << 22  # elements of a weight that are worked on at a time


def absmax_scales(weight, dtype):
    """One scale a row and group of 64, so that the largest magnitude takes code 7 or -7.

    weight: (N, K) float32. Returns (G, N) in `dtype`, the type in which the scale is stored.
    """
    absmax = weight.unflatten(-1, (-1, GROUP_SIZE)).abs().amax(dim=-1)  # (N, G)
    return (absmax / SIGNED_MAX).t().to(dtype).contiguous()


def round_to_nearest(weight, scales):
    """weight: (N, K) float32; scales: (G, N). Returns codes (N, K) int8, -8..7."""
    steps = scales.float().t().unsqueeze(-1)  # (N, G, 1)
    steps = torch.where(steps == 0, torch.ones_like(steps), steps)
    codes = (weight.unflatten(-1, (-1, GROUP_SIZE)) / steps).round().clamp(-SIGNED_MAX - 1, SIGNED_MAX)
    return codes.flatten(-2).to(torch.int8)


def rounded(weight, scales):
    """round_to_nearest as what its codes stand for, (N, K) float32."""
    out = torch.empty_like(weight)
    for rows in row_chunks(weight):
        part = scales[:, rows]
        out[rows] = scaled_codes(round_to_nearest(weight[rows], part).float(), part.float().t())
    return out


def row_chunks(matrix):
    """Slices of the matrix's rows of at most CHUNK elements: what is computed of a chunk in several steps stays in a GPU's cache,
    and the copies that it takes stay small."""
    rows = max(1, CHUNK // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def awq_round(weight, dtype):
    """Asymmetric codes 0..15 with W ~ (code - 8) * scale + zero, a scale and a zero per row and group of 64.

    weight: (N, K) float32. Returns codes (N, K) int8, scales (G, N) and zeros (G, N) in `dtype`.
    """
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1)  # (N, G)
    scales = ((high - low) / UNSIGNED_MAX).to(dtype)
    zeros = (low + 8 * scales.float()).to(dtype)
    steps = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    codes = ((groups - zeros.float().unsqueeze(-1)) / steps).round() + 8
    return codes.clamp(0, UNSIGNED_MAX).flatten(-2).to(torch.int8), scales.t().contiguous(), zeros.t().contiguous()
