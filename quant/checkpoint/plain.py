"""Models that are not packed in 4 bits: in 16 bits, in fp8, or in a format that ComfyUI itself reads."""

from dataclasses import dataclass

from .. import families
from ..families.family import Family
from . import comfy_kitchen, completeness, core_formats, foreign
from .header import CheckpointError


@dataclass(frozen=True)
class PlainFile:
    """A whole model that is not packed, checked.

    family: the model's; prefix: of its tensors' names in the file; names: {name that every host reads: name in the file}; shapes: {name
    that every host reads: shape}, without the tensors beside the weights, such as scales; config: the host's configuration; formats:
    {layer: name of the format of ComfyUI's in which the layer is stored}.
    """

    family: Family
    prefix: str
    names: dict
    shapes: dict
    config: dict
    formats: dict


def find(header):
    """(Family, prefix of its tensors) of a file's model; the prefix is None under diffusers' names. Raises CheckpointError if the file
    holds no model of a family, or one that would be read incorrectly."""
    family, prefix = foreign.find(header) or (foreign.find_diffusers(header), None)
    if family is None:
        what = foreign.kind(header) or f"not a {families.TITLES} model"
        move = f"move it to {foreign.FOLDERS[what]}, and " if what in foreign.FOLDERS else ""
        raise CheckpointError(f"{header.file} is {what}; {move}choose a {families.TITLES} model in safetensors format.")
    return family, prefix


def open_file(header, family, prefix):
    """The PlainFile of a model in ComfyUI's naming, as `find` found it. Raises CheckpointError unless the model is whole."""
    inside = header.within(prefix)
    described = {layer.removeprefix(prefix): conf.get("format") for layer, conf in comfy_kitchen.descriptions(inside).items()}
    formats = {layer: name for layer, name in described.items() if f"{layer}.weight" in inside.tensors}
    for layer, name in formats.items():
        core_formats.check(header, prefix, layer, name)
    names = completeness.stored_names(header, family, inside.tensors)
    # foreign.find has checked those that belong to a layer of the file, such as its scales.
    shapes = {name: inside.tensors[stored].shape for name, stored in names.items() if not _is_beside(stored, inside.tensors, prefix)}
    completeness.check_types(header, {name: inside.tensors[names[name]].dtype for name in shapes}, formats)
    config = completeness.configuration(header, family, shapes, {})
    completeness.check(header, family, config, shapes, formats=formats)
    return PlainFile(family, prefix, {name: prefix + stored for name, stored in names.items()}, shapes, config, formats)


def open_diffusers(header, family):
    """The host's configuration of a model in diffusers' naming. Raises CheckpointError unless the model is whole."""
    foreign.check_diffusers(header, family)
    return completeness.check_diffusers(header, family)


def _is_beside(name, names, prefix):
    """Whether a tensor lies beside a diffusion model's weights: a layer's scale and the like, or a tensor of another model."""
    in_layer = foreign.layer_of(name, names) and not name.endswith((".weight", ".bias"))
    return in_layer or name == foreign.MARK or not prefix and name.startswith(foreign.OTHER_MODELS)
