"""Write a quantized model as a Nunchaku INT4 file: the inverse of reader.py."""

import json
from collections import ChainMap

import torch

from ....cuda import reference
from ... import families
from ...families.family import Packing
from ...layers import layout
from ..card import modelspec
from ..header import CheckpointError
from ..packed import StoredTensors
from ..write import check_target, write
from . import halves, names
from . import layout as order
from .contents import FLOAT_TYPES, HALF_TYPES


def save(path, tensors, specs, config, recipe, source, overwrite=False, source_card=None, counted=lambda tensors, total: tensors):
    """Write a checkpoint in Nunchaku's layout as write.write does.

    tensors: mapping {name: tensor} of the whole diffusion model, read one at a time; specs: {layer name: LayerSpec} of
    its packed layers; config, recipe: JSON-able dicts; source: str; source_card: card.of_source of the quantized model's
    file. Codes, scales and branches keep their values; every layer gets the largest rank, padded with zeros. counted: (iterable of
    (name, tensor), their number) -> the same iterable, which may show progress. Raises CheckpointError if Nunchaku's layout can't hold a
    layer, and as write.write does.
    """
    check_target(path, overwrite)
    family = families.of_config(config)
    if family.nunchaku is None or family.nunchaku.comfy_class is None:
        raise CheckpointError(f"Nunchaku's layout has no place for {family.title} models; choose layout native.")
    depths = {kind: config[key] for kind, key in names.depth_keys(family).items()}
    layers = _layers(family.nunchaku, depths)
    for name in layers:
        _check_layer(family.layer(name), name, specs.get(name))
    tensors = _with_16_bits_outside(family.nunchaku, tensors, specs)
    plain = _plain(family.nunchaku, tensors, depths)
    rank = _common_rank(family, tensors, specs, layers)
    infos = {stored: (tensors[name].shape, tensors[name].dtype) for name, stored in plain.items()}
    for name, (parts, chunks) in layers.items():
        infos |= _layout(family.layer(name).joined, specs[name], parts, chunks, rank)
    metadata = _metadata(family, tensors, config, rank) | modelspec(path, family.architecture, source_card) | {
        "svdquant.recipe": json.dumps(recipe), "svdquant.source": source}
    write(path, infos, counted(_stream(family, tensors, specs, layers, plain, rank), len(infos)), metadata, overwrite)


def save_packed(path, packed, overwrite, source_card, counted):
    """Write a PackedFile of another format as `save` does. Its tensors must be readable one by one (packed.read)."""
    save(path, StoredTensors(packed), packed.specs, packed.config, packed.recipe, packed.source, overwrite, source_card, counted)


def _layers(tables, depths):
    """{our layer: (prefixes of Nunchaku's layers, chunks of a modulation layer or 0)}."""
    layers = {}
    for ours, theirs, kind in names.blocks(tables, depths):
        layers |= {f"{ours}.{name}": (tuple(f"{theirs}.{part}" for part in parts), 0)
                   for name, parts in tables.linears[kind].items()}
        layers |= {f"{ours}.{name}": ((f"{theirs}.{part}",), tables.chunks[kind])
                   for name, part in tables.modulations[kind].items()}
    return layers


def _check_layer(layer, name, spec):
    """Raise CheckpointError if a layer can't be written in a form that Nunchaku reads."""
    if spec is not None and spec.format == layout.NVFP4:
        raise CheckpointError(f"Layer {name} is NVFP4, and Nunchaku's layout is written for INT4 models only; choose layout native.")
    why = None
    if spec is None:
        why = "is not in 4 bits"
    elif (spec.format == layout.AWQ) != (layer.packing is Packing.W4A16):
        why = f"has format {spec.format}"
    elif spec.dtype not in HALF_TYPES:
        why = f"has scales of type {spec.dtype}"
    elif spec.format != layout.AWQ and (spec.in_features % order.TILE or spec.out_features % order.TILE):
        why = f"is {spec.out_features} x {spec.in_features}, not multiples of {order.TILE}"
    elif spec.format != layout.AWQ and spec.unsigned_from != layer.unsigned_from(spec.in_features, spec.out_features):
        why = "has other unsigned input columns"
    elif spec.act_bits == 8:
        why = "has activations of 8 bits"
    if why:
        raise CheckpointError(f"Layer {name} {why}, which Nunchaku's layout has no place for; choose layout native.")


def _with_16_bits_outside(tables, tensors, specs):
    """The tensors, with packed layers outside the blocks converted to 16 bits, as Nunchaku stores them."""
    dense = {f"{name}.weight": reference.dequantize_awq(*(tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_zeros"))
                                                        ).to(specs[name].dtype) for name in tables.outside if name in specs}
    return ChainMap(dense, tensors)


def _plain(tables, tensors, depths):
    """{our name: Nunchaku's name} of the tensors that are not packed. Raises CheckpointError if one of them is missing."""
    plain = {f"{ours}.{name}": f"{theirs}.{stored}" for ours, theirs, kind in names.blocks(tables, depths)
             for name, stored in tables.norms[kind].items()}
    for name, stored in tables.outside.items():
        if name not in tables.optional or f"{name}.weight" in tensors:
            plain |= {f"{name}.{leaf}": f"{stored}.{leaf}" for leaf in ("weight", "bias")}
    for name in plain:
        if name not in tensors or tensors[name].dtype not in FLOAT_TYPES:
            raise CheckpointError(f"The model has no 16-bit tensor {name}, which Nunchaku's layout needs; choose layout native.")
    return plain


def _parts(joined, tensors, name, spec):
    """[{parameter name: tensor}] of the one or two Nunchaku layers in our W4A4 layer. joined: the layer's Joined, or None."""
    own = {part: tensors[f"{name}.{part}"].detach().cpu() for part in spec.tensors()}
    own |= _branch(own, spec)
    if not spec.bias:
        own["bias"] = torch.zeros(spec.out_features, dtype=spec.dtype)
    return halves.split(own, joined.at(spec.in_features, spec.out_features), joined.rows) if joined else [own]


def _branch(tensors, spec):
    """{parameter name: tensor} of a layer's branch in 16 bits."""
    return dict(zip(("weight_proj_down", "weight_proj_up"), layout.branch_of(tensors, spec.dtype)))


def _common_rank(family, tensors, specs, layers):
    """The rank of all layers in the file: Nunchaku's fused MLP requires the same rank of fc1 and fc2."""
    rank = order.RANK_TILE
    for name, (parts, chunks) in layers.items():
        if len(parts) == 1 and not chunks:
            rank = max(rank, specs[name].rank)
        elif specs[name].rank > rank:
            joined, spec = family.layer(name).joined, specs[name]
            branch = {part: tensors[f"{name}.{part}"].detach().cpu() for part in spec.tensors() if part.startswith("weight_proj")}
            halved = halves.split(_branch(branch, spec), joined.at(spec.in_features, spec.out_features), joined.rows)
            rank = max(rank, *(half["weight_proj_up"].shape[1] for half in halved))
    return rank + -rank % order.RANK_TILE


def _layout(joined, spec, parts, chunks, rank):
    """{Nunchaku's name: (shape, dtype)} of our layer's tensors."""
    n, k, groups = spec.out_features, spec.in_features, spec.in_features // layout.GROUP_SIZE
    if chunks:
        scales = ((groups + -groups % order.AWQ_GROUP_TILE, n), spec.dtype)
        leaves = {"qweight": ((n // order.AWQ_ROWS, k // 2), torch.int32), "wscales": scales, "wzeros": scales,
                  "bias": ((n,), spec.dtype)}
        return {f"{parts[0]}.{leaf}": info for leaf, info in leaves.items()}
    sizes, infos = [(n, k)], {}
    if joined:
        at = joined.at(k, n)
        sizes = [(at, k), (n - at, k)] if joined.rows else [(n, at), (n, k - at)]
    for part, (rows, columns) in zip(parts, sizes):
        leaves = {"qweight": ((rows, columns // 2), torch.int8), "wscales": ((columns // layout.GROUP_SIZE, rows), spec.dtype)}
        leaves |= {leaf: (shape, spec.dtype) for leaf, shape in (
            ("bias", (rows,)), ("smooth", (columns,)), ("smooth_orig", (columns,)), ("lora_down", (columns, rank)),
            ("lora_up", (rows, rank)))}
        infos |= {f"{part}.{leaf}": info for leaf, info in leaves.items()}
    return infos


def _stream(family, tensors, specs, layers, plain, rank):
    """Yield (Nunchaku's name, tensor) of the whole file."""
    for name, (parts, chunks) in layers.items():
        if chunks:
            spec = specs[name]
            own = [tensors[f"{name}.{part}"].detach().cpu() for part in ("weight", "weight_scale", "weight_zeros")]
            bias = tensors[f"{name}.bias"].detach().cpu() if spec.bias else torch.zeros(spec.out_features, dtype=spec.dtype)
            packed = order.pack_awq(*own, bias, chunks)
            yield from ((f"{parts[0]}.{leaf}", tensor) for leaf, tensor in packed.items())
        else:
            for part, own in zip(parts, _parts(family.layer(name).joined, tensors, name, specs[name])):
                yield from ((f"{part}.{leaf}", tensor) for leaf, tensor in _pack_linear(own, rank).items())
    for name, stored in plain.items():
        tensor = tensors[name].detach().cpu()
        yield stored, torch.cat(tensor.chunk(2)[::-1]) if name.startswith(family.nunchaku.swapped) else tensor


def _pack_linear(own, rank):
    """{leaf name: tensor} of one of Nunchaku's W4A4 layers, its branch padded to `rank` with zeros."""
    missing = rank - own["weight_proj_up"].shape[1]
    down, up = (torch.nn.functional.pad(own[part], (0, missing)) for part in ("weight_proj_down", "weight_proj_up"))
    smooth = order.pack_vector(own["weight_smooth_factor"])
    return {"qweight": order.pack_codes(own["weight"]), "wscales": order.pack_scales(own["weight_scale"]),
            "bias": order.pack_vector(own["bias"]), "smooth": smooth, "smooth_orig": smooth,
            "lora_down": order.pack_down(down), "lora_up": order.pack_up(up)}


def _metadata(family, tensors, config, rank):
    """The metadata that Nunchaku's loaders read."""
    four_bits = {"dtype": "int4", "scale_dtype": None, "group_size": layout.GROUP_SIZE}
    tables = family.nunchaku
    first, last = (next(ours for ours, theirs in tables.outside.items() if theirs == name) for name in (tables.inputs[0], tables.output))
    diffusers = {
        "_class_name": tables.diffusers_class, "attention_head_dim": sum(config["axes_dim"]),
        "in_channels": tensors[f"{first}.weight"].shape[1], "out_channels": tensors[f"{last}.weight"].shape[0], "patch_size": 1,
        **{theirs: config[ours] for theirs, ours in tables.config.items()},
    }
    comfy = {"model_class": tables.comfy_class(config), "model_config": {**config, "disable_unet_model_creation": True}}
    quantization = {"method": "svdquant", "weight": four_bits, "activation": four_bits, "rank": rank}
    return {"model_class": tables.model_classes[0], "config": json.dumps(diffusers), "comfy_config": json.dumps(comfy),
            "quantization_config": json.dumps(quantization)}
