"""Quantized models that others saved under comfy-kitchen's names: `X.weight`, `X.weight_scale`, ..., `X.comfy_quant`.

They are read like our own files. They lack our metadata, so the configuration comes from the tensors' shapes alone. Some layers may be
unpacked, and a layer whose input is partly unsigned in our files may be signed throughout. comfy-kitchen has no partly unsigned layers, so
no layer of such a file is misread.

Two variants are converted to that form. The descriptions may be in the file's metadata, as ComfyUI's `_quantization_metadata`,
{"layers": {X: the JSON of X.comfy_quant}}. And each tensor of a layer may be packed for the tiles of comfy-kitchen's kernel, which have
128 rows and 64 columns:

    X.weight          (N/128, K/64, 32, 128)  each line of a tile holds 32 bytes of each of 4 rows
    X.weight_scale    (K/64, N) as (N/128, K/64, 128)
    X.weight_proj_up  (N, R) as (N/128, R, 128)

Comfy-Org's comfy-quants has other names for some of the tensors (OTHER_NAMES). It may also store proj_down for the input x / smooth, while
every kernel applies proj_down to x; the description's `lowrank_branch_input_basis` then is "post_smoothing".
"""

import json
from dataclasses import dataclass, field, replace

from .. import families
from ..layers import layout
from . import native, text_encoder
from .header import CheckpointError, Header

PREFIXES = ("model.diffusion_model.", "")
METADATA = "_quantization_metadata"
TILE_ROWS, TILE_COLUMNS, TILE_LINES = 128, 64, 32
OTHER_NAMES = {"smooth_factor": "weight_smooth_factor", "proj_down": "weight_proj_down", "proj_up": "weight_proj_up",
               "weight_zero": "weight_zeros"}
BASIS, RAW, SMOOTHED = "lowrank_branch_input_basis", "raw", "post_smoothing"


def matches(header):
    """Whether the file has a layer in one of our formats. Raises CheckpointError if its metadata are damaged."""
    return prefix_of(header) is not None


def open_file(header):
    """The PackedFile of a file. Raises CheckpointError as native.open_file does."""
    prefix = prefix_of(header)
    own = _as_ours(header, prefix)
    family = families.of_tensors(own.tensors.keys())
    if family is None:
        raise CheckpointError(f"{header.file} has 4-bit layers and is not a whole {families.TITLES} model; the file is incomplete or "
                              "holds another model, download it again or choose another file.")
    packed = native.packed_file(own, family, "", {}, {"preset": native.OTHERS_PRESET}, header.file)
    mappable = packed.prefix is not None and not (own.tiles or own.renamed or own.smoothed)
    return replace(packed, header=header, prefix=prefix if mappable else None, stored=header.tensors,
                   modules=frozenset(prefix + layer for layer in packed.specs))


def prefix_of(header):
    """The prefix of the packed layers' names; None if no layer has a format that this version runs."""
    if text_encoder.matches(header):  # its layers have such a format too
        return None
    for name, conf in descriptions(header).items():
        if conf.get("format") in native.MODULE_FORMATS:
            # In the metadata, names may also lack the prefix.
            return next(prefix for prefix in PREFIXES if name.startswith(prefix) or f"{prefix}{name}.weight" in header.tensors)
    return None


def descriptions(header):
    """{layer: dict} of the file's descriptions of its layers, without damaged ones, which the reader of the layer refuses."""
    found, suffix = {}, f".{layout.QUANT_KEY}"
    for key in header.tensors:
        if key.endswith(suffix):
            try:
                found[key.removesuffix(suffix)] = header.description(key)
            except CheckpointError:
                continue
    return found | _listed(header)


def _listed(header):
    """{layer: dict} of the descriptions in the file's metadata."""
    if METADATA not in header.metadata:
        return {}
    try:
        listed = json.loads(header.metadata[METADATA])["layers"]
        if all(isinstance(conf, dict) for conf in listed.values()):
            return listed
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        pass
    raise CheckpointError(f"{header.file} has no valid {METADATA} in its metadata; download it again.")


# --- as our own ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AsOurs(Header):
    """The file's diffusion model under our names and in our order.

    listed: {X.comfy_quant: dict} of the descriptions in the metadata; `tensors` has None under such a name if no tensor has it. tiles:
    {name: TensorInfo as stored} of tensors packed in tiles; renamed: whether the file has names of OTHER_NAMES; smoothed: names of the
    proj_downs that are stored for x / smooth.
    """

    listed: dict = field(default_factory=dict)
    tiles: dict = field(default_factory=dict)
    renamed: bool = False
    smoothed: frozenset = frozenset()

    def description(self, name):
        return self.listed[name] if name in self.listed else super().description(name)

    def read_tensor(self, name):
        tensor = super().read_tensor(name)
        if name in self.smoothed:
            smooth = super().read_tensor(name.replace("_proj_down", "_smooth_factor"))
            return (tensor.float() / smooth.float().unsqueeze(-1)).to(tensor.dtype)
        if name not in self.tiles:
            return tensor
        return UNTILE[name.rpartition(".")[2]](tensor.view(self.tiles[name].shape))


def _as_ours(header, prefix):
    inside, suffix = header.within(prefix), f".{layout.QUANT_KEY}"
    listed = {}
    for name, conf in _listed(header).items():
        if not name.startswith(prefix) and f"{name}.weight" not in inside.tensors:
            continue  # a text encoder in the same file
        key = name.removeprefix(prefix) + suffix
        if key in inside.tensors and inside.description(key) != conf:
            raise CheckpointError(f"{header.file} has two different descriptions of layer {name}, in {METADATA} and in {key}; download it "
                                  "again.")
        listed[key] = conf
    tensors = inside.tensors | {key: None for key in listed if key not in inside.tensors}
    layers = {key.removesuffix(suffix) for key in tensors if key.endswith(suffix)}
    renamed = {f"{layer}.{theirs}": f"{layer}.{part}" for layer in layers for theirs, part in OTHER_NAMES.items()}
    renamed = {name: ours for name, ours in renamed.items() if name in tensors and ours not in tensors}
    tensors = {renamed.get(name, name): info for name, info in tensors.items()}
    tiles = {}
    for name in (f"{layer}.{part}" for layer in layers for part in UNTILE):
        shape = _natural_shape(name.rpartition(".")[2], tensors[name].shape) if name in tensors else None
        if shape is not None:
            tiles[name] = tensors[name]
            tensors[name] = replace(tensors[name], shape=shape)
    ours = _AsOurs(header.path, tensors, header.metadata, header.described, header.state, listed, tiles, bool(renamed))
    return replace(ours, smoothed=frozenset(f"{layer}.weight_proj_down" for layer in layers if _is_smoothed(ours, layer)))


def _is_smoothed(header, layer):
    """Whether the layer's proj_down is stored for x / smooth."""
    basis = header.description(f"{layer}.{layout.QUANT_KEY}").get(BASIS, RAW)
    if basis not in (RAW, SMOOTHED):
        raise CheckpointError(f"{header.file}: layer {layer} has {BASIS} {basis!r}, which this version can't run; update "
                              "ComfyUI-SVDQuant.")
    return basis == SMOOTHED


def _natural_shape(part, shape):
    """The shape of a tensor after unpacking its tiles; None if it is not packed in tiles."""
    if part == "weight" and len(shape) == 4 and shape[2:] == (TILE_LINES, TILE_ROWS * TILE_COLUMNS // 2 // TILE_LINES):
        return shape[0] * TILE_ROWS, shape[1] * TILE_COLUMNS // 2
    if part != "weight" and len(shape) == 3 and shape[2] == TILE_ROWS:
        rows = shape[0] * TILE_ROWS
        return (shape[1], rows) if part == "weight_scale" else (rows, shape[1])
    return None


def untile_codes(tiled):
    """(N/128, K/64, 32, 128) int8 -> (N, K/2)."""
    tiles, groups = tiled.shape[:2]
    rows = tiled.view(tiles, groups, TILE_LINES, TILE_ROWS // TILE_LINES, TILE_COLUMNS // 2)
    return rows.permute(0, 2, 3, 1, 4).reshape(tiles * TILE_ROWS, -1)


def untile_scales(tiled):
    """(N/128, G, 128) -> (G, N)."""
    return tiled.permute(1, 0, 2).reshape(tiled.shape[1], -1)


def untile_up(tiled):
    """(N/128, R, 128) -> (N, R)."""
    return tiled.permute(0, 2, 1).reshape(-1, tiled.shape[1])


UNTILE = {"weight": untile_codes, "weight_scale": untile_scales, "weight_proj_up": untile_up}
