"""Our own checkpoint: a quantized model under ComfyUI's parameter names.

Every 16-bit tensor has the same name as in an ordinary file of its family, without prefix. Every packed layer X has the tensors of
layout.py, and `X.comfy_quant` describes it. The file's metadata:

    svdquant.version   "1"; "2" if a layer has int8 scales, "3" if one has a branch in 8 bits; a reader refuses a higher number
    svdquant.config    JSON: the host's configuration of the model (image_model, hidden_size, depth, ...)
    svdquant.recipe    JSON: how it was quantized; its "calibration" has the number of prompts, its "layers" the error,
                       size and smoothing of each layer (pipeline.LayerRecord)
    svdquant.source    name of the quantized model; source_title and source_hash_sha256 are copied from its own card
    svdquant.minor     "1" since tensors have checksums; a reader takes a higher number, whose additions it may ignore
    svdquant.checksums JSON: a checksum of each tensor: checksums.py
    modelspec.*        title, author, licence, ...: card.py

Files from other software under comfy-kitchen's names have none of these metadata; comfy_kitchen.py reads them with this module.
"""

import json
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from ...cuda.row_scales import HIGHEST, LOWEST
from .. import families
from ..layers import layout
from ..text import bounded
from . import completeness, int8_scales
from .card import modelspec
from .header import CheckpointError
from .packed import PackedFile
from .write import check_target, write

VERSION, MINOR = 3, 1
MODULE_FORMATS = tuple(layout.GROUP_SIZES)
HALF_TYPES = (torch.bfloat16, torch.float16)
SCALE_TYPES = (*HALF_TYPES, torch.float32)
OTHERS_PRESET = "comfy-kitchen file"  # in the recipe of files that other software has quantized


def matches(header):
    """Whether the file has this pack's own format."""
    return "svdquant.version" in header.metadata


def open_file(header):
    """The PackedFile of a file in this pack's own format. Raises CheckpointError, before any weight is read, unless the model is whole and
    the metadata are valid."""
    stored = config(header)
    kind = stored.get("image_model")
    try:
        family = families.of_config(stored) or (families.of_tensors(header.tensors.keys()) if kind is None else None)
    except ValueError as error:
        raise CheckpointError(f"{header.file} {error}; the file is damaged, save or download it again.") from None
    if family is None:
        what = "no image_model in its configuration" if kind is None else f"image_model = {kind!r} in its configuration"
        raise CheckpointError(f"{header.file} says {what}, which this version doesn't know; update ComfyUI-SVDQuant, or save or download "
                              "the file again.")
    packed = packed_file(header, family, "", stored, recipe(header), header.metadata.get("svdquant.source", ""))
    version = _version(header)
    for needed, names in ((2, packed.computed), (3, [name for name, spec in packed.specs.items() if spec.branch_bits == 8])):
        if names and version < needed:
            raise CheckpointError(f"{header.file} says that it has SVDQuant format version {version}, but {min(names)} needs version "
                                  f"{needed}; download or save it again.")
    return packed


def packed_file(header, family, prefix, config, recipe, source):
    """The PackedFile of a header with a family's tensors under our names, after `prefix`. Raises CheckpointError unless the model is
    whole."""
    own = header.within(prefix)
    specs, compact = layer_specs(own, family)
    check_unsigned(header, family, specs, signed_allowed=recipe.get("preset") == OTHERS_PRESET)
    computed = frozenset(f"{layer}.weight_scale" for layer in compact)
    leave_out = {f"{layer}.weight_scale_2" for layer in compact}
    names = completeness.stored_names(header, family, (name for name in own.tensors if not name.endswith(f".{layout.QUANT_KEY}")
                                                       and name not in leave_out))
    shapes = {name: own.tensors[stored].shape for name, stored in names.items()}
    dtypes = {name: own.tensors[stored].dtype for name, stored in names.items()}
    dtypes |= {f"{layer}.weight_scale": specs[layer].dtype for layer in compact}
    completeness.check_types(header, dtypes, specs)
    config = completeness.configuration(header, family, shapes, config)
    completeness.check(header, family, config, shapes, specs)
    read = partial(_read, own, names, computed)
    return PackedFile(header, family, specs, shapes, dtypes, config, recipe, source, lambda: ((name, read(name)) for name in shapes),
                      prefix if all(name == stored for name, stored in names.items()) else None, read, computed)


def _read(header, names, computed, name):
    """One tensor as the model has it. names: {model's name: file's}. Raises CheckpointError if int8 scales are invalid."""
    if name not in computed:
        return header.read_tensor(names[name])
    integers, row_scale = header.read_tensor(name), header.read_tensor(f"{name}_2")
    if not ((row_scale >= 0) & (row_scale * HIGHEST).isfinite()).all():
        raise CheckpointError(f"{header.file}: tensor {name}_2 has values that are negative, not finite or too large; download or "
                              "save it again.")
    values = integers.numpy()
    if values.size and not LOWEST <= values.min() <= values.max() <= HIGHEST:
        raise CheckpointError(f"{header.file}: tensor {name} has values outside {LOWEST}..{HIGHEST}; download or save it again.")
    return int8_scales.product(integers, row_scale)


def json_metadata(header, key):
    """The dict in an entry of the metadata. Raises CheckpointError if it is missing or damaged."""
    try:
        value = json.loads(header.metadata.get(key, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{header.file} has no valid {key} in its metadata; save or download it again.")
    return value


def _version(header):
    return version_of(header, "svdquant.version", VERSION)


def version_of(header, key, newest):
    """The version of a format of ours, in an entry of the metadata. Raises CheckpointError if it is higher than `newest`."""
    version = header.metadata[key]
    if not version.isdecimal() or len(version) > 9 or int(version) > newest:
        raise CheckpointError(f"{header.file} has SVDQuant format version {version}, and this pack reads up to {newest}; update "
                              "ComfyUI-SVDQuant.")
    return int(version)


def newer(header):
    """What to tell users about a file of a newer minor version, as a sentence; "" for others. Its additions are no part of the model."""
    minor = header.metadata.get("svdquant.minor", "0")
    if minor.isdecimal() and (len(minor) > 9 or int(minor) > MINOR):
        version = bounded(header.metadata.get("svdquant.version", "?"), 20)
        return (f"It is of format version {version}.{bounded(minor, 20)}, and this pack knows {version}.{MINOR}: it loads whole, without "
                "what newer versions add to files; update ComfyUI-SVDQuant for that.")
    return ""


def config(header):
    """The host's configuration in the file's metadata, a dict. Raises CheckpointError if the version is newer or the entry is damaged."""
    _version(header)
    return json_metadata(header, "svdquant.config")


def recipe(header):
    """How the model was quantized, a dict. Raises CheckpointError if the entry is damaged."""
    return json_metadata(header, "svdquant.recipe")


def layer_specs(header, family):
    """({layer name: LayerSpec} of a model's packed layers, names of the layers with int8 scales). Raises CheckpointError if a layer's
    name, description and tensors do not agree."""
    suffix = f".{layout.QUANT_KEY}"
    names = [key.removesuffix(suffix) for key in header.tensors if key.endswith(suffix)]
    found = {name: _layer_spec(header, family, name) for name in names}
    return {name: spec for name, (spec, _) in found.items()}, [name for name, (_, int8_scale) in found.items() if int8_scale]


def _layer_spec(header, family, name):
    """(LayerSpec, whether the scales are int8) of layer `name`. Raises CheckpointError as layer_specs does."""
    key = f"{name}.{layout.QUANT_KEY}"
    conf = header.description(key)
    kind = conf.get("format")
    usual = layout.GROUP_SIZES[kind] if kind in MODULE_FORMATS else None
    group_size = conf.get("group_size", usual)
    if usual is None or group_size != usual:
        raise CheckpointError(f"{header.file}: layer {name} has format {kind!r} with group size "
                              f"{group_size!r}, which this version can't run; update ComfyUI-SVDQuant.")
    layer = family.layer(name)
    if layer is None:
        raise CheckpointError(f"{header.file}: layer {name} is packed, but a {family.title} has no such packed layer; choose another file.")
    weight, scale = (info_of(header, f"{name}.{part}") for part in ("weight", "weight_scale"))
    if len(weight.shape) != 2:
        # The tiles of comfy-kitchen's files have been unpacked to such a matrix.
        raise CheckpointError(f"{header.file}: {name}.weight has shape {list(weight.shape)} instead of (N, K/2); "
                              "choose a file that is not packed for another kernel, or save or download it again.")
    n, k = weight.shape[0], weight.shape[1] * 2
    rank = 0 if kind == layout.AWQ else conf.get("rank", _rank(header, name))
    if type(rank) is not int or rank < 0:  # True is an int too
        raise CheckpointError(f"{header.file}: {key} lacks a valid rank; save or download the file again.")
    act_bits = conf.get("act_bits", 0)
    if type(act_bits) is not int or act_bits not in ((0,) if kind in (layout.AWQ, layout.NVFP4) else (0, 4, 8)):
        raise CheckpointError(f"{header.file}: {key} says act_bits = {act_bits!r}, which this version can't run; update ComfyUI-SVDQuant, "
                              "or save or download the file again.")
    unsigned = _unsigned_from(header, key, conf, k)
    int8_branch = kind == layout.SVDQUANT_INT8_BRANCH
    int8_scale = kind == layout.SVDQUANT_INT8_SCALE or int8_branch and _scale_bits(header, key, conf) == 8
    dtype, scale_blocks = scale.dtype, 1
    if kind == layout.NVFP4:
        dtype = info_of(header, f"{name}.weight_smooth_factor").dtype
        scale_blocks = (*info_of(header, f"{name}.weight_scale_2").shape, 0)[0]
    elif int8_scale:
        dtype = info_of(header, f"{name}.weight_scale_2").dtype
    elif f"{name}.weight_scale_2" in header.tensors:
        raise CheckpointError(f"{header.file} has tensor {name}.weight_scale_2, which a layer of format {kind} has no place for; "
                              "download or save it again.")
    if not int8_branch and f"{name}.weight_proj_scale" in header.tensors:
        raise CheckpointError(f"{header.file} has tensor {name}.weight_proj_scale, which a layer of format {kind} has no place for; "
                              "download or save it again.")
    if dtype not in (HALF_TYPES if int8_scale or int8_branch else SCALE_TYPES):
        raise CheckpointError(f"{header.file}: layer {name} has scales of type {dtype}; the file is damaged, download or save it again.")
    try:
        # If the kind of layer has a bias, a file without it is damaged.
        spec = (layout.svdquant_spec(k, n, rank, unsigned, layer.bias, dtype) if int8_scale or int8_branch
                else layout.LayerSpec(kind, k, n, rank, unsigned, layer.bias, dtype, scale_blocks))
        spec = replace(spec, act_bits=act_bits, branch_bits=8 if int8_branch else 16)
    except ValueError as error:
        raise CheckpointError(f"{header.file}: layer {name} {error}; save or download the file again.") from None
    for part, (shape, dtype) in spec.stored(int8_scale).items():
        check_tensor(header, f"{name}.{part}", shape, dtype)
    return spec, int8_scale


def _scale_bits(header, key, conf):
    """The bits in which a layer's group scales are stored, from its description. Raises CheckpointError if it has none."""
    bits = conf.get("scale_bits")
    if type(bits) is not int or bits not in (8, 16):
        raise CheckpointError(f"{header.file}: {key} says scale_bits = {bits!r}, which this version can't run; update ComfyUI-SVDQuant, "
                              "or save or download the file again.")
    return bits


def _unsigned_from(header, key, conf, k):
    """The first unsigned column of a layer's input, from its description. Raises CheckpointError if the description is invalid."""
    kind, unsigned = conf["format"], conf.get("act_unsigned", False)
    if type(unsigned) is not bool:
        raise CheckpointError(f"{header.file}: {key} says act_unsigned = {unsigned!r} instead of true or false; save or download the "
                              "file again.")
    if kind not in (layout.SVDQUANT_SPLIT, layout.SVDQUANT_INT8_SCALE, layout.SVDQUANT_INT8_BRANCH):
        return 0 if unsigned and kind == layout.SVDQUANT else k
    first = conf.get("act_unsigned_from")
    if type(first) is not int or first < 0 or unsigned is not (first == 0):
        raise CheckpointError(f"{header.file}: {key} lacks a valid act_unsigned_from, or contradicts it in act_unsigned; save or download "
                              "the file again.")
    return first


def check_unsigned(header, family, specs, signed_allowed):
    """Raise CheckpointError if the unsigned columns of a layer's input are not those of its family: weights quantized for signed inputs
    give wrong images with unsigned inputs, and vice versa. signed_allowed: whether a layer may be signed throughout instead, as in files
    from other software."""
    for name, spec in specs.items():
        if spec.format in (layout.AWQ, layout.NVFP4):
            continue
        first = family.layer(name).unsigned_from(spec.in_features, spec.out_features)
        if spec.unsigned_from != first and not (signed_allowed and spec.unsigned_from == spec.in_features):
            raise CheckpointError(f"{header.file}: layer {name} has its first unsigned column at {spec.unsigned_from}, where a "
                                  f"{family.title} has it at {first}; the file is damaged, save or download it again.")


def _rank(header, name):
    """The rank of a layer's branch according to the tensor's shape."""
    shape = info_of(header, f"{name}.weight_proj_down").shape
    return shape[1] if len(shape) == 2 else None


def info_of(header, key):
    """The TensorInfo of tensor `key`. Raises CheckpointError if the file has none."""
    if key not in header.tensors:
        raise CheckpointError(f"{header.file} lacks tensor {key}; the file is incomplete, download or save it again.")
    return header.tensors[key]


def check_tensor(header, key, shape, dtype=None):
    """Raise CheckpointError unless the file has tensor `key` with this shape (and dtype, if given)."""
    info = info_of(header, key)
    if info.shape != tuple(shape):
        raise CheckpointError(f"{header.file}: tensor {key} has shape {list(info.shape)} instead of {list(shape)}; "
                              "the file does not fit its own configuration, download or save it again.")
    if dtype is not None and info.dtype != dtype:
        raise CheckpointError(f"{header.file}: tensor {key} is {info.dtype} instead of {dtype}; the file is damaged, "
                              "download or save it again.")


def save(path, tensors, specs, config, recipe, source, overwrite=False, source_card=None):
    """Write a checkpoint as write.write does.

    tensors: {name: tensor} of the whole diffusion model; specs: {layer name: LayerSpec} of its packed layers; config,
    recipe: JSON-able dicts; source: str; source_card: card.of_source of the quantized model's file. Scales that are integer
    multiples of one float per row are written as int8. Raises CheckpointError if the file exists and overwrite is False, if the disk is
    full or if the folder can't be written.
    """
    check_target(path, overwrite)
    infos = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    row_scales = {layer: int8_scales.find_row_scale(tensors[f"{layer}.weight_scale"].detach().cpu())
                  for layer, spec in specs.items()
                  if spec.format in (layout.SVDQUANT, layout.SVDQUANT_SPLIT) and spec.dtype in HALF_TYPES}
    save_stream(path, infos, tensors.items(), specs, config, recipe, source, overwrite, source_card,
                {layer: row_scale for layer, row_scale in row_scales.items() if row_scale is not None})


def save_stream(path, infos, tensors, specs, config, recipe, source, overwrite=False, source_card=None, row_scales=None):
    """Write a checkpoint as `save` does, from tensors that come one at a time. infos: {name: (shape, dtype)}; tensors: iterable of (name,
    tensor); row_scales: {layer name: int8_scales.find_row_scale} of the layers to write with int8 scales."""
    row_scales = row_scales or {}
    described = {f"{layer}.{layout.QUANT_KEY}": layout.encode_conf(spec.conf(layer in row_scales)) for layer, spec in specs.items()}
    stored = {f"{layer}.{part}": specs[layer].stored(True)[part] for part in ("weight_scale", "weight_scale_2") for layer in row_scales}
    # The int8 scales lie side by side in the file: they are read before all other tensors.
    infos = stored | {key: info for key, info in infos.items() if key not in stored}
    infos |= {key: (tensor.shape, tensor.dtype) for key, tensor in described.items()}
    architecture = families.of_config(config).architecture
    metadata = {
        "svdquant.version": _needed_version(specs, row_scales), "svdquant.minor": str(MINOR), "svdquant.config": json.dumps(config),
        "svdquant.recipe": json.dumps(recipe), "svdquant.source": source, **modelspec(path, architecture, source_card),
    }
    write(path, infos, chain(_with_int8_scales(tensors, row_scales), described.items()), metadata, overwrite)


def _needed_version(specs, row_scales):
    """svdquant.version of a file with these layers. row_scales: as in save_stream."""
    return "3" if any(spec.branch_bits == 8 for spec in specs.values()) else "2" if row_scales else "1"


def save_packed(path, packed, overwrite, source_card, counted):
    """Write a PackedFile of another format; its 16-bit scales stay 16-bit. counted: (iterable of (name, tensor), their number) -> the same
    iterable, which may show progress."""
    infos = {name: (shape, packed.dtypes[name]) for name, shape in packed.shapes.items()}
    save_stream(path, infos, counted(packed.tensors(), len(infos)), packed.specs, packed.config, packed.recipe, packed.source, overwrite,
                source_card)


def _with_int8_scales(tensors, row_scales):
    """The iterable of (name, tensor), with the scales of layers {name: row scale} in the file's int8 form."""
    for name, tensor in tensors:
        layer, _, part = name.rpartition(".")
        if part == "weight_scale" and layer in row_scales:
            yield name, int8_scales.integers(tensor.detach().cpu(), row_scales[layer])
            yield f"{name}_2", row_scales[layer]
        else:
            yield name, tensor
