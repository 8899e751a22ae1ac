"""Fused forwards for a quantized model's blocks (FusedBlock of the family).

A block keeps its place and its parameters; its class becomes a subclass of the host's, with a forward that takes fewer passes over memory.
That forward runs where the host is known: the source of the host's class has a digest that the family lists, nobody has replaced the
functions and norms whose work it does, and its numbers agree with those of the host's forward on this device. Otherwise the host's own
forward runs, and a line of the log says so once if it is for the whole session. SVDQUANT_FUSED=0 switches the fused forwards off.
"""

import functools
import hashlib
import importlib
import inspect
import io
import logging
import operator
import os
import sys
import textwrap
import threading
import tokenize
from collections.abc import Callable
from typing import NamedTuple

import comfy.ops
import torch

from ...cuda import block_ops, traced
from ..layers import block_branches, shared_input
from ..layers.linear import PackedLinear, replaced

log = logging.getLogger(__name__)

VARIABLE = "SVDQUANT_FUSED"  # environment variable: 0 switches the fused forwards off
HOST_MODULES = "comfy."  # how the names of the host's modules begin
OVERRIDE = "optimized_attention_override"  # the transformer option by which nodes replace attention
LARGEST_ERROR = 0.05  # relative, of a block's update of its states: the host rounds to 16 bits after each of some ten passes
LAYOUT_TOKENS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_verdicts = {}  # {agrees' arguments: whether the fused forward agrees with the host's}
_testing = threading.Lock()


def fuse(diffusion_model, family):
    """Give the blocks of a model their fused forwards, where the family has some and the host is known. Returns whether all blocks have
    one."""
    fused = True
    for blocks in family.blocks:
        for block in getattr(diffusion_model, blocks.name):
            block.__class__ = fused_class(type(block), family.fused) or type(block)
            if not isinstance(block, _Fused):
                fused = False
                continue
            for name, module in block.named_modules():
                if name in block.declared.gated and isinstance(module, PackedLinear):
                    module.gated = True
    return fused


@functools.cache
def fused_class(host_class, module):
    """The subclass of a block's class with a fused forward; None if there is none, or if the class is not as the forward expects it.
    module: Family.fused."""
    if module is None or os.environ.get(VARIABLE) == "0":
        return None
    declared = importlib.import_module(f"..families.{module}", __package__).BLOCKS
    name = f"{host_class.__module__}.{host_class.__qualname__}"
    if name not in declared:
        return None
    fused = declared[name]
    known = _relied_on(host_class, fused)
    if not all(_of_host(each.function) for each in known if each.function is not None):
        log.warning("Another node pack has replaced parts of ComfyUI's %s: that forward runs in place of SVDQuant's fused one, which takes "
                    "longer.", name)
        return None
    whole = all(getattr(*_place(dotted), None) is not None for dotted in (fused.rope, fused.attention))
    if (found := digest(host_class, fused.functions)) not in fused.sources or not whole:
        log.warning("This ComfyUI's %s is not one that SVDQuant has a fused forward for (source %s): its own forward runs, which takes "
                    "longer. Update the node pack.", name, found)
        return None
    attends = _place(fused.attention)
    host = Host(functools.partial(attention, *attends), takes, untouched, norm_eps, functools.partial(keeps_nothing, *attends),
                shared_input.outputs)
    # The name stays the host's, since custom nodes find blocks by it.
    return type(host_class.__name__, (_Fused, host_class), {
        "__module__": host_class.__module__, "__qualname__": host_class.__qualname__, "forward": _forward(host_class),
        "declared": fused, "host_class": host_class, "host_forward": host_class.forward, "host": host, "known": known, "attends": attends,
        "family": module})


class Known(NamedTuple):
    """A function on which a fused forward relies, and where the host looks it up."""

    owner: object  # a module or a class
    name: str
    function: Callable


def _relied_on(host_class, fused):
    """(Known of the class's forward, of RoPE, and of `functions` of a FusedBlock). One that the host doesn't have has no function."""
    module = sys.modules[host_class.__module__]
    places = [(host_class, "forward"), _place(fused.rope)]
    for path in fused.functions:
        owner, _, name = path.rpartition(".")
        places.append((operator.attrgetter(owner)(module) if owner else module, name))
    return tuple(Known(owner, name, getattr(owner, name, None)) for owner, name in places)


def _place(dotted):
    """(module, name) of a dotted name in a module of the host's; None in place of one that is not imported."""
    module, _, name = dotted.rpartition(".")
    return sys.modules.get(module), name


def _of_host(function):
    """Whether a function is ComfyUI's: neither another's nor another's wrapper, which inspect.getsource would look through."""
    return getattr(function, "__module__", "").startswith(HOST_MODULES) and not hasattr(function, "__wrapped__")


def preparations(diffusion_model, dtype, device, tokens=()):
    """Functions that each compile and test the fused passes of one kind of block, or the kernels of its layers that share an input, for
    preparation.warm_up. tokens: numbers of tokens to compile for, of the layers."""
    if device.type != "cuda" or not block_ops.takes(dtype, device):
        return []
    firsts = {}  # {kind: the first such block}
    for block in diffusion_model.modules():
        if isinstance(block, _Fused):
            firsts.setdefault(kind(block), block)
    groups = [[block.get_submodule(name) for name in group] for block in firsts.values() for group in block.declared.shared]
    return [*(functools.partial(agrees, *each, dtype, device) for each in firsts),
            *(job for group in groups for job in shared_input.preparations(group, tokens, dtype, device))]


def digest(host_class, functions):
    """A short digest of the sources of a class's forward and of those functions that its module has, without comments and line breaks.
    "unreadable" without a source."""
    found = (_found(host_class, path) for path in (f"{host_class.__qualname__}.forward", *functions))
    try:
        return digest_of([inspect.getsource(function) for function in found if function is not None])
    except (OSError, TypeError):
        return "unreadable"


def digest_of(sources):
    """digest of the texts of the functions."""
    tokens = (token for source in sources for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline))
    return hashlib.sha256(" ".join(token.string for token in tokens if token.type not in LAYOUT_TOKENS).encode()).hexdigest()[:16]


def _found(host_class, path):
    """What the module of a class has under a dotted name, or None."""
    found = sys.modules[host_class.__module__]
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


class Host(NamedTuple):
    """The host's part in a fused forward, and the layers'."""

    attention: Callable      # attention(q, k, v, mask, transformer_options)
    takes: Callable          # takes(block, states, pe)
    untouched: Callable      # untouched(module, kind)
    norm_eps: Callable       # norm_eps(norm, x)
    keeps_nothing: Callable  # keeps_nothing(transformer_options)
    outputs: Callable        # shared_input.outputs


def attention(module, name, q, k, v, mask, transformer_options):
    """(B, heads, L, D) each -> (B, L, heads * D), by the function that the host's module has under this name."""
    return getattr(module, name)(q, k, v, q.shape[1], mask=mask, skip_reshape=True, transformer_options=transformer_options)


def _forward(host_class):
    """The forward of a fused class. It has the signature of the host's, which custom nodes read."""
    def run(self, *args, **kwargs):
        if self.host_is_known():
            states = self.declared.forward(self, self.host, *args, **kwargs)
            if states is not NotImplemented:
                return states
        return host_class.forward(self, *args, **kwargs)  # looked up here: others may replace it

    @functools.wraps(host_class.forward)
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # each layer's op expands its own branch
            return run(self, *args, **kwargs)
        with block_branches.expanded(self):
            return run(self, *args, **kwargs)
    return forward


class _Fused:
    """The first base of a fused class."""

    def host_is_known(self):
        """Whether the functions that the fused forward replaces are still those whose source was compared."""
        for owner, name, function in self.known:
            if getattr(owner, name, None) is not function:
                return False
        return True

    def __reduce_ex__(self, protocol):
        # pickle finds the host's class under the name.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty_block, (self.host_class, self.family), *state


def _empty_block(host_class, module):
    """A block without its state, for copy and pickle."""
    cls = fused_class(host_class, module) or host_class
    return cls.__new__(cls)


def takes(block, states, pe):
    """Whether the fused passes take these states (B, L, K) and this position embedding (B or 1, 1, L, D / 2, 2, 2), and have agreed with
    the host's forward on their device."""
    x = states[0]
    return (x.ndim == 3 and all(state.dtype == x.dtype and state.shape[::2] == x.shape[::2] for state in states)
            and isinstance(pe, torch.Tensor) and pe.ndim == 6 and pe.shape[1] == 1 and pe.shape[-3] * 2 in block_ops.HEAD_WIDTHS
            and pe.dtype in (torch.float32, x.dtype) and pe.shape[0] in (1, x.shape[0])
            and pe.shape[2] == sum(state.shape[1] for state in states)
            and not (torch.is_grad_enabled() and any(state.requires_grad for state in states))
            and x.shape[-1] % 8 == 0 and x.shape[-1] <= block_ops.MAX_COLUMNS
            and agrees(*kind(block), x.dtype, x.device))


def kind(block):
    """The first arguments of agrees, which blocks of one kind share: (class, its sizes)."""
    return type(block), *block.declared.sizes(block)


def untouched(module, kind):
    """Whether a module is of the host's class of the name `kind`, and nothing else works on its input and its output: no hook, no other
    forward, no patch of its weight."""
    own, cls = module.__dict__, type(module)
    return cls.__name__ == kind and cls.__module__.startswith(HOST_MODULES) and not (
        own["_forward_pre_hooks"] or own["_forward_hooks"] or replaced(module) or own.get("weight_function") or own.get("bias_function"))


def keeps_nothing(module, name, transformer_options):
    """Whether the module's function of attention is one of ComfyUI's own, none of which keeps its q, k or v."""
    return OVERRIDE not in (transformer_options or ()) and getattr(module, name).__module__.startswith(HOST_MODULES)


def norm_eps(norm, x):
    """The number that an RMSNorm of the host adds to the mean square of x."""
    eps = getattr(norm, "eps", 1e-6)  # ComfyUI's own class, before 0.14, has this number in its forward
    return default_eps(x.dtype, x.device) if eps is None else eps


@traced.constant  # on a function of its own: torch.compile looks through lru_cache, and would trace what it wraps
def default_eps(dtype, device):
    """PyTorch's own choice for an RMSNorm without eps."""
    return _default_eps(dtype, device)


@functools.lru_cache(maxsize=16)
def _default_eps(dtype, device):
    """It differs between versions and devices, and so is measured: for x = 0.001, y = x / sqrt(x^2 + eps)."""
    x = torch.full((1, 8), 1e-3, dtype=dtype, device=device)
    y, x = torch.nn.functional.rms_norm(x, (8,)).double(), x.double()
    measured = ((x / y).square() - x.square())[0, 0].item()
    return min((torch.finfo(dtype).eps, torch.finfo(torch.float32).eps), key=lambda eps: abs(eps - measured))


# --- The comparison with the host's forward ----------------------------------------------------------------------------


class _StandIn(torch.nn.Module):
    """In place of a linear: each output is one input, times a number. A block of any width then takes almost no memory and time."""

    def __init__(self, in_features, out_features, bias=True, dtype=None, device=None):
        super().__init__()
        self.index = torch.arange(out_features, device=device) * 7 % in_features
        self.factor = torch.linspace(-1, 1, out_features, dtype=dtype, device=device)

    def forward(self, x):
        return x[..., self.index] * self.factor


class _Operations(comfy.ops.disable_weight_init):
    Linear = _StandIn


@traced.constant
def agrees(fused, *arguments):
    """agrees(fused, *sizes, dtype, device): whether `device` has the fused passes for `dtype`, and the forward of the class `fused` agrees
    there with the host's, for blocks of these sizes (FusedBlock.sizes). Tried once a process. The block itself is no argument, so that a
    graph of torch.compile serves all blocks of a kind."""
    *sizes, dtype, device = arguments
    if not block_ops.takes(dtype, device):
        return False
    key = fused, *arguments
    if key not in _verdicts:
        with _testing:
            if key not in _verdicts:
                _verdicts[key] = _compare(fused, sizes, dtype, device)
    return _verdicts[key]


def _compare(fused, sizes, dtype, device):
    try:
        error = difference(fused, *sizes, dtype, device)
    except torch.OutOfMemoryError:
        raise  # a lack of memory says nothing about the forward
    except Exception as reason:  # a host or a driver that nobody here has: its own forward may run all the same
        log.warning("SVDQuant's fused forward of %s failed its test on %s (%s: %s): ComfyUI's own runs, which takes longer. Please report "
                    "this line.", fused.__name__, device, type(reason).__name__, reason)
        return False
    if not error <= LARGEST_ERROR:  # also NaN
        log.warning("SVDQuant's fused forward of %s differs from ComfyUI's on %s (%s, relative error %.3g): ComfyUI's own runs, which "
                    "takes longer. Please report this line.", fused.__name__, device, dtype, error)
    return error <= LARGEST_ERROR


def new_block(host_class, made, dtype, device, operations):
    """A block of a class of the host's with the arguments `made`."""
    settings = {"dtype": dtype, "device": device, "operations": operations}
    together = "operation_settings" in inspect.signature(host_class).parameters
    return host_class(**made, **({"operation_settings": settings} if together else settings))


def difference(fused, *arguments):
    """difference(fused, *sizes, dtype, device): the relative error ‖fused - host‖ / ‖host - input‖ of a block's updated states."""
    *sizes, dtype, device = arguments
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    with torch.no_grad():
        made, given = fused.declared.example(*sizes, random)
        example = new_block(fused.host_class, made, dtype, device, _Operations)
        for parameter in example.parameters():
            parameter.copy_(random(*parameter.shape))
        ours = fused.declared.forward(example, fused.host._replace(takes=lambda *_: True), **given)
        copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        theirs = fused.host_forward(example, **copies)  # it may write to its arguments
    if ours is NotImplemented:
        return torch.nan
    ours, theirs = (states if isinstance(states, tuple) else (states,) for states in (ours, theirs))
    return max(((a.double() - b.double()).norm() / (b.double() - x.double()).norm()).item()
               for a, b, x in zip(ours, theirs, given.values()))
