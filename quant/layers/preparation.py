"""The preparation of a model's packed layers before it runs: dtypes, activation bits, row scales, compiled kernels."""

import functools

import torch

from ...cuda import expand_branch, mlp, ops, targets
from ...cuda.choose import W4A16
from ...cuda.errors import KernelsUnavailable
from ...cuda.operands import NO_LORA
from .linear import AWQLinear, SVDQuantLinear
from .packed_mlp import PackedMLP

HALVES = torch.bfloat16, torch.float16
AREAS = (1 / 4, 1 / 16, 9 / 16, 9 / 4, 4)  # images to compile for besides a family's usual one, relative to its area


def compute_in(model, dtype, device):
    """Convert the layers' bf16 tensors to fp16 if the kernels on `device` compute a model in `dtype` in fp16, so that no call has to
    convert them. The specs keep the dtype of the file. A conversion back gives the same numbers, except for those below 2^-17, which are
    within 2^-25. fp16 tensors of a bf16 model are left as they are, because bf16 would lose their last bits."""
    if device.type != "cuda" or torch.version.hip:
        return
    for module in model.modules():
        if isinstance(module, (SVDQuantLinear, AWQLinear)):
            try:
                if targets.compute_dtype(dtype, module.spec.dtype, device) != torch.float16:
                    continue
            except KernelsUnavailable:  # a GPU that is too old
                return
            for name, p in module.named_parameters(recurse=False):
                if p.dtype == torch.bfloat16 and name != "weight_proj_scale":  # the scales are multiplied in float32
                    p.data = p.data.half()


def of_other_sizes(tokens):
    """The numbers of tokens (of an image, of its text, of both) of a family, then those of smaller and larger images with that text."""
    image, text, _ = tokens
    images = [int(image * area) for area in AREAS]
    return tuple(dict.fromkeys((*tokens, *images, *(other + text for other in images))))


def warm_up(model, device, dtype, tokens, others=()):
    """Compile the kernels that the model's packed layers need on `device` in threads, while the caller goes on.

    dtype: of the model, and so of the layers' inputs; tokens: numbers of tokens to compile for, the most urgent first. Other numbers may
    need another kernel; others: functions without arguments that prepare more than layers. Returns the threads' futures; an empty list for
    other devices than CUDA's.
    """
    if device.type != "cuda" or torch.version.hip:
        return []
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def computed(spec):
        return dtype if dtype in HALVES else spec.dtype

    layers, mlps, together = [], [], set()
    for module in model.modules():
        if isinstance(module, PackedMLP) and module.fuses(device) and dtype in (torch.float16, module[0].spec.dtype):
            first, _, second = module
            together |= {first, second}
            mlps += [(m, first.in_features, first.out_features, second.out_features, first.spec.rank, second.spec.rank,
                      first.spec.unsigned_from, second.spec.unsigned_from, dtype) for m in tokens]
        elif isinstance(module, SVDQuantLinear) and module not in together:
            branch, gelu_from, lora, gated = module.lora_branch, module.gelu_from, NO_LORA, module.gated
            if branch is not None:  # as PackedLinear.forward computes it
                more = branch.has_terms or branch.has_gain
                gelu_from, gated = None if more else gelu_from, gated and not more
                lora = branch.lora if branch.gain is None else NO_LORA
            for m in tokens:
                layers.append((m, module.out_features, module.in_features, module.spec.rank, module.spec.unsigned_from, module.bits(device),
                               computed(module.spec), gelu_from, lora))
                layers += [(*layers[-1], True)] if gated else []
        elif isinstance(module, AWQLinear):
            layers.append((1, module.out_features, module.in_features, 0, module.in_features, W4A16, computed(module.spec)))
    stored = dict.fromkeys(module.spec.dtype for module in model.modules() if isinstance(module, SVDQuantLinear)
                           and module.spec.branch_bits == 8)
    more = [functools.partial(expand_branch.prepare, dtype, each, device) for each in stored]
    more += [functools.partial(mlp.prepare, *sizes, device) for sizes in dict.fromkeys(mlps)]
    return ops.warm_up(sorted(dict.fromkeys(layers), key=lambda layer: tokens.index(layer[0]) if layer[0] in tokens else -1), device,
                       [*more, *others])


def set_act_bits(model, act_bits):
    """Set the activation bits of every W4A4 layer of the model, as in SVDQuantLinear."""
    for module in model.modules():
        if isinstance(module, SVDQuantLinear):
            module.act_bits = act_bits


def prepare(model, device):
    """Prepare every W4A4 layer for forwards on `device` (SVDQuantLinear.prepare)."""
    for module in model.modules():
        if isinstance(module, SVDQuantLinear):
            module.prepare(device)
