"""The low-rank branches in 8 bits of a block's layers, expanded by one launch at the block's start in place of one a layer.

Their memory lives as long as the block's forward. A layer whose branch is not among them, such as an offloaded one, expands its own.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import NamedTuple, Optional

from ...cuda import dispatch, expand_branch
from ...cuda.errors import KernelsUnavailable
from .linear import SVDQuantLinear

NOTHING = contextlib.nullcontext()
_plans = weakref.WeakKeyDictionary()  # {block: _Plan}


class _Plan(NamedTuple):
    """How a block's branches are expanded while they stay where they are."""

    layers: tuple  # weak references to the block's layers that have a branch in 8 bits
    found: list    # the result of _branches for which `expand` was made
    expand: Optional[Callable]  # expand_branch.ahead_of's; None if each layer expands its own


def expanded(block):
    """A context manager for a forward of the module `block`, in which its layers find their branches expanded on the current stream."""
    plan = _plans.get(block)
    if plan is None:
        layers = (layer for layer in block.modules() if isinstance(layer, SVDQuantLinear) and layer.spec.branch_bits == 8)
        plan = _plans[block] = _Plan(tuple(map(weakref.ref, layers)), [], None)
    layers = [layer for reference in plan.layers if (layer := reference()) is not None]
    if not layers or not dispatch.plain(layers[0].codes()[0]):
        return NOTHING
    found = _branches(layers)
    if found != plan.found:
        plan = _plans[block] = _Plan(plan.layers, found, _expander(layers, found))
    return NOTHING if plan.expand is None else plan.expand()


def _branches(layers):
    """[(addresses of the layer's codes(), the type in which it multiplies)]"""
    return [(tuple(tensor.data_ptr() for tensor in layer.codes()), layer._parameters["weight_scale"].dtype) for layer in layers]


def _expander(layers, found):
    """expand_branch.ahead_of the branches on one GPU and in one type, those of the first one there; None if less than two are."""
    resident, where = [], None
    for layer, (addresses, dtype) in zip(layers, found):
        codes = layer.codes()
        devices = {tensor.device for tensor in codes}
        if dispatch.on_gpu(codes[0]) and len(devices) == 1:
            where = where or (dtype, *devices)
            if where == (dtype, *devices):
                resident.append((addresses, (layer.in_features, layer.out_features, layer.spec.rank)))
    if len(resident) < 2:
        return None
    try:
        return expand_branch.ahead_of(*map(tuple, zip(*resident)), *where)
    except KernelsUnavailable:  # the layers' own calls log the reason
        return None
