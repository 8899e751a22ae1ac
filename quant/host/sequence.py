"""One forward of a diffusion model with its tokens divided among processes (parallel/all_to_all.py, peer_attention.py).

ComfyUI's own forward runs in every process, on the same inputs. Hooks on the blocks narrow the states to a process's own tokens before the
first block, and make the whole image of them in process 0 after the last one; attention goes through ComfyUI's option for other attention
functions. What a ControlNet adds after each block is narrowed likewise. Packed layers, LoRAs in them and fused forwards see ordinary
tensors of fewer tokens.
"""

from contextlib import contextmanager

import torch

from ..parallel import all_to_all, peer_attention
from .fused_blocks import OVERRIDE

ROPE = "pe"  # the blocks' argument with the position embedding, whose third dimension is the tokens


class Finished(Exception):
    """Raised in the processes other than 0 when the last block has run: only process 0 computes what follows."""


def heads_of(diffusion_model, family):
    """The number of attention heads of a model's blocks."""
    return next(block.num_heads for _, block in family.running_blocks(diffusion_model))


def can_be_divided(family):
    """Whether the tokens of the family's models can be divided."""
    return all(blocks.sequence for blocks in family.blocks)


class _Forward:
    """The hooks of one forward. control: its own {place: [residual of each block (B, image tokens, K), or None]} of ControlNets; every: the
    run's parallel.ranks.Ranks; groups: as in peer_attention.attend."""

    def __init__(self, family, control, every, groups):
        self.family, self.every, self.rank, self.groups = family, every, every.rank, groups
        self.division, self.rope = None, None
        self.control, self.residuals = control, {place: list(tensors) for place, tensors in control.items()}

    def attention(self, function, q, k, v, heads, *args, **kwargs):
        """In place of an attention function of ComfyUI's. The mask is that of the whole sequence."""
        if not kwargs.get("skip_reshape"):
            raise ValueError("SVDQuant Several GPUs knows attention with separate heads only; bypass it.")
        mask = kwargs.get("mask")
        if mask is not None:
            mask = self.division.ordered(mask)

        def of_heads(q, k, v, own):
            own_mask = mask[:, own] if mask is not None and mask.ndim == 4 and mask.shape[1] == heads else mask
            return function(q, k, v, q.shape[1], *args, **kwargs | ({} if mask is None else {"mask": own_mask}))

        return peer_attention.attend(self.every, q, k, v, self.division, of_heads, self.groups)

    def narrow(self, blocks):
        """A pre-hook for the blocks of a BlockList."""
        def hook(_block, args, kwargs):
            states = {name: args[place] if place < len(args) else kwargs[name] for place, name in enumerate(blocks.states)}
            if self.division is None:
                self.division = all_to_all.Division([states[name].shape[1] for name in blocks.sequence], self.rank, self.every.size)
                states |= {name: self.division.own_of_part(states[name], part) for part, name in enumerate(blocks.sequence)}
                self.narrow_control(blocks.sequence.index("img"))
            if self.rope is None or self.rope[0] is not kwargs[ROPE]:
                self.rope = kwargs[ROPE], self.division.own(kwargs[ROPE], 2)
            args = tuple(states[name] for name in blocks.states[:len(args)]) + tuple(args[len(blocks.states):])
            return args, kwargs | {name: states[name] for name in blocks.states[len(args):]} | {ROPE: self.rope[1]}
        return hook

    def narrow_control(self, part):
        """Leave this process's image tokens in the ControlNets' residuals. They may have fewer tokens than the image, whose last ones are
        reference pictures then."""
        own = self.division.own_range(part)
        for place, tensors in self.residuals.items():
            self.control[place][:] = [None if tensor is None else tensor[:, own] for tensor in tensors]

    def widen(self, _block, _args, output):
        """A hook for the last block: its own tokens of the text, which the model drops, and the whole image, to which the model then adds
        the last residual of a ControlNet."""
        for place, tensors in self.residuals.items():
            self.control[place][:] = tensors
        text = self.division.counts[self.rank][0]
        image = all_to_all.gathered(output[:, text:], self.division, 1)
        if self.rank:
            raise Finished
        return torch.cat((output[:, :text], image), 1)


@contextmanager
def divided(diffusion_model, family, arguments, every, groups=1):
    """A context in which a forward of the model with {name: argument} works on a part of the tokens. It changes `arguments`, and for the
    time their transformer options. every: the run's parallel.ranks.Ranks; groups: as in peer_attention.attend."""
    options, control = arguments["transformer_options"], arguments.get("control")
    if control is not None:
        arguments["control"] = control = {place: list(tensors) for place, tensors in control.items()}
    forward, hooks = _Forward(family, control or {}, every, groups), []
    try:
        for blocks in family.blocks:
            hook = forward.narrow(blocks)
            for block in getattr(diffusion_model, blocks.name):
                hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        hooks.append(block.register_forward_hook(forward.widen))
        options[OVERRIDE] = forward.attention
        yield
    finally:
        options.pop(OVERRIDE, None)
        for hook in hooks:
            hook.remove()
