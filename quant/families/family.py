"""The declaration of a model family: one frozen dataclass holds all that the pack knows about an architecture.

A declaration imports neither ComfyUI nor PyTorch. It names the host's classes by their dotted names, layers by their names in the
diffusion model, and shapes by functions of a layer's (in_features, out_features), written k and n.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

NO_ENTRIES = MappingProxyType({})
# {leaf name in the second version of Nunchaku's format: in the first}.
NUNCHAKU_LEAVES = MappingProxyType({
    "proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig"})
OUTSIDE = "outside"  # in place of a block's name: the layers outside the blocks; their "block" is the whole model


class Packing(Enum):
    """How a linear is stored in 4 bits."""

    W4A4 = "4-bit weights and activations beside a low-rank branch"
    W4A16 = "4-bit weights, 16-bit activations: for layers that see few tokens"


def all_signed(k, n):
    """unsigned_from of a layer that has no input from a GELU."""
    return k


def all_unsigned(k, n):
    """unsigned_from of a layer whose inputs all come from a GELU."""
    return 0


@dataclass(frozen=True)
class Joined:
    """A linear that combines two layers, which published SVDQuant files keep separate, each with its own branch.

    rows: True if both layers read the same input, so that the weight's rows are split; False if their outputs are added, so that its
    columns are split. at(k, n): the row or column at which the second layer begins.
    """

    rows: bool
    at: Callable[[int, int], int]


@dataclass(frozen=True)
class Gelu:
    """A tanh GELU that is the only reader of a layer's output columns, so that the layer's kernel can apply it.

    module: the GELU's name in the block; columns_from(k, n): the layer's first output column that the GELU reads; reader: the name of the
    layer that reads the GELU's output; module_class: the dotted name of the GELU's class. A class of the host's may hold the layer itself,
    as its only child, and compute the layer and the GELU.
    """

    module: str
    columns_from: Callable[[int, int], int]
    reader: str
    module_class: str = "torch.nn.modules.activation.GELU"


@dataclass(frozen=True)
class Layer:
    """How one kind of linear is packed.

    unsigned_from(k, n): the first input column that comes from a GELU and therefore gets unsigned codes; k if there is none. joined:
    set if the linear combines two layers. gelu: set if the layer's kernel can apply a GELU to its output. bias: whether linears of this
    kind have a bias.
    """

    packing: Packing = Packing.W4A4
    unsigned_from: Callable[[int, int], int] = all_signed
    joined: Joined | None = None
    gelu: Gelu | None = None
    bias: bool = True

    @property
    def branches(self):
        """How many layers of published SVDQuant files the linear combines; each of them has its own branch there."""
        return 2 if self.joined else 1


@dataclass(frozen=True)
class BlockList:
    """One list of transformer blocks of the diffusion model.

    name: the ModuleList's name; layers: {name within a block: Layer} of the packed linears; states: the names of the forward's leading
    arguments that a block updates and returns; returned: the same names in the order in which it returns them, if that is another one;
    after: names of the lists whose last blocks' outputs the first block of this list reads; None for the list before it; shares_input:
    groups of layers that read the same tensor, such as q, k and v, which get one smoothing factor; mlps: names of the (linear, GELU,
    linear) Sequentials in a block that can run as one op; sequence: the states in the order in which attention joins their tokens, for
    blocks whose tokens can be divided among GPUs: only attention, through the host's function, mixes them, and the position embedding is
    the argument pe, (B, 1, L, ...).
    """

    name: str
    layers: MappingProxyType
    states: tuple
    returned: tuple = ()
    after: tuple | None = None
    shares_input: tuple = ()
    mlps: tuple = ()
    sequence: tuple = ()

    def pass_through(self, *args, **kwargs):
        """A block's forward that returns its states unchanged: one value, or a tuple of several."""
        given = {name: args[i] if i < len(args) else kwargs[name] for i, name in enumerate(self.states)}
        states = tuple(given[name] for name in self.returned or self.states)
        return states if len(states) > 1 else states[0]


@dataclass(frozen=True)
class Pooled:
    """The conditioning's pooled output, which a forward takes as one row a picture, and which reaches W4A16 layers alone.

    argument: its name in the forward; others: the other arguments with one row a picture; embedders: beginnings of the names of the
    modules that embed these arguments, whose rows are added up for the other W4A16 layers; unless: keyword arguments with which a forward
    has other rows.
    """

    argument: str
    others: tuple
    embedders: tuple
    unless: tuple = ()


@dataclass(frozen=True)
class FusedBlock:
    """A forward for the blocks of one of the host's classes, which computes the same with fewer passes over memory.

    forward(block, host, arguments of the class's forward) -> its result, or NotImplemented for a call that it doesn't take; host:
    host/fused_blocks.Host. sizes(block) -> numbers, equal for blocks of one kind; example(*sizes, random) -> (arguments of the class,
    arguments of a forward, first its states in the order of its result), for a numerical comparison with the class's own forward.
    functions: names of functions of the class's module that the forward replaces or relies on, where the host has them; rope, attention:
    dotted names of the host's functions that rotate q and k, which the forward replaces, and that compute attention, which other packs may
    replace; sources: digests of the host's source (host/fused_blocks.digest) for which the forward was written; gated: names of the
    block's packed layers whose output the forward has added to the states (PackedLinear.add_gated); shared: groups of its layers that
    the forward gives to Host.outputs.
    """

    forward: Callable
    sizes: Callable
    example: Callable
    functions: tuple
    rope: str
    attention: str
    sources: frozenset
    gated: tuple = ()
    shared: tuple = ()


@dataclass(frozen=True)
class Signature:
    """How the tensor names of a family's files are recognized.

    anchors: a file has one of these names, under its prefix; names: it has all of these names too; parts: (beginning of a name, title of
    the model that lacks such names): some name must begin so; lookalikes: (part of a name, description of the other model that has it);
    telltale: part of a name by which a model with parts missing is still recognized, for messages, or None.
    """

    anchors: tuple
    names: tuple
    parts: tuple = ()
    lookalikes: tuple = ()
    telltale: str | None = None

    def lookalike(self, keys):
        """The description of another, similar model that the tensors `keys` belong to; None if there is no sign of one."""
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

    keys: names by which a file is recognized; blocks: {configuration key of a depth: diffusers' list of blocks}; tensors(configuration) ->
    {diffusers' name: shape} of a model; measured: {diffusers' module: our name} of the modules from which the configuration is measured;
    names: the function of comfy.utils that has ComfyUI's conversion table.
    """

    keys: tuple
    blocks: MappingProxyType
    tensors: Callable[[dict], dict]
    measured: MappingProxyType
    names: str


@dataclass(frozen=True)
class Nunchaku:
    """The family in Nunchaku's files. Tables map {our name: Nunchaku's name}, relative to a block or to the model.

    model_classes: values of model_class in Nunchaku's metadata; config: {diffusers' configuration key: ComfyUI's key}; inputs: modules by
    which a file of the family is recognized, the first of which has the hidden size; blocks: {our list of blocks: Nunchaku's}; linears:
    the W4A4 layers of each of Nunchaku's lists, one or two of them for a layer of ours; modulations: the W4A16 layers; norms, outside,
    others: 16-bit tensors of a block, modules, and tensors that are neither a weight nor a bias; leaves: the tensors of the modules in
    `outside`; optional: modules of `outside` that not every model has; swapped: a module whose two output halves are in the opposite
    order; modules_v2, leaves_v2: names of the format's second version, {version 2: version 1}; chunks: the number of modulation vectors
    that each modulation layer computes.
    stacked: {list: {Nunchaku's W4A4 layer: our layers, equally high, whose rows it has one after another}}; dense: {list: {Nunchaku's W4A4
    layer: the layers that it is where a file has it in 16 bits}}; markers: {diffusers' configuration key: the empty tensor by which our
    files say that it is true}.
    Only of a family that we write: diffusers_class, comfy_class(configuration): the class names that Nunchaku's loaders expect in the
    metadata; output: the last module.
    """

    model_classes: tuple
    config: MappingProxyType
    inputs: tuple
    blocks: MappingProxyType
    linears: MappingProxyType
    norms: MappingProxyType
    outside: MappingProxyType
    modules_v2: MappingProxyType
    leaves_v2: MappingProxyType = field(default_factory=lambda: NUNCHAKU_LEAVES)
    modulations: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    chunks: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    stacked: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    dense: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    others: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    markers: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    leaves: tuple = ("weight", "bias")
    optional: tuple = ()
    swapped: str | None = None
    diffusers_class: str | None = None
    comfy_class: Callable[[dict], str] | None = None
    output: str | None = None


@dataclass(frozen=True)
class Configuration:
    """The host's configuration of a family's models, and where each of its values comes from.

    keys: the keys that our files store, in order; fixed: {key: value} common to all models of the family; usual: {key: value} that
    tensor shapes don't determine, with the family's usual values, which a file may override; matrices, vectors: names of the tensors
    whose shapes are measured; measure({tensor name: shape}, usual values) -> {key: value} found from shapes; derive(all of these) ->
    {key: value} computed from them; trouble(all of these): the second half of a sentence that says which value is invalid, or None;
    assumed: {key: value} that the host assumes where its own configuration lacks the key; detected: keys of `assumed` that the host finds
    in a file itself, if it knows such models; values(configuration): names of the tensors whose values, and not only shapes, the host's
    detection reads.
    """

    keys: tuple
    fixed: MappingProxyType
    usual: MappingProxyType
    matrices: tuple
    vectors: tuple
    measure: Callable
    derive: Callable
    trouble: Callable
    assumed: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    detected: tuple = ()
    values: Callable = lambda configuration: ()

    def of(self, shapes, stored=NO_ENTRIES):
        """The configuration of a model with tensors {name: shape}. stored: the configuration in its file, used for `usual` only.

        Raises ValueError, whose message is the second half of a sentence, if a tensor has the wrong rank or a value is invalid.
        """
        for name in self.matrices:
            if len(shapes.get(name, ())) != 2 or 0 in shapes[name]:
                raise ValueError(f"has no matrix {name}")
        for name in self.vectors:
            if len(shapes.get(name, ())) != 1 or 0 in shapes[name]:
                raise ValueError(f"has no vector {name}")
        for key, value in stored.items():
            if key in self.usual and not _is_like(value, self.usual[key]):
                raise ValueError(f"has {key} = {value!r} in its configuration, which is not valid")
        usual = {key: stored.get(key, value) for key, value in self.usual.items()}
        config = {**self.fixed, **usual, **self.measure(shapes, usual)}
        if trouble := self.trouble(config):
            raise ValueError(trouble)
        config |= self.derive(config)
        for key, value in stored.items():
            if key in self.keys and config[key] != value:
                raise ValueError(f"has {key} = {value!r} in its configuration, but its tensors give {config[key]!r}")
        return {key: config[key] for key in self.keys}


    def added_to(self, host, config):
        """The host's configuration `host`, a dict, with our `config`. Older hosts don't know every key; a key is left out where they
        assume its value."""
        return host | {key: value for key, value in config.items() if key in host or value != self.assumed.get(key)}

    def unknown_to(self, host, config):
        """"key = value" of the first value of `config` that a host should have found in the file itself, and has not, or None."""
        missed = (key for key in self.detected if host.get(key, self.assumed[key]) != config[key])
        return next((f"{key} = {config[key]}" for key in missed), None)


def _is_like(value, usual):
    """Whether a stored number, or list of numbers, is positive and has the type and length of `usual`."""
    if isinstance(usual, (list, tuple)):
        return isinstance(value, list) and len(value) == len(usual) and all(map(_is_like, value, usual))
    kinds = (int, float) if isinstance(usual, float) else int
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1e6


@dataclass(frozen=True)
class Family:
    """One architecture.

    title: its name for users; architecture: its name in a file's ModelSpec card; model_class: the dotted name of the host's class; lacks:
    {key of the host's configuration that the family doesn't have: title of the model that has it}; needs: modules that every model of the
    family has; unused: parameters that some hosts' models and some files have and no forward reads.
    blocks: the BlockLists in running order; outer: {name: Layer} of layers outside the blocks, whose input has one token per image.
    tensors(configuration) -> {tensor name in a file: shape} of a 16-bit model, packed layers as the linears that they replace;
    figures(configuration): the sizes that describe a model to users, as text; variants(configuration): the name of the published model
    with this configuration, or None.
    text_width: configuration key of the conditioning's width; pooled: the conditioning's pooled output, None if the model takes none;
    encoders: the text encoders to name in a message; clip_type: the host's name of the kind of text encoder. cell: pixels a side of one
    element of the latent; tokens: usual numbers of tokens in a layer's input; examples: for a tooltip, a pattern of layers and a pattern
    with a rank; largest: (name, tokens, inputs, outputs) of the largest layers of a published model, on which a GPU is measured;
    renamed: (pattern of a parameter's name in newer hosts, its replacement in a file, which every host reads); fused: the module in this
    folder whose BLOCKS are {dotted name of a host's class: FusedBlock}, imported when a model is built; None if there is none.
    """

    title: str
    architecture: str
    model_class: str
    blocks: tuple
    outer: MappingProxyType
    signature: Signature
    configuration: Configuration
    tensors: Callable[[dict], dict]
    figures: Callable[[dict], str]
    text_width: str
    pooled: Pooled | None
    encoders: str
    clip_type: str
    tokens: tuple
    examples: tuple
    largest: tuple = ()
    renamed: tuple = ()
    lacks: MappingProxyType = field(default_factory=lambda: NO_ENTRIES)
    needs: tuple = ()
    unused: tuple = ()
    diffusers: Diffusers | None = None
    nunchaku: Nunchaku | None = None
    variants: Callable[[dict], str | None] = lambda configuration: None
    fused: str | None = None
    cell: int = 8

    def variant(self, configuration):
        """The name of a model with this configuration, for users."""
        return self.variants(configuration) or self.title

    def relative(self, configuration):
        """The title of the relative on the same class that a host's configuration belongs to, or None."""
        return next((title for feature, title in self.lacks.items() if configuration.get(feature)), None)

    @property
    def image_model(self):
        """The host's name of the family in a configuration."""
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

    def sources(self, diffusion_model):
        """{block name: names of the blocks whose outputs are its states}, in running order."""
        found, last = {}, {}  # last: {list: names of the blocks whose outputs leave it}
        for i, blocks in enumerate(self.blocks):
            after = [before.name for before in self.blocks[max(i - 1, 0):i]] if blocks.after is None else blocks.after
            states = tuple(name for before in after for name in last[before])
            for j in range(len(getattr(diffusion_model, blocks.name))):
                found[f"{blocks.name}.{j}"], states = states, (f"{blocks.name}.{j}",)
            last[blocks.name] = states
        return found

    def first_reader(self, name):
        """The first of the layers that read the same tensor as packed layer `name` (BlockList.shares_input); most layers are alone."""
        if found := self._in_block(name):
            blocks, index, inner = found
            shared = next((group for group in blocks.shares_input if inner in group), (inner,))
            return f"{blocks.name}.{index}.{shared[0]}"
        return name

    def pass_through(self, block_name):
        """A forward for block `block_name` that returns its states unchanged."""
        return self._in_block(f"{block_name}.")[0].pass_through

    def block_layers(self, block_name, block):
        """{full name: linear} of the layers of a block that quantization packs."""
        named = ((f"{block_name}.{name}", module) for name, module in block.named_modules() if name)
        return {name: module for name, module in named if self.layer(name)}

    def outer_layers(self, diffusion_model):
        """{full name: linear} of the layers outside the blocks that quantization packs."""
        return {name: module for name, module in diffusion_model.named_modules() if name in self.outer}

    def packed_names(self, keys):
        """Names of the layers among `keys` (tensor names) that a quantized model packs, in order of appearance."""
        names = (key.removesuffix(".weight") for key in keys if key.endswith(".weight"))
        return [name for name in names if self.layer(name)]

    def stored_name(self, name):
        """A parameter's name in a file: the one that every version of the host reads."""
        for pattern, stored in self.renamed:
            name = re.sub(pattern, stored, name)
        return name
