"""Whether a file holds a whole model: every tensor of its family's model in its shape, and no other. Loading, inspection and conversion
make this one check. It reads no weight and needs no ComfyUI."""

from . import core_formats
from .header import WEIGHT_DTYPES, CheckpointError
from .nunchaku.names import depth


def stored_names(header, family, names):
    """{name that every host reads: name in the file} of a file's tensors, without prefix. Raises CheckpointError if the file has a
    tensor under two names."""
    found = {}
    for name in names:
        stored = family.stored_name(name)
        if stored in found:
            raise CheckpointError(f"{header.file} has tensor {stored} twice, as {found[stored]} and {name}; download or save it again.")
        found[stored] = name
    return found


def configuration(header, family, shapes, stored):
    """The host's configuration of a model with tensors {name: shape}. stored: the configuration in the file's metadata. Raises
    CheckpointError if tensors or metadata give no valid configuration."""
    try:
        return family.configuration.of(shapes, stored)
    except ValueError as error:
        raise CheckpointError(f"{header.file} {error}; the file is incomplete or damaged, download or save it again.") from None


def check(header, family, config, shapes, specs=None, formats=None):
    """Raise CheckpointError unless tensors {name: shape} are all the tensors of a family's model, each in the shape that it has there.

    config: the model's configuration; specs: {layer: LayerSpec} of packed layers; formats: {layer: name of the format of ComfyUI's in
    which its weight is stored}.
    """
    expected = family.tensors(config)
    for layer, spec in (specs or {}).items():
        shape = expected.pop(f"{layer}.weight", None)
        if shape not in (None, (spec.out_features, spec.in_features)):
            raise CheckpointError(f"{header.file}: layer {layer} is {spec.out_features} x {spec.in_features} instead of {shape[0]} x "
                                  f"{shape[1]}; the file does not fit a {family.title} of its size, download or save it again.")
        if shape is not None:
            expected.pop(f"{layer}.bias", None)
            expected |= {f"{layer}.{part}": shape for part, (shape, _) in spec.tensors().items()}
    for layer, name in (formats or {}).items():
        if f"{layer}.weight" in expected:
            expected[f"{layer}.weight"] = core_formats.stored_shape(name, expected[f"{layer}.weight"])
    _compare(header, family, expected, shapes)


def check_diffusers(header, family):
    """The host's configuration of a whole model in diffusers' naming. Raises CheckpointError unless its tensors are exactly the model's."""
    theirs, found = family.diffusers, {}
    for name, info in header.tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in theirs.measured:
            found[f"{theirs.measured[module]}.{leaf}"] = info.shape
    config = configuration(header, family, found, {}) | {key: depth(header.tensors, blocks) for key, blocks in theirs.blocks.items()}
    _compare(header, family, theirs.tensors(config), {name: info.shape for name, info in header.tensors.items()})
    return config


def _compare(header, family, expected, shapes):
    """Raise CheckpointError unless tensors {name: shape} are the expected ones, {name: shape, or None for any shape}."""
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{header.file} lacks tensor {name}; the file is incomplete, download or save it again.")
        if shape is not None and tuple(shapes[name]) != shape:
            raise CheckpointError(f"{header.file}: tensor {name} has shape {list(shapes[name])} instead of {list(shape)}; the "
                                  f"file does not fit a {family.title} of its size, download or save it again.")
    left_over = next((name for name in shapes if name not in expected and name not in family.unused), None)
    if left_over is not None:
        raise CheckpointError(f"{header.file} has tensor {left_over}, which a {family.title} of its size has no place for; download or "
                              "save it again, or choose another version of the model.")


def check_types(header, dtypes, quantized):
    """Raise CheckpointError unless all tensors {name: dtype} outside the layers `quantized` have a floating point type."""
    for name, dtype in dtypes.items():
        if name.rpartition(".")[0] not in quantized and dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{header.file}: tensor {name} is {dtype} instead of a floating point type; the file is damaged, or "
                                  "mixes formats that this version can't run, download or save it again.")
