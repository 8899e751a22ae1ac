"""ComfyUI's weight patches as the LoRA branch of a packed layer.

comfy.lora.calculate_weight applies a patch (patches.py) to a dense weight. Here the same difference becomes a few 16-bit terms:

    LoRA                     its own two factors, and its strength as a number
    DoRA over outputs        its factors, and a gain per row
    LoKr                     its Kronecker product, never multiplied out
    a scaled weight          a gain
    anything else            the dense difference: as a truncated SVD that keeps 99 % of its energy, or in full if the SVD
                             would take more memory
"""

from collections import defaultdict

import comfy.lora
import torch

from ..layers import linear
from ..layers.lora_branch import Dense, Kronecker, LoRABranch, LowRank
from ..quantizer import out_of_memory
from ..quantizer.truncated_svd import KEPT_ENERGY, truncated_svd
from ..text import bounded
from .patches import NAMES, LoKrParts, LoRAParts, dora_scale, identity, kind, nbytes, parts, patch_of, reads_weight, tensors_of

EXACT = "exactly"
# What ComfyUI's arithmetic raises for damaged adapters.
FAILURES = RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, NameError


def refusal(layer_name, why):
    """The ValueError for a patch that a packed layer can't take."""
    return ValueError(f"A LoRA or weight patch for {layer_name} can't run on a model in 4 bits: {why}.")


def check(layer_name, layer, parameter, value, strength_model, offset):
    """Raise ValueError for a patch of a packed layer's parameter that neither a LoRA branch nor the bias can apply."""
    if parameter not in ("weight", "bias"):
        raise refusal(layer_name, f"it changes {parameter}, which belongs to the packed weight")
    if isinstance(value, list):
        raise refusal(layer_name, "merging changes every weight; merge the 16-bit models, then quantize the result")
    corrected = layer.spec.unsigned_from < layer.in_features
    if parameter == "bias" and corrected and (strength_model != 1.0 or kind(value) != NAMES["diff"]):
        raise refusal(layer_name, "its bias contains the GELU shift correction, so a patch can only add to it")
    if parameter == "bias" and not all(torch.isfinite(tensor).all() for tensor in tensors_of(value)):
        raise refusal(layer_name, f"its {kind(value)} has NaN or infinity")
    if parameter == "weight" and isinstance(parts(value), (LoRAParts, LoKrParts)):
        # On the meta device this computes nothing, and raises if shapes do not fit.
        try:
            _Sketch(layer_name, layer, torch.device("meta"), {}).add_factors(value, 1.0, offset)
        except (RuntimeError, IndexError) as error:
            raise refusal(layer_name, f"the factors of its {kind(value)} don't fit each other ({bounded(str(error), 200)})") from error


def build(key, layer, patches, device, cache, in_place=False):
    """(LoRABranch or None, [(kind, how)]) for a packed layer.

    patches: ComfyUI's, in order; device: where to compute; cache: {identity of a patch: (low-rank factors, the patch's value)}, most
    recently used last, so that another strength needs no new SVD; in_place: where only strengths differ from those of the layer's branch,
    that branch takes them and is returned. Raises ValueError if a patch does not fit the layer.
    """
    sketch = _Sketch(key, layer, device, cache)
    for entry in patches:
        sketch.add(*patch_of(entry))
    if in_place and sketch.changes_strengths():
        return layer.lora_branch, sketch.notes
    branch, home = sketch.branch(), layer.weight.device
    return branch if branch is None or home == device else branch.to(home), sketch.notes


def branch_size(layer, patches, device):
    """About how many bytes build()'s branch takes beside the layer on `device`: where a W4A4 layer and its branch don't share memory, the
    branch has the layer's own proj_down a second time, in 16 bits."""
    copies = layer.takes_lora and not (device.type in linear.SHARING and layer.spec.branch_bits == 16)
    own = layer.in_features * layer.spec.rank if copies else 0
    return nbytes(patches) + own * layer.lora_dtype.itemsize


def lines(notes):
    """Lines for the log, one for each kind of patch that is not a plain LoRA. notes: [(kind, how)] of all the layers."""
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
    """A LoRA branch under construction: the terms and the gain of the patches so far, in order."""

    def __init__(self, key, layer, device, cache):
        self.key, self.layer, self.device, self.cache = key, layer, device, cache
        self.shape = (layer.out_features, layer.in_features)
        self.terms, self.gain, self.notes = [], None, []

    def branch(self):
        """The LoRABranch, or None if the patches change nothing."""
        own = self.layer.spec.rank if self.layer.takes_lora else 0
        gain = () if self.gain is None else (self.gain[:, 0], self.layer.gelu_shift_correction(self.device))
        if not self.terms and not gain:
            return None
        branch = LoRABranch.of(self.terms, self.shape, self.layer.lora_dtype, self.device, own, *gain)
        if not branch.is_finite():
            kinds = " or its ".join(dict.fromkeys(what for what, _ in self.notes))
            raise refusal(self.key, f"its {kinds} gives NaN or infinity")
        return branch

    def changes_strengths(self):
        """Whether only strengths differ from those of the layer's branch, which then has them."""
        branch = self.layer.lora_branch
        return (branch is not None and self.gain is None
                and branch.take_strengths(self.terms, self.layer.out_features, self.layer.lora_dtype))

    def weight(self):
        """(N, K) float32: the layer's dense weight with the patches so far."""
        weight = self.layer.dense(self.device)
        if self.gain is not None:
            weight *= self.gain
        for term in self.terms:
            weight[slice(*term.rows), slice(*term.cols)] += term.dense(self.device)
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
        """Add an adapter by its own factors. Returns EXACT, or None if they can't be used as terms."""
        adapter = parts(value)
        if isinstance(adapter, LoRAParts):
            return self.add_lora(adapter, strength, *self.window(offset))
        return self.add_lokr(adapter, strength, *self.window(offset)) if isinstance(adapter, LoKrParts) else None

    def window(self, offset):
        """The rows and the columns that a patch changes, (start, stop) each."""
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
        """Multiply rows of the weight, including the terms so far. factor: a number or (rows, 1)."""
        if cols != (0, self.shape[1]):
            self.terms.append(Dense(rows, cols, (factor - 1) * self.weight()[slice(*rows), slice(*cols)]))
            return
        if self.gain is None:
            self.gain = torch.ones(self.shape[0], 1, device=self.device)
        self.gain[slice(*rows)] *= factor
        self.terms = [term.scaled(rows, factor) for term in self.terms]

    def floats(self, *tensors):
        return [tensor.to(self.device).float() for tensor in tensors]  # the other order would convert on the CPU

    def add_lora(self, adapter, strength, rows, cols):
        n, k = rows[1] - rows[0], cols[1] - cols[0]
        if adapter.reshape is not None and tuple(adapter.reshape) != self.shape:
            raise self.misfit(f"a weight of {list(adapter.reshape)}")
        if adapter.mid is not None:
            return None
        up, down = (factor if factor.ndim == 2 else factor.flatten(1) for factor in (adapter.up, adapter.down))
        if (up.shape[0], down.shape[1]) != (n, k):
            raise self.misfit(f"{[up.shape[0], down.shape[1]]} in place of {[n, k]}")
        if not down.shape[0]:
            raise refusal(self.key, "its LoRA has no ranks")
        scale = 1.0 if adapter.alpha is None else adapter.alpha / down.shape[0]
        dora = adapter.dora_scale
        if dora is not None:
            if dora.shape[0] != n or cols != (0, self.shape[1]):
                return None
            # W' = W + strength (gain (W + scale up down) - W), gain = dora / |W| over each row
            norm = self.weight()[slice(*rows)].norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
            gain = self.floats(dora.reshape(n, 1))[0] / norm
            self.scale(rows, cols, 1 + strength * (gain - 1))
            up = self.floats(up)[0] * gain
        self.terms.append(LowRank(rows, cols, up, down, strength * scale))
        return EXACT

    def multiplied(self, up, down):
        """(a factor of a LoKr from its own two, their rank)"""
        if up is None or down is None:
            raise refusal(self.key, "its LoKr lacks a factor")
        up, down = self.floats(up, down)
        return up @ down, down.shape[0]

    def add_lokr(self, adapter, strength, rows, cols):
        if adapter.dora_scale is not None or adapter.t2 is not None:
            return None
        left, right, rank = adapter.w1, adapter.w2, None
        if left is None:
            left, rank = self.multiplied(adapter.w1_a, adapter.w1_b)
        if right is None:
            right, rank = self.multiplied(adapter.w2_a, adapter.w2_b)
        left, right = self.floats(left, right)
        if left.ndim != 2 or right.ndim != 2:
            return None
        shape = [left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]]
        if shape != [rows[1] - rows[0], cols[1] - cols[0]]:
            raise self.misfit(f"{shape} in place of {[rows[1] - rows[0], cols[1] - cols[0]]}")
        scale = adapter.alpha / rank if adapter.alpha is not None and rank else 1.0
        self.terms.append(Kronecker(rows, cols, left * (strength * scale), right))
        return EXACT

    def add_dense(self, strength, value, offset, function, rows, cols):
        """Add the difference that ComfyUI would make to the dense weight, as terms. Returns how, for the notes: a rank or words."""
        if function is not None or reads_weight(value):
            before = self.weight()
            return self.add_difference(self.applied(before, strength, value, offset, function) - before)
        what = (self.key, offset, identity(value))
        if what in self.cache:
            self.cache[what] = self.cache.pop(what)
        else:
            zeros = torch.zeros(self.shape, device=self.device)
            difference = self.applied(zeros, 1.0, value, offset, None)[slice(*rows), slice(*cols)]
            factors = truncated_svd(difference)
            if factors is None:
                return self.add_difference(strength * difference, rows, cols)
            # Keeping `value` keeps Python from reusing the ids of its tensors.
            self.cache[what] = (*(factor.to(self.layer.spec.dtype).cpu() for factor in factors), value)
        up, down = self.cache[what][:2]
        self.terms.append(LowRank(rows, cols, up, down, strength))
        return up.shape[1]

    def applied(self, weight, strength, value, offset, function):
        """(N, K): `weight` with the patch applied by ComfyUI's own code. Raises ValueError if ComfyUI can't apply it."""
        dora = dora_scale(value)
        if dora is not None and dora.numel() not in (stop - start for start, stop in self.window(offset)):
            raise self.misfit(f"{dora.numel()} rows or columns by its DoRA scale")
        computed = []

        def passed_on(difference):
            computed.append(difference.shape)
            return difference if function is None else function(difference)

        originals = {self.key: [(self.layer.dense(self.device), None)]} if kind(value) == NAMES["model_as_lora"] else None
        try:
            result = comfy.lora.calculate_weight([(strength, value, 1.0, offset, passed_on)], weight.clone(), self.key,
                                                 original_weights=originals)
        except FAILURES as error:  # factors are missing, empty, or don't fit each other
            if out_of_memory.on_device(error) or out_of_memory.on_host(error):
                raise
            raise refusal(self.key, f"ComfyUI could not apply its {kind(value)} to a weight of {list(self.shape)} "
                                    f"({bounded(str(error), 200)})") from error
        if result.shape != weight.shape:
            raise self.misfit(f"a weight of {list(result.shape)}")
        # ComfyUI only logs when it can't apply a patch. When it can, it calls `function` or replaces the weight.
        if not computed and torch.equal(result, weight):
            raise refusal(self.key, f"ComfyUI could not apply its {kind(value)} to a weight of {list(self.shape)}; the console says why")
        if not torch.isfinite(result).all():
            raise refusal(self.key, f"its {kind(value)} gives NaN or infinity")
        return result

    def add_difference(self, difference, rows=None, cols=None):
        rows, cols = rows or (0, self.shape[0]), cols or (0, self.shape[1])
        factors = truncated_svd(difference)
        if factors is None:
            self.terms.append(Dense(rows, cols, difference))
            return "in full as 16-bit weights, since no low rank keeps enough of it"
        self.terms.append(LowRank(rows, cols, *factors))
        return factors[0].shape[1]
