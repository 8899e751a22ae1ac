"""Read Nunchaku's INT4 and NVFP4 checkpoints, without a second copy of the model in memory.

Nunchaku's layers have the same tensors as ours, in another byte order (layout.py) and under other names (names.py), in one file or two
(source.py). INT4 files do not state that the second layer of an MLP has unsigned inputs and that its bias includes the GELU shift
correction. NVFP4 files have neither; their modulation layers are INT4 as well.

A linear of ours that combines two published layers (families.family.Joined) is two layers there, each with its own branch. The two
branches of rank R become one block-diagonal branch of rank 2R. If both layers have the same proj_down or proj_up, as in files from
writer.py, the joined branch keeps rank R.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ...layers import layout
from .. import completeness
from ..header import CheckpointError
from ..packed import PackedFile
from . import halves, names
from . import layout as order
from .source import BLOCKS_FILE, REST_FILE, gather

READERS = min(4, os.cpu_count() or 1)  # threads; more threads than cores would only wait for each other
AHEAD = 4  # number of layers that are read ahead
HALF_TYPES = (torch.bfloat16, torch.float16)
FLOAT_TYPES = (*HALF_TYPES, torch.float32)
UNUSED = ("smooth_orig",)  # the smoothing factor before it was merged into another layer; it has no use
LEAVES = ("qweight", "wscales", "wzeros", "wcscales", "wtscale", "smooth", "bias", "lora_down", "lora_up")  # tensors read of a layer
SECOND_SCALES = ("wtscale", "wcscales")  # NVFP4's


def matches(header):
    """Whether the file is a Nunchaku model, or that one of its two files that has no packed layer."""
    if any(name.endswith(".qweight") for name in header.tensors):
        return True
    return header.file == REST_FILE and os.path.isfile(os.path.join(os.path.dirname(header.path), BLOCKS_FILE))


def open_file(header):
    """The PackedFile of a Nunchaku model. header: the header of its file, or of one of its two files.

    Raises CheckpointError, before any weight is read, unless every tensor is there with the right shape and type.
    """
    source = gather(header)
    _check_supported(source)
    nvfp4, tables = _is_nvfp4(source), source.family.nunchaku
    depths = {kind: names.depth(source.tensors, kind) for kind in tables.linears}
    layers = {}
    for ours, theirs, kind in names.blocks(tables, depths):
        for name, parts in tables.linears[kind].items():
            layers[f"{ours}.{name}"] = _linear(source, f"{ours}.{name}", [f"{theirs}.{part}" for part in parts], nvfp4)
        for name, part in tables.modulations[kind].items():
            if not _is_dense(source, f"{theirs}.{part}"):
                layers[f"{ours}.{name}"] = _modulation(source, f"{theirs}.{part}", tables.chunks[kind])
    _check_uniform(source, layers, nvfp4)
    plain = _plain(source, depths)
    _check_left_over(source, layers, plain, nvfp4)
    specs = {name: layer.spec for name, layer in layers.items()}
    shapes = {f"{name}.{part}": shape for name, spec in specs.items() for part, (shape, _) in spec.tensors().items()}
    shapes |= {name: source.info(stored).shape for name, stored in plain.items()}
    dtypes = {f"{name}.{part}": dtype for name, spec in specs.items() for part, (_, dtype) in spec.tensors().items()}
    dtypes |= {name: source.info(stored).dtype for name, stored in plain.items()}
    config = completeness.configuration(header, source.family, shapes, _config(source))
    completeness.check(header, source.family, config, shapes, specs)
    return PackedFile(header, source.family, specs, shapes, dtypes, config, _recipe(source, specs, nvfp4),
                      source.metadata.get("svdquant.source", header.file), lambda: _tensors(source, layers, plain),
                      stored=source.infos(), modules=source.packed_modules(), paths=source.paths())


# --- the file -------------------------------------------------------------------------------------------------------


def _check_supported(source):
    """Raise CheckpointError if the metadata name another model than the family whose tensors the file has."""
    title, classes = source.family.title, source.family.nunchaku.model_classes
    if (model_class := source.metadata.get("model_class", classes[0])) not in classes:
        raise CheckpointError(f"{source.header.file} is a Nunchaku model that is a {model_class}; choose a Nunchaku {title} model.")


def _is_nvfp4(source):
    """Whether the model is NVFP4, from its metadata; without those, whether it has a float8 tensor."""
    weight = source.json("quantization_config").get("weight")
    stated = weight.get("dtype") if isinstance(weight, dict) else None
    if isinstance(stated, str):
        return stated.startswith("fp4")
    return any(header.tensors[stored].dtype == torch.float8_e4m3fn for header, stored in source.tensors.values())


def _config(source):
    """The host's configuration, as far as the metadata state it."""
    diffusers, comfy = source.json("config"), source.json("comfy_config").get("model_config", {})
    if not isinstance(comfy, dict):
        raise CheckpointError(f"{source.header.file} has no valid comfy_config in its metadata; download it again.")
    config = {ours: diffusers[theirs] for theirs, ours in source.family.nunchaku.config.items() if theirs in diffusers}
    for key, value in config.items():
        if comfy.get(key, value) != value:
            raise CheckpointError(f"{source.header.file} says {key} = {value!r} in its config and {comfy[key]!r} in its "
                                  "comfy_config; download it again.")
    return config | comfy


def _recipe(source, specs, nvfp4):
    """The recipe of the model, from its metadata; a short one if the metadata have none."""
    rank = max((spec.rank for name, spec in specs.items() if not source.family.layer(name).joined), default=0)
    return source.json("svdquant.recipe") or {"preset": f"Nunchaku {_kind(nvfp4)}", "rank": rank}


def _kind(nvfp4):
    return "NVFP4" if nvfp4 else "INT4"


# --- layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One packed layer of ours. parts: v1 prefixes of Nunchaku's layers in it; joint: as in halves.join; chunks: number of vectors that a
    modulation layer computes, else 0."""

    spec: layout.LayerSpec
    parts: tuple
    joint: bool = True
    chunks: int = 0


def _linear_spec(source, part, nvfp4):
    """The LayerSpec of one of Nunchaku's W4A4 layers, without unsigned_from. Raises CheckpointError unless its tensors are valid."""
    kind = layout.NVFP4 if nvfp4 else layout.SVDQUANT
    shape, file = source.info(f"{part}.qweight").shape, source.header.file
    if len(shape) != 2 or shape[0] % order.TILE or shape[1] * 2 % order.TILE or 0 in shape:
        raise CheckpointError(f"{file}: tensor {part}.qweight has shape {list(shape)} instead of (N, K/2) with N and K "
                              f"multiples of {order.TILE}; choose a Nunchaku {source.family.title} model.")
    n, k = shape[0], shape[1] * 2
    source.check(f"{part}.qweight", shape, (torch.int8,))
    dtype = source.check(f"{part}.bias", (n,), HALF_TYPES)
    source.check(f"{part}.wscales", (k // layout.GROUP_SIZES[kind], n), (torch.float8_e4m3fn,) if nvfp4 else (dtype,))
    if nvfp4:
        _check_second_scales(source, part, n)
    rank = 0
    if f"{part}.lora_down" in source.tensors or f"{part}.lora_up" in source.tensors:
        rank = (*source.info(f"{part}.lora_down").shape, 0, 0)[1]
        if rank % order.RANK_TILE:
            raise CheckpointError(f"{file}: tensor {part}.lora_down has rank {rank}, which is not a multiple of "
                                  f"{order.RANK_TILE}; the file is damaged, download it again.")
        source.check(f"{part}.lora_down", (k, rank), (dtype,))
        source.check(f"{part}.lora_up", (n, rank), (dtype,))
    source.check(f"{part}.smooth", (k,), (dtype,))
    return layout.LayerSpec(kind, k, n, rank, dtype=dtype)


def _check_second_scales(source, part, n):
    """Raise CheckpointError unless the second scales are valid: wtscale, one number for a layer of one matrix, or wcscales, one number per
    row of a fused q k v layer. Very old files have neither."""
    if f"{part}.wtscale" in source.tensors:
        shape = source.info(f"{part}.wtscale").shape
        source.check(f"{part}.wtscale", shape if shape == () else (1,), FLOAT_TYPES)
    if f"{part}.wcscales" in source.tensors:
        source.check(f"{part}.wcscales", (n,), HALF_TYPES)


def _check_uniform(source, layers, nvfp4):
    """Raise CheckpointError if some W4A4 layers have second scales, or a branch, and others have none. Very old files have none at all. In
    newer files a layer without them is damaged and would give wrong images."""
    parts = [part for layer in layers.values() if not layer.chunks for part in layer.parts]
    for leaves in ((SECOND_SCALES,) if nvfp4 else ()) + (("lora_down", "lora_up"),):
        with_them = [part for part in parts if any(f"{part}.{leaf}" in source.tensors for leaf in leaves)]
        without = set(parts) - set(with_them)
        if with_them and without:
            raise CheckpointError(f"{source.header.file} has {' or '.join(leaves)} in layer {with_them[0]} and not in {min(without)}; the "
                                  "file is incomplete, download it again.")


def _linear(source, name, parts, nvfp4):
    """The _Layer of our linear `name`, which is one or two of Nunchaku's layers."""
    specs = [_linear_spec(source, part, nvfp4) for part in parts]
    n, k, rank = specs[0].out_features, specs[0].in_features, specs[0].rank
    joint = True
    if len(specs) == 2:
        rows = _by_rows(source, name)
        shared, ranks = ("in_features", "lora_down") if rows else ("out_features", "lora_up"), [s.rank for s in specs]
        if getattr(specs[0], shared[0]) != getattr(specs[1], shared[0]) or specs[0].dtype != specs[1].dtype:
            raise CheckpointError(f"{source.header.file}: layers {parts[0]} and {parts[1]} do not fit together; the file is "
                                  "damaged, download it again.")
        if rows and source.read_bytes(f"{parts[0]}.smooth") != source.read_bytes(f"{parts[1]}.smooth"):
            raise CheckpointError(f"{source.header.file}: layers {parts[0]} and {parts[1]} read the same input with different "
                                  "smoothing factors, which this version can't run; choose another version of the model.")
        joint = ranks[0] == ranks[1] and (not rank or source.read_bytes(f"{parts[0]}.{shared[1]}")
                                          == source.read_bytes(f"{parts[1]}.{shared[1]}"))
        rank = rank if joint else sum(ranks)
        n, k = (n + specs[1].out_features, k) if rows else (n, k + specs[1].in_features)
    unsigned_from = source.family.layer(name).unsigned_from(k, n)
    if len(specs) == 2 and not rows and unsigned_from != specs[0].in_features:
        raise CheckpointError(f"{source.header.file}: layer {parts[0]} has {specs[0].in_features} input columns instead of "
                              f"{unsigned_from}; the file is damaged, download it again.")
    if nvfp4:
        blocks = (1,) if len(specs) == 1 or rows else halves.scale_blocks(*(spec.in_features for spec in specs))
        return _Layer(layout.LayerSpec(layout.NVFP4, k, n, rank, dtype=specs[0].dtype, scale_blocks=sum(blocks)), tuple(parts), joint)
    try:
        spec = layout.svdquant_spec(k, n, rank, unsigned_from, True, specs[0].dtype)
    except ValueError as error:
        raise CheckpointError(f"{source.header.file}: layer {name} {error}; the file is damaged, download it again.") from None
    return _Layer(spec, tuple(parts), joint)


def _by_rows(source, name):
    """Whether the two parts of our layer split its rows, not its columns."""
    return source.family.layer(name).joined.rows


def _is_dense(source, part):
    """Whether a modulation layer is in 16 bits, as in diffusers' files: nunchaku-lite reads both forms."""
    return f"{part}.weight" in source.tensors


def _modulation(source, part, chunks):
    shape, width = source.info(f"{part}.qweight").shape, (*source.info(f"{source.family.nunchaku.inputs[0]}.weight").shape, 0)[0]
    source.check(f"{part}.qweight", shape, (torch.int32,))
    n, k = (shape[0] * order.AWQ_ROWS, shape[1] * 2) if len(shape) == 2 else (0, 0)
    # The padded scales do not determine K, so K is compared with the model's width.
    if not n or not k or n % chunks or k != width or k % layout.GROUP_SIZE:
        raise CheckpointError(f"{source.header.file}: tensor {part}.qweight has shape {list(shape)} instead of (N/4, K/2) with N a "
                              f"multiple of {chunks} and K {width}; the file is damaged, download it again.")
    groups = k // layout.GROUP_SIZE
    groups += -groups % order.AWQ_GROUP_TILE
    dtype = source.check(f"{part}.wscales", (groups, n), HALF_TYPES)
    source.check(f"{part}.wzeros", (groups, n), (dtype,))
    source.check(f"{part}.bias", (n,), (dtype,))
    return _Layer(layout.LayerSpec(layout.AWQ, k, n, dtype=dtype), (part,), chunks=chunks)


def _plain(source, depths):
    """{our name: v1 name} of the tensors that are not packed."""
    tables = source.family.nunchaku
    plain = {f"{ours}.{name}": f"{theirs}.{stored}" for ours, theirs, kind in names.blocks(tables, depths)
             for name, stored in tables.norms[kind].items()}
    dense = {f"{ours}.{name}": f"{theirs}.{part}" for ours, theirs, kind in names.blocks(tables, depths)
             for name, part in tables.modulations[kind].items() if _is_dense(source, f"{theirs}.{part}")}
    for name, stored in (tables.outside | dense).items():
        if name not in tables.optional or any(f"{stored}.{leaf}" in source.tensors for leaf in ("weight", "bias")):
            plain |= {f"{name}.{leaf}": f"{stored}.{leaf}" for leaf in ("weight", "bias")}
    for name, stored in plain.items():
        shape = source.info(stored).shape
        source.check(stored, shape, FLOAT_TYPES)
        if name.startswith(source.family.nunchaku.swapped) and (not shape or shape[0] % 2):
            raise CheckpointError(f"{source.header.file}: tensor {stored} has shape {list(shape)} instead of an even number of "
                                  "rows; the file is damaged, download it again.")
    return plain


def _check_left_over(source, layers, plain, nvfp4):
    """Raise CheckpointError if the file has a tensor that no layer uses."""
    used, linear = set(plain.values()), ("smooth", "lora_down", "lora_up", *UNUSED, *(SECOND_SCALES if nvfp4 else ()))
    for layer in layers.values():
        leaves = ("qweight", "wscales", "bias", *(("wzeros",) if layer.chunks else linear))
        used |= {f"{part}.{leaf}" for part in layer.parts for leaf in leaves}
    for name in source.tensors:
        if name not in used:
            raise CheckpointError(f"{source.header.file} has tensor {name}, which a Nunchaku {_kind(nvfp4)} {source.family.title} model "
                                  "has no place for; choose another version of the model.")


# --- reading -------------------------------------------------------------------------------------------------------


def _tensors(source, layers, plain):
    """Yield (our name, tensor) of the whole model, one layer at a time, in the order of the file."""
    def stored(name):
        return [f"{part}.{leaf}" for part in layers[name].parts for leaf in LEAVES] if name in layers else [plain[name]]

    def read(name):
        if name in plain:
            tensor = source.read(plain[name])
            return {name: torch.cat(tensor.chunk(2)[::-1]) if name.startswith(source.family.nunchaku.swapped) else tensor}
        tensors = (_read_modulation if layers[name].chunks else _read_linear)(source, name, layers[name])
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    in_order = sorted((*layers, *plain), key=lambda name: source.info(stored(name)[0]).start)
    for tensors in _ahead(read, in_order, lambda name: source.announce(stored(name))):
        yield from tensors.items()


def _ahead(function, items, announce):
    """map(function, items), in order, with a few calls running ahead in threads, so that reading and unpacking overlap. announce: called
    with each item some time before `function`."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting = deque()
        try:
            for item in items:
                announce(item)
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read_modulation(source, _name, layer):
    part = layer.parts[0]
    leaves = (source.read(f"{part}.{leaf}") for leaf in ("wscales", "wzeros", "bias"))
    return order.unpack_awq(source.stored(f"{part}.qweight"), *leaves, layer.chunks)


def _read_part(source, part, spec):
    """{parameter name: tensor} of one of Nunchaku's W4A4 layers without its codes, in our order. spec: the LayerSpec of our layer that
    contains it."""
    nvfp4, wscales = spec.format == layout.NVFP4, f"{part}.wscales"
    tensors = {"weight_scale": order.unpack_nvfp4_scales(source.stored(wscales)) if nvfp4 else order.unpack_scales(source.read(wscales)),
               "weight_smooth_factor": order.unpack_vector(source.read(f"{part}.smooth")),
               "bias": order.unpack_vector(source.read(f"{part}.bias"))}
    if nvfp4:
        tensors["weight_scale_2"] = _read_second_scales(source, part, source.info(wscales).shape[1])
    if spec.rank == 0 or f"{part}.lora_down" not in source.tensors:
        features = {"weight_proj_down": tensors["weight_smooth_factor"], "weight_proj_up": tensors["bias"]}
        return tensors | {name: torch.zeros(len(vector), 0, dtype=spec.dtype) for name, vector in features.items()}
    return tensors | {"weight_proj_down": order.unpack_down(source.read(f"{part}.lora_down")),
                      "weight_proj_up": order.unpack_up(source.read(f"{part}.lora_up"))}


def _read_second_scales(source, part, n):
    """The product of both second scales, (1, N) float32, in which the product of two 16-bit numbers is exact."""
    second = torch.ones(n)
    if f"{part}.wtscale" in source.tensors:
        second *= source.read(f"{part}.wtscale").float()
    if f"{part}.wcscales" in source.tensors:
        second *= order.unpack_vector(source.read(f"{part}.wcscales")).float()
    return second.unsqueeze(0)


def _read_linear(source, name, layer):
    spec, rows = layer.spec, len(layer.parts) == 2 and _by_rows(source, name)
    weight = order.empty(spec.out_features, spec.in_features // 2)
    shapes = [source.info(f"{part}.qweight").shape for part in layer.parts]
    for part, own in zip(layer.parts, weight.split([shape[0] if rows else shape[1] for shape in shapes], 0 if rows else 1)):
        order.unpack_codes(source.stored(f"{part}.qweight"), own)
    parts = [_read_part(source, part, spec) for part in layer.parts]
    return {"weight": weight} | (parts[0] if len(parts) == 1 else halves.join(parts, rows, layer.joint))
