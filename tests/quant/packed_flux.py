"""A small FLUX.1, quantized without ComfyUI: tensors, specs and configuration for a checkpoint's writer."""

import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import pipeline, presets

from .random_flux import flux_tensors

CONTEXT, POOLED = 128, 64


def packed_flux(hidden=128, depth=1, depth_single=1, rank=16, guidance=True, in_channels=16):
    """(tensors, specs, config)."""
    plain = flux_tensors(hidden=hidden, depth=depth, depth_single=depth_single, guidance=guidance, in_channels=in_channels)
    tensors, specs = packed_tensors(FAMILY, plain, rank)
    config = {"image_model": "flux", "in_channels": in_channels, "out_channels": 16, "patch_size": 2, "hidden_size": hidden,
              "num_heads": hidden // 128, "depth": depth, "depth_single_blocks": depth_single, "context_in_dim": CONTEXT,
              "vec_in_dim": POOLED, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": guidance, "axes_dim": [16, 56, 56],
              "theta": 10000}
    return tensors, specs, config


def packed_tensors(family, plain, rank=16):
    """(tensors, specs) of a family's 16-bit model {name: tensor}, with the layers of its blocks in 4 bits, as other software has them."""
    recipe, rest = presets.make_recipe("data-free", rank), dict(plain)
    tensors, specs = {}, {}
    for name in (name for name in family.packed_names(plain) if family.block_of(name)):
        layer, weight = family.layer(name), rest.pop(f"{name}.weight")
        specs[name] = layout.layer_spec(layer, name, weight.shape, rank, layer.bias, torch.bfloat16)
        packed, _ = pipeline.quantize_layer(name, weight, rest.pop(f"{name}.bias", None), None, specs[name], recipe)
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    return tensors | rest, specs
