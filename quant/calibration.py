"""What the layers see: statistics of their inputs on real forwards of the model, one block at a time.

A few calls of the diffusion model are recorded while it samples. Then the blocks are streamed: for each block, every
call is replayed up to it and no further, with the blocks before it replaced by their stored output, so that a block
runs once a call in all, and only its own statistics and one hidden state a call are held. The model's own forward does
everything between the blocks, so nothing here depends on how a ComfyUI version writes it.
"""

import itertools
from contextlib import contextmanager

import torch

SAMPLE_TOKENS = 1024  # inputs kept a layer, spread over all the calls


class InputStats:
    """Running statistics of one linear's input, float32 on the input's device.

    absmax, rms: (K,) over all tokens seen; sample: (at most SAMPLE_TOKENS, K); gram: (K, K), the mean of x^T x, if
    `with_gram` (it is K * K * 4 bytes: 944 MB for the widest layer of FLUX.1).
    """

    def __init__(self, expected_calls, with_gram=False):
        self.tokens = 0
        self._with_gram, self._gram = with_gram, None
        self._per_call = max(1, SAMPLE_TOKENS // max(1, expected_calls))
        self._samples = []
        self._absmax = self._square = None

    def add(self, x):
        """x: (..., K), the input of one call."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        absmax, square = x.abs().amax(dim=0), x.square().sum(dim=0)
        if self._absmax is None:
            self._absmax, self._square = absmax, square
        else:
            self._absmax = torch.maximum(self._absmax, absmax)
            self._square = self._square + square
        rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], self._per_call), device=x.device).round().long()
        self._samples.append(x[rows])
        self.tokens += x.shape[0]
        if self._with_gram:
            self._gram = x.t() @ x if self._gram is None else self._gram.addmm_(x.t(), x)

    def gram(self):
        """(K, K) float32, E[x^T x]; None where it was not asked for."""
        return None if self._gram is None else self._gram / self.tokens

    def spans(self):
        """{"absmax": (K,), "rms": (K,)} of all the tokens seen."""
        return {"absmax": self._absmax, "rms": (self._square / self.tokens).sqrt()}

    def sample(self):
        """(at most SAMPLE_TOKENS, K) float32."""
        return torch.cat(self._samples)[:SAMPLE_TOKENS]


class _Reached(Exception):
    """Raised inside a replayed forward when the block of interest has run; nothing after it is needed."""


def to_device(value, device):
    """Move the tensors inside nested lists, tuples and dicts; leave everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


@contextmanager
def recorded_calls(diffusion_model, calls, every=1):
    """Within it, the arguments of every n-th forward of `diffusion_model` are appended to `calls`, on the CPU."""
    counter = itertools.count()

    def record(_module, args, kwargs):
        if next(counter) % every == 0:
            calls.append((to_device(args, "cpu"), to_device(kwargs, "cpu")))

    hook = diffusion_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def _forward_replaced(modules_and_forwards):
    """Within it, each module's forward is the given function; restored whatever happens, also where a module has a forward of
    its own from elsewhere."""
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


def _pass_through(block_name):
    """A forward that hands the hidden states on: (img, txt) in a double block, one tensor in a single block."""
    if block_name.startswith("double_blocks"):
        return lambda img, txt, *args, **kwargs: (img, txt)
    return lambda x, *args, **kwargs: x


@contextmanager
def _observed(layers, stats):
    """Within it, each layer's input goes into its InputStats."""
    hooks = [layer.register_forward_pre_hook(lambda _module, args, name=name: stats[name].add(args[0]))
             for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _replay(diffusion_model, call, device, blocks, index, previous):
    """Run one recorded call up to and with block `index`; `previous` is the output of the block before. Returns its output,
    None where the call does not run the block (some nodes skip blocks)."""
    reached = {}

    def stop(_module, _args, output):
        reached["output"] = to_device(output, "cpu")
        raise _Reached

    replaced = [(block, _pass_through(name)) for name, block in blocks[:index]]
    if index:
        replaced[-1] = (blocks[index - 1][1], lambda *args, **kwargs: to_device(previous, device))
    hook = blocks[index][1].register_forward_hook(stop)
    try:
        with _forward_replaced(replaced):
            args, kwargs = call
            diffusion_model(*to_device(args, device), **to_device(kwargs, device))
    except _Reached:
        pass
    finally:
        hook.remove()
    return reached.get("output")


def stream_blocks(diffusion_model, calls, device, blocks, layers_of, with_gram=False):
    """Yield (block name, {layer name: InputStats}) for each block in turn; the statistics are dropped before the next.

    calls: from recorded_calls; blocks: [(name, module)] in running order; layers_of(name, block): {name: linear}. A call that
    does not run every block is left out from there on; ValueError where none is left.
    """
    outputs = [None] * len(calls)
    for index, (name, block) in enumerate(blocks):
        layers = layers_of(name, block)
        stats = {layer: InputStats(len(calls), with_gram) for layer in layers}
        with _observed(layers, stats):
            outputs = [_replay(diffusion_model, call, device, blocks, index, output) for call, output in zip(calls, outputs)]
        whole = [(call, output) for call, output in zip(calls, outputs) if output is not None]
        if not whole:
            raise ValueError(f"The model never ran its block {name} while it was watched; take nodes that skip blocks off the "
                             "MODEL, and put them behind SVDQuant Quantize Model.")
        calls, outputs = map(list, zip(*whole))
        yield name, stats
