"""From numbers to 4-bit codes: the scale rules and round to nearest."""

import torch

from ..cuda.int4 import GROUP_SIZE, SIGNED_MAX, UNSIGNED_MAX
from ..cuda.reference import scaled_codes

CHUNK = 1 << 22  # elements of a weight that are worked on at a time
AWQ_WIDTHS, AWQ_FITS = (1.0, 0.94, 0.88, 0.82), 3  # shares of a group's range, and how often scale and zero are fitted


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
    """Asymmetric codes 0..15 with W ~ (code - 8) * scale + zero, a scale and a zero per row and group of 64: of those that the search
    tries, what leaves a group the least squared error. That the whole range has codes is tried first, so it is never worse.

    weight: (N, K) float32. Returns codes (N, K) int8, scales (G, N) and zeros (G, N) in `dtype`.
    """
    parts = [_awq_search(weight[rows].unflatten(-1, (-1, GROUP_SIZE)), dtype) for rows in row_chunks(weight)]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts))
    return codes, scales.t().contiguous(), zeros.t().contiguous()


def _awq_search(groups, dtype):
    """groups: (N, G, 64). Returns codes (N, K) int8, scales and zeros (N, G): from ranges of several widths, each followed by fits of
    scale and zero to the codes that came of them."""
    low, high = groups.aminmax(dim=-1)
    best = None
    for width in AWQ_WIDTHS:
        scales = (high - low) * width / UNSIGNED_MAX
        lowest = (low + high) / 2 - scales * (UNSIGNED_MAX / 2)
        found = None
        for _ in range(AWQ_FITS):
            if found is not None:
                scales, lowest = _awq_line(groups, found[0], scales)
            found = _awq_codes(groups, scales.to(dtype), lowest.to(dtype))
            best = found if best is None else tuple(
                torch.where((found[-1] < best[-1]).view(*found[-1].shape, *[1] * (new.ndim - 2)), new, old)
                for new, old in zip(found, best))
    codes, scales, zeros, _ = best
    return codes.flatten(-2).to(torch.int8), scales, zeros


def _awq_line(groups, codes, scales):
    """(scale, value of code 0), (N, G) each, of the line through each group's weights over its codes; the scale is the one given where
    all codes are the same."""
    mean = codes.mean(dim=-1, keepdim=True)
    around = codes - mean
    spread = around.square().sum(dim=-1)
    scales = torch.where(spread > 0, (around * groups).sum(dim=-1) / spread, scales)
    return scales, groups.mean(dim=-1) - scales * mean.squeeze(-1)


def _awq_codes(groups, scales, lowest):
    """(codes (N, G, 64), scales, zeros, squared error (N, G)) under given scales and values of code 0, which other formats store in
    place of zeros: so both are what 16 bits can hold."""
    zeros = (lowest.float() + 8 * scales.float()).to(scales.dtype)
    steps = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    stood = zeros.float().unsqueeze(-1)
    codes = (((groups - stood) / steps).round() + 8).clamp_(0, UNSIGNED_MAX)
    error = ((codes - 8) * scales.float().unsqueeze(-1) + stood - groups).square().sum(dim=-1)
    return codes, scales, zeros, error
