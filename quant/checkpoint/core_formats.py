"""The formats in which ComfyUI itself stores quantized layers (comfy.quant_ops.QUANT_ALGOS). ComfyUI does not check their tensors."""

from dataclasses import dataclass

import torch

from .header import CheckpointError


@dataclass(frozen=True)
class CoreFormat:
    """How a layer is stored.

    dtype: the stored weight's; columns: matrix columns in one stored column; scales: names of the tensors beside the weight.
    """

    dtype: torch.dtype
    columns: int = 1
    scales: tuple = ("weight_scale",)


FORMATS = {
    "float8_e4m3fn": CoreFormat(torch.float8_e4m3fn),
    "float8_e5m2": CoreFormat(torch.float8_e5m2),
    "mxfp8": CoreFormat(torch.float8_e4m3fn),
    "nvfp4": CoreFormat(torch.uint8, 2, ("weight_scale", "weight_scale_2")),
    "int8_tensorwise": CoreFormat(torch.int8),
    "convrot_w4a4": CoreFormat(torch.int8, 2),
    "asym_w4a8_int8": CoreFormat(torch.int8, 2, ("weight_s_rel",)),
}


def check(header, prefix, layer, name):
    """Raise CheckpointError if a layer in format `name` lacks a scale or has a weight of another dtype. Formats that are not listed here
    are left to ComfyUI."""
    expected = _format(name)
    if expected is None:
        return
    weight = f"{prefix}{layer}.weight"
    missing = next((scale for scale in expected.scales if f"{prefix}{layer}.{scale}" not in header.tensors), None)
    if missing:
        raise CheckpointError(f"{header.file} lacks tensor {prefix}{layer}.{missing}, a scale of format {name}; the file is incomplete, "
                              "download or save it again.")
    if header.tensors[weight].dtype != expected.dtype:
        raise CheckpointError(f"{header.file}: tensor {weight} is {header.tensors[weight].dtype} instead of {expected.dtype}, the type in "
                              f"format {name}; the file is damaged, download or save it again.")


def stored_shape(name, shape):
    """The shape in which format `name` stores a weight of `shape`, (N, K); None for a format that is not listed here."""
    expected = _format(name)
    return None if expected is None else (*shape[:-1], shape[-1] // expected.columns)


def _format(name):
    """The CoreFormat called `name`, which may be any JSON value; None if there is none."""
    return FORMATS.get(name) if isinstance(name, str) else None
