"""Random Chroma weights under the names of a file."""

import torch

from .random_flux import flux_tensors

OUTSIDE = ("time_in.", "vector_in.", "guidance_in.", "final_layer.adaLN_modulation.")  # FLUX.1's layers that Chroma lacks
NETWORK, NETWORK_WIDTH, NETWORK_LAYERS, NETWORK_INPUTS = "distilled_guidance_layer", 96, 2, 64


def chroma_tensors(hidden=256, depth=1, depth_single=2, dtype=torch.bfloat16):
    """{name: tensor} of a random Chroma whose activations stay at order one."""
    flux = flux_tensors(dtype, hidden=hidden, depth=depth, depth_single=depth_single)
    found = {name: tensor for name, tensor in flux.items() if "mod.lin" not in name and "modulation.lin" not in name
             and not name.startswith(OUTSIDE)}
    g = torch.Generator().manual_seed(2)
    shapes = {"in_proj": (NETWORK_WIDTH, NETWORK_INPUTS), "out_proj": (hidden, NETWORK_WIDTH)}
    for i in range(NETWORK_LAYERS):
        shapes |= {f"layers.{i}.{part}": (NETWORK_WIDTH, NETWORK_WIDTH) for part in ("in_layer", "out_layer")}
        found[f"{NETWORK}.norms.{i}.scale"] = torch.ones(NETWORK_WIDTH, dtype=dtype)
    for name, shape in shapes.items():
        found[f"{NETWORK}.{name}.weight"] = (torch.randn(shape, generator=g) / shape[1] ** 0.5).to(dtype)
        found[f"{NETWORK}.{name}.bias"] = (torch.randn(shape[0], generator=g) * 0.02).to(dtype)
    return found
