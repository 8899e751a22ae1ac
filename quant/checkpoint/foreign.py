"""Which model a file holds in 16 bits, by the names of its tensors: one of a known family, or another."""

import re

from ..families import FAMILIES
from ..layers import layout
from .comfy_kitchen import METADATA
from .header import WEIGHT_DTYPES, CheckpointError

# Those that ComfyUI reads too; a whole checkpoint has text encoders and a VAE beside the second.
PREFIXES = ("", "model.diffusion_model.", "model.", "model.model.", "net.")
PACKED = ".weight_smooth_factor"  # that only a layer in 4 bits has
NF4 = ".quant_state.bitsandbytes__"  # in the names of what bitsandbytes keeps of a 4-bit matrix
SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.")  # in the name of a file that holds a part of a model

# A part of a name that gives a model away, and what to call it.
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


def find(header):
    """(Family, prefix of its tensors) of a diffusion model in ComfyUI's naming; None where the file holds none that the pack knows.

    Raises CheckpointError where it holds one that would be read wrongly: in a format that nothing in it describes, with blocks missing,
    or only in part.
    """
    _check_whole(header)
    for family in FAMILIES:
        found = family.signature.prefixes(header.tensors.keys())
        prefix = next((prefix for prefix in (*PREFIXES, *found) if prefix in found), None)
        if prefix is not None:
            _check_model(header, family, prefix)
            return family, prefix
    return None


def _check_model(header, family, prefix):
    if prefix not in PREFIXES:
        raise CheckpointError(f"{header.file} has the tensors of a {family.title} under names that begin with {prefix!r}, which ComfyUI "
                              "does not read; save the model again without that.")
    names = header.within(prefix).tensors
    for beginning, relative in family.signature.parts:
        if not any(name.startswith(beginning) for name in names):
            raise CheckpointError(f"{header.file} has {family.title}'s blocks and no {beginning.rstrip('.')}, as {relative} has, which is "
                                  f"another model; choose a whole {family.title} model.")
    _check_blocks(header, family, names)
    _check_described(header, family, names, prefix)


def _check_whole(header):
    """Raise CheckpointError for a shard, which by itself looks like a damaged model."""
    shard = SHARD.search(header.file)
    if shard and int(shard[2]) > 1:
        raise CheckpointError(f"{header.file} is a part of a model that lies in {int(shard[2])} files; choose the model in one "
                              "file, or join them first.")


def _check_blocks(header, family, names):
    """Raise CheckpointError where blocks are left out: ComfyUI takes those before the first gap and ignores the rest."""
    found = {blocks.name: set() for blocks in family.blocks}
    for block in filter(None, map(family.block_of, names)):
        kind, _, index = block.rpartition(".")
        found[kind].add(int(index))
    for kind, numbers in found.items():
        missing = min(set(range(len(numbers))) - numbers, default=None)
        if missing is not None:
            raise CheckpointError(f"{header.file} has {kind}.{max(numbers)} and no {kind}.{missing}; the file is incomplete, or blocks "
                                  "were taken out and the others not renumbered: download or save it again.")


def _check_described(header, family, names, prefix):
    """Raise CheckpointError where there are weights in 4 or 8 bits, and nothing says what they are: ComfyUI would take them for
    what they are not. names: {name without prefix: TensorInfo}."""
    layers = [name.removesuffix(PACKED) for name in names if name.endswith(PACKED)]
    if layers and METADATA not in header.metadata and not any(f"{layer}.{layout.QUANT_KEY}" in names for layer in layers):
        raise CheckpointError(f"{header.file} has layers in 4 bits ({prefix}{layers[0]}) and no word of how, as another node than "
                              "SVDQuant Save Model leaves them; save the quantized model with SVDQuant Save Model.")
    if any(NF4 in name for name in names):
        raise CheckpointError(f"{header.file} is a {family.title} in bitsandbytes' 4 bits (NF4 or FP4), which can't be read here; choose a "
                              "bf16, fp16 or fp8 version of the model.")
    for name, info in names.items():
        layer, _, leaf = name.rpartition(".")
        coded = leaf in ("weight", "bias", "scale") and info.dtype not in WEIGHT_DTYPES
        undescribed = METADATA not in header.metadata and f"{layer}.{layout.QUANT_KEY}" not in names
        if (coded or leaf == "weight_scale") and undescribed or leaf == "scale_weight" and "scaled_fp8" not in names:
            raise CheckpointError(f"{header.file} has {prefix}{name} and no word of the format that it belongs to; choose a bf16, fp16 "
                                  "or ordinary fp8 version of the model.")


def find_diffusers(header):
    """The Family of a model in diffusers' naming, or None."""
    keys = header.tensors.keys()
    return next((family for family in FAMILIES if family.diffusers and not family.signature.lookalike(keys)
                 and all(key in keys for key in family.diffusers.keys)), None)


def kind(header):
    """What a file is that holds no model of a family; None where nothing gives it away."""
    keys = header.tensors.keys()
    relatives = filter(None, (family.signature.lookalike(keys) for family in FAMILIES))
    return next(relatives, None) or next((what for part, what in FOREIGN if any(part in key for key in keys)), None)
