"""Which model a file holds, according to its tensors' names: a model of a known family that is not packed, or another model."""

import re

from ..families import FAMILIES
from ..layers import layout
from . import text_encoder
from .comfy_kitchen import METADATA, descriptions
from .header import WEIGHT_DTYPES, CheckpointError

# The prefixes that ComfyUI reads. Whole checkpoints, which include text encoders and a VAE, have the second.
PREFIXES = ("", "model.diffusion_model.", "model.", "model.model.", "net.")
PACKED = ".weight_smooth_factor"  # only W4A4 layers have such a tensor
SCALES = ("scale_weight", "scale_input", "scaled_fp8", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "SCB",
          layout.QUANT_KEY)  # names of tensors that only quantized weights have
MARK, MARKED = "scaled_fp8", ("scale_weight", "scale_input")  # scaled fp8: the file's mark, and the tensors beside a weight
# In names of tensors that bitsandbytes stores beside a matrix: a part of the name for 4 bits, the end of the name for 8 bits.
BITSANDBYTES_4_BITS, BITSANDBYTES_8_BITS = ".quant_state.bitsandbytes__", ".SCB"
SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.")  # in the names of files that may hold a part of a model
PADDED_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")  # in the names that the Hub's own tools give to parts of a model
LORA, NUNCHAKU = "lora_", ".qweight"  # in a LoRA's names; in the names of Nunchaku's files, which have lora_down and lora_up too

# Beginnings of the names of the other models in a whole checkpoint.
OTHER_MODELS = ("text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.")
# (a part of a tensor's name, the model that has it).
FOREIGN = (
    ("individual_token_refiner", "a HunyuanVideo model"),
    ("caption_projection.0.linear.weight", "a HiDream model"),
    ("input_blocks.0.0.weight", "a Stable Diffusion or SDXL UNet"),
    ("joint_blocks.0.", "a Stable Diffusion 3 model"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    ("text_model.encoder.layers.0.", "a CLIP text encoder"),
    ("decoder.conv_in.weight", "a VAE"),
    ("taesd_decoder.", "a VAE"),
    ("down_blocks.0.resnets.0.conv1.weight", "a Stable Diffusion or SDXL UNet"),
)
PACKED_ENCODER = "a text encoder in 4 bits"
FOLDERS = {"a LoRA": "models/loras", "a VAE": "models/vae",  # {kind of file: ComfyUI's folder for it}
           **dict.fromkeys(("a T5 text encoder", "a CLIP text encoder", PACKED_ENCODER), "models/text_encoders")}


def find(header):
    """(Family, prefix of its tensors) of a diffusion model in ComfyUI's naming; None if the file holds no model of a known family.

    Raises CheckpointError if ComfyUI would misread the model: if the file does not describe the format of its weights, if blocks are
    missing, or if the file holds only a part of the model.
    """
    for family in FAMILIES:
        found = family.signature.prefixes(header.tensors.keys())
        prefix = next((prefix for prefix in (*PREFIXES, *found) if prefix in found), None)
        if prefix is not None:
            _check_shard(header, _is_measured(header.within(prefix), family))
            _check_model(header, family, prefix)
            return family, prefix
    _check_shard(header, find_diffusers(header) is not None)
    return None


def _is_measured(header, family):
    """Whether a file has the tensors at both ends of a model from which the configuration is measured. No shard has all of them."""
    try:
        family.configuration.of({family.stored_name(name): info.shape for name, info in header.tensors.items()})
    except (ValueError, KeyError, IndexError):
        return False
    return True


def _check_model(header, family, prefix):
    if prefix not in PREFIXES:
        raise CheckpointError(f"{header.file} has the tensors of a {family.title} under names that begin with {prefix!r}, which ComfyUI "
                              "does not read; save the model again without this prefix.")
    names = header.within(prefix).tensors
    for beginning, relative in family.signature.parts:
        if not any(name.startswith(beginning) for name in names):
            raise CheckpointError(f"{header.file} has {family.title}'s blocks and no {beginning.rstrip('.')}, like {relative}, which is "
                                  f"another model; choose a whole {family.title} model.")
    _check_blocks(header, family, names)
    _check_described(header, family, names, prefix)


def _check_shard(header, whole):
    """Raise CheckpointError if the file is a shard, one of several files of a model. whole: whether it looks like a whole model."""
    shard = SHARD.search(header.file)
    if shard and int(shard[2]) > 1 and not (whole and not PADDED_SHARD.search(header.file)):
        raise CheckpointError(f"{header.file} is a part of a model in {int(shard[2])} files; choose the model in one file, or join the "
                              "files first.")


def _check_blocks(header, family, names):
    """Raise CheckpointError if a block is missing: ComfyUI loads the blocks before the gap and ignores the others."""
    found = {blocks.name: set() for blocks in family.blocks}
    for block in filter(None, map(family.block_of, names)):
        kind, _, index = block.rpartition(".")
        found[kind].add(int(index))
    for kind, numbers in found.items():
        missing = min(set(range(len(numbers))) - numbers, default=None)
        if missing is not None:
            raise CheckpointError(f"{header.file} has {kind}.{max(numbers)} and no {kind}.{missing}; the file is incomplete, or blocks "
                                  "were removed without renumbering the others, download or save it again.")


def _check_described(header, family, names, prefix):
    """Raise CheckpointError if the file has weights in 4 or 8 bits and does not describe their format: ComfyUI would misread them.
    names: {name without prefix: TensorInfo}."""
    layers = [name.removesuffix(PACKED) for name in names if name.endswith(PACKED)]
    if layers and METADATA not in header.metadata and not any(f"{layer}.{layout.QUANT_KEY}" in names for layer in layers):
        raise CheckpointError(f"{header.file} has layers in 4 bits ({prefix}{layers[0]}) without their descriptions, which only SVDQuant "
                              "Save Model writes; save the quantized model with SVDQuant Save Model.")
    _check_bitsandbytes(header, family, names)
    described = _described(header, names, prefix)
    marked = MARK in names and METADATA not in header.metadata  # ComfyUI ignores the mark in a file with this metadata
    for name, info in names.items():
        layer = layer_of(name, names)
        leaf = name.removeprefix(f"{layer}.")
        coded = leaf in ("weight", "bias", "scale") and info.dtype not in WEIGHT_DTYPES
        extra = layer is not None and leaf not in ("weight", "bias")
        if (coded or extra and not (marked and leaf in MARKED)) and layer not in described:
            raise CheckpointError(f"{header.file} has {prefix}{name}, and does not describe the format that it belongs to; choose a bf16, "
                                  "fp16 or ordinary fp8 version of the model.")


def layer_of(name, names):
    """The layer that a tensor belongs to: the innermost module around it that has a weight among `names`; None if none has."""
    layer = name
    while layer := layer.rpartition(".")[0]:
        if f"{layer}.weight" in names and name != f"{layer}.weight.weight":
            return layer
    return None


def _described(header, names, prefix):
    """{layer: dict} of the layers whose format the file describes where ComfyUI reads it. Raises CheckpointError if a description is
    damaged."""
    suffix = f".{layout.QUANT_KEY}"
    for name in names:
        if name.endswith(suffix):
            header.description(f"{prefix}{name}")
    found = {layer.removeprefix(prefix): conf for layer, conf in descriptions(header.within(prefix)).items()}
    return {layer: conf for layer, conf in found.items() if f"{layer}.weight" in names}


def _check_bitsandbytes(header, family, names):
    """Raise CheckpointError if bitsandbytes has quantized the model."""
    form = ("4 bits (NF4 or FP4)" if any(BITSANDBYTES_4_BITS in name for name in names)
            else "8 bits (LLM.int8)" if any(name.endswith(BITSANDBYTES_8_BITS) for name in names) else None)
    if form:
        raise CheckpointError(f"{header.file} is a {family.title} in bitsandbytes' {form}, which SVDQuant does not read; choose a bf16, "
                              "fp16 or fp8 version of the model.")


def find_diffusers(header):
    """The Family of a model in diffusers' naming, or None."""
    keys = header.tensors.keys()
    return next((family for family in FAMILIES if family.diffusers and not family.signature.lookalike(keys)
                 and all(key in keys for key in family.diffusers.keys)), None)


def check_diffusers(header, family):
    """Raise CheckpointError if ComfyUI's conversion would misread a weight of a model in diffusers' naming: the conversion joins q, k and v
    without their scales."""
    _check_bitsandbytes(header, family, header.tensors)
    for name, info in header.tensors.items():
        layer = layer_of(name, header.tensors)
        if name in SCALES or layer is not None and name.removeprefix(f"{layer}.") not in ("weight", "bias"):
            raise CheckpointError(f"{header.file} has 8-bit weights with scales of their own ({name}), which ComfyUI does not read under "
                                  f"diffusers' names; choose the bf16 version, or an fp8 {family.title} in ComfyUI's own naming.")
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{header.file} has {name} as {info.dtype}, and does not describe the format that it belongs to; choose "
                                  f"the bf16 version, or an fp8 {family.title} in ComfyUI's own naming.")


def kind(header):
    """The name of a file's content, if it holds no model of a family, for messages; None if it is unknown."""
    if text_encoder.matches(header):
        return PACKED_ENCODER
    keys = header.tensors.keys()
    relatives = sorted(filter(None, (family.signature.lookalike(keys) for family in FAMILIES)), key=lambda what: "parts missing" in what)
    partial = [(part, f"a {family.title} model with parts missing") for family in FAMILIES if (part := family.signature.telltale)]
    found = next(iter(relatives), None) or next((what for part, what in (*partial, *FOREIGN) if any(part in key for key in keys)), None)
    in_lora = sum(LORA in key for key in keys)
    # A damaged or unknown model may have a few such names too.
    is_lora = 0 < len(keys) <= 2 * in_lora and not any(key.endswith(NUNCHAKU) for key in keys)
    return found or ("a LoRA" if is_lora else None)
