"""Nunchaku's INT4 checkpoints of FLUX.1: read, without a second copy of the model in memory.

A layer of theirs has the same parts as ours, in another byte order (nunchaku_layout.py) and under other names
(nunchaku_names.py). Single files carry their configuration as metadata; the older form is a folder of
transformer_blocks.safetensors, unquantized_layers.safetensors and config.json, of which either tensor file may be
chosen. What the file does not say: the second layer of an MLP codes its input unsigned, and its bias holds the shift.

linear1 and linear2 are two layers each there, with a branch each. The two branches of rank R become one of rank 2R
that has zeros where they do not meet; where the files share what can be shared (as write does), it stays one of rank R.
"""

import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .. import flux, layout
from . import nunchaku_halves as halves
from . import nunchaku_layout as order
from . import nunchaku_names as names
from .header import CheckpointError, Header, read_header
from .packed import PackedFile

BLOCKS_FILE, REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
CONFIG_FILES = {"config": "config.json", "comfy_config": "comfy_config.json"}
MAX_CONFIG_BYTES = 1 << 20
AHEAD = 3  # layers that are read before they are asked for
MODEL_CLASSES = ("NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2")
HALF_TYPES = (torch.bfloat16, torch.float16)
FLOAT_TYPES = (*HALF_TYPES, torch.float32)
UNUSED = ("smooth_orig",)  # what the smoothing was before it was merged into another layer; nobody reads it
# diffusers' configuration keys: ComfyUI's
DIFFUSERS_CONFIG = {
    "axes_dims_rope": "axes_dim", "num_layers": "depth", "num_single_layers": "depth_single_blocks",
    "num_attention_heads": "num_heads", "joint_attention_dim": "context_in_dim",
    "pooled_projection_dim": "vec_in_dim", "guidance_embeds": "guidance_embed",
}


def matches(header):
    """Whether the file is a Nunchaku model, or the half of one that holds no packed layer."""
    if any(name.endswith(".qweight") for name in header.tensors):
        return True
    return header.file == REST_FILE and os.path.isfile(os.path.join(os.path.dirname(header.path), BLOCKS_FILE))


def open_file(header):
    """PackedFile of a Nunchaku FLUX.1, of which `header` is the file or one of the two.

    Raises CheckpointError, before any weight is read, unless every tensor is there with the right shape and type.
    """
    source = _gather(header)
    _check_supported(source)
    depths = {kind: names.depth(source.tensors, kind) for kind in (names.DOUBLE, names.SINGLE)}
    layers = {}
    for ours, theirs, kind in names.blocks(depths):
        for name, parts in names.LINEARS[kind].items():
            layers[f"{ours}.{name}"] = _linear(source, f"{ours}.{name}", [f"{theirs}.{part}" for part in parts])
        for name, part in names.MODULATIONS[kind].items():
            layers[f"{ours}.{name}"] = _modulation(source, f"{theirs}.{part}", names.CHUNKS[kind])
    plain = _plain(source, depths)
    _check_left_over(source, layers, plain)
    specs = {name: layer.spec for name, layer in layers.items()}
    shapes = {f"{name}.{part}": shape for name, spec in specs.items() for part, (shape, _) in spec.tensors().items()}
    shapes |= {name: source.info(stored).shape for name, stored in plain.items()}
    dtypes = {f"{name}.{part}": dtype for name, spec in specs.items() for part, (_, dtype) in spec.tensors().items()}
    dtypes |= {name: source.info(stored).dtype for name, stored in plain.items()}
    return PackedFile(header, specs, shapes, dtypes, _config(source), _recipe(source, specs),
                      source.metadata.get("svdquant.source", header.file), lambda: _tensors(source, layers, plain))


# --- the file or files ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """tensors: {v1 name: (Header, stored name)}."""

    header: Header
    tensors: dict
    metadata: dict

    def info(self, name):
        """TensorInfo of a v1 name. Raises CheckpointError where the file lacks it."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.header.file} lacks tensor {name}; the file is incomplete, download it again.")
        header, stored = self.tensors[name]
        return header.tensors[stored]

    def read(self, name):
        header, stored = self.tensors[name]
        return header.read_tensor(stored)

    def read_bytes(self, name):
        header, stored = self.tensors[name]
        return header.read_bytes(stored)

    def check(self, name, shape, dtypes):
        """Raise CheckpointError unless tensor `name` has this shape and one of these dtypes. Returns its dtype."""
        info = self.info(name)
        if info.shape != tuple(shape):
            raise CheckpointError(f"{self.header.file}: tensor {name} has shape {list(info.shape)} where {list(shape)} is "
                                  "due; the file is damaged, download it again.")
        if info.dtype not in dtypes:
            raise CheckpointError(f"{self.header.file}: tensor {name} is {info.dtype} where {dtypes[0]} is due; the file "
                                  "is damaged, download it again.")
        return info.dtype


def _gather(header):
    """_Source of a file, with its neighbour if it is one of two."""
    headers, metadata, folder = [header], dict(header.metadata), os.path.dirname(header.path)
    neighbour = {BLOCKS_FILE: REST_FILE, REST_FILE: BLOCKS_FILE}.get(header.file)
    if neighbour is not None:
        path = os.path.join(folder, neighbour)
        if not os.path.isfile(path):
            raise CheckpointError(f"{header.file} is one of the two files of a Nunchaku model, and {neighbour} is not beside "
                                  "it; put both into one folder.")
        headers.append(read_header(path))
        metadata |= {key: text for key, file in CONFIG_FILES.items() if (text := _small_text(os.path.join(folder, file)))}
    tensors = {}
    for part in headers:
        for stored in part.tensors:
            name = names.v1(stored)
            if name in tensors:
                raise CheckpointError(f"{part.file} has tensor {name} twice, as {stored} and {tensors[name][1]}; download "
                                      "it again.")
            tensors[name] = (part, stored)
    return _Source(header, tensors, metadata)


def _small_text(path):
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CONFIG_BYTES)


def _json(source, key):
    """A JSON object of the metadata, {} where it is absent."""
    if key not in source.metadata:
        return {}
    try:
        value = json.loads(source.metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source.header.file} has no valid {key} in its metadata; download it again.")
    return value


def _check_supported(source):
    """Raise CheckpointError where it is a Nunchaku model of another kind than INT4 FLUX.1."""
    file, model_class = source.header.file, source.metadata.get("model_class", MODEL_CLASSES[0])
    has_flux = all(f"{name}.weight" in source.tensors for name in ("x_embedder", "context_embedder"))
    if model_class not in MODEL_CLASSES or not has_flux:
        what = "is not a FLUX.1" if model_class in MODEL_CLASSES else f"is a {model_class}"
        raise CheckpointError(f"{file} is a Nunchaku model that {what}; choose a Nunchaku INT4 FLUX.1 model.")
    weight = _json(source, "quantization_config").get("weight")
    stated = isinstance(weight, dict) and str(weight.get("dtype", "")).startswith("fp4")
    if stated or any(name.endswith((".wtscale", ".wcscales")) for name in source.tensors) or any(
            name.endswith(".wscales") and source.info(name).dtype == torch.float8_e4m3fn for name in source.tensors):
        raise CheckpointError(f"{file} is a Nunchaku NVFP4 model, and NVFP4 is not supported yet; choose the INT4 version "
                              "of the model (svdq-int4_...).")


def _config(source):
    """The FLUX configuration in ComfyUI's terms, as far as the metadata has it."""
    diffusers, comfy = _json(source, "config"), _json(source, "comfy_config").get("model_config", {})
    if not isinstance(comfy, dict):
        raise CheckpointError(f"{source.header.file} has no valid comfy_config in its metadata; download it again.")
    config = {ours: diffusers[theirs] for theirs, ours in DIFFUSERS_CONFIG.items() if theirs in diffusers}
    for key, value in config.items():
        if comfy.get(key, value) != value:
            raise CheckpointError(f"{source.header.file} says {key} = {value!r} in its config and {comfy[key]!r} in its "
                                  "comfy_config; download it again.")
    return config | comfy


def _recipe(source, specs):
    """What a file of ours that is written on says of its quantization."""
    rank = max((spec.rank for name, spec in specs.items() if name.startswith("double_blocks")), default=0)
    return _json(source, "svdquant.recipe") or {"preset": "Nunchaku INT4", "rank": rank}


# --- layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One packed layer of ours. parts: v1 prefixes of theirs; joint: both parts share what one branch shares; chunks:
    of a modulation layer, else 0."""

    spec: layout.LayerSpec
    parts: tuple
    joint: bool = True
    chunks: int = 0


def _linear_spec(source, part):
    """LayerSpec of one W4A4 layer of theirs, unsigned_from left out. Its tensors are checked."""
    shape, file = source.info(f"{part}.qweight").shape, source.header.file
    if len(shape) != 2 or shape[0] % order.TILE or shape[1] * 2 % order.TILE or 0 in shape:
        raise CheckpointError(f"{file}: tensor {part}.qweight has shape {list(shape)} where (N, K/2) with N and K multiples "
                              f"of {order.TILE} is due; choose a Nunchaku INT4 FLUX.1 model.")
    n, k = shape[0], shape[1] * 2
    source.check(f"{part}.qweight", shape, (torch.int8,))
    dtype = source.check(f"{part}.wscales", (k // layout.GROUP_SIZE, n), HALF_TYPES)
    rank = 0
    if f"{part}.lora_down" in source.tensors or f"{part}.lora_up" in source.tensors:
        rank = (*source.info(f"{part}.lora_down").shape, 0, 0)[1]
        if rank % order.RANK_TILE:
            raise CheckpointError(f"{file}: tensor {part}.lora_down has rank {rank}, which is not a multiple of "
                                  f"{order.RANK_TILE}; the file is damaged, download it again.")
        source.check(f"{part}.lora_down", (k, rank), (dtype,))
        source.check(f"{part}.lora_up", (n, rank), (dtype,))
    source.check(f"{part}.bias", (n,), (dtype,))
    source.check(f"{part}.smooth", (k,), (dtype,))
    return layout.LayerSpec(layout.SVDQUANT, k, n, rank, dtype=dtype)


def _linear(source, name, parts):
    """_Layer of our linear `name`, which is one or two of theirs."""
    specs = [_linear_spec(source, part) for part in parts]
    n, k, rank = specs[0].out_features, specs[0].in_features, specs[0].rank
    joint = True
    if len(specs) == 2:
        rows = _by_rows(name)
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
    try:
        spec = layout.svdquant_spec(k, n, rank, flux.unsigned_from(name, k, n), True, specs[0].dtype)
    except ValueError as error:
        raise CheckpointError(f"{source.header.file}: layer {name} {error}; the file is damaged, download it again.") from None
    if len(specs) == 2 and not rows and spec.unsigned_from != specs[0].in_features:
        raise CheckpointError(f"{source.header.file}: layer {parts[0]} has {specs[0].in_features} input columns where "
                              f"{spec.unsigned_from} are due; the file is damaged, download it again.")
    return _Layer(spec, tuple(parts), joint)


def _by_rows(name):
    """Whether the two parts of our layer are its rows (linear1) and not its columns (linear2)."""
    return name.endswith(".linear1")


def _modulation(source, part, chunks):
    shape = source.info(f"{part}.qweight").shape
    n, k = (shape[0] * order.AWQ_ROWS, shape[1] * 2) if len(shape) == 2 else (0, 0)
    if not n or not k or n % chunks or k % layout.GROUP_SIZE:
        raise CheckpointError(f"{source.header.file}: tensor {part}.qweight has shape {list(shape)} where (N/4, K/2) with N a "
                              f"multiple of {chunks} and K of {layout.GROUP_SIZE} is due; the file is damaged, download it again.")
    source.check(f"{part}.qweight", shape, (torch.int32,))
    groups = k // layout.GROUP_SIZE
    groups += -groups % order.AWQ_GROUP_TILE
    dtype = source.check(f"{part}.wscales", (groups, n), HALF_TYPES)
    source.check(f"{part}.wzeros", (groups, n), (dtype,))
    source.check(f"{part}.bias", (n,), (dtype,))
    return _Layer(layout.LayerSpec(layout.AWQ, k, n, dtype=dtype), (part,), chunks=chunks)


def _plain(source, depths):
    """{our name: v1 name} of the tensors that are not packed."""
    plain = {f"{ours}.{name}": f"{theirs}.{stored}" for ours, theirs, kind in names.blocks(depths)
             for name, stored in names.NORMS[kind].items()}
    for name, stored in names.OUTSIDE.items():
        if name not in names.OPTIONAL or any(f"{stored}.{leaf}" in source.tensors for leaf in ("weight", "bias")):
            plain |= {f"{name}.{leaf}": f"{stored}.{leaf}" for leaf in ("weight", "bias")}
    for name, stored in plain.items():
        shape = source.info(stored).shape
        source.check(stored, shape, FLOAT_TYPES)
        if name.startswith(names.SWAPPED) and (not shape or shape[0] % 2):
            raise CheckpointError(f"{source.header.file}: tensor {stored} has shape {list(shape)} where an even number of rows "
                                  "is due; the file is damaged, download it again.")
    return plain


def _check_left_over(source, layers, plain):
    """Raise CheckpointError where the file has a tensor that no layer uses."""
    used = set(plain.values())
    for layer in layers.values():
        leaves = ("qweight", "wscales", "bias", *(("wzeros",) if layer.chunks else ("smooth", "lora_down", "lora_up", *UNUSED)))
        used |= {f"{part}.{leaf}" for part in layer.parts for leaf in leaves}
    for name in source.tensors:
        if name not in used:
            raise CheckpointError(f"{source.header.file} has tensor {name}, which a Nunchaku INT4 FLUX.1 model has no place "
                                  "for; choose another version of the model.")


# --- reading -------------------------------------------------------------------------------------------------------


def _tensors(source, layers, plain):
    """Yield (our name, tensor) of the whole model, a layer at a time."""
    def read(name):
        layer = layers[name]
        return name, (_read_modulation if layer.chunks else _read_linear)(source, name, layer)

    for name, tensors in _ahead(read, layers):
        yield from ((f"{name}.{part}", tensor) for part, tensor in tensors.items())
    for name, stored in plain.items():
        tensor = source.read(stored)
        yield name, torch.cat(tensor.chunk(2)[::-1]) if name.startswith(names.SWAPPED) else tensor


def _ahead(function, items):
    """map(function, items), in order, with a few calls running ahead: reading and unpacking both take their time."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read_modulation(source, _name, layer):
    leaves = (source.read(f"{layer.parts[0]}.{leaf}") for leaf in ("qweight", "wscales", "wzeros", "bias"))
    return order.unpack_awq(*leaves, layer.chunks)


def _read_part(source, part, rank_zero):
    """{parameter name: tensor} of one W4A4 layer of theirs, in our order. rank_zero: spec.rank is 0, no branch."""
    tensors = {"weight": order.unpack_codes(source.read(f"{part}.qweight")),
               "weight_scale": order.unpack_scales(source.read(f"{part}.wscales")),
               "weight_smooth_factor": order.unpack_vector(source.read(f"{part}.smooth")),
               "bias": order.unpack_vector(source.read(f"{part}.bias"))}
    if rank_zero or f"{part}.lora_down" not in source.tensors:
        (n, half), dtype = tensors["weight"].shape, tensors["bias"].dtype
        return tensors | {"weight_proj_down": torch.zeros(half * 2, 0, dtype=dtype),
                          "weight_proj_up": torch.zeros(n, 0, dtype=dtype)}
    return tensors | {"weight_proj_down": order.unpack_down(source.read(f"{part}.lora_down")),
                      "weight_proj_up": order.unpack_up(source.read(f"{part}.lora_up"))}


def _read_linear(source, name, layer):
    parts = [_read_part(source, part, layer.spec.rank == 0) for part in layer.parts]
    return parts[0] if len(parts) == 1 else halves.join(parts, _by_rows(name), layer.joint)
