"""What a Nunchaku model has: its packed layers and its 16-bit tensors, each checked against the file's header. No weight is read, except
small ones of which two layers of ours have to have the same."""

from dataclasses import dataclass, replace

import torch

from ...layers import layout
from ..header import CheckpointError
from . import halves, names
from . import layout as order

HALF_TYPES = (torch.bfloat16, torch.float16)
FLOAT_TYPES = (*HALF_TYPES, torch.float32)
UNUSED = ("smooth_orig",)  # the smoothing factor before it was merged into another layer; it has no use
LEAVES = ("qweight", "wscales", "wzeros", "wcscales", "wtscale", "smooth", "bias", "lora_down", "lora_up")  # tensors read of a layer
SECOND_SCALES = ("wtscale", "wcscales")  # NVFP4's


def kind_of(nvfp4):
    """The name of a model's codes for users."""
    return "NVFP4" if nvfp4 else "INT4"


@dataclass(frozen=True)
class PackedLayers:
    """Packed layers of ours from one or two of Nunchaku's. names: ours, of which several are stacked in Nunchaku's one; spec: the LayerSpec
    of ours, or of the stack; parts: v1 prefixes of Nunchaku's; joint: as in halves.join; chunks: number of vectors that a modulation
    layer computes, else 0."""

    names: tuple
    spec: layout.LayerSpec
    parts: tuple
    joint: bool = True
    chunks: int = 0

    def specs(self):
        """{our layer: its LayerSpec}."""
        return dict.fromkeys(self.names, replace(self.spec, out_features=self.spec.out_features // len(self.names)))

    def stored(self):
        """v1 names of the tensors that are read."""
        return [f"{part}.{leaf}" for part in self.parts for leaf in LEAVES]


@dataclass(frozen=True)
class Plain:
    """A 16-bit tensor of ours: the rows of the tensors `stored` (v1 names) one after another; of these the part `piece` of `pieces` equal
    ones."""

    stored: tuple
    piece: int = 0
    pieces: int = 1


def w4a4_layers(tables, kind):
    """Yield (our layers within a block, Nunchaku's) of each entry of the tables for Nunchaku's list `kind`."""
    yield from (((name,), parts) for name, parts in tables.linears[kind].items())
    yield from ((ours, (part,)) for part, ours in tables.stacked.get(kind, {}).items())


def dense_parts(source, tables, kind, block, parts):
    """The weights that hold Nunchaku's layer `parts` of a block in 16 bits, as v1 names; None if the file has it in 4 bits."""
    modules = tables.dense.get(kind, {}).get(parts[0])
    if modules is None or f"{block}.{parts[0]}.qweight" in source.tensors:
        return None
    return tuple(f"{block}.{module}.weight" for module in modules)


def _linear_spec(source, part, bias, nvfp4):
    """The LayerSpec of one of Nunchaku's W4A4 layers, without unsigned_from. bias: whether it has one. Raises CheckpointError unless its
    tensors are valid."""
    kind = layout.NVFP4 if nvfp4 else layout.SVDQUANT
    shape, file = source.info(f"{part}.qweight").shape, source.header.file
    if len(shape) != 2 or shape[0] % order.TILE or shape[1] * 2 % order.TILE or 0 in shape:
        raise CheckpointError(f"{file}: tensor {part}.qweight has shape {list(shape)} instead of (N, K/2) with N and K "
                              f"multiples of {order.TILE}; choose a Nunchaku {source.family.title} model.")
    n, k = shape[0], shape[1] * 2
    source.check(f"{part}.qweight", shape, (torch.int8,))
    dtype = source.check(f"{part}.smooth", (k,), HALF_TYPES)
    if bias:
        source.check(f"{part}.bias", (n,), (dtype,))
    source.check(f"{part}.wscales", (k // layout.GROUP_SIZES[kind], n), (torch.float8_e4m3fn,) if nvfp4 else (dtype,))
    if nvfp4:
        _check_second_scales(source, part, n)
    rank = 0
    if f"{part}.lora_down" in source.tensors or f"{part}.lora_up" in source.tensors:
        rank = (*source.info(f"{part}.lora_down").shape, 0, 0)[1]
        if rank % order.RANK_TILE:
            raise CheckpointError(f"{file}: tensor {source.label(f'{part}.lora_down')} has rank {rank}, which is not a multiple of "
                                  f"{order.RANK_TILE}; the file is damaged, download it again.")
        source.check(f"{part}.lora_down", (k, rank), (dtype,))
        source.check(f"{part}.lora_up", (n, rank), (dtype,))
    return layout.LayerSpec(kind, k, n, rank, bias=bias, dtype=dtype)


def _check_second_scales(source, part, n):
    """Raise CheckpointError unless the second scales are valid: wtscale, one number for a layer of one matrix, or wcscales, one number per
    row of a fused q k v layer. Very old files have neither."""
    if f"{part}.wtscale" in source.tensors:
        shape = source.info(f"{part}.wtscale").shape
        source.check(f"{part}.wtscale", shape if shape == () else (1,), FLOAT_TYPES)
    if f"{part}.wcscales" in source.tensors:
        source.check(f"{part}.wcscales", (n,), HALF_TYPES)


def check_uniform(source, layers, nvfp4):
    """Raise CheckpointError if some W4A4 layers have second scales, or a branch, and others have none. Very old files have none at all. In
    newer files a layer without them is damaged and would give wrong images."""
    parts = [part for layer in layers if not layer.chunks for part in layer.parts]
    for leaves in ((SECOND_SCALES,) if nvfp4 else ()) + (("lora_down", "lora_up"),):
        with_them = [part for part in parts if any(f"{part}.{leaf}" in source.tensors for leaf in leaves)]
        without = set(parts) - set(with_them)
        if with_them and without:
            labels = [source.label(f"{part}.{leaf}").rpartition(".") for part in (with_them[0], min(without)) for leaf in leaves]
            what = " or ".join(leaf for _, _, leaf in labels[len(leaves):])
            raise CheckpointError(f"{source.header.file} has {what} in layer {labels[0][0]} and not in {labels[-1][0]}; the file is "
                                  "incomplete, download it again.")


def linear(source, ours, parts, nvfp4):
    """The PackedLayers of our linears `ours`: one, which is one or two of Nunchaku's layers, or several, which are stacked in one."""
    name, layer = ours[0], source.family.layer(ours[0])
    specs = [_linear_spec(source, part, layer.bias, nvfp4) for part in parts]
    n, k, rank = specs[0].out_features, specs[0].in_features, specs[0].rank
    joint = True
    if len(specs) == 2:
        n, k, rank, joint = _joined_sizes(source, name, parts, specs)
    if n % len(ours):
        raise CheckpointError(f"{source.header.file}: tensor {parts[0]}.qweight has {n} rows, which are not those of {len(ours)} equally "
                              "high layers; the file is damaged, download it again.")
    unsigned_from = layer.unsigned_from(k, n)
    if len(specs) == 2 and not layer.joined.rows and (at := layer.joined.at(k, n)) != specs[0].in_features:
        raise CheckpointError(f"{source.header.file}: layer {parts[0]} has {specs[0].in_features} input columns instead of "
                              f"{at}; the file is damaged, download it again.")
    if nvfp4:
        blocks = (1,) if len(specs) == 1 or layer.joined.rows else halves.scale_blocks(*(spec.in_features for spec in specs))
        spec = layout.LayerSpec(layout.NVFP4, k, n, rank, bias=layer.bias, dtype=specs[0].dtype, scale_blocks=sum(blocks))
        return PackedLayers(tuple(ours), spec, tuple(parts), joint)
    try:
        spec = layout.svdquant_spec(k, n, rank, unsigned_from, layer.bias, specs[0].dtype)
    except ValueError as error:
        raise CheckpointError(f"{source.header.file}: layer {name} {error}; the file is damaged, download it again.") from None
    return PackedLayers(tuple(ours), spec, tuple(parts), joint)


def _joined_sizes(source, name, parts, specs):
    """(N, K, rank, joint) of our linear `name`, which is two of Nunchaku's layers. Raises CheckpointError unless they fit together."""
    rows = by_rows(source, name)
    shared, ranks = ("in_features", "lora_down") if rows else ("out_features", "lora_up"), [spec.rank for spec in specs]
    if getattr(specs[0], shared[0]) != getattr(specs[1], shared[0]) or specs[0].dtype != specs[1].dtype:
        raise CheckpointError(f"{source.header.file}: layers {parts[0]} and {parts[1]} do not fit together; the file is "
                              "damaged, download it again.")
    if rows and source.read_bytes(f"{parts[0]}.smooth") != source.read_bytes(f"{parts[1]}.smooth"):
        raise CheckpointError(f"{source.header.file}: layers {parts[0]} and {parts[1]} read the same input with different "
                              "smoothing factors, which this version can't run; choose another version of the model.")
    joint = ranks[0] == ranks[1] and (not ranks[0] or source.read_bytes(f"{parts[0]}.{shared[1]}")
                                      == source.read_bytes(f"{parts[1]}.{shared[1]}"))
    n, k = specs[0].out_features, specs[0].in_features
    n, k = (n + specs[1].out_features, k) if rows else (n, k + specs[1].in_features)
    return n, k, ranks[0] if joint else sum(ranks), joint


def by_rows(source, name):
    """Whether the two parts of our layer split its rows, not its columns."""
    return source.family.layer(name).joined.rows


def is_dense(source, part):
    """Whether a modulation layer is in 16 bits, as in diffusers' files: nunchaku-lite reads both forms."""
    return f"{part}.weight" in source.tensors


def modulation(source, name, part, chunks):
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
    return PackedLayers((name,), layout.LayerSpec(layout.AWQ, k, n, dtype=dtype), (part,), chunks=chunks)


def plain_tensors(source, depths):
    """{our name: Plain} of the tensors that are 16-bit in every file, and of modulation layers that are in this one."""
    tables = source.family.nunchaku
    plain = {f"{ours}.{name}": f"{theirs}.{stored}" for ours, theirs, kind in names.blocks(tables, depths)
             for name, stored in tables.norms[kind].items()} | dict(tables.others)
    dense = {f"{ours}.{name}": f"{theirs}.{part}" for ours, theirs, kind in names.blocks(tables, depths)
             for name, part in tables.modulations.get(kind, {}).items() if is_dense(source, f"{theirs}.{part}")}
    for name, stored in (tables.outside | dense).items():
        if name not in tables.optional or any(f"{stored}.{leaf}" in source.tensors for leaf in tables.leaves):
            plain |= {f"{name}.{leaf}": f"{stored}.{leaf}" for leaf in tables.leaves}
    return {name: Plain((stored,)) for name, stored in plain.items()}


def plain_shape(source, entry):
    """The shape of a 16-bit tensor of ours. Raises CheckpointError unless the file's tensors fit."""
    shapes = [source.info(stored).shape for stored in entry.stored]
    for stored, shape in zip(entry.stored, shapes):
        dtypes = FLOAT_TYPES if stored == entry.stored[0] else (source.info(entry.stored[0]).dtype,)
        source.check(stored, shape if stored == entry.stored[0] else (*shape[:1], *shapes[0][1:]), dtypes)
    rows, parts = sum(shape[0] for shape in shapes) if shapes[0] else 0, 2 if is_swapped(source, entry) else entry.pieces
    if parts > 1 and (not rows or rows % parts):
        what = "an even number of rows" if parts == 2 else f"a number of rows that is a multiple of {parts}"
        raise CheckpointError(f"{source.header.file}: tensor {source.label(entry.stored[0])} has shape {list(shapes[0])} instead of "
                              f"{what}; the file is damaged, download it again.")
    return (rows // entry.pieces, *shapes[0][1:]) if shapes[0] else ()


def is_swapped(source, entry):
    """Whether the two halves of a 16-bit tensor are in the opposite order."""
    swapped = source.family.nunchaku.swapped
    return swapped is not None and entry.stored[0].startswith(f"{source.family.nunchaku.outside[swapped]}.")


def markers(source):
    """{our name: empty tensor} of the tensors by which our files say what Nunchaku's say in the configuration."""
    config = source.json("config")
    return {name: torch.zeros(0, dtype=torch.bfloat16) for key, name in source.family.nunchaku.markers.items() if config.get(key) is True}


def check_left_over(source, layers, plain, nvfp4):
    """Raise CheckpointError if the file has a tensor that no layer uses."""
    used = {stored for entry in plain.values() for stored in entry.stored}
    linear = ("smooth", "lora_down", "lora_up", *UNUSED, *(SECOND_SCALES if nvfp4 else ()))
    for layer in layers:
        leaves = ("qweight", "wscales", *(("bias",) if layer.spec.bias else ()), *(("wzeros",) if layer.chunks else linear))
        used |= {f"{part}.{leaf}" for part in layer.parts for leaf in leaves}
    for name in source.tensors:
        if name not in used:
            raise CheckpointError(f"{source.header.file} has tensor {source.label(name)}, which a Nunchaku {kind_of(nvfp4)} "
                                  f"{source.family.title} model has no place for; choose another version of the model.")
