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
    recipe = presets.make_recipe("data-free", rank)
    tensors, specs = {}, {}
    for name in (name for name in FAMILY.packed_names(plain) if FAMILY.block_of(name)):  # Nunchaku has the others in 16 bits
        weight, bias = plain.pop(f"{name}.weight"), plain.pop(f"{name}.bias")
        specs[name] = layout.layer_spec(FAMILY.layer(name), name, weight.shape, rank, True, torch.bfloat16)
        packed, _ = pipeline.quantize_layer(name, weight, bias, None, specs[name], recipe)
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    config = {"image_model": "flux", "in_channels": in_channels, "out_channels": 16, "patch_size": 2, "hidden_size": hidden,
              "num_heads": hidden // 128, "depth": depth, "depth_single_blocks": depth_single, "context_in_dim": CONTEXT,
              "vec_in_dim": POOLED, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": guidance, "axes_dim": [16, 56, 56],
              "theta": 10000}
    return tensors | plain, specs, config
