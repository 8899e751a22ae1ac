"""Small models of the families that learn the demo's pictures: their sizes, what they see of the demo's latents, and their outliers.

All are ComfyUI's own classes. The demo's VAE gives latents z, (n, 16, 24, 24), and its words give contexts, (n, 16, 128).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

HIDDEN = 256


def same(z):
    return z


def packed_2_by_4(z):
    """(n, 16, h, w) -> (n, 128, h / 2, w / 4): the 128 channels to which ComfyUI brings every latent of FLUX.2."""
    return z.unflatten(3, (-1, 4)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unpacked_2_by_4(x):
    return x.unflatten(1, (-1, 2, 4)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class Tiny(NamedTuple):
    """image_model: the host's name of the family; config: of the small model; pack, unpack: z to the model's latents and back;
    velocity(model, x, sigma, context, guidance): a forward at noise level sigma; outliers(state, factors): see add_outliers."""

    image_model: str
    config: dict
    pack: Callable = same
    unpack: Callable = same
    velocity: Callable | None = None
    outliers: Callable | None = None


# --- outliers --------------------------------------------------------------------------------------------------------


def rescale(state, factors, rows, readers, offset=()):
    """Multiply the rows from `start` on of each (name, start) of `rows` by factors, one a row, and divide the columns of each (name, start)
    of `readers`, which read them, by the same. offset: (name, start) of scales of which a model multiplies by 1 + scale."""
    count = len(factors)
    for name, start in rows:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state:
                part = state[key][start:start + count]
                part *= factors.view(-1, *[1] * (part.ndim - 1))
    for name, start in offset:
        state[f"{name}.bias"][start:start + count] += factors - 1
    for name, start in readers:
        state[f"{name}.weight"][:, start:start + count] /= factors


def qwen_image_outliers(state, factors):
    """In what modulation gives attention and MLPs, and in the values that attention mixes."""
    for block in blocks_of(state, "transformer_blocks"):
        shared = factors(HIDDEN)
        for stream, q, v, out in (("img", "to_{}", "to_v", "to_out.0"), ("txt", "add_{}_proj", "add_v_proj", "to_add_out")):
            mod = f"{block}.{stream}_mod.1"
            attention = [(f"{block}.attn.{q.format(x)}", 0) for x in "qkv"]
            for chunk, readers in ((0, attention), (3, [(f"{block}.{stream}_mlp.net.0.proj", 0)])):
                scale = (mod, (chunk + 1) * HIDDEN)
                rescale(state, factors(HIDDEN), [(mod, chunk * HIDDEN), scale], readers, [scale])
            rescale(state, shared, [(f"{block}.attn.{v}", 0)], [(f"{block}.attn.{out}", 0)])


def z_image_outliers(state, factors):
    """In what the norms give attention and MLPs, in the values, and in the ungated half of SwiGLU."""
    for block in blocks_of(state, "context_refiner", "noise_refiner", "layers"):
        mlp = state[f"{block}.feed_forward.w2.weight"].shape[1]
        qkv, gated, up = (f"{block}.{name}" for name in ("attention.qkv", "feed_forward.w1", "feed_forward.w3"))
        rescale(state, factors(HIDDEN), [(f"{block}.attention_norm1", 0)], [(qkv, 0)])
        rescale(state, factors(HIDDEN), [(f"{block}.ffn_norm1", 0)], [(gated, 0), (up, 0)])
        rescale(state, factors(HIDDEN), [(qkv, 2 * HIDDEN)], [(f"{block}.attention.out", 0)])
        rescale(state, factors(mlp), [(up, 0)], [(f"{block}.feed_forward.w2", 0)])


def flux2_outliers(state, factors):
    """In the values and in the ungated half of SwiGLU: the modulation has no bias that could hold the 1 of 1 + scale."""
    for block in blocks_of(state, "double_blocks"):
        mlp, shared = state[f"{block}.img_mlp.2.weight"].shape[1], factors(HIDDEN)
        for stream in (f"{block}.img", f"{block}.txt"):
            rescale(state, shared, [(f"{stream}_attn.qkv", 2 * HIDDEN)], [(f"{stream}_attn.proj", 0)])
            rescale(state, factors(mlp), [(f"{stream}_mlp.0", mlp)], [(f"{stream}_mlp.2", 0)])
    for block in blocks_of(state, "single_blocks"):
        mlp = state[f"{block}.linear2.weight"].shape[1] - HIDDEN
        rescale(state, factors(HIDDEN), [(f"{block}.linear1", 2 * HIDDEN)], [(f"{block}.linear2", 0)])
        rescale(state, factors(mlp), [(f"{block}.linear1", 3 * HIDDEN + mlp)], [(f"{block}.linear2", HIDDEN)])


def blocks_of(state, *lists):
    return sorted({".".join(name.split(".")[:2]) for name in state if name.split(".")[0] in lists})


def add_outliers(tiny, state, seed=0, share=None):
    """A float32 copy of a state dict with the same function, and with outlier channels before linears, as demo/tiny_flux/outliers.py
    gives the demo's FLUX. Factors are powers of two. share: of the channels; the demo's by default."""
    from tiny_flux import outliers

    generator = torch.Generator().manual_seed(seed)
    found = {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    share = outliers.SHARE if share is None else share
    tiny.outliers(found, lambda channels: outliers.factors(channels, generator, share, outliers.STRENGTHS))
    return found


# --- the models ------------------------------------------------------------------------------------------------------

FLUX1 = Tiny("flux", {})  # the demo's, which demo/tiny_flux/train.py trains
FLUX2 = Tiny(
    "flux2",
    {"axes_dim": [32] * 4, "theta": 2000, "mlp_ratio": 3.0, "patch_size": 1, "in_channels": 128, "out_channels": 128,
     "hidden_size": HIDDEN, "num_heads": HIDDEN // 128, "depth": 2, "depth_single_blocks": 6, "context_in_dim": 128,
     "guidance_embed": True},
    packed_2_by_4, unpacked_2_by_4,
    lambda model, x, sigma, context, guidance: model(x, sigma, context, None, guidance), flux2_outliers)
QWEN_IMAGE = Tiny(
    "qwen_image",
    {"in_channels": 64, "out_channels": 16, "num_layers": 5, "num_attention_heads": HIDDEN // 128, "attention_head_dim": 128,
     "joint_attention_dim": 128, "axes_dims_rope": [16, 56, 56], "default_ref_method": "index", "use_additional_t_cond": False},
    lambda z: z.unsqueeze(2), lambda x: x.squeeze(2),
    lambda model, x, sigma, context, guidance: model(x, sigma, context), qwen_image_outliers)
Z_IMAGE = Tiny(
    "lumina2",
    {"dim": HIDDEN, "n_layers": 6, "n_refiner_layers": 2, "n_heads": HIDDEN // 128, "n_kv_heads": HIDDEN // 128, "in_channels": 16,
     "patch_size": 2, "cap_feat_dim": 128, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
     "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0, "pad_tokens_multiple": 32},
    velocity=lambda model, x, sigma, context, guidance: model(x, sigma, context, context.shape[1]), outliers=z_image_outliers)
TRAINED = {"flux2": FLUX2, "qwen-image": QWEN_IMAGE, "z-image": Z_IMAGE}
BY_IMAGE_MODEL = {tiny.image_model: tiny for tiny in (FLUX1, *TRAINED.values())}


def new_model(tiny, device="cpu", **changes):
    """(the diffusion model of a Tiny in float32 with uninitialized weights, its Family). changes: to the configuration."""
    import family_models

    from tiny_flux import host

    family, _, model_config = family_models.described(tiny.image_model, tiny.config | changes)
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = host.operations()
    made = model_config.get_model({}, "", device=torch.device("meta"))
    return made.diffusion_model.to_empty(device=device), family


def initialize(model):
    """Xavier matrices, norms of one, zero biases; modulations and the last layer start at zero, so every block starts as identity."""
    for name, parameter in model.named_parameters():
        if "mod" in name or name.startswith(("final_layer.", "proj_out.")) or name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.xavier_uniform_(parameter)


def as_flux(tiny, model):
    """A function with the arguments of the demo's FLUX, in its latents: (z, sigma, context, pooled, guidance) -> velocity."""
    def velocity(z, sigma, context, pooled, guidance):
        return tiny.unpack(tiny.velocity(model, tiny.pack(z), sigma, context, guidance))

    return velocity
