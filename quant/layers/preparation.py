"""What is done to all the packed layers of a model before it draws: types, activation bits, row scales, kernels."""

import functools

import torch

from ...cuda import mlp, ops
from ...cuda.choose import W4A16
from ...cuda.errors import KernelsUnavailable
from ...cuda.operands import NO_LORA
from .linear import AWQLinear, SVDQuantLinear
from .packed_mlp import PackedMLP

HALVES = torch.bfloat16, torch.float16


def compute_in(model, dtype, device):
    """Have the layers' bf16 tensors in fp16, where the kernels on `device` compute in that while the model is in `dtype`, so that no call
    has to convert them. The specs go on to say how they were stored; the way back is exact but for what is below 2^-17, to within 2^-25.
    Tensors in fp16 stay so in a bf16 model, where their last bits would be lost."""
    if device.type != "cuda" or torch.version.hip:
        return
    for module in model.modules():
        if isinstance(module, (SVDQuantLinear, AWQLinear)):
            try:
                if ops.compute_dtype(dtype, module.spec.dtype, device) != torch.float16:
                    continue
            except KernelsUnavailable:  # a GPU that is too old
                return
            for p in module.parameters():
                if p.dtype == torch.bfloat16:
                    p.data = p.data.half()


def warm_up(model, device, dtype, tokens):
    """Have the kernels that the model's packed layers will ask for on `device` compiled in threads, beside what the caller does next.

    dtype: the model's, of the layers' inputs; tokens: the numbers of them to compile for; others may want a kernel more. Returns the
    threads' futures; none off CUDA.
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
            branch = module.lora_branch
            gelu_from, lora = (module.gelu_from, NO_LORA) if branch is None else (None if branch.terms else module.gelu_from, branch.lora)
            layers += [(m, module.out_features, module.in_features, module.spec.rank, module.spec.unsigned_from, module.bits(device),
                        computed(module.spec), gelu_from, lora) for m in tokens]
        elif isinstance(module, AWQLinear):
            layers.append((1, module.out_features, module.in_features, 0, module.in_features, W4A16, computed(module.spec)))
    return ops.warm_up(dict.fromkeys(layers), device, [functools.partial(mlp.prepare, *sizes, device) for sizes in dict.fromkeys(mlps)])


def set_act_bits(model, act_bits):
    """Have every W4A4 layer of the model quantize its input to act_bits (SVDQuantLinear says which there are)."""
    for module in model.modules():
        if isinstance(module, SVDQuantLinear):
            module.act_bits = act_bits


def prepare(model, device):
    """Have every layer find what its forwards on `device` need beside its parameters (SVDQuantLinear.prepare)."""
    for module in model.modules():
        if isinstance(module, SVDQuantLinear):
            module.prepare(device)
