"""Two of Nunchaku's layers as one of ours, and back: linear1 by rows, linear2 by columns.

rows: the two read the same input (q k v; MLP up), else their outputs are added (attention out | MLP down). Parameters
are in our order, as layout.py lists them.
"""

import torch

from ..layout import GROUP_SIZE


def join(parts, rows, joint):
    """Two layers as one: ({parameter name: tensor}, the other's) -> {parameter name: tensor}.

    joint: they have the same proj_down (rows) or proj_up (columns), so that the branch keeps its rank; else it gets
    the ranks of both, with zeros where they do not meet.
    """
    first, second = parts

    def cat(part, dim):
        return torch.cat((first[part], second[part]), dim)

    def diagonal(part):
        return torch.block_diag(first[part], second[part])

    if rows:
        return {"weight": cat("weight", 0), "weight_scale": cat("weight_scale", 1), "bias": cat("bias", 0),
                "weight_smooth_factor": first["weight_smooth_factor"],
                "weight_proj_down": first["weight_proj_down"] if joint else cat("weight_proj_down", 1),
                "weight_proj_up": cat("weight_proj_up", 0) if joint else diagonal("weight_proj_up")}
    bias = (first["bias"].float() + second["bias"].float()).to(first["bias"].dtype)
    return {"weight": cat("weight", 1), "weight_scale": cat("weight_scale", 0), "bias": bias,
            "weight_smooth_factor": cat("weight_smooth_factor", 0),
            "weight_proj_down": cat("weight_proj_down", 0) if joint else diagonal("weight_proj_down"),
            "weight_proj_up": first["weight_proj_up"] if joint else cat("weight_proj_up", 1)}


def split(tensors, at, rows):
    """The inverse of join, at row or column `at`. Ranks that a half has no use for are left out of it, so that what
    join put together comes apart as it was."""
    def cut(part, dim):
        whole = tensors[part].shape[dim]
        start = at // GROUP_SIZE if (part, dim) == ("weight_scale", 0) else at // 2 if (part, dim) == ("weight", 1) else at
        return tensors[part].split((start, whole - start), dim)

    if rows:
        pairs = {part: cut(part, dim) for part, dim in (("weight", 0), ("weight_scale", 1), ("bias", 0), ("weight_proj_up", 0))}
        pairs |= {part: (tensors[part],) * 2 for part in ("weight_smooth_factor", "weight_proj_down")}
    else:
        pairs = {part: cut(part, dim) for part, dim in (("weight", 1), ("weight_scale", 0), ("weight_smooth_factor", 0),
                                                        ("weight_proj_down", 0))}
        pairs |= {"weight_proj_up": (tensors["weight_proj_up"],) * 2,
                  "bias": (torch.zeros_like(tensors["bias"]), tensors["bias"])}
    return [_used_ranks({part: pair[i] for part, pair in pairs.items()}) for i in range(2)]


def _used_ranks(tensors):
    used = (tensors["weight_proj_down"] != 0).any(0) & (tensors["weight_proj_up"] != 0).any(0)
    return tensors | {part: tensors[part][:, used] for part in ("weight_proj_down", "weight_proj_up")}
