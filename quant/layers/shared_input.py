"""Layers of a model that read the same tensor, such as q, k and v: where they can, they share its quantization."""

import functools
import hashlib
import weakref

import torch

from ...cuda import ops, shared_input
from .linear import SVDQuantLinear, operands, version_of

_digests = weakref.WeakKeyDictionary()  # {layer: (weak reference to its smoothing factors, number of writes to them, their digest)}


def outputs(layers, x):
    """[layer(x) for layer in layers]. If the layers are W4A4 with one smoothing, x is quantized once."""
    if ops.plain(x) and all(takes_part(layer, x) for layer in layers) and are_alike(layers, x.device):
        return shared_input.svdquant_linears(x, [operands_of(layer, x) for layer in layers])
    return [layer(x) for layer in layers]


def takes_part(layer, x):
    """Whether a layer's output is its product, of parameters on x's device, with nothing that works on the input, or on the output."""
    if not isinstance(layer, SVDQuantLinear) or not layer.alone():
        return False
    branch, device = layer._modules.get("lora_branch"), x.device  # a module finds attributes of its own kinds slowly
    if branch is not None and (branch.has_gain or branch.has_terms):
        return False
    for p in layer._parameters.values():
        if p is not None and p.device != device:
            return False
    return True


def are_alike(layers, device):
    """Whether layers quantize their inputs in the same way."""
    first, *others = layers
    bits, unsigned_from, inputs = first.bits(device), first.spec.unsigned_from, first.in_features
    for layer in others:
        if layer.bits(device) != bits or layer.spec.unsigned_from != unsigned_from or layer.in_features != inputs:
            return False
    one = smoothing(first)
    return one is not None and all(smoothing(layer) == one for layer in others)


def smoothing(layer):
    """A digest of a layer's smoothing factors; None while it is not known, and a CUDA graph is captured, in which nothing can be read."""
    parameter = layer._parameters["weight_smooth_factor"]
    version = version_of(parameter)
    known = _digests.get(layer)
    if known is not None and known[0]() is parameter and known[1] == version:
        return known[2]
    if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    digest = hashlib.sha256(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
    _digests[layer] = weakref.ref(parameter), version, digest
    return digest


def operands_of(layer, x):
    """The LayerOperands of a layer that takes_part()."""
    p = layer.at(x) if layer.bias_function or layer.spec.branch_bits == 8 else layer._parameters
    branch, act_bits = layer._modules.get("lora_branch"), layer.bits(x.device)
    row_scale = layer.row_scale(p["weight_scale"]) if act_bits == 8 else None
    lora = () if branch is None else branch.operands(x, layer.lora_dtype)
    return operands(p, p["bias"], layer.spec.unsigned_from, act_bits, row_scale, layer.gelu_from, lora)


def preparations(layers, tokens, dtype, device):
    """Functions that each compile, load and test the kernels with which layers without LoRAs share an input of so many tokens, for
    preparation.warm_up. They hold no layer, since ops.warm_up remembers them."""
    if not all(isinstance(layer, SVDQuantLinear) for layer in layers):
        return []
    first = layers[0]
    sizes = tuple((layer.out_features, layer.spec.rank, layer.gelu_from, ops.NO_LORA) for layer in layers)
    shared = first.in_features, sizes, first.spec.unsigned_from, first.bits(device), dtype, device
    return [functools.partial(shared_input.prepare, m, *shared) for m in tokens]
