"""Round to nearest: absmax scales and signed codes for W4A4, scales, zeros and unsigned codes for W4A16."""

import torch

from ...cuda.int4 import GROUP_SIZE, SIGNED_MAX, UNSIGNED_MAX
from ...cuda.reference import scaled_codes

CHUNK = 1 << 22  # elements of a weight that are processed at a time
AWQ_WIDTHS, AWQ_FITS = (1.0, 0.94, 0.88, 0.82), 3  # fractions of a group's range to try, and how often each is rounded


def absmax_scales(weight, dtype):
    """One scale per row and group of 64, with which the largest magnitude gets code 7 or -7.

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
    """The dequantized weight after round_to_nearest, (N, K) float32."""
    out = torch.empty_like(weight)
    for rows in row_chunks(weight):
        part = scales[:, rows]
        out[rows] = scaled_codes(round_to_nearest(weight[rows], part).float(), part.float().t())
    return out


def row_chunks(matrix):
    """Slices of the matrix's rows of at most CHUNK elements. The intermediate results of a chunk stay in a GPU's cache, and its copies
    stay small."""
    rows = max(1, CHUNK // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def awq_round(weight, dtype, energy=None):
    """Asymmetric codes 0..15 with W ~ (code - 8) * scale + zero, one scale and zero per row and group of 64. The search keeps the candidate
    with the least squared error of a group. The first candidate covers the whole range, so the result is never worse than that.

    weight: (N, K) float32; energy: (K,), the mean square of each input, by which its errors are weighted, or None for equal ones.
    Returns codes (N, K) int8, scales (G, N) and zeros (G, N) in `dtype`.
    """
    energy = torch.ones(weight.shape[1], device=weight.device) if energy is None else energy
    importance = _importance(energy.view(-1, GROUP_SIZE))
    return _awq_in_chunks(weight, lambda groups: _awq_search(groups, importance, dtype))


def awq_plain(weight, dtype):
    """awq_round without a search: codes 0 and 15 are a group's smallest and largest weight."""
    equal = _importance(torch.ones(weight.shape[1] // GROUP_SIZE, GROUP_SIZE, device=weight.device))
    return _awq_in_chunks(weight, lambda groups: _awq_codes(groups, equal, *_awq_range(groups, 1.0, dtype))[:-1])


def _awq_in_chunks(weight, round_groups):
    """(codes, scales, zeros) in the shapes of awq_round. round_groups(groups (n, G, 64)) returns codes (n, G, 64), scales and zeros (n, G)
    of some of the rows."""
    parts = [round_groups(weight[rows].unflatten(-1, (-1, GROUP_SIZE))) for rows in row_chunks(weight)]
    codes = torch.cat([part[0].flatten(-2).to(torch.int8) for part in parts])
    scales, zeros = (torch.cat([part[i] for part in parts]).t().contiguous() for i in (1, 2))
    return codes, scales, zeros


def _importance(energy):
    """(G, 64): each input's fraction of its group's energy; equal fractions if the energy is zero."""
    total = energy.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, energy / total, 1 / GROUP_SIZE)


def _awq_range(groups, width, dtype):
    """(scale, value of code 0), (N, G) each in `dtype`, for codes over the middle `width` of each group's range."""
    low, high = groups.aminmax(dim=-1)
    scales = (high - low) * width / UNSIGNED_MAX
    return scales.to(dtype), ((low + high) / 2 - scales * (UNSIGNED_MAX / 2)).to(dtype)


def _awq_search(groups, importance, dtype):
    """groups: (N, G, 64). Returns codes (N, G, 64), scales and zeros (N, G). The candidates are ranges of several widths, and after
    each the fits of scale and zero to its codes."""
    best = None
    for width in AWQ_WIDTHS:
        scales, lowest = _awq_range(groups, width, torch.float32)
        found = None
        for _ in range(AWQ_FITS):
            if found is not None:
                scales, lowest = _awq_line(groups, importance, found[0], scales)
            found = _awq_codes(groups, importance, scales.to(dtype), lowest.to(dtype))
            best = found if best is None else tuple(
                torch.where((found[-1] < best[-1]).view(*found[-1].shape, *[1] * (new.ndim - 2)), new, old)
                for new, old in zip(found, best))
    return best[:-1]


def _awq_line(groups, importance, codes, scales):
    """(scale, value of code 0), (N, G) each: the least-squares line through each group's weights over its codes. If all codes are the
    same, the scale stays as given."""
    mean = (codes * importance).sum(dim=-1, keepdim=True)
    centred = codes - mean
    weighted = centred * importance
    variance = (weighted * centred).sum(dim=-1)
    scales = torch.where(variance > 0, (weighted * groups).sum(dim=-1) / variance, scales)
    return scales, (groups * importance).sum(dim=-1) - scales * mean.squeeze(-1)


def _awq_codes(groups, importance, scales, lowest):
    """(codes (N, G, 64), scales, zeros, squared error (N, G)) under given scales and values of code 0. Both are in the 16-bit dtype, since
    other formats store the value of code 0 instead of the zero."""
    zeros = (lowest.float() + 8 * scales.float()).to(scales.dtype)
    steps = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    offsets = zeros.float().unsqueeze(-1)
    codes = (((groups - offsets) / steps).round() + 8).clamp_(0, UNSIGNED_MAX)
    error = ((codes - 8) * scales.float().unsqueeze(-1) + offsets - groups).square_().mul_(importance).sum(dim=-1)
    return codes, scales, zeros, error
