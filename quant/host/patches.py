"""ComfyUI's weight patches: their parts by name, what they are called, and the order they are applied in.

ComfyUI keeps a patch, and the weights of an adapter (LoRA, LoKr, ...), as plain tuples. The views below name their entries. Where a
ComfyUI has changed one of these tuples, the patch is refused in words; the pack still loads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy.weight_adapter import WeightAdapterBase

from ...cuda.operands import RANK_STEP

NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT",
         "diff": "weight difference", "set": "replaced weight", "model_as_lora": "model as LoRA"}


class Patch(NamedTuple):
    """An entry of ModelPatcher.patches[key]; comfy.lora.calculate_weight applies it to a dense weight."""

    strength: float
    value: object              # a weight adapter; (tensor,) or ("diff", (tensor,)) and the like; a list for a merge
    strength_model: float      # a factor of the weight before the patch
    offset: tuple | None       # (dimension, start, length) of the part of the weight that it is for
    function: Callable | None  # applied to the difference


class LoRAParts(NamedTuple):
    """up (n, R), down (R, k): the difference is alpha / R * up @ down."""

    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None
    mid: torch.Tensor | None         # convolutions only
    dora_scale: torch.Tensor | None  # DoRA's magnitudes, (n, 1) or (1, k)
    reshape: list | None             # [N, K] that the weight is widened to, of FLUX-tools' LoRAs


class LoHaParts(NamedTuple):
    """The difference is alpha / R * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise."""

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    alpha: float | None
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    t1: torch.Tensor | None
    t2: torch.Tensor | None
    dora_scale: torch.Tensor | None


class LoKrParts(NamedTuple):
    """The difference is the Kronecker product of w1 and w2, each of them given or as w_a @ w_b, with alpha / R where it is a product."""

    w1: torch.Tensor | None
    w2: torch.Tensor | None
    alpha: float | None
    w1_a: torch.Tensor | None
    w1_b: torch.Tensor | None
    w2_a: torch.Tensor | None
    w2_b: torch.Tensor | None
    t2: torch.Tensor | None
    dora_scale: torch.Tensor | None


class GLoRAParts(NamedTuple):
    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor
    alpha: float | None
    dora_scale: torch.Tensor | None


class OFTParts(NamedTuple):
    blocks: torch.Tensor
    rescale: torch.Tensor | None
    alpha: float | None
    dora_scale: torch.Tensor | None


PARTS = {"lora": LoRAParts, "loha": LoHaParts, "lokr": LoKrParts, "glora": GLoRAParts, "oft": OFTParts, "boft": OFTParts}


def _named(view, entries, what):
    """The tuple `entries` as a NamedTuple `view`. Raises ValueError where ComfyUI's has more or fewer entries than the view."""
    if len(entries) != len(view._fields):
        raise ValueError(f"In this version of ComfyUI {what} has {len(entries)} parts, and SVDQuant knows {len(view._fields)} "
                         f"({', '.join(view._fields)}); update ComfyUI-SVDQuant.")
    return view(*entries)


def patch_of(entry):
    """An entry of ModelPatcher.patches[key] as a Patch."""
    return _named(Patch, entry, "a weight patch")


def parts(value):
    """The weights of an adapter by name, or None for another value and for adapters that have no view here."""
    view = PARTS.get(value.name) if isinstance(value, WeightAdapterBase) else None
    return None if view is None else _named(view, value.weights, f"a {NAMES[value.name]}")


def dora_scale(value):
    """DoRA's magnitudes, (n, 1) or (1, k), or None."""
    return getattr(parts(value), "dora_scale", None)


def kind(value):
    """The name of a patch's value in messages."""
    if isinstance(value, WeightAdapterBase):
        name = NAMES.get(value.name, value.name)
        return f"{name} with DoRA" if dora_scale(value) is not None else name
    if isinstance(value, list):
        return "merge"
    return NAMES.get("diff" if len(value) == 1 else value[0], str(value[0]))


def reads_weight(value):
    """Whether the difference that a patch makes depends on the weight it is applied to."""
    if isinstance(parts(value), (LoRAParts, LoHaParts, LoKrParts)):
        return dora_scale(value) is not None
    return kind(value) != NAMES["diff"]


def new_shape(value):
    """The shape that a patch gives a weight, as the LoRA's file says it; None if it keeps the weight's shape."""
    return getattr(parts(value), "reshape", None)


def widened_columns(value):
    """The number of columns that a patch gives a weight; 0 if it keeps the weight's shape."""
    reshape = new_shape(value)
    return 0 if reshape is None else reshape[1]


def widest_last(patches):
    """Patches of one weight, ordered so that those that widen it (LoRAs of control models widen the image input) come last, the widest
    at the end. ComfyUI can't add a LoRA of the usual width to a widened weight, nor narrow a weight; in this order both work."""
    return sorted(patches, key=lambda entry: widened_columns(patch_of(entry).value))


def padded(patches, usual, width):
    """Patches of a weight that a LoRA has widened already, from `usual` columns to `width`: narrower LoRAs get columns of zeros."""
    def pad(patch):
        lora = parts(patch.value)
        if not isinstance(lora, LoRAParts) or not usual <= lora.down.shape[1] < width:
            return patch
        down = torch.nn.functional.pad(lora.down, (0, width - lora.down.shape[1]))
        return patch._replace(value=type(patch.value)(patch.value.loaded_keys, tuple(lora._replace(down=down, reshape=None))))

    return [tuple(pad(patch_of(entry))) for entry in patches]


def nbytes(patches):
    """About how many bytes the LoRA branch of these patches takes."""
    def numel(value):
        if isinstance(lora := parts(value), LoRAParts) and (rank := lora.down.shape[0]):
            return ((lora.up.numel() + lora.down.numel()) // rank + 2) * (rank + -rank % RANK_STEP)  # 2: a strength has 32 bits
        return sum(tensor.numel() for tensor in tensors_of(value))
    return 2 * sum(numel(patch_of(entry).value) for entry in patches)


def tensors_of(value):
    """The tensors of a patch's value."""
    if isinstance(value, torch.Tensor):
        return [value]
    value = value.weights if isinstance(value, WeightAdapterBase) else value
    return [tensor for entry in value for tensor in tensors_of(entry)] if isinstance(value, (tuple, list)) else []


def identity(value):
    """A hashable stand-in for a patch's value: the same tensors, the same identity."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, WeightAdapterBase):
        return (value.name, identity(value.weights))
    return tuple(map(identity, value)) if isinstance(value, (tuple, list)) else repr(value)
