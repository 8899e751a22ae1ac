"""ComfyUI's own FLUX and TAESD classes, for a script or a test that runs outside ComfyUI."""

import os
import sys

import torch

from . import words

FLUX_CONFIG = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 256, "num_heads": 2, "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0, "depth": 2, "depth_single_blocks": 6, "context_in_dim": words.CONTEXT_DIM,
    "vec_in_dim": words.POOLED_DIM, "qkv_bias": True, "guidance_embed": True, "theta": 10000,
}
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159     # of comfy.latent_formats.Flux; the VAE undoes them, so FLUX gets its raw latents


def find_comfyui(path: str | None = None) -> str:
    """Put ComfyUI's folder (the argument, or COMFYUI_PATH) on sys.path and return it. Raises ValueError if it is not a ComfyUI."""
    path = path or os.environ.get("COMFYUI_PATH", "")
    if not os.path.isfile(os.path.join(path, "comfy", "sd.py")):
        raise ValueError(f"'{path}' is not a ComfyUI folder. Pass --comfyui, or set COMFYUI_PATH.")
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.cli_args
    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    return path


def operations():
    """ComfyUI's layers. The LayerNorms copy their input, since the blocks later add to it in place."""
    import comfy.ops

    class Trainable(comfy.ops.disable_weight_init):
        class LayerNorm(torch.nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.clone())

    return Trainable


def new_flux(device="cpu", dtype=torch.float32):
    """A FLUX with FLUX_CONFIG and uninitialized weights."""
    from comfy.ldm.flux.model import Flux, FluxParams
    # Newer ComfyUIs take the position axes that the text uses; FLUX.1's text uses none.
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    return Flux(dtype=dtype, device=device, operations=operations(), **FLUX_CONFIG, **newer)


def new_vae(device="cpu"):
    """A TAESD with 16 channels, whose decoder takes FLUX's own latents, and uninitialized convolutions."""
    from comfy.taesd.taesd import TAESD
    vae = TAESD(latent_channels=16)
    vae.vae_scale.data.fill_(LATENT_SCALE)
    vae.vae_shift.data.fill_(LATENT_SHIFT)
    return vae.to(device)


def sample(flux, ids, seed=0, steps=20, side=24, guidance=3.5):
    """Latents (n, 16, side, side) for the captions ids (n, words.LENGTH): KSampler's euler, simple, cfg 1, shift 1.15."""
    from comfy.model_sampling import ModelSamplingFlux
    weight = flux.img_in.weight
    table = ModelSamplingFlux().sigmas
    picks = [len(table) - 1 - int(i * len(table) / steps) for i in range(steps)]
    sigmas = [*table[picks].tolist(), 0.0]
    n = len(ids)
    context, pooled = (t.to(weight) for t in words.embed(ids.to(weight.device)))
    x = torch.randn(n, 16, side, side, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    strength = torch.full((n,), guidance, device=weight.device)
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:]):
            time = torch.full((n,), sigma, device=weight.device)
            v = flux(x.to(weight.dtype), time, context, pooled, strength).float()
            x = x + v * (following - sigma)
    return x
