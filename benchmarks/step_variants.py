"""The variants of flux_step.py: FLUX.1-dev as this pack and as its peers hold it, times the ways to run it."""

import argparse
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import flux_model
import fp8_rowwise
import torch

MODES = "eager", "compiled", "graph"


class Model(NamedTuple):
    make: Callable  # (rank, {argument of Flux: value, for a smaller model}) -> Flux
    package: str = ""  # that it needs
    ranked: bool = False  # whether it has a low-rank branch


def replaced(flux, make, modulation):
    """The Flux with make(linear) in place of each linear that this pack packs. modulation: whether that includes the modulation layers."""
    from comfyui_svdquant.quant.families.family import Packing
    from comfyui_svdquant.quant.families.flux1 import FAMILY

    for name in FAMILY.packed_names(dict(flux.named_parameters())):
        if modulation or FAMILY.layer(name).packing is not Packing.W4A16:
            parent, _, child = name.rpartition(".")
            parent = flux.get_submodule(parent)
            setattr(parent, child, make(getattr(parent, child)))
    return flux


def fp8_flux(rank, smaller):
    return replaced(flux_model.plain_flux(**smaller), fp8_rowwise.Linear, modulation=False)


def comfyui_fp8_flux(rank, smaller):
    """ComfyUI's model with weight_dtype fp8_e4m3fn under --fast fp8_matrix_mult. Raises RuntimeError where its fp8 product fails, because
    ComfyUI itself then computes in 16 bits, without an error."""
    import comfy.ops

    flux = flux_model.plain_flux(comfy.ops.fp8_ops, torch.float8_e4m3fn, **smaller)
    linear = flux.double_blocks[0].img_attn.qkv
    x = torch.randn(1, 16, linear.in_features, device=flux_model.device()).bfloat16()
    expected = comfy.ops.fp8_linear(linear, x)
    # With x in 16 bits the results differ, since its values have no fp8 codes.
    if expected is None or not torch.equal(linear(x), expected):
        raise RuntimeError("ComfyUI does not multiply in fp8 here.")
    return flux


def nf4_flux(rank, smaller):
    """bitsandbytes' NF4 of every packed layer, with its defaults: blocks of 64, and absolute maxima that are quantized themselves."""
    import bitsandbytes

    def linear4bit(linear):
        made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.bfloat16, device="meta")
        weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.weight, made.bias = weight.to(linear.weight.device), linear.bias  # to() quantizes
        return made

    return replaced(flux_model.plain_flux(**smaller), linear4bit, modulation=True)


def ours(**how):
    return Model(lambda rank, smaller: flux_model.packed_flux(rank, **how, **smaller), ranked=True)


def in_16_bits(rank, smaller):
    """Branches of half the rank in 16 bits, which are as large."""
    return flux_model.packed_flux(rank // 2, fused=True, branch_bits=16, **smaller)


MODELS = {
    "bf16": Model(lambda rank, smaller: flux_model.plain_flux(**smaller)),
    "fp8": Model(fp8_flux),  # rowwise, as torchao's users run it
    "comfyui-fp8": Model(comfyui_fp8_flux),
    "nf4": Model(nf4_flux, "bitsandbytes"),
    "ours": ours(),
    "ours-fused": ours(fused=True),
    "ours-fused-16-bit-branch": Model(in_16_bits, ranked=True),
    "ours-w4a4": ours(act_bits=4),
}
DEFAULT = ("bf16-eager", "bf16-compiled", "fp8-compiled", "comfyui-fp8-eager", "nf4-eager", "ours-eager", "ours-fused-eager",
           "ours-fused-compiled", "ours-fused-graph")


def variant(text):
    """ "MODEL-MODE" -> (a key of MODELS, one of MODES), for argparse."""
    model, _, mode = text.rpartition("-")
    if model not in MODELS or mode not in MODES:
        raise argparse.ArgumentTypeError(f"{text} is no variant: write MODEL-MODE, with one of {', '.join(MODELS)} and one of "
                                         f"{', '.join(MODES)}.")
    return model, mode


def missing(model):
    """Why `model` can't be measured here; None if it can."""
    package = MODELS[model].package
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else None
