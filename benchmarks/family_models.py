"""The published models that family_step.py and quantize_full.py measure: their sizes, and ComfyUI's configuration of each."""

from collections.abc import Callable
from typing import NamedTuple

import flux_model
import torch


class Model(NamedTuple):
    """image_model: of the family; config: of the published model; text: (tokens, width) of its text; latent(pixels): the shape of a latent;
    more: other arguments of a forward, with numbers as values; pooled: width of the pooled text, 0 if the model has none."""

    image_model: str
    config: dict
    text: tuple
    latent: Callable
    more: dict
    pooled: int = 0


# The keys of a configuration that hold the number of blocks of each kind, the width, and the numbers of heads, each of HEAD channels.
DEPTHS = {"flux": ("depth", "depth_single_blocks"), "flux2": ("depth", "depth_single_blocks"), "qwen_image": ("num_layers",),
          "lumina2": ("n_layers",)}
WIDTH = {"flux": "hidden_size", "flux2": "hidden_size", "lumina2": "dim"}
HEADS = {"flux": ("num_heads",), "flux2": ("num_heads",), "qwen_image": ("num_attention_heads",), "lumina2": ("n_heads", "n_kv_heads")}
HEAD = 128


def flux1():
    dev = flux_model.DEV
    text = flux_model.TEXT_TOKENS, dev["context_in_dim"]
    return Model("flux", dev, text, flux_model.latent_shape, {"guidance": 3.5}, dev["vec_in_dim"])


def flux2(hidden, double, single, width, guidance=False):
    config = {"axes_dim": [32] * 4, "theta": 2000, "mlp_ratio": 3.0, "patch_size": 1, "out_channels": 128, "in_channels": 128,
              "hidden_size": hidden, "num_heads": hidden // HEAD, "depth": double, "depth_single_blocks": single, "context_in_dim": width,
              "guidance_embed": guidance}
    return Model("flux2", config, (512, width), lambda pixels: (1, 128, pixels // 16, pixels // 16), {"guidance": 3.5} if guidance else {})


def qwen_image(layers, heads):
    config = {"in_channels": 64, "out_channels": 16, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": HEAD,
              "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56], "default_ref_method": "index", "use_additional_t_cond": False}
    return Model("qwen_image", config, (256, 3584), lambda pixels: (1, 16, 1, pixels // 8, pixels // 8), {})


def z_image(dim, layers):
    config = {"dim": dim, "n_layers": layers, "n_refiner_layers": 2, "n_heads": dim // HEAD, "n_kv_heads": dim // HEAD, "in_channels": 16,
              "patch_size": 2, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
              "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0, "pad_tokens_multiple": 32}
    return Model("lumina2", config, (256, 2560), lambda pixels: (1, 16, pixels // 8, pixels // 8), {"num_tokens": 256})


MODELS = {"flux1-dev": flux1(), "flux2-klein-9b": flux2(4096, 8, 24, 12288), "z-image": z_image(3840, 30), "qwen-image": qwen_image(60, 24),
          "flux2-klein-4b": flux2(3072, 5, 20, 7680), "flux2-dev": flux2(6144, 8, 48, 15360, guidance=True)}


def resized(model, hidden=None, blocks=None):
    """A Model of another width (a multiple of HEAD) or with other numbers of blocks, one for each of its kinds; None leaves them. Raises
    ValueError if `blocks` has another number of kinds."""
    kind, config = model.image_model, dict(model.config)
    if blocks is not None:
        config |= dict(zip(DEPTHS[kind], blocks, strict=True))
    if hidden is not None:
        config |= dict.fromkeys(HEADS[kind], hidden // HEAD) | ({WIDTH[kind]: hidden} if kind in WIDTH else {})
    return model._replace(config=config)


def depths(model):
    """The numbers of blocks of a Model, one for each of its kinds, as `resized` takes them."""
    return tuple(model.config[key] for key in DEPTHS[model.image_model])


def described(image_model, config):
    """(Family, {name: shape} of its 16-bit model, the host's configuration) of a model with these sizes."""
    import comfy.model_detection
    from comfyui_svdquant.quant import families
    from comfyui_svdquant.quant.host import build

    family = families.of_image_model(image_model)
    config = {**family.configuration.fixed, **config}
    shapes = family.tensors(config)
    tensors = build.shapes_as_tensors(shapes)
    host = family.configuration.added_to(comfy.model_detection.detect_unet_config(tensors, ""), config)
    return family, shapes, comfy.model_detection.model_config_from_unet_config(host, tensors)


def on_meta(model_config):
    """The host's BaseModel of a configuration in bf16, on the meta device."""
    model_config.set_inference_dtype(torch.bfloat16, None)
    return model_config.get_model({}, "", device=torch.device("meta"))
