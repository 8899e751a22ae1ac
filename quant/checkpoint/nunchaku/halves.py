"""Join two of Nunchaku's layers into one of ours and split it again, as a family's Joined declares; and take stacked layers apart.

rows: True if both layers read the same input (q k v; MLP up), so that their weights are stacked in rows; False if their outputs are added
(attention out | MLP down), so that their weights are side by side. Parameters are in our order, as in layers/layout.py.
"""

import math

import numpy as np
import torch

from ...layers.layout import GROUP_SIZE

# The dimension along which a parameter is split. Parameters that are not listed belong to both halves, the bias to the second.
ROWS = {"weight": 0, "weight_scale": 1, "bias": 0, "weight_proj_up": 0}
COLUMNS = {"weight": 1, "weight_scale": 0, "weight_smooth_factor": 0, "weight_proj_down": 0}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # {bytes: integer type}, since NumPy lacks bf16 and fp8


def join(parts, rows, joint):
    """Join the parameters of two layers, without their codes: ({parameter name: tensor}, {...}) -> {parameter name: tensor}.

    joint: whether both have the same proj_down (rows) or proj_up (columns), so that the joined branch keeps their rank. Otherwise its rank
    is the sum of theirs, and it is block diagonal.
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
    if "bias" in first:
        extra["bias"] = cat("bias", 0) if rows else (first["bias"].float() + second["bias"].float()).to(first["bias"].dtype)
    if rows:
        return extra | {"weight_scale": cat("weight_scale", 1), "weight_smooth_factor": first["weight_smooth_factor"],
                "weight_proj_down": first["weight_proj_down"] if joint else cat("weight_proj_down", 1),
                "weight_proj_up": cat("weight_proj_up", 0) if joint else diagonal("weight_proj_up")}
    return extra | {"weight_scale": cat("weight_scale", 0), "weight_smooth_factor": cat("weight_smooth_factor", 0),
            "weight_proj_down": cat("weight_proj_down", 0) if joint else diagonal("weight_proj_down"),
            "weight_proj_up": first["weight_proj_up"] if joint else cat("weight_proj_up", 1)}


# NumPy copies in the calling thread. PyTorch would start more threads from each of the threads that read layers.


def _cat(tensors, dim):
    return torch.from_numpy(np.concatenate([_bits(tensor) for tensor in tensors], dim)).view(tensors[0].dtype)


def _diagonal(first, second):
    joined = np.zeros(np.add(first.shape, second.shape), _bits(first).dtype)
    joined[: len(first), : first.shape[1]], joined[len(first) :, first.shape[1] :] = _bits(first), _bits(second)
    return torch.from_numpy(joined).view(first.dtype)


def _bits(tensor):
    return tensor.view(INTEGERS[tensor.itemsize]).numpy()


def unstack(tensors, count):
    """The parameters of `count` layers, equally high, that are stacked in one: a list of {parameter name: tensor}. They read one input
    through one branch, so each has the same smoothing factor and proj_down."""
    cuts = ROWS | {"weight_scale_2": 1}
    pieces = {part: np.split(_bits(tensor), count, cuts[part]) if part in cuts else [_bits(tensor)] * count
              for part, tensor in tensors.items()}
    # Copies: each parameter has memory of its own.
    return [{part: torch.from_numpy(own[i].copy()).view(tensors[part].dtype) for part, own in pieces.items()} for i in range(count)]


def scale_blocks(*columns):
    """The number of rows of NVFP4's second scales for each of two layers side by side, if every row covers the same number of columns."""
    return [part // math.gcd(*columns) for part in columns]


def split(tensors, at, rows):
    """The inverse of join, at row or column `at`. `tensors` may also be a layer's branch alone. Each half keeps only the ranks that it
    uses, so that a layer from `join` is split into the two original ones."""
    units = {"weight": (at, at // 2), "weight_scale": (at // GROUP_SIZE, at)}  # in dimensions 0 and 1
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
