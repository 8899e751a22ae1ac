"""Layers of a model that read the same tensor, such as q, k and v: where they can, they share its quantization."""

import functools
import hashlib
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...cuda import dispatch, ops, shared_input
from .linear import SHAPES, SVDQuantLinear, operands, version_of

_launches = weakref.WeakKeyDictionary()  # {a group's first layer: {x's shape: CachedLaunch}}
_digests = weakref.WeakKeyDictionary()  # {layer: (weak reference to its smoothing factors, number of writes to them, their digest)}


def outputs(layers, x):
    """[layer(x) for layer in layers]. If the layers are W4A4 with one smoothing, x is quantized once."""
    if not dispatch.plain(x):
        return [layer(x) for layer in layers]
    known = _launches.get(layers[0])
    known = None if known is None else known.get(x.shape)
    if known is not None and known.is_of(layers):
        found = known.launch(x, [layer._parameters["weight_proj_down"] for layer in layers])
        if found is not None:
            return found
    if not all(takes_part(layer, x) for layer in layers) or not are_alike(layers, x.device):
        return [layer(x) for layer in layers]
    args = [operands_of(layer, x) for layer in layers]
    found = shared_input.svdquant_linears(x, args)
    keep_launch(layers, x, args)
    return found


def keep_launch(layers, x, args):
    """Keep a CachedLaunch for the layers with these LayerOperands and x's shape, where there can be one."""
    states, launch = [state(layer) for layer in layers], shared_input.cached_launch(x, args)
    if launch is None or None in states:
        return
    kept = _launches.setdefault(layers[0], {})
    if len(kept) >= SHAPES:
        kept.clear()
    kept[x.shape] = CachedLaunch(launch, tuple(map(weakref.ref, layers)), states)


class CachedLaunch(NamedTuple):
    """How layers run with an input of one shape, as long as nothing else changes."""

    launch: Callable  # shared_input.cached_launch's
    layers: tuple     # weak references to the layers
    states: list      # state() of each layer when the launch was made

    def is_of(self, layers):
        return (len(layers) == len(self.layers)
                and all(known() is layer and state(layer) == before for known, layer, before in zip(self.layers, layers, self.states)))


def state(layer):
    """All that a cached launch of an SVDQuantLinear that takes_part() depends on; None if there can be none: with LoRAs or a
    patch of the bias."""
    if layer.bias_function or layer._modules.get("lora_branch") is not None or not layer.alone():
        return None
    p, row_scale, digest = layer._parameters, layer._row_scale, _digests.get(layer)
    if row_scale is not None and not _holds(row_scale.parameter, row_scale.version, p["weight_scale"]):
        return None
    if digest is None or not _holds(*digest[:2], p["weight_smooth_factor"]):
        return None
    return (layer.spec, layer.act_bits, layer.gelu_from, p["weight_scale"].dtype, None if row_scale is None else row_scale.address,
            *[0 if tensor is None else tensor.data_ptr() for tensor in p.values()])


def _holds(reference, version, parameter):
    """Whether what was computed from a parameter, by reference, at a version, is still its. Asking a tensor that has no version for it
    takes as long as a launch."""
    return reference() is parameter and (version is None or version == parameter._version)


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
    p = layer.at(x) if layer.bias_function else layer._parameters
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
