"""Quantizing the layers of a text encoder from their weights alone."""

import torch

from ..layers import layout
from . import pipeline
from .metrics import relative_error
from .rounding import awq_round, row_chunks

INT8_MAX = 127


def pack(weight, bias, spec):
    """({parameter name: tensor} of a packed layer on the weight's device, the relative error of its weight).

    weight: (N, K) or, of an embedding, (V, D), in any floating point type; bias: (N,) or None; spec: a LayerSpec of W4A16 or an
    EmbeddingSpec. Raises ValueError, whose message is the second half of a sentence, if the weight isn't finite.
    """
    if spec.format != layout.AWQ:
        return pack_embedding(weight)
    weight = _checked(weight.to(torch.float32))
    tensors = pipeline.awq_tensors(*awq_round(weight, spec.dtype), bias, spec)
    return tensors, relative_error(pipeline.awq_weight(tensors), weight)


def pack_embedding(weight):
    """pack of an embedding: {"weight": (V, D) int8, "weight_scale": (V, 1) float32}. Each row's largest magnitude has code 127 or -127; a
    row of zeros has scale 1. It takes a part of the rows at a time, since a table in float32 may not fit on a GPU."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    lost = total = 0.0
    for rows in row_chunks(weight):
        part = _checked(weight[rows].to(torch.float32))
        largest = part.abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / INT8_MAX)
        code = (part / scale).round_()
        codes[rows], scales[rows] = code.to(torch.int8), scale
        lost += float((code * scale - part).square().sum())
        total += float(part.square().sum())
    return {"weight": codes, "weight_scale": scales}, (lost / total) ** 0.5 if total else 0.0


def _checked(weight):
    if not torch.isfinite(weight).all():
        raise ValueError("holds NaN or Inf")
    return weight
