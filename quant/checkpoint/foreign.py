"""Which model a file holds in 16 bits, told by the names of its tensors: a FLUX.1, or what else."""

import re

from ..layers import layout
from .comfy_kitchen import METADATA
from .header import WEIGHT_DTYPES, CheckpointError

# Those that ComfyUI reads too; a whole checkpoint has text encoders and a VAE beside the second.
PREFIXES = ("", "model.diffusion_model.", "model.", "model.model.", "net.")
PACKED = ".weight_smooth_factor"  # that only a layer in 4 bits has
NF4 = ".quant_state.bitsandbytes__"  # in the names of what bitsandbytes keeps of a 4-bit matrix
FLUX_KEYS = ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm.weight")
BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.")
SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.")  # in the name of a file that holds a part of a model

# A part of a name that gives a model away, and what to call it; first those that look like a FLUX.1 otherwise.
COUSINS = (
    ("distilled_guidance_layer", "a Chroma model"),
    ("double_stream_modulation_img.", "a FLUX.2 model"),
    ("img_mlp.gate_proj.", "an Ovis-Image model"),
    ("context_embedder_norm.", "an Ovis-Image model"),  # in diffusers' naming
    ("time_embed.timestep_embedder.", "a LongCat-Image model"),  # likewise
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
    """The prefix of a FLUX.1's tensors in ComfyUI's naming; None where the file is none. Raises CheckpointError where it is one that
    would be read wrongly: in a format that nothing in it describes, with blocks missing, or only in part."""
    _check_whole(header)
    if _first(header, COUSINS):
        return None
    found = {name.removesuffix(key) for key in FLUX_KEYS for name in header.tensors if name.endswith(key)}
    found = [prefix for prefix in (*PREFIXES, *sorted(found)) if prefix in found and f"{prefix}img_in.weight" in header.tensors]
    if not found:
        return None
    prefix = found[0]
    if prefix not in PREFIXES:
        raise CheckpointError(f"{header.file} has the tensors of a FLUX.1 under names that begin with {prefix!r}, which ComfyUI does "
                              "not read; save the model again without that.")
    names = header.within(prefix).tensors
    if not any(name.startswith("vector_in.") for name in names):
        raise CheckpointError(f"{header.file} has FLUX.1's blocks and no vector_in, as LongCat-Image has, which is another model; "
                              "choose a whole FLUX.1 model.")
    _check_blocks(header, names)
    _check_described(header, names, prefix)
    return prefix


def _check_whole(header):
    """Raise CheckpointError for a shard, which by itself looks like a damaged model."""
    shard = SHARD.search(header.file)
    if shard and int(shard[2]) > 1:
        raise CheckpointError(f"{header.file} is a part of a model that lies in {int(shard[2])} files; choose the model in one "
                              "file, or join them first.")


def _check_blocks(header, names):
    """Raise CheckpointError where blocks are left out: ComfyUI takes those before the first gap and ignores the rest."""
    found = {"double_blocks": set(), "single_blocks": set()}
    for match in filter(None, map(BLOCK.match, names)):
        found[match[1]].add(int(match[2]))
    for kind, numbers in found.items():
        missing = min(set(range(len(numbers))) - numbers, default=None)
        if missing is not None:
            raise CheckpointError(f"{header.file} has {kind}.{max(numbers)} and no {kind}.{missing}; the file is incomplete, or blocks "
                                  "were taken out and the others not renumbered: download or save it again.")


def _check_described(header, names, prefix):
    """Raise CheckpointError where there are weights in 4 or 8 bits, and nothing says what they are: ComfyUI would take them for
    what they are not. names: {name without prefix: TensorInfo}."""
    layers = [name.removesuffix(PACKED) for name in names if name.endswith(PACKED)]
    if layers and METADATA not in header.metadata and not any(f"{layer}.{layout.QUANT_KEY}" in names for layer in layers):
        raise CheckpointError(f"{header.file} has layers in 4 bits ({prefix}{layers[0]}) and no word of how, as another node than "
                              "SVDQuant Save Model leaves them; save the quantized model with SVDQuant Save Model.")
    if any(NF4 in name for name in names):
        raise CheckpointError(f"{header.file} is a FLUX.1 in bitsandbytes' 4 bits (NF4 or FP4), which can't be read here; choose a "
                              "bf16, fp16 or fp8 version of the model.")
    for name, info in names.items():
        layer, _, leaf = name.rpartition(".")
        coded = leaf in ("weight", "bias", "scale") and info.dtype not in WEIGHT_DTYPES
        undescribed = METADATA not in header.metadata and f"{layer}.{layout.QUANT_KEY}" not in names
        if (coded or leaf == "weight_scale") and undescribed or leaf == "scale_weight" and "scaled_fp8" not in names:
            raise CheckpointError(f"{header.file} has {prefix}{name} and no word of the format that it belongs to; choose a bf16, fp16 "
                                  "or ordinary fp8 version of the model.")


def is_diffusers_flux(header):
    """Whether the file is a FLUX.1 in diffusers' naming."""
    keys = ("transformer_blocks.0.attn.norm_added_k.weight", "x_embedder.weight")
    return all(key in header.tensors for key in keys) and not _first(header, COUSINS)


def kind(header):
    """What a file is that is no FLUX.1; None where nothing gives it away."""
    return _first(header, COUSINS + FOREIGN)
