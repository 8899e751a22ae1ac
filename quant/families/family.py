"""What a model family is: all that the pack knows of one architecture, as one frozen declaration.

A declaration imports neither ComfyUI nor PyTorch. It names the host's classes by their dotted names, layers by their names in the
diffusion model, and shapes by functions of a layer's (in_features, out_features), written k and n.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

NO_ENTRIES = MappingProxyType({})


class Packing(Enum):
    """How a linear is stored in 4 bits."""

    W4A4 = "4-bit weights and activations beside a 16-bit low-rank branch"
    W4A16 = "4-bit weights, 16-bit activations: for layers that see few tokens"


def all_signed(k, n):
    """unsigned_from of a layer none of whose inputs come out of a GELU."""
    return k


def all_unsigned(k, n):
    """unsigned_from of a layer all of whose inputs come out of a GELU."""
    return 0


@dataclass(frozen=True)
class Joined:
    """A linear that holds two layers which SVDQuant publishes apart, each with a branch of its own.

    rows: whether the two read the same input, so that the rows of the weight are divided; else their outputs are added, and its columns
    are divided. at(k, n): the row or column at which the second layer begins.
    """

    rows: bool
    at: Callable[[int, int], int]


@dataclass(frozen=True)
class Gelu:
    """The tanh GELU that alone reads a layer's output, so that the layer's kernel can apply it.

    module: its name in the block; columns_from(k, n): the layer's first output column that it reads; reader: the layer of the block that
    reads the GELU's output.
    """

    module: str
    columns_from: Callable[[int, int], int]
    reader: str


@dataclass(frozen=True)
class Layer:
    """How one kind of linear is packed.

    unsigned_from(k, n): the first input column that comes out of a GELU and is therefore coded unsigned; k if none does. bias: whether
    linears of this kind have a bias.
    """

    packing: Packing = Packing.W4A4
    unsigned_from: Callable[[int, int], int] = all_signed
    joined: Joined | None = None
    gelu: Gelu | None = None
    bias: bool = True

    @property
    def branches(self):
        """How many layers that SVDQuant publishes, each with a branch of its own, the linear holds."""
        return 2 if self.joined else 1


@dataclass(frozen=True)
class BlockList:
    """One list of transformer blocks of the diffusion model.

    name: the ModuleList's; layers: {name within a block: Layer} of the packed linears; states: the names of the forward's leading
    arguments that a block hands on, in the order in which it returns them; block_class: the host's class, dotted, in which the layers
    may take over a GELU; mlps: names of (linear, GELU, linear) in a block that can run as one op.
    """

    name: str
    layers: MappingProxyType
    states: tuple
    block_class: str
    mlps: tuple = ()

    def pass_through(self, *args, **kwargs):
        """A block's forward that hands its states on as they came: one value, or a tuple of several."""
        states = tuple(args[i] if i < len(args) else kwargs[name] for i, name in enumerate(self.states))
        return states if len(states) > 1 else states[0]


@dataclass(frozen=True)
class Signature:
    """How a family's tensors are told from others'.

    anchors: names of which a file has one, under its prefix; names: those that it has as well; parts: (beginning of a name, whose files
    lack it): something must begin so; lookalikes: (part of a name, what a file with it is).
    """

    anchors: tuple
    names: tuple
    parts: tuple = ()
    lookalikes: tuple = ()

    def lookalike(self, keys):
        """What a file with tensors `keys` is that looks like the family and is another model; None where nothing says so."""
        return next((what for part, what in self.lookalikes if any(part in key for key in keys)), None)

    def prefixes(self, keys):
        """The prefixes under which `keys` have the family's tensors, sorted."""
        if self.lookalike(keys):
            return []
        found = {key.removesuffix(anchor) for anchor in self.anchors for key in keys if key.endswith(anchor)}
        return sorted(prefix for prefix in found if all(f"{prefix}{name}" in keys for name in self.names))


@dataclass(frozen=True)
class Diffusers:
    """The family in diffusers' naming.

    keys: names by which a file is known; blocks: {configuration key of a depth: diffusers' list of blocks}; width: the matrix whose rows
    are the hidden size; needed: what ComfyUI's conversion joins without a word if it is missing, beside what its table says; names: the
    function of comfy.utils with that table.
    """

    keys: tuple
    blocks: MappingProxyType
    width: str
    needed: tuple
    names: str


@dataclass(frozen=True)
class Nunchaku:
    """The family in Nunchaku's files. Tables read {ours: theirs}, relative to a block or to the model.

    model_classes: values of their metadata's model_class; diffusers_class, comfy_class(configuration): what their loaders expect in the
    metadata that are written; config: {diffusers' configuration key: ComfyUI's}; blocks: {our list: theirs}; linears: W4A4 layers of
    each list of theirs, a layer of ours as one or two of theirs; modulations: W4A16 ones, chunks: how many vectors each of them gives;
    norms, outside: 16-bit tensors and modules; optional: of those outside, the ones that not every model has; swapped: a module whose
    output halves are in the other order; modules_v2, leaves_v2: names of the format's second version, {theirs: version 1's}; inputs:
    modules by which a file of the family is known, the first of which gives the hidden size; output: the last one.
    """

    model_classes: tuple
    diffusers_class: str
    comfy_class: Callable[[dict], str]
    config: MappingProxyType
    inputs: tuple
    output: str
    blocks: MappingProxyType
    linears: MappingProxyType
    modulations: MappingProxyType
    chunks: MappingProxyType
    norms: MappingProxyType
    outside: MappingProxyType
    optional: tuple
    swapped: str
    modules_v2: MappingProxyType
    leaves_v2: MappingProxyType


@dataclass(frozen=True)
class Configuration:
    """The host's configuration of a family's models, and where each of its values comes from.

    keys: those that a file of ours has, in its order; fixed: {key: value} of what makes the family; usual: {key: value} of what neither
    the name nor a tensor's shape tells, as the family has it: a file may say otherwise; matrices, vectors: names of the tensors whose
    shapes are measured; measure({tensor name: shape}, usual values) -> {key: value} that shapes tell; derive(all of these) -> {key:
    value} that follow; trouble(all of these): what can't be, as the second half of a sentence, or None.
    """

    keys: tuple
    fixed: MappingProxyType
    usual: MappingProxyType
    matrices: tuple
    vectors: tuple
    measure: Callable
    derive: Callable
    trouble: Callable

    def of(self, shapes, stored=NO_ENTRIES):
        """The configuration of a model with tensors {name: shape}. stored: what its file says, which counts for `usual` only.

        Raises ValueError, the second half of a sentence, where a tensor is of another kind, or the values can't be.
        """
        for name in self.matrices:
            if len(shapes.get(name, ())) != 2 or 0 in shapes[name]:
                raise ValueError(f"has no matrix {name}")
        for name in self.vectors:
            if len(shapes.get(name, ())) != 1 or 0 in shapes[name]:
                raise ValueError(f"has no vector {name}")
        for key, value in stored.items():
            if key in self.usual and not _is_like(value, self.usual[key]):
                raise ValueError(f"says {key} = {value!r} in its configuration, which can't be")
        usual = {key: stored.get(key, value) for key, value in self.usual.items()}
        config = {**self.fixed, **usual, **self.measure(shapes, usual)}
        if trouble := self.trouble(config):
            raise ValueError(trouble)
        config |= self.derive(config)
        for key, value in stored.items():
            if key in self.keys and config[key] != value:
                raise ValueError(f"says {key} = {value!r} in its configuration and its tensors say {config[key]!r}")
        return {key: config[key] for key in self.keys}


def _is_like(value, usual):
    """Whether a stored number (or list of them) is of the kind that `usual` is: positive, of its type, as many."""
    if isinstance(usual, (list, tuple)):
        return isinstance(value, list) and len(value) == len(usual) and all(map(_is_like, value, usual))
    kinds = (int, float) if isinstance(usual, float) else int
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1e6


@dataclass(frozen=True)
class Family:
    """One architecture.

    title: its name for users; architecture: in a file's ModelSpec card; model_class: the host's class, dotted; lacks: {parameter of the
    host's class that the family has not: whose it is}; needs: modules without which a model is another's.
    blocks: in running order; outer: {name: Layer} outside the blocks, where a layer sees no more than a token a picture.
    text_width: configuration key of the conditioning's width; pooled: whether the conditioning needs a pooled output; encoders: the text
    encoders to name in a message. tokens: numbers of tokens a layer usually sees; examples: for a tooltip, a pattern of layers and one
    with a rank; renamed: (pattern of a parameter's name in newer hosts, its replacement in a file, which every host reads).
    """

    title: str
    architecture: str
    model_class: str
    blocks: tuple
    outer: MappingProxyType
    signature: Signature
    configuration: Configuration
    text_width: str
    pooled: bool
    encoders: str
    tokens: tuple
    examples: tuple
    renamed: tuple = ()
    lacks: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    needs: tuple = ()
    diffusers: Diffusers | None = None
    nunchaku: Nunchaku | None = None

    @property
    def image_model(self):
        """The host's word for the family in a configuration."""
        return self.configuration.fixed["image_model"]

    def layer(self, name):
        """The Layer of linear `name`, relative to the diffusion model; None for one that stays in 16 bits."""
        found = self._in_block(name)
        return self.outer.get(name) if found is None else found[0].layers.get(found[2])

    def block_of(self, name):
        """The name of the block that layer `name` is in; None for a layer outside the blocks."""
        found = self._in_block(name)
        return None if found is None else f"{found[0].name}.{found[1]}"

    def _in_block(self, name):
        """(BlockList, index as text, name within the block), or None."""
        for blocks in self.blocks:
            index, dot, inner = name.removeprefix(f"{blocks.name}.").partition(".")
            if dot and name.startswith(f"{blocks.name}.") and index.isdecimal():
                return blocks, index, inner
        return None

    def running_blocks(self, diffusion_model):
        """[(name, module)] of the transformer blocks, in the order in which they run."""
        return [(f"{blocks.name}.{i}", block) for blocks in self.blocks for i, block in enumerate(getattr(diffusion_model, blocks.name))]

    def pass_through(self, block_name):
        """A forward for block `block_name` that hands its states on as they came."""
        return self._in_block(f"{block_name}.")[0].pass_through

    def block_layers(self, block_name, block):
        """{full name: linear} of a block's layers that are to be packed."""
        named = ((f"{block_name}.{name}", module) for name, module in block.named_modules() if name)
        return {name: module for name, module in named if self.layer(name)}

    def outer_layers(self, diffusion_model):
        """{full name: linear} of the layers outside the blocks that are to be packed."""
        return {name: module for name, module in diffusion_model.named_modules() if name in self.outer}

    def packed_names(self, keys):
        """Names of the layers that `keys` (tensor names) hold and that a quantized model packs, in order of appearance."""
        names = (key.removesuffix(".weight") for key in keys if key.endswith(".weight"))
        return [name for name in names if self.layer(name)]

    def stored_name(self, name):
        """A parameter's name in a file: the one that every version of the host reads."""
        for pattern, stored in self.renamed:
            name = re.sub(pattern, stored, name)
        return name
