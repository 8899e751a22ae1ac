"""Read Nunchaku's INT4 and NVFP4 checkpoints, without a second copy of the model in memory.

Nunchaku's layers have the same tensors as ours, in another byte order (layout.py) and under other names (names.py), in one file or two
(source.py). INT4 files do not state that the second layer of an MLP has unsigned inputs and that its bias includes the GELU shift
correction. NVFP4 files have neither; their modulation layers are INT4 as well.

A linear of ours that combines two published layers (families.family.Joined) is two layers there, each with its own branch. The two
branches of rank R become one block-diagonal branch of rank 2R. If both layers have the same proj_down or proj_up, as in files from
writer.py, the joined branch keeps rank R. Linears of ours that one published layer stacks (families.family.Nunchaku.stacked) get their
rows of it, and each its own copy of the smoothing factor and of proj_down.

No published file was opened. The layout of Qwen-Image and Z-Image is that of nunchaku's transformer_qwenimage.py, transformer_zimage.py
and linear.py, which take a file's tensors as they are, and of ComfyUI-nunchaku's zimage.py, which renames them for ComfyUI. What others
have published about the files agrees with it: Z-Image-Turbo INT4 of rank 32 has 963 tensors in bf16 and 136 in int8 of 3,008,102,400 bytes,
that of rank 128 4,011,374,152 bytes with the header; w3's rows stand before w1's; the metadata say "skip_refiners": false. Inferred, since
only kernels and DeepCompressor's export determine them: the packed arrays are ordered as in FLUX.1's files, which the same kernels read; in
INT4 files the bias of a layer after a GELU contains the shift correction; the bias of Qwen-Image's modulation has 1 added to its scales,
since the loader sets scale_shift to 0; and a second scale may be of either form, wtscale or wcscales. FLUX.2's layout is that
of nunchaku-lite's adapter: Nunchaku itself publishes no FLUX.2.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from ...layers import layout
from .. import completeness
from ..header import CheckpointError
from ..packed import PackedFile
from . import contents, halves, names
from . import layout as order
from .source import BLOCKS_FILE, REST_FILE, gather

READERS = min(4, os.cpu_count() or 1)  # threads; more threads than cores would only wait for each other
AHEAD = 4  # number of layers that are read ahead


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
    layers, plain = [], contents.plain_tensors(source, depths)
    for ours, theirs, kind in names.blocks(tables, depths):
        for names_within, parts in contents.w4a4_layers(tables, kind):
            prefixed, stored = [f"{ours}.{name}" for name in names_within], [f"{theirs}.{part}" for part in parts]
            if dense := contents.dense_parts(source, tables, kind, theirs, parts):
                plain |= {f"{name}.weight": contents.Plain(dense, i, len(prefixed)) for i, name in enumerate(prefixed)}
            else:
                layers.append(contents.linear(source, prefixed, stored, nvfp4))
        for name, part in tables.modulations.get(kind, {}).items():
            if not contents.is_dense(source, f"{theirs}.{part}"):
                layers.append(contents.modulation(source, f"{ours}.{name}", f"{theirs}.{part}", tables.chunks[kind]))
    contents.check_uniform(source, layers, nvfp4)
    plain_shapes = {name: contents.plain_shape(source, entry) for name, entry in plain.items()}
    contents.check_left_over(source, layers, plain, nvfp4)
    specs = {name: spec for layer in layers for name, spec in layer.specs().items()}
    shapes = {f"{name}.{part}": shape for name, spec in specs.items() for part, (shape, _) in spec.tensors().items()}
    shapes |= plain_shapes
    dtypes = {f"{name}.{part}": dtype for name, spec in specs.items() for part, (_, dtype) in spec.tensors().items()}
    dtypes |= {name: source.info(entry.stored[0]).dtype for name, entry in plain.items()}
    markers = contents.markers(source)
    shapes |= {name: tuple(tensor.shape) for name, tensor in markers.items()}
    dtypes |= {name: tensor.dtype for name, tensor in markers.items()}
    config = completeness.configuration(header, source.family, shapes, _config(source))
    completeness.check(header, source.family, config, shapes, specs)
    return PackedFile(header, source.family, specs, shapes, dtypes, config, _recipe(source, specs, nvfp4),
                      source.metadata.get("svdquant.source", header.file), lambda: _tensors(source, layers, plain, markers),
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
    return source.json("svdquant.recipe") or {"preset": f"Nunchaku {contents.kind_of(nvfp4)}", "rank": rank}


# --- reading -------------------------------------------------------------------------------------------------------


def _tensors(source, layers, plain, markers):
    """Yield (our name, tensor) of the whole model, one layer at a time, in the order of the file."""
    def stored(item):
        return item.stored() if isinstance(item, contents.PackedLayers) else plain[item].stored

    def read(item):
        if not isinstance(item, contents.PackedLayers):
            return {item: _read_plain(source, plain[item])}
        tensors = (_read_modulation if item.chunks else _read_linear)(source, item)
        pieces = halves.unstack(tensors, len(item.names)) if len(item.names) > 1 else [tensors]
        return {f"{name}.{part}": tensor for name, own in zip(item.names, pieces) for part, tensor in own.items()}

    in_order = sorted((*layers, *plain), key=lambda item: source.info(stored(item)[0]).start)
    for tensors in _ahead(read, in_order, lambda item: source.announce(stored(item))):
        yield from tensors.items()
    yield from markers.items()


def _read_plain(source, entry):
    tensors = [source.read(stored) for stored in entry.stored]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if entry.pieces > 1:
        tensor = tensor.chunk(entry.pieces)[entry.piece].clone()
    return torch.cat(tensor.chunk(2)[::-1]) if contents.is_swapped(source, entry) else tensor


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


def _read_modulation(source, layer):
    part = layer.parts[0]
    leaves = (source.read(f"{part}.{leaf}") for leaf in ("wscales", "wzeros", "bias"))
    return order.unpack_awq(source.stored(f"{part}.qweight"), *leaves, layer.chunks)


def _read_part(source, part, spec):
    """{parameter name: tensor} of one of Nunchaku's W4A4 layers without its codes, in our order. spec: the LayerSpec of our layer that
    contains it."""
    nvfp4, wscales = spec.format == layout.NVFP4, f"{part}.wscales"
    tensors = {"weight_scale": order.unpack_nvfp4_scales(source.stored(wscales)) if nvfp4 else order.unpack_scales(source.read(wscales)),
               "weight_smooth_factor": order.unpack_vector(source.read(f"{part}.smooth"))}
    if spec.bias:
        tensors["bias"] = order.unpack_vector(source.read(f"{part}.bias"))
    if nvfp4:
        tensors["weight_scale_2"] = _read_second_scales(source, part, source.info(wscales).shape[1])
    if spec.rank == 0 or f"{part}.lora_down" not in source.tensors:
        n, k = source.info(f"{part}.qweight").shape[0], len(tensors["weight_smooth_factor"])
        return tensors | {name: torch.zeros(size, 0, dtype=spec.dtype) for name, size in (("weight_proj_down", k), ("weight_proj_up", n))}
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


def _read_linear(source, layer):
    spec, rows = layer.spec, len(layer.parts) == 2 and contents.by_rows(source, layer.names[0])
    weight = order.empty(spec.out_features, spec.in_features // 2)
    shapes = [source.info(f"{part}.qweight").shape for part in layer.parts]
    for part, own in zip(layer.parts, weight.split([shape[0] if rows else shape[1] for shape in shapes], 0 if rows else 1)):
        order.unpack_codes(source.stored(f"{part}.qweight"), own)
    parts = [_read_part(source, part, spec) for part in layer.parts]
    return {"weight": weight} | (parts[0] if len(parts) == 1 else halves.join(parts, rows, layer.joint))
