"""Calibration: statistics of the layers' inputs on real forwards of the model, one block at a time.

A few calls of the diffusion model are recorded while it samples. Then the blocks are streamed: for each block, every call is replayed up
to this block, and the stored output of the previous block replaces all blocks before it. So a block runs once per call, and memory holds
only its own statistics and one hidden state per call. The model's own forward does everything between the blocks, so nothing here depends
on how a ComfyUI version writes it.
"""

import functools
import itertools
import logging
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch

from ..parallel.alone import ALONE
from . import out_of_memory, shared_replay

SAMPLE_TOKENS = 1024  # inputs kept for each layer, evenly spaced over all the calls
# Tokens for each input channel that go into a Gram matrix. Fewer than 2 are too few for GPTQ. With 16 in place of 4 the small FLUX's steps
# together have an error of 2.43 % for 2.52 (W4A4) and of 1.32 % for 1.42 (W4A8) on prompts on which it was not calibrated.
TOKENS_PER_INPUT = 16
STRIPE = 2048  # rows of a Gram matrix that are updated at a time

# Errors of the device itself, as opposed to an operation that PyTorch lacks. Older PyTorch has no AcceleratorError.
DEVICE_FAULTS = (torch.OutOfMemoryError, *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []))

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What one call contributes to a layer's statistics."""

    absmax: torch.Tensor  # (K,) float32
    square: torch.Tensor  # (K,) float32, the sum over the tokens
    sample: torch.Tensor  # (S, K) float32
    rows: torch.Tensor | None  # (M, K), the tokens for the Gram matrix
    tokens: int


class InputStats:
    """Running statistics of one linear's input, float32 on `device`, or on the input's device if it is None.

    spans: absmax and rms, (K,) each, over all tokens seen; sample: (at most SAMPLE_TOKENS, K); gram: (K, K), the mean of x^T x, only
    `with_gram` (it is K * K * 4 bytes: 944 MB for the widest layer of FLUX.1). The Gram matrix uses evenly spaced tokens of each call, from
    the first to the last, about `tokens_per_input` * K in all the expected calls, or every token if that is None.
    """

    def __init__(self, expected_calls, with_gram=False, tokens_per_input=None, device=None):
        self.tokens = self.gram_tokens = 0
        self._calls, self._tokens_per_input, self._device = max(1, expected_calls), tokens_per_input, device
        self._with_gram, self._gram, self._is_mean = with_gram, None, False
        self._samples = []
        self._absmax = self._square = None

    def add(self, x):
        """x: (..., K), the input of one call."""
        self.merge(self.part(x))

    def part(self, x):
        """The Part of the statistics that one call's input x (..., K) contributes. It may share memory with x."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self._device or x.device)
        low, high = x.aminmax(dim=0)
        absmax, square = torch.maximum(-low, high).float(), torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
        sample = evenly_spaced(x, max(1, SAMPLE_TOKENS // self._calls)).to(torch.float32, copy=True)
        tokens, rows = x.shape[0], None
        if self._with_gram:
            rows = x if self._tokens_per_input is None else evenly_spaced(x, -(-self._tokens_per_input * x.shape[1] // self._calls))
        return Part(absmax, square, sample, rows, tokens)

    def merge(self, part):
        """Add a Part. The order of the calls matters to the last bit."""
        if self._device is not None:
            part = Part(*to_device(tuple(part), self._device))
        if self._absmax is None:
            self._absmax, self._square = part.absmax, part.square
        else:
            self._absmax = torch.maximum(self._absmax, part.absmax)
            self._square = self._square + part.square
        self._samples.append(part.sample)
        self.tokens += part.tokens
        if part.rows is not None:
            if self._gram is None:
                self._gram = torch.zeros(part.rows.shape[1], part.rows.shape[1], device=part.rows.device)
            add_gram(self._gram, part.rows)
            self.gram_tokens += part.rows.shape[0]

    def gram(self):
        """(K, K) float32, E[x^T x]; None without `with_gram`. Nothing can be added afterwards."""
        if self._gram is not None and not self._is_mean:
            self._gram /= self.gram_tokens  # In place, since it may be the largest tensor on the device.
            self._is_mean, self._with_gram = True, False
        return self._gram

    def spans(self):
        """{"absmax": (K,), "rms": (K,)} of all the tokens seen."""
        return {"absmax": self._absmax, "rms": (self._square / self.tokens).sqrt()}

    def sample(self):
        """(at most SAMPLE_TOKENS, K) float32."""
        return torch.cat(self._samples)[:SAMPLE_TOKENS]

    def to(self, device):
        """Move everything to another device."""
        self._absmax, self._square, self._gram = to_device((self._absmax, self._square, self._gram), device)
        self._samples = to_device(self._samples, device)
        return self


def evenly_spaced(x, most):
    """At most `most` rows of x, evenly spaced."""
    if x.shape[0] <= most:
        return x
    return x[torch.linspace(0, x.shape[0] - 1, most, device=x.device).round().long()]


def add_gram(gram, x):
    """gram += x^T x. gram: (K, K) float32; x: (M, K). The products of 16-bit numbers are exact, and are summed in float32."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not _sums_in_float32(x.device):
        gram.addmm_(x.float().t(), x.float())
        return
    for start in range(0, len(gram), STRIPE):
        gram[start:start + STRIPE] += torch.mm(x[:, start:start + STRIPE].t(), x, out_dtype=torch.float32)


@functools.cache
def _sums_in_float32(device):
    """Whether this PyTorch multiplies 16-bit matrices on `device` into a float32 one. Raises the device's faults."""
    if device.type != "cuda":
        return False
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    # CUDA reports a fault of earlier work at some later call. Outside the try statement it can't be mistaken for a missing feature.
    torch.cuda.synchronize(device)
    try:
        found = torch.mm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except TypeError:  # PyTorch before 2.8 does not know out_dtype.
        return False
    except RuntimeError as error:  # NotImplementedError is one too.
        if isinstance(error, DEVICE_FAULTS):
            raise
        found = False
    torch.cuda.synchronize(device)
    return found


class _Reached(Exception):
    """Raised inside a replayed forward when the block of interest has run; nothing after it is needed."""


class Memory:
    """Where calibration keeps its tensors. They move to host memory step by step when the device runs out of memory.

    states: each call's output of the last block; notes: sentences about the moves; unload: a function that moves the model off the device,
    so that its blocks come there one by one, or None if it isn't there as a whole. That is the first step, since it costs the least time.
    """

    UNLOADED = "the model went to host memory, and each block comes back for its turn"
    STEPS = ("the states between the blocks went to host memory", "the statistics went to host memory too, which takes longer")

    def __init__(self, device):
        self.device, self.level = torch.device(device), 0
        self.states, self.notes, self.unload = [], [], None

    @property
    def states_on(self):
        return self.device if self.level == 0 else torch.device("cpu")

    @property
    def statistics_on(self):
        return self.device if self.level < len(self.STEPS) else torch.device("cpu")

    def attempt(self, what, run, otherwise=False):
        """Return run(). Each time the device runs out of memory, step down and call it again, or return None if the caller can do
        `otherwise`. Raises MemoryError if host memory is used up; other errors of run pass through."""
        while True:
            try:
                return run()
            except out_of_memory.ERRORS as error:
                if out_of_memory.on_host(error):
                    raise MemoryError(f"The computer has too little memory for {what} ({first_line(error)}); close other programs and "
                                      "models, or calibrate on fewer prompts and steps.") from error
                if not out_of_memory.on_device(error) or (self.level == len(self.STEPS) and not otherwise):
                    raise
            # Outside the except clause the exception is released, and with it the tensors that its frames held.
            if otherwise:
                return empty_cache(self.device)
            self.step_down(what)

    def step_down(self, what):
        if self.unload is not None:
            self.say(f"The GPU ran out of memory at {what}: {self.UNLOADED}.")
            unload, self.unload = self.unload, None
            unload()
        else:
            self.say(f"The GPU ran out of memory at {what}: {self.STEPS[self.level]}.")
            self.level += 1
            self.states[:] = to_device(self.states, self.states_on)
        empty_cache(self.device)

    def say(self, note):
        log.warning("%s", note)
        self.notes.append(note)


def first_line(error):
    """The first line of an error's message, without the advice and traces of libraries that follow it; its type if there is none."""
    return next(iter(str(error).splitlines()), "")[:200].rstrip(". ") or type(error).__name__


def empty_cache(device):
    """Release the GPU memory that PyTorch caches."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def to_device(value, device, copy=False):
    """Move the tensors inside nested lists, tuples and dicts; leave other values unchanged. copy: also copy tensors on `device`. Tensors on
    the meta device stay there."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.detach().to(device, copy=copy)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device, copy) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device, copy) for k, v in value.items()}
    return value


def _shared(value, known):
    """`value`, with each tensor replaced by the one at the same position in `known` if the two are equal, so that both use its memory."""
    if type(value) is not type(known):
        return value
    if isinstance(value, torch.Tensor):
        return known if value.shape == known.shape and value.dtype == known.dtype and torch.equal(value, known) else value
    if isinstance(value, (list, tuple)) and len(value) == len(known):
        return type(value)(map(_shared, value, known))
    if isinstance(value, dict):
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    return value


@contextmanager
def recorded_calls(diffusion_model, calls, every=1, first=0):
    """A context in which the arguments of every n-th forward of `diffusion_model`, from `first` on, are appended to `calls`, on the CPU.
    Tensors that are equal in successive calls, such as the prompt, are kept once."""
    counter = itertools.count(-first)

    def record(_module, args, kwargs):
        if next(counter) % every == 0:
            call = to_device((args, kwargs), "cpu", copy=True)
            calls.append(_shared(call, calls[-1]) if calls else call)

    hook = diffusion_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def played_back(diffusion_model, outputs):
    """A context in which each forward of the model returns the next of `outputs`, on the device of its first argument."""
    remaining = iter(outputs)
    with _forward_replaced([(diffusion_model, lambda x, *args, **kwargs: next(remaining).to(x.device))]):
        yield


@contextmanager
def recorded_outputs(diffusion_model):
    """A context that yields a list, to which the output of every forward of the model is appended, on the CPU."""
    outputs = []
    hook = diffusion_model.register_forward_hook(lambda _module, _args, output: outputs.append(to_device(output, "cpu", copy=True)))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _forward_replaced(modules_and_forwards):
    """A context in which each module's forward is the given function. At the end every module gets its former one back, also a forward that
    other code has set on the module itself."""
    own = [(module, module.__dict__.get("forward")) for module, _ in modules_and_forwards]
    try:
        for module, forward in modules_and_forwards:
            module.forward = forward
        yield
    finally:
        for module, forward in own:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextmanager
def observed(layers, add):
    """A context in which add(name, x) is called with the input of each layer. layers: {name: linear}."""
    hooks = [layer.register_forward_pre_hook(lambda _module, args, name=name: add(name, args[0])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _filled(value, device):
    """`value` with zeros on `device` in place of the tensors on the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value, device=device) if value.is_meta else value
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, device) for item in value)
    return {key: _filled(item, device) for key, item in value.items()} if isinstance(value, dict) else value


def _replay(diffusion_model, call, memory, blocks, pass_through, group, states, read_later):
    """Run one recorded call through the blocks of `group`, a range of indices. Returns {block name: output} of those that the call runs
    (some nodes skip blocks), on the meta device where neither `read_later` nor the last of the group needs it.

    states: {name of an earlier block: its stored output, on the meta device where nothing reads it any more}; read_later: the names of the
    blocks whose outputs are read after the group. The last block may be the model itself.
    """
    outputs, (*inner, (last, end)) = {}, blocks[group.start:group.stop]

    def stop(_module, _args, output):
        outputs[last] = to_device(output, memory.states_on)
        raise _Reached

    def passed_on(name):
        def hook(_module, _args, output):
            outputs[name] = to_device(output, memory.states_on, copy=True) if name in read_later else to_device(output, "meta")
            return to_device(output, memory.device, copy=True)  # as a stored output is, so that the next block computes the same bits

        return hook

    def stored(name):
        # The model may change its input in place, and a second attempt after running out of memory needs the original, so it gets a copy.
        return lambda *args, **kwargs: _filled(to_device(states[name], memory.device, copy=True), memory.device)

    replaced = [(block, stored(name) if name in states else pass_through(name)) for name, block in blocks[:group.start]]
    hooks = [*(block.register_forward_hook(passed_on(name)) for name, block in inner), end.register_forward_hook(stop)]
    try:
        with _forward_replaced(replaced):
            args, kwargs = to_device(call, memory.device, copy=True)
            diffusion_model(*args, **kwargs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _unchanged(name, block):
    """A context in which the block runs as it is."""
    return nullcontext()


def _still_read(states, read_later, keep_shapes):
    """The stored outputs {block: output} that a later block reads. keep_shapes: also the others, as tensors on the meta device."""
    found = {name: output for name, output in states.items() if name in read_later}
    return {name: to_device(output, "meta") for name, output in states.items() if name not in found} | found if keep_shapes else found


def in_a_row(blocks):
    """stream_blocks' sources of blocks each of which reads the output of the one before."""
    names = [name for name, _ in blocks]
    return {name: (before,) for before, name in zip(names, names[1:])}


def _check_has_run(name, found):
    """found: for each process whether one of its calls runs the block."""
    if not any(found):
        raise ValueError(f"The model never ran its block {name} during calibration; remove nodes that skip blocks "
                         "from the MODEL, and put them behind SVDQuant Quantize Model.")


def stream_blocks(diffusion_model, calls, memory, blocks, layers_of, pass_through, with_gram=False, tokens_per_input=None,
                  loaded=_unchanged, quantized=None, sources=None, ranks=ALONE, owner_of=lambda layer: 0, last=None, rows=None):
    """Yield (block name, {layer name: InputStats}) for one block after the other. The statistics are released before the next block.

    calls: from recorded_calls, moved to the device here; memory: Memory; blocks: [(name, module)] in running order, and last the model
    itself if layers outside the blocks are calibrated too; layers_of(name, block): {name: linear}; pass_through(name): a forward that
    returns a block's states unchanged (families.Family), for blocks whose outputs nothing reads any more; None to have them return zeros of
    their outputs' shapes; loaded(name, block): a context in which the block can run; quantized(name, block): a context in which it runs in
    4 bits, entered after the yield, so that its output there is the next block's input; None to use its 16-bit output; sources: {block
    name: names of the blocks whose outputs are its states} (families.Family.sources), None for in_a_row. A block's output is kept until the
    last block that reads it has run. A call that skips a block is left out from this block on. Raises ValueError if no call is left.

    ranks: the processes of the run (parallel.alone); each has its own calls (shared_replay.numbers), and gets the statistics, over all
    calls, of the layers for which owner_of(layer) is its rank. last: names of the blocks that end a group, which is replayed in one forward
    a call unless `quantized`; None: all do. Processes meet at every call, so they share the work on the Gram matrices of one group only.
    rows: pooled_rows.PooledRows, or None.
    """
    # Every block re-reads them; the originals are released. Each has a few MB.
    calls[:] = to_device(calls, memory.states_on)
    numbers, memory.states[:] = shared_replay.numbers(ranks, len(calls)), [{} for _ in calls]
    sources = in_a_row(blocks) if sources is None else sources

    def run(group, layers, in_4_bits, read_later):
        order = shared_replay.running_order(ranks, numbers)
        stats = {layer: InputStats(len(order), with_gram, tokens_per_input, memory.statistics_on) for layer in layers}

        def replay(number, add):
            place = numbers.index(number)
            # Also where nothing is observed: more rows can change the rounding of a call's own, and a run that goes on from another's
            # blocks has to end in the same bits.
            call, own = rows.more(number, calls[place]) if rows else (calls[place], None)
            with observed(layers, add), rows.own_rows(blocks[group.start:group.stop], own) if rows else nullcontext():
                return _replay(diffusion_model, call, memory, blocks, pass_through, group, memory.states[place], read_later)

        with ExitStack() as stack:
            def enter():
                for name, block in blocks[group.start:group.stop]:
                    stack.enter_context(loaded(name, block))
                    stack.enter_context(in_4_bits(name, block))

            shared_replay.together(ranks, enter)
            return shared_replay.replay_all(ranks, order, replay, stats, owner_of)

    groups = shared_replay.block_groups(blocks, last if quantized is None else None)
    while groups:
        group = groups.pop(0)
        name, own = blocks[group[-1]][0], {blocks[index][0]: layers_of(*blocks[index]) for index in group}
        read_later = {source for later, _ in blocks[group.stop:] for source in sources.get(later, ())}
        layers = {layer: module for found in own.values() for layer, module in found.items()}
        result = memory.attempt(name, functools.partial(run, group, layers, _unchanged, read_later), otherwise=len(group) > 1)
        if shared_replay.must_part(group, result, ranks):
            groups[:0] = [range(index, index + 1) for index in group]
            result = None  # its statistics would take memory beside those of the first block
            continue
        stats, outputs = result
        _check_has_run(name, ranks.gathered(any(outputs)))
        if quantized is not None:
            yield name, stats
            stats.clear()
            _, outputs = memory.attempt(name, functools.partial(run, group, {}, quantized, read_later))
        whole = [(number, call, _still_read(states | found, read_later, pass_through is None))
                 for number, call, states, found in zip(numbers, calls, memory.states, outputs) if found]
        numbers, calls, memory.states[:] = map(list, zip(*whole)) if whole else ([], [], [])
        del outputs, whole, result
        if quantized is None:
            for name, layers in own.items():
                yield name, {layer: stats.pop(layer) for layer in layers if layer in stats}
