"""Group scales in half the bytes, as our files store them: 8-bit integers times one float per row, equal to the scales bit for bit.

    weight_scale[g, n] = c_n * i[g, n],   i in -15..16

The functions work on one piece at a time in the calling thread. PyTorch would split large tensors between threads, and on a busy machine
waiting for those threads takes many times as long as working without them.
"""

import numpy as np
import torch

from ...cuda.row_scales import HIGHEST, LOWEST

PIECE = 1 << 15  # elements; PyTorch uses one thread up to this size


def _pieces(scales):
    """Slices of the rows n of scales (G, N), each of about PIECE scales."""
    count = max(1, PIECE // max(1, scales.shape[0]))
    return [slice(start, start + count) for start in range(0, scales.shape[1], count)]


def _quotients(scales, row_scale):
    """scales (G, N) / row_scale (N,), rounded to whole numbers; NumPy arrays of float32."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.rint(scales * np.where(row_scale == 0, 0, 1 / row_scale))


def find_row_scale(weight_scale):
    """weight_scale (G, N), 16-bit, on the CPU -> c (N,) of the same dtype, so that the products with integers() equal weight_scale bit for
    bit; None if a row has no such c. 16 * c is finite."""
    found = []
    for rows in _pieces(weight_scale):
        found.append(_row_scale(weight_scale[:, rows].float().numpy(), weight_scale.dtype))
        if found[-1] is None:
            return None
    return torch.cat(found)


def _row_scale(scales, dtype):
    """find_row_scale of scales (G, N) float32."""
    if np.signbit(scales[scales == 0]).any():  # no product is -0
        return None
    largest, most = np.abs(scales).max(axis=0), torch.finfo(dtype).max / HIGHEST
    found, left = np.empty_like(largest), np.arange(len(largest))
    for divisor in range(HIGHEST, 0, -1):  # in rows from our quantizer the largest integer is mostly 16, 15, ...
        c = torch.from_numpy(largest[left] / divisor).to(dtype).float().numpy()
        i = _quotients(scales, c)
        with np.errstate(invalid="ignore"):
            exact = ((i * c == scales) & (i >= LOWEST) & (i <= HIGHEST)).all(axis=0) & (c <= most)
        found[left[exact]] = c[exact]
        left, scales = left[~exact], scales[:, ~exact]
        if not left.size:
            return torch.from_numpy(found).to(dtype)
    return None


def integers(weight_scale, row_scale):
    """i (G, N) int8, from weight_scale (G, N) on the CPU and its find_row_scale (N,)."""
    found = np.empty(weight_scale.shape, np.int8)
    for rows in _pieces(weight_scale):
        found[:, rows] = _quotients(weight_scale[:, rows].float().numpy(), row_scale[rows].float().numpy())
    return torch.from_numpy(found)


def product(integers, row_scale):
    """weight_scale (G, N), from integers (G, N) int8 and row_scale (N,) 16-bit, on the CPU."""
    found = torch.empty(integers.shape, dtype=row_scale.dtype)
    for group, i in zip(found, integers):
        torch.mul(i, row_scale, out=group)
    return found
