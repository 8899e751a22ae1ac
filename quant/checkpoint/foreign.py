"""Which model a file holds in 16 bits, told by the names of its tensors: a FLUX.1, or what else."""

from .. import layout
from .header import CheckpointError
from .kitchen import METADATA

PREFIXES = ("", "model.diffusion_model.")  # a whole checkpoint has text encoders and a VAE beside the second
PACKED = ".weight_smooth_factor"  # that only a layer in 4 bits has
FLUX_KEYS = ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm.weight")

# A part of a name that gives a model away, and what to call it; first those that look like a FLUX.1 otherwise.
COUSINS = (
    ("distilled_guidance_layer", "a Chroma model"),
    ("double_stream_modulation_img.", "a FLUX.2 model"),
    ("controlnet_blocks.0.weight", "a ControlNet"),
    ("controlnet_x_embedder.", "a ControlNet"),
)
FOREIGN = (
    ("individual_token_refiner", "a HunyuanVideo model"),
    ("caption_projection.0.linear.weight", "a HiDream model"),
    ("txt_norm.weight", "a Qwen-Image model"),
    ("cap_embedder.1.weight", "a Lumina or Z-Image model"),
    ("input_blocks.0.0.weight", "a Stable Diffusion or SDXL UNet"),
    ("joint_blocks.0.", "a Stable Diffusion 3 model"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    ("text_model.encoder.layers.0.", "a CLIP text encoder"),
    ("decoder.conv_in.weight", "a VAE"),
    ("taesd_decoder.", "a VAE"),
    ("down_blocks.0.resnets.0.conv1.weight", "a Stable Diffusion or SDXL UNet"),
    ("lora_", "a LoRA"),
)


def _first(header, kinds):
    return next((what for key, what in kinds if any(key in name for name in header.tensors)), None)


def flux_prefix(header):
    """The prefix of a FLUX.1's tensors in ComfyUI's naming; None where the file is none. Raises CheckpointError where they are in
    4 bits and nothing says how."""
    for prefix in () if _first(header, COUSINS) else PREFIXES:
        if f"{prefix}img_in.weight" in header.tensors and any(prefix + key in header.tensors for key in FLUX_KEYS):
            _check_described(header)
            return prefix
    return None


def _check_described(header):
    """Raise CheckpointError where there are layers in 4 bits, and nothing says what they are."""
    layers = [name.removesuffix(PACKED) for name in header.tensors if name.endswith(PACKED)]
    if layers and METADATA not in header.metadata and not any(f"{layer}.{layout.QUANT_KEY}" in header.tensors for layer in layers):
        raise CheckpointError(f"{header.file} has layers in 4 bits ({layers[0]}) and no word of how, as another node than SVDQuant Save "
                              "Model leaves them; save the quantized model with SVDQuant Save Model.")


def is_diffusers_flux(header):
    """Whether the file is a FLUX.1 in diffusers' naming."""
    keys = ("transformer_blocks.0.attn.norm_added_k.weight", "x_embedder.weight")
    return all(key in header.tensors for key in keys) and not _first(header, COUSINS)


def kind(header):
    """What a file is that is no FLUX.1; None where nothing gives it away."""
    return _first(header, COUSINS + FOREIGN)
