"""Two of Nunchaku's layers as one of ours, and back, as a family's Joined says.

rows: the two read the same input (q k v; MLP up), so that one is above the other; else their outputs are added (attention out | MLP
down), and they lie side by side. Parameters are in our order, as layers/layout.py lists them.
"""

import math

import numpy as np
import torch

from ...layers.layout import GROUP_SIZE

# The dimension along which a part of a layer falls in two; the others belong to both halves (the bias to the second).
ROWS = {"weight": 0, "weight_scale": 1, "bias": 0, "weight_proj_up": 0}
COLUMNS = {"weight": 1, "weight_scale": 0, "weight_smooth_factor": 0, "weight_proj_down": 0}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # NumPy's, for bits of any type


def join(parts, rows, joint):
    """Two layers but for their codes as one: ({parameter name: tensor}, the other's) -> {parameter name: tensor}.

    joint: they have the same proj_down (rows) or proj_up (columns), so that the branch keeps its rank; else it gets
    the ranks of both, with zeros where they do not meet.
    """
    first, second = parts

    def cat(part, dim):
        return _cat((first[part], second[part]), dim)

    def diagonal(part):
        return _diagonal(first[part], second[part])

    extra = {}
    if "weight_scale_2" in first:
        blocks = scale_blocks(*(len(part["weight_smooth_factor"]) for part in parts))
        extra["weight_scale_2"] = cat("weight_scale_2", 1) if rows else torch.cat(
            [part["weight_scale_2"].expand(count, -1) for part, count in zip(parts, blocks)])
    if rows:
        return extra | {"weight_scale": cat("weight_scale", 1), "bias": cat("bias", 0),
                "weight_smooth_factor": first["weight_smooth_factor"],
                "weight_proj_down": first["weight_proj_down"] if joint else cat("weight_proj_down", 1),
                "weight_proj_up": cat("weight_proj_up", 0) if joint else diagonal("weight_proj_up")}
    bias = (first["bias"].float() + second["bias"].float()).to(first["bias"].dtype)
    return extra | {"weight_scale": cat("weight_scale", 0), "bias": bias,
            "weight_smooth_factor": cat("weight_smooth_factor", 0),
            "weight_proj_down": cat("weight_proj_down", 0) if joint else diagonal("weight_proj_down"),
            "weight_proj_up": first["weight_proj_up"] if joint else cat("weight_proj_up", 1)}


# PyTorch would hand these copies to threads of its own, from each of the threads in which layers are read.


def _cat(tensors, dim):
    return torch.from_numpy(np.concatenate([_bits(tensor) for tensor in tensors], dim)).view(tensors[0].dtype)


def _diagonal(first, second):
    joined = np.zeros(np.add(first.shape, second.shape), _bits(first).dtype)
    joined[: len(first), : first.shape[1]], joined[len(first) :, first.shape[1] :] = _bits(first), _bits(second)
    return torch.from_numpy(joined).view(first.dtype)


def _bits(tensor):
    return tensor.view(INTEGERS[tensor.itemsize]).numpy()


def scale_blocks(*columns):
    """How many rows of NVFP4's second scales each of two layers side by side takes, where a row is for as many columns in both."""
    return [part // math.gcd(*columns) for part in columns]


def split(tensors, at, rows):
    """The inverse of join, at row or column `at`; of a layer's branch alone, too. Ranks that a half has no use for are
    left out of it, so that what join put together comes apart as it was."""
    units = {"weight": (at, at // 2), "weight_scale": (at // GROUP_SIZE, at)}  # of dimension 0 and 1
    cuts = ROWS if rows else COLUMNS
    first, second = {}, {}
    for part, tensor in tensors.items():
        if part in cuts:
            start = units.get(part, (at, at))[cuts[part]]
            first[part], second[part] = tensor.split((start, tensor.shape[cuts[part]] - start), cuts[part])
        else:
            first[part] = torch.zeros_like(tensor) if part == "bias" else tensor
            second[part] = tensor
    return [_used_ranks(first), _used_ranks(second)]


def _used_ranks(tensors):
    used = (tensors["weight_proj_down"] != 0).any(0) & (tensors["weight_proj_up"] != 0).any(0)
    return tensors | {part: tensors[part][:, used] for part in ("weight_proj_down", "weight_proj_up")}
