"""ComfyUI's weight patches as a side branch of a packed layer.

A patch is ComfyUI's tuple (strength, value, strength_model, offset, function), where value is a weight adapter (LoRA, LoKr,
...) or ("diff", (tensor,)) and the like. comfy.lora.calculate_weight applies it to a dense weight; here the same
difference becomes a few 16-bit terms:

    LoRA                     its own two factors
    DoRA over outputs        its factors, and a gain a row
    LoKr                     its Kronecker product, never multiplied out
    a scaled weight          a gain
    anything else            the dense difference by a truncated SVD that keeps 99 % of its energy, or in full where
                             that takes no more memory
"""

import logging
import threading
from collections import defaultdict
from contextlib import contextmanager

import comfy.lora
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase

from ..layers.lora_branch import Dense, Kronecker, LowRank, SideBranch, merged
from ..quantizer.lowrank import SEARCH_ITERATIONS, low_rank

KEPT_ENERGY = 0.99
SKETCH_RANKS = (64, 256)  # tried before a full decomposition, which takes far longer
NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT",
         "diff": "weight difference", "set": "replaced weight", "model_as_lora": "model as LoRA"}
EXACT = "exactly"


def refusal(layer_name, why):
    return ValueError(f"A LoRA or weight patch for {layer_name} can't run on a model in 4 bits: {why}.")


def kind(value):
    """What a patch's value is called."""
    if isinstance(value, WeightAdapterBase):
        name = NAMES.get(value.name, value.name)
        return f"{name} with DoRA" if _dora(value) is not None else name
    if isinstance(value, list):
        return "merge"
    return NAMES.get("diff" if len(value) == 1 else value[0], str(value[0]))


def check(layer_name, layer, parameter, value, strength_model, offset):
    """Raise ValueError for a patch of a packed layer's parameter that no side branch or bias can express."""
    if parameter not in ("weight", "bias"):
        raise refusal(layer_name, f"it changes {parameter}, which belongs to the packed weight")
    if isinstance(value, list):
        raise refusal(layer_name, "merging changes every weight; merge the 16-bit models, then quantize the result")
    folded = layer.spec.unsigned_from < layer.in_features
    if parameter == "bias" and folded and (strength_model != 1.0 or kind(value) != NAMES["diff"]):
        raise refusal(layer_name, "its bias holds the correction for the GELU's shift, so it can only be added to")
    if parameter == "weight" and isinstance(value, (LoRAAdapter, LoKrAdapter)):
        # On meta tensors nothing is computed, and shapes that do not fit are told.
        _Sketch(layer_name, layer, torch.device("meta"), {}).add_factors(value, 1.0, offset)


def widest_last(patches):
    """Patches of one weight, those that widen it (FLUX-tools' LoRAs, of img_in) behind the others, the widest last. ComfyUI can't
    add a LoRA of the usual width to a weight that was widened, nor widen it to less than it is; added first, both work."""
    return sorted(patches, key=lambda patch: widens_to(patch[1]))


def padded(patches, usual, width):
    """Patches of a weight that a LoRA has widened already, from `usual` columns to `width`: narrower LoRAs get columns of zeros."""
    def pad(strength, value, *rest):
        if not isinstance(value, LoRAAdapter) or not usual <= value.weights[1].shape[1] < width:
            return strength, value, *rest
        up, down, *others, _reshape = value.weights
        down = torch.nn.functional.pad(down, (0, width - down.shape[1]))
        return strength, LoRAAdapter(value.loaded_keys, (up, down, *others, None)), *rest

    return [pad(*patch) for patch in patches]


def widens_to(value):
    """The columns that a patch gives a weight; 0 where it leaves it as wide as it is."""
    reshape = value.weights[5] if isinstance(value, LoRAAdapter) else None
    return 0 if reshape is None else reshape[1]


def nbytes(patches):
    """About how many bytes the side branch of these patches takes."""
    def numel(value):
        if isinstance(value, torch.Tensor):
            return value.numel()
        value = value.weights if isinstance(value, WeightAdapterBase) else value
        return sum(map(numel, value)) if isinstance(value, (tuple, list)) else 0
    return 2 * sum(numel(patch[1]) for patch in patches)


def build(key, layer, patches, device, cache):
    """(SideBranch or None, [(kind, how)]) for a packed layer.

    patches: ComfyUI's, in order; device: where to compute; cache: {what: (low-rank factors, what they were made of)},
    latest last, so that another strength needs no other SVD. Raises ValueError where a patch does not fit.
    """
    sketch = _Sketch(key, layer, device, cache)
    for patch in patches:
        sketch.add(*patch)
    dtype, home = layer.spec.dtype, layer.weight.device
    terms = [term.stored(dtype, home) for term in merged(sketch.terms)]
    if sketch.gain is None:
        return (SideBranch(terms) if terms else None), sketch.notes
    return SideBranch(terms, sketch.gain[:, 0].to(home), layer.fold(device).to(home)), sketch.notes


def lines(notes):
    """What the log says: a line for each kind of patch that is not a plain LoRA. notes: [(kind, how)] of all the layers."""
    groups = defaultdict(list)
    for what, how in notes:
        if (what, how) != (NAMES["lora"], EXACT):
            groups[what, how if isinstance(how, str) else None].append(how)
    texts = []
    for (what, how), entries in groups.items():
        if how is None:
            rank = f"{min(entries)} to {max(entries)}" if min(entries) < max(entries) else entries[0]
            how = f"as a truncated SVD of rank {rank}, which keeps {KEPT_ENERGY:.0%} of the difference's energy"
        texts.append(f"SVDQuant: {what} on {len(entries)} packed layers, {how}.")
    return texts


class _Sketch:
    """A side branch in the making: float32 terms and the gain so far, in the order of the patches."""

    def __init__(self, key, layer, device, cache):
        self.key, self.layer, self.device, self.cache = key, layer, device, cache
        self.shape = (layer.out_features, layer.in_features)
        self.terms, self.gain, self.notes = [], None, []

    def weight(self):
        """(N, K): the weight that the layer stands for, with the patches so far."""
        weight = self.layer.dense(self.device)
        if self.gain is not None:
            weight *= self.gain
        for term in self.terms:
            weight[slice(*term.rows), slice(*term.cols)] += term.dense()
        return weight

    def add(self, strength, value, strength_model, offset, function):
        rows, cols = self.window(offset)
        if strength_model != 1.0:
            self.scale(rows, cols, strength_model)
        what = kind(value)
        if strength == 0 and what != NAMES["set"]:
            return
        how = self.add_factors(value, strength, offset) if function is None else None
        self.notes.append((what, how or self.add_dense(strength, value, offset, function, rows, cols)))

    def add_factors(self, value, strength, offset):
        """Add an adapter whose own factors serve as terms: EXACT, or None where they do not."""
        if isinstance(value, LoRAAdapter):
            return self.add_lora(value, strength, *self.window(offset))
        return self.add_lokr(value, strength, *self.window(offset)) if isinstance(value, LoKrAdapter) else None

    def window(self, offset):
        """The rows and the columns that a patch is for, (start, stop) each."""
        window = [(0, size) for size in self.shape]
        if offset is not None:
            dim, start, length = offset
            if start + length > self.shape[dim]:
                raise self.misfit(f"rows or columns up to {start + length}")
            window[dim] = (start, start + length)
        return window

    def misfit(self, what):
        return refusal(self.key, f"it is for {what} and the layer is {list(self.shape)}, so it belongs to another model")

    def scale(self, rows, cols, factor):
        """Multiply rows of the weight, the terms so far included. factor: a number or (rows, 1)."""
        if cols != (0, self.shape[1]):
            self.terms.append(Dense(rows, cols, (factor - 1) * self.weight()[slice(*rows), slice(*cols)]))
            return
        if self.gain is None:
            self.gain = torch.ones(self.shape[0], 1, device=self.device)
        self.gain[slice(*rows)] *= factor
        self.terms = [term.scaled(rows, factor) for term in self.terms]

    def floats(self, *tensors):
        return [tensor.to(self.device, torch.float32) for tensor in tensors]

    def add_lora(self, adapter, strength, rows, cols):
        up, down, alpha, mid, dora, reshape = adapter.weights
        n, k = rows[1] - rows[0], cols[1] - cols[0]
        if reshape is not None and tuple(reshape) != self.shape:
            raise self.misfit(f"a weight of {list(reshape)}")
        up, down = self.floats(up.flatten(1), down.flatten(1))
        if mid is not None:
            return None
        if (up.shape[0], down.shape[1]) != (n, k):
            raise self.misfit(f"{[up.shape[0], down.shape[1]]} in place of {[n, k]}")
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        if dora is not None:
            if dora.shape[0] != n or cols != (0, self.shape[1]):
                return None
            # W' = W + strength (gain (W + scale up down) - W), gain = dora / |W| over each row
            norm = self.weight()[slice(*rows)].norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
            gain = self.floats(dora.reshape(n, 1))[0] / norm
            self.scale(rows, cols, 1 + strength * (gain - 1))
            up = up * gain
        self.terms.append(LowRank(rows, cols, up * (strength * scale), down))
        return EXACT

    def add_lokr(self, adapter, strength, rows, cols):
        left, right, alpha, left_up, left_down, right_up, right_down, core, dora = adapter.weights
        if dora is not None or core is not None:
            return None
        rank = None
        if left is None:
            up, left = self.floats(left_up, left_down)
            rank, left = left.shape[0], up @ left
        if right is None:
            up, right = self.floats(right_up, right_down)
            rank, right = right.shape[0], up @ right
        left, right = self.floats(left, right)
        if left.ndim != 2 or right.ndim != 2:
            return None
        shape = [left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]]
        if shape != [rows[1] - rows[0], cols[1] - cols[0]]:
            raise self.misfit(f"{shape} in place of {[rows[1] - rows[0], cols[1] - cols[0]]}")
        scale = alpha / rank if alpha is not None and rank is not None else 1.0
        self.terms.append(Kronecker(rows, cols, left * (strength * scale), right))
        return EXACT

    def add_dense(self, strength, value, offset, function, rows, cols):
        """The difference that ComfyUI would make to the dense weight, as terms; returns how."""
        if function is not None or _reads_weight(value):
            before = self.weight()
            return self.add_difference(self.applied(before, strength, value, offset, function) - before)
        what = (self.key, offset, _identity(value))
        if what in self.cache:
            self.cache[what] = self.cache.pop(what)
        else:
            zeros = torch.zeros(self.shape, device=self.device)
            difference = self.applied(zeros, 1.0, value, offset, None)[slice(*rows), slice(*cols)]
            factors = truncated(difference)
            if factors is None:
                return self.add_difference(strength * difference, rows, cols)
            # `value` is kept so that the identity of its tensors stays theirs.
            self.cache[what] = (*(factor.to(self.layer.spec.dtype).cpu() for factor in factors), value)
        up, down = self.floats(*self.cache[what][:2])
        self.terms.append(LowRank(rows, cols, up * strength, down))
        return up.shape[1]

    def applied(self, weight, strength, value, offset, function):
        originals = {self.key: [(self.layer.dense(self.device), None)]} if kind(value) == NAMES["model_as_lora"] else None
        with _failures_raised(self.key):
            result = comfy.lora.calculate_weight([(strength, value, 1.0, offset, function)], weight.clone(), self.key,
                                                 original_weights=originals)
        if result.shape != weight.shape:
            raise self.misfit(f"a weight of {list(result.shape)}")
        return result

    def add_difference(self, difference, rows=None, cols=None):
        rows, cols = rows or (0, self.shape[0]), cols or (0, self.shape[1])
        factors = truncated(difference)
        if factors is None:
            self.terms.append(Dense(rows, cols, difference))
            return "in full as 16-bit weights, since no low rank keeps enough of it"
        self.terms.append(LowRank(rows, cols, *factors))
        return factors[0].shape[1]


def truncated(difference):
    """The smallest rank that keeps 99 % of a matrix's energy, its squared sum.

    difference: (n, k) float32. Returns up (n, R) and down (R, k), or None where they are no smaller than the matrix.
    """
    n, k = difference.shape
    wanted = KEPT_ENERGY * difference.square().sum()
    if wanted == 0:
        return difference.new_zeros(n, 1), difference.new_zeros(1, k)
    for rank in SKETCH_RANKS:
        if rank < min(n, k) / 2:
            up, down = low_rank(difference, rank, SEARCH_ITERATIONS)
            # The singular values are split evenly, so a column's squared norm is one of them.
            energy = up.square().sum(dim=0).square().cumsum(dim=0)
            if energy[-1] >= wanted:
                kept = int((energy < wanted).sum()) + 1
                return up[:, :kept], down[:, :kept].t()
    wide = n < k
    gram = difference @ difference.t() if wide else difference.t() @ difference
    values, vectors = torch.linalg.eigh(gram)  # ascending
    energy = values.flip(0).clamp_min(0).cumsum(dim=0)
    kept = min(int((energy < wanted).sum()) + 1, len(values))
    if kept * (n + k) >= n * k:
        return None
    basis = vectors[:, -kept:]
    return (basis, basis.t() @ difference) if wide else (difference @ basis, basis.t())


def _dora(value):
    """A weight adapter's magnitude vector, or None. It is the last of its tensors, but for LoRA's `reshape`."""
    return value.weights[4] if isinstance(value, LoRAAdapter) else value.weights[-1]


def _reads_weight(value):
    """Whether the difference that a patch makes depends on the weight it is applied to."""
    if isinstance(value, (LoRAAdapter, LoHaAdapter, LoKrAdapter)):
        return _dora(value) is not None
    return kind(value) != NAMES["diff"]


def _identity(value):
    """A hashable stand-in for a patch's value: the same tensors, the same identity."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, WeightAdapterBase):
        return (value.name, _identity(value.weights))
    return tuple(map(_identity, value)) if isinstance(value, (tuple, list)) else repr(value)


@contextmanager
def _failures_raised(key):
    """ComfyUI tells of a patch that it could not apply in the log only; here that is an error."""
    thread = threading.get_ident()

    def watch(record):
        if record.levelno >= logging.WARNING and record.thread == thread:
            raise refusal(key, f"ComfyUI says {record.getMessage()!r}")
        return True

    root = logging.getLogger()
    root.addFilter(watch)
    try:
        yield
    finally:
        root.removeFilter(watch)
