"""A family that was found in a model itself, for models of no declared family.

Its description is a JSON object: calibration makes it (host/discovery.py), and the model's file has it in its configuration.

    title, model_class       name of the host's configuration class; dotted name of its diffusion model's class
    image_model              the host's name of the architecture; null if it has none
    host                     {key: value} of the host's configuration that it does not find in the tensors' shapes
    blocks                   {block: [blocks whose outputs it reads]}, in running order
    outside                  [blocks whose outputs the layers outside the blocks read]
    layers                   {layer: {"w4a16", "unsigned", "bias": bool, "reads": the first of the layers that read the same tensor}};
                             outside the blocks all are W4A16
    tensors                  {name: shape} of the whole model in 16 bits
    tokens                   the numbers of tokens that calibration saw most, most of all first
"""

from dataclasses import dataclass, field
from types import MappingProxyType

from .family import NO_ENTRIES, OUTSIDE, Configuration, Family, Layer, Packing, Signature, all_signed, all_unsigned

KEY = "discovered"  # the configuration key that holds the description
FLAGS = "w4a16", "unsigned", "bias"


@dataclass(frozen=True)
class DiscoveredConfiguration(Configuration):
    """The host finds the configuration in the file itself, but for the keys of the description's `host`."""

    def added_to(self, host, config):
        return host | (config[KEY]["host"] if KEY in config else {})


@dataclass(frozen=True)
class DiscoveredFamily(Family):
    """reads: {block: names of the blocks whose outputs it reads}, in running order; read_outside: those that the layers outside the blocks
    read; packed: {layer name: Layer}; readers: {layer name: the first of the layers that read the same tensor}."""

    pass_through = None  # nobody has declared which arguments a block returns

    reads: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    read_outside: tuple = ()
    packed: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    readers: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)

    def layer(self, name):
        return self.packed.get(name)

    def block_of(self, name):
        return next((block for block in self.reads if name.startswith(f"{block}.")), None)

    def running_blocks(self, diffusion_model):
        return [(name, diffusion_model.get_submodule(name)) for name in self.reads]

    def sources(self, diffusion_model):
        return dict(self.reads) | {OUTSIDE: self.read_outside}

    def first_reader(self, name):
        return self.readers.get(name, name)


def discovered(description):
    """The DiscoveredFamily of a description. Raises ValueError, whose message is the second half of a sentence, if it is not one."""
    try:
        _check(description)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("has no valid description of its layers in its configuration") from None
    title, layers = description["title"], description["layers"]
    shapes = {name: tuple(shape) for name, shape in description["tensors"].items()}
    packed = {name: _layer(entry) for name, entry in layers.items()}
    blocks = len(description["blocks"])
    return DiscoveredFamily(
        title=title, architecture=description["image_model"] or title.lower(), model_class=description["model_class"],
        blocks=(), outer=MappingProxyType({name: layer for name, layer in packed.items() if _is_outside(name, description["blocks"])}),
        signature=Signature(anchors=(), names=()),
        configuration=DiscoveredConfiguration(
            keys=(KEY,), fixed=MappingProxyType({"image_model": description["image_model"]}), usual=NO_ENTRIES, matrices=(), vectors=(),
            measure=lambda shapes, usual: {KEY: description}, derive=lambda config: {}, trouble=lambda config: None),
        tensors=lambda config: dict(shapes),
        figures=lambda config: f"{blocks} blocks and {len(layers)} layers, found by calibration",
        text_width="", pooled=None, encoders="", clip_type="", tokens=tuple(description["tokens"]), examples=(),
        reads=MappingProxyType({name: tuple(sources) for name, sources in description["blocks"].items()}),
        read_outside=tuple(description["outside"]), packed=MappingProxyType(packed),
        readers=MappingProxyType({name: entry["reads"] for name, entry in layers.items()}))


def _layer(entry):
    return Layer(Packing.W4A16 if entry["w4a16"] else Packing.W4A4, all_unsigned if entry["unsigned"] else all_signed, bias=entry["bias"])


def _check(description):
    """Raise KeyError, TypeError or AttributeError unless a description, which may come from a file, has the types of one."""
    def require(*conditions):
        if not all(conditions):
            raise TypeError

    blocks, layers, tokens = description["blocks"], description["layers"], description["tokens"]
    require(isinstance(description["title"], str), isinstance(description["model_class"], str), isinstance(description["host"], dict),
            isinstance(description["image_model"], (str, type(None))), len(tokens) == 3, all(_is_size(size) for size in tokens))
    require(all(source in blocks for sources in (*blocks.values(), description["outside"]) for source in sources))
    for name, entry in layers.items():
        require(all(type(entry[flag]) is bool for flag in FLAGS), entry["reads"] in layers, entry["w4a16"] or not _is_outside(name, blocks))
    for shape in description["tensors"].values():
        require(all(_is_size(size) for size in shape))


def _is_outside(name, blocks):
    """Whether layer `name` is in none of the blocks."""
    return not any(name.startswith(f"{block}.") for block in blocks)


def _is_size(value):
    return type(value) is int and value >= 0
