"""A step's launches as one CUDA graph, where Python would otherwise keep the GPU waiting: small pictures, slow processors.

The diffusion model's class becomes a subclass whose _forward replays the graph of an earlier call that did the same: inputs of the same
shapes, the same tensors in every module, and nothing in the call or on the model whose Python code a replay would leave out (patches,
ControlNets, hooks, other forwards, offloaded layers). The first call of a kind runs as ever, the second is timed, and the third is recorded
if the second took the processor about as long as the GPU. A graph computes the same bits.

A graph keeps the step's work memory. It is released when the model is patched, moved or unloaded, and none is made where memory is short.
SVDQUANT_STEP_GRAPHS: 0 never, 1 always, otherwise as above.
"""

import functools
import inspect
import logging
import operator
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain, repeat
from typing import NamedTuple

import comfy.model_management
import torch
from torch.nn.modules import module as module_hooks

from ..layers.linear import version_of
from . import malloc_graph

log = logging.getLogger(__name__)

VARIABLE = "SVDQUANT_STEP_GRAPHS"
DEVICE = "cuda"     # type of the devices that record
GRAPHS = 4          # graphs of a model: cond and uncond of two sizes
HOST_BOUND = 0.8    # a graph pays if the processor is busy for this share of a step
FREE_BYTES = 1 << 30  # free memory that must be left to other models
# Entries of transformer_options that no code inside the forward reads, or that it writes itself.
KNOWN_OPTIONS = {"cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "total_blocks", "block_type", "block_index",
                 "block", "img_slice", "reference_image_num_tokens", "multigpu_thread_device"}
FORWARDS = "forward", "_forward", "forward_orig"  # methods of a diffusion model; not every class has the last one
SIMPLE = (int, float, bool, str, type(None))
# {diffusion model: StepGraphs}. A StepGraphs refers to the dictionaries of the model's modules. As an attribute of the model it would form
# a reference cycle, and the model's memory would wait for the garbage collector.
_graphs = weakref.WeakKeyDictionary()
REPLACED = ("forward", "weight_function", "bias_function", "streamed")  # attributes of modules whose Python code a replay would leave out
ATTRIBUTES = (*REPLACED, "act_bits", "_row_scale")  # attributes that decide what a module runs


@functools.cache
def graphed_class(host_class):
    """The subclass of a diffusion model's class whose steps are recorded. Its name stays the host's."""
    functions = {name: inspect.getattr_static(host_class, name) for name in FORWARDS if hasattr(host_class, name)}
    return type(host_class.__name__, (_Graphed, host_class), {
        "__module__": host_class.__module__, "__qualname__": host_class.__qualname__, "host_class": host_class,
        "host_functions": functions, "signature": inspect.signature(host_class._forward)})


def record_steps(diffusion_model):
    """Let a model whose blocks are all fused record its steps, if its class has the forwards of ComfyUI's: one that runs the wrappers of
    other nodes, around _forward."""
    host_class = type(diffusion_model)
    if all(hasattr(host_class, name) for name in FORWARDS[:2]):
        diffusion_model.__class__ = graphed_class(host_class)


def graphs_of(diffusion_model):
    """The StepGraphs of a model. A copy of a model has its own."""
    return _graphs.setdefault(diffusion_model, StepGraphs())


def release(diffusion_model):
    """Forget the graphs of a model, and free their memory."""
    _graphs.pop(diffusion_model, None)


def can_record(diffusion_model):
    """Whether steps of the model are recorded at all."""
    return (isinstance(diffusion_model, _Graphed) and not torch.compiler.is_compiling() and os.environ.get(VARIABLE) != "0"
            and diffusion_model.is_the_hosts())


class _Graphed:
    """The first base of a graphed class."""

    def _forward(self, *args, **kwargs):
        forward = functools.partial(self.host_functions["_forward"], self)
        if not can_record(self):
            return forward(*args, **kwargs)
        bound = self.signature.bind(self, *args, **kwargs)
        bound.arguments.pop("self")
        return graphs_of(self).run(self, forward, bound.arguments)

    def is_the_hosts(self):
        """Whether nobody has replaced a function of the model's class, or of this model."""
        own = self.__dict__
        return all(name not in own and inspect.getattr_static(self.host_class, name) is function
                   for name, function in self.host_functions.items())


class Step:
    """The calls of one kind. state: the ModelState of the last one; timed: whether a call was timed; pays: whether a graph would then be
    faster; graph, inputs, output: the recorded graph and its tensors; number: of a divided forward's graph (divided_steps.py)."""

    def __init__(self, state, pays=False):
        self.state, self.timed, self.pays, self.graph, self.inputs, self.output, self.number = state, pays, pays, None, (), None, 0


class Ways(NamedTuple):
    """How calls run. call(forward, arguments): as ever; recorded(step, forward, arguments, tensors): for the first time from a graph;
    replayed(step, tensors): from the graph of a Step. by: None on one GPU, else what divides the calls among several (divided_steps.py):
    its graphs are apart, and record a call at the second time, since the time of one processor says little about that of a step."""

    call: Callable
    recorded: Callable
    replayed: Callable
    by: object = None


class StepGraphs:
    """The graphs of one diffusion model."""

    def __init__(self):
        self.steps = OrderedDict()  # {(description of the inputs, attention functions): Step}, the last used last

    def run(self, model, forward, arguments, ways=None):
        """The forward of `model` for {name: argument}, from a graph if there is one for such a call. ways: Ways; None on one GPU."""
        ways = ways or Ways(call, recorded, replayed)
        tensors = []
        description = described(arguments, tensors) if allowed(arguments) else None
        if description is None or not all(block.host_is_known() for block in first_blocks(model)):
            return ways.call(forward, arguments)
        key = description, attentions(model), ways.by
        step, result = self.steps.pop(key, None), None
        if step is not None and step.graph is not None:
            result = replay_of_the_same(step, tensors, ways)
        if result is None:
            step, result = self.ordinary(step, model, forward, arguments, tensors, ways)
        if step is not None:
            self.steps[key] = step
        while len(self.steps) > GRAPHS:
            self.steps.popitem(last=False)
        return result

    @staticmethod
    def ordinary(step, model, forward, arguments, tensors, ways):
        """(the Step of the next call of this kind, or None; the result) of a call that no recorded graph stands for. step: of the last one,
        or None."""
        if step is None or step.graph is not None or (step.pays or not step.timed) and not step.state.unchanged():
            state = ModelState(model)
            return Step(state, ways.by is not None) if state.can_be_recorded() else None, ways.call(forward, arguments)
        if not step.timed:
            return step, timed(step, forward, arguments)
        if step.pays and has_room(tensors[0].device):
            return step, ways.recorded(step, forward, arguments, tensors)
        return step, ways.call(forward, arguments)


def replay_of_the_same(step, tensors, ways):
    """The result of a recorded Step, or None if the model has changed since. Most of the comparison runs while the GPU computes: a graph
    writes to its own memory alone, so that its result can still be dropped if the memory that it reads was there."""
    if not step.state.has_same_memory():
        return None
    result = ways.replayed(step, tensors)
    return result if step.state.unchanged() else None


def call(forward, arguments):
    """forward with {name: argument}, of which "kwargs" are more of them."""
    return forward(**{name: value for name, value in arguments.items() if name != "kwargs"}, **arguments.get("kwargs", {}))


# --- Which calls are of one kind ---------------------------------------------------------------------------------------


def allowed(arguments):
    """Whether a graph can stand for the call: it runs on a GPU, and nothing in it brings Python code of its own."""
    given = {**arguments.get("kwargs", {}), **arguments}  # some classes don't name all that they take
    x, options = given.get("x"), given.get("transformer_options") or {}
    return (isinstance(x, torch.Tensor) and x.device.type == DEVICE and not torch.version.hip and given.get("control") is None
            and not any(options[name] for name in options.keys() - KNOWN_OPTIONS)  # an empty entry, as of "patches", does nothing
            and not torch.is_grad_enabled() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
            and not (module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks) and not malloc_graph.is_active())


def described(value, tensors):
    """A hashable description of a call's arguments, in which equal ones are of one kind; None if there is none. `tensors` gets the
    tensors, in order."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return (value.shape, value.dtype, value.device) if type(value) is torch.Tensor and value.device == tensors[0].device else None
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, (list, tuple)):
        parts = tuple(described(part, tensors) for part in value)
    elif isinstance(value, dict):
        parts = tuple((name, found) for name, part in value.items()
                      if name != "transformer_options" and (found := described(part, tensors)) != ())  # an empty dictionary says nothing
        return None if any(part is None for _, part in parts) else parts
    else:
        return None
    return None if None in parts else (type(value), parts)


def rebuilt(value, tensors):
    """The arguments `value` with the tensors of an iterator in place of their own."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(part, tensors) for part in value)
    if isinstance(value, dict):
        return {name: dict(part or {}) if name == "transformer_options" else rebuilt(part, tensors) for name, part in value.items()}
    return value


def attentions(model):
    """The functions that compute attention in the model's blocks, which other node packs replace globally."""
    return tuple(getattr(*block.attends) for block in first_blocks(model))


def first_blocks(model):
    """The first block of each of the model's lists of blocks."""
    lists = (blocks for blocks in model.children() if isinstance(blocks, torch.nn.ModuleList) and len(blocks))
    return [blocks[0] for blocks in lists if hasattr(blocks[0], "host_is_known")]


class ModelState:
    """All that a step reads from a model, as far as a change of it shows without reading the GPU's memory: the modules, their tensors with
    their addresses, and the attributes of ATTRIBUTES. Thousands of entries are compared at every step, and so by C loops."""

    def __init__(self, model):
        stack, self.owns = [model], []
        while stack:
            own = stack.pop().__dict__
            self.owns.append(own)
            stack += [module for module in own["_modules"].values() if module is not None]  # an empty container is false, too
        self.children = [own["_modules"] for own in self.owns]
        self.holders = [own[name] for own in self.owns for name in ("_parameters", "_buffers")]
        self.hooks = [own[name] for own in self.owns for name in ("_forward_hooks", "_forward_pre_hooks")]
        self.memory, self.before = self.addresses(), self.now()

    def tensors(self):
        return [tensor for tensor in chain.from_iterable(map(dict.values, self.holders)) if tensor is not None]

    def addresses(self):
        return list(map(torch.Tensor.data_ptr, self.tensors()))

    def now(self):
        """(objects, which must stay the same ones, numbers of writes to tensors with a row scale)"""
        objects = [*chain.from_iterable(map(dict.values, self.children)), *self.tensors()]
        for name in ATTRIBUTES:
            objects += map(dict.get, self.owns, repeat(name))
        row_scales = filter(None, map(dict.get, self.owns, repeat("_row_scale")))
        # A tensor made in inference mode has no version, and asking for it raises an error, which takes as long as a launch.
        versions = [version_of(known.parameter()) for known in row_scales if known.version is not None]
        return objects, versions

    def can_be_recorded(self):
        """Whether a replay would leave nothing out: no hook, no other forward, no patch that is applied at every call, no layer whose
        parameters are elsewhere."""
        return (not any(self.hooks) and not any(any(map(dict.get, self.owns, repeat(name))) for name in REPLACED)
                and all(tensor is None or tensor.device.type == DEVICE for holder in self.holders for tensor in holder.values()))

    def has_same_memory(self):
        """Whether the tensors lie where they lay. Those that somebody has replaced since live as long as this state."""
        return self.addresses() == self.memory

    def unchanged(self):
        """Whether the model is as it was when this state was taken."""
        (objects, versions), (now, versions_now) = self.before, self.now()
        return (not any(self.hooks) and len(objects) == len(now) and all(map(operator.is_, objects, now)) and versions == versions_now
                and self.has_same_memory())


def has_room(device):
    return comfy.model_management.get_free_memory(device) > FREE_BYTES


# --- The calls ---------------------------------------------------------------------------------------------------------


def timed(step, forward, arguments):
    """An ordinary call, after which step.pays says whether the processor took about as long as the GPU."""
    device = arguments["x"].device
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call(forward, arguments)
    issued = time.perf_counter()
    torch.cuda.synchronize(device)
    busy = (issued - start) / (time.perf_counter() - start)
    step.timed, step.pays = True, isinstance(result, torch.Tensor) and (busy > HOST_BOUND or os.environ.get(VARIABLE) == "1")
    return result


def recorded(step, forward, arguments, tensors):
    """Record the call's launches and replay them; an ordinary call if they can't be recorded."""
    inputs = [tensor.clone() for tensor in tensors]
    found = captured(lambda: call(forward, rebuilt(arguments, iter(inputs))), tensors[0].device)
    if found is None:
        step.pays = False
        return call(forward, arguments)
    step.inputs, (step.graph, step.output) = inputs, found
    return replayed(step, tensors)


def captured(run, device):
    """(the CUDA graph of run()'s launches, run()'s result), or None if they can't be recorded."""
    current, stream, graph = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads go on, such as one that compiles kernels
            try:
                output = run()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
    except Exception as error:  # a node's own attention may wait for the GPU, for example, which can't be recorded
        if isinstance(error, comfy.model_management.InterruptProcessingException):
            raise
        log.debug("A step could not be recorded as a CUDA graph.", exc_info=True)
        return None
    return graph, output


def replayed(step, tensors):
    with torch.inference_mode():  # the tensors of a graph may be inference tensors, which nothing else may write to
        for recorded_input, tensor in zip(step.inputs, tensors):
            recorded_input.copy_(tensor)
        step.graph.replay()
    return step.output.clone()
