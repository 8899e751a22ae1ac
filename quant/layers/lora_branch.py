"""The LoRA branch of a packed layer: what loaded LoRAs add, in 16 bits, beside the packed weights, which stay as they are.

    y = gain * (W x) + sum of the terms + bias

A term reads a range of the columns and adds to a range of the rows, so that a LoRA on k alone, or on the MLP's part of
a joined linear, costs no more than its own size. `gain` is a factor per row. It is rare: DoRA and nodes that scale weights need it.

The ranks of plain LoRAs are joined in one pair of factors (joined()), which a W4A4 layer's kernels take beside the layer's own low-rank
branch. Other terms are added to the layer's output.

N outputs, K inputs of the layer; n, k those of a term; parts as in cuda/operands.py's LoRASizes.
"""

import math
import weakref
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from ...cuda import reference
from ...cuda.operands import MAX_PART_RANK, MAX_PARTS, NO_LORA, PART_ROWS, RANK_STEP, LoRASizes


class Term(torch.nn.Module):
    """One addend of the weight. rows, cols: (start, stop) within the layer. Its tensors are buffers, so that they move with the layer, and
    not persistent, so that they are not part of a checkpoint."""

    def __init__(self, rows, cols, *factors):
        super().__init__()
        self.rows, self.cols = rows, cols
        for name, factor in zip(self.names, factors):
            self.register_buffer(name, factor, persistent=False)

    def factors(self):
        return [getattr(self, name) for name in self.names]

    def stored(self, dtype, device):
        """The same term as a LoRA branch keeps it: in 16 bits, on the layer's device."""
        return type(self)(self.rows, self.cols, *(factor.to(device, dtype) for factor in self.factors()))

    def scaled(self, rows, factor):
        """The term with the layer's `rows` multiplied by `factor`, a number or (stop - start, 1)."""
        start, stop = max(rows[0], self.rows[0]), min(rows[1], self.rows[1])
        if start >= stop:
            return self
        first, *rest = self.factors()
        first = first.clone()
        first[start - self.rows[0]:stop - self.rows[0]] *= (
            factor if isinstance(factor, (int, float)) else factor[start - rows[0]:stop - rows[0]])
        return type(self)(self.rows, self.cols, first, *rest)


class LowRank(Term):
    """up (n, R), down (R, k). Their dtypes and devices may differ. `down` is a LoRA's own tensor, and strengths are factors of `up` alone,
    so that a branch with the same LoRAs at other strengths needs no other `down`."""

    names = ("up", "down")

    def dense(self):
        return self.up.float() @ self.down.to(self.up.device).float()

    def balanced(self, dtype):
        """(up, down) of the same product, which `dtype` can hold: in fp16 both are of the same size, in bf16 any size will do."""
        return _balanced(self.up.float(), self.down.to(self.up.device).float()) if dtype == torch.float16 else (self.up, self.down)


class Kronecker(Term):
    """left (a, b), right (c, d): the weight is their Kronecker product, n = a c, k = b d, which is never computed."""

    names = ("left", "right")

    def dense(self):
        return torch.kron(self.left, self.right)

    def forward(self, x):
        inner = linear(x.unflatten(-1, (self.left.shape[1], self.right.shape[1])), self.right.to(x))  # (..., b, c)
        return (self.left.to(x) @ inner).flatten(-2)

    def stored(self, dtype, device):
        return Kronecker(self.rows, self.cols, *_balanced(self.left, self.right)).to(device, dtype)

    def scaled(self, rows, factor):
        if isinstance(factor, (int, float)) and rows[0] <= self.rows[0] and self.rows[1] <= rows[1]:
            return Kronecker(self.rows, self.cols, self.left * factor, self.right)
        return Dense(self.rows, self.cols, self.dense()).scaled(rows, factor)


class Dense(Term):
    """weight (n, k)."""

    names = ("weight",)

    def dense(self):
        return self.weight

    def forward(self, x):
        return linear(x, self.weight.to(x))


def _balanced(left, right):
    """Both factors, scaled by a power of two to the same magnitude, which rounds nothing. Otherwise alpha / rank may make one too small for
    fp16, or the other too large."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = left.abs().amax().clamp_min(tiny) / right.abs().amax().clamp_min(tiny)
    factor = torch.exp2((ratio.log2() / 2).round())
    return left / factor, right * factor


class JoinedLoRAs(NamedTuple):
    """The ranks of all of a layer's low-rank terms, as LayerOperands has them."""

    down: torch.Tensor  # its first rows are for the layer's own proj_down, and have no values yet
    up: torch.Tensor
    sizes: LoRASizes
    sources: tuple = ()  # (weak reference to its `down`, rows, cols) of each term, whose values `down` has as they are


def joined(terms, shape, own, dtype, device, before=None):
    """The JoinedLoRAs of LowRank terms, in `dtype` on `device`. shape: the layer's (N, K); own: rows of `down` for its own ranks; before:
    the layer's LoRABranch so far, whose `down` serves again if it is from the same tensors.

    Terms for some of the rows get parts of their own, if the rows' borders allow it and that takes less memory. Otherwise `up` is zero in
    the rows that a term doesn't reach, as `down` always is in such columns.
    """
    n, k = shape
    sizes = min(_possible_sizes(terms, n), key=lambda sizes: _numel(sizes, n, k))
    rows, ranks = sizes.rows(n), sizes.ranks
    numel = [(stop - start) * rank for (start, stop), rank in zip(rows, ranks)]
    whole = sum(term.up.numel() + term.down.numel() for term in terms) == sum(ranks) * k + sum(numel)  # nothing stays zero
    new = torch.empty if whole else torch.zeros
    up = new(sum(numel), dtype=dtype, device=device)
    sources = () if dtype == torch.float16 else tuple((weakref.ref(term.down), term.rows, term.cols) for term in terms)
    known = before is not None and before.has_down(sources, sizes, own, up)
    down = before.lora_down if known else new(own + sum(ranks), k, dtype=dtype, device=device)
    parts = [(first, last, part_down, part_up.view(last - first, -1) if len(part_down) else part_up)
             for (first, last), part_down, part_up in zip(rows, down[own:].split(ranks), up.split(numel))]
    used = [0] * len(parts)
    for term in terms:
        rank, (start, stop), term_up, term_down = len(term.down), term.rows, *term.balanced(dtype)
        for part, (first, last, part_down, part_up) in enumerate(parts):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                slots = slice(used[part], used[part] + rank)
                if not known:
                    part_down[slots, slice(*term.cols)].copy_(term_down)
                part_up[begin - first:end - first, slots].copy_(term_up[begin - start:end - start])
                used[part] += rank
    return JoinedLoRAs(down, up, sizes, sources)


def _possible_sizes(terms, n):
    """[LoRASizes] that LowRank terms can have: one part, and equal parts at whose borders the terms' rows begin and end."""
    found = [LoRASizes((_padded_ranks(terms, 0, n),))]
    borders = {row for term in terms for row in term.rows} - {0, n}
    part_rows = math.gcd(*borders)
    count = max(borders) // part_rows + 1 if borders else 1
    if 1 < count <= MAX_PARTS and part_rows % PART_ROWS == 0:
        ranks = tuple(_padded_ranks(terms, *rows) for rows in LoRASizes((0,) * count, part_rows).rows(n))
        if max(ranks) <= MAX_PART_RANK:
            found.append(LoRASizes(ranks, part_rows))
    return found


def _padded_ranks(terms, first, last):
    """The ranks of the terms that reach a row from `first` to `last` - 1, padded."""
    ranks = sum(len(term.down) for term in terms if term.rows[0] < last and first < term.rows[1])
    return ranks + -ranks % RANK_STEP


def _numel(sizes, n, k):
    return sum(rank * (k + stop - start) for (start, stop), rank in zip(sizes.rows(n), sizes.ranks))


class LoRABranch(torch.nn.Module):
    """Everything that loaded LoRAs add to one layer.

    lora: JoinedLoRAs or None; own: rows of its `down` for the layer's own ranks; terms: [Term], others; gain: (N,) or None;
    gelu_shift_correction: (N,) with a gain, the part of the layer's bias that belongs to W x (PackedLinear.gelu_shift_correction).
    """

    def __init__(self, lora, own=0, terms=(), gain=None, gelu_shift_correction=None):
        super().__init__()
        down, up, self.lora, self.sources = lora or (None, None, NO_LORA, ())
        self.own = own
        self.shares = False  # whether the rows of the layer's own ranks are the layer's memory
        self.register_buffer("lora_down", down, persistent=False)
        self.register_buffer("lora_up", up, persistent=False)
        self.terms = torch.nn.ModuleList(terms)
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("gelu_shift_correction", gelu_shift_correction, persistent=False)

    @classmethod
    def of(cls, terms, shape, dtype, device, own=0, gain=None, gelu_shift_correction=None, before=None):
        """The LoRABranch of Terms in any order, in `dtype` on `device`. shape: the layer's (N, K); own: as in LoRABranch; before: as in
        joined."""
        low_rank = [term for term in terms if isinstance(term, LowRank)]
        others = [term.stored(dtype, device) for term in terms if not isinstance(term, LowRank)]
        lora = joined(low_rank, shape, own, dtype, device, before) if low_rank else None
        return cls(lora, own, others, gain, gelu_shift_correction)

    def __getstate__(self):  # weak references can't be copied
        return self.__dict__ | {"sources": ()}

    def has_down(self, sources, sizes, own, like):
        """Whether lora_down is what joined() would make of these sources, in the dtype and on the device of `like`."""
        return (len(self.sources) == len(sources) > 0 and self.lora == sizes and self.own == own
                and all(mine[0]() is other[0]() and mine[1:] == other[1:] for mine, other in zip(self.sources, sources))
                and self.lora_down.dtype == like.dtype and self.lora_down.device == like.device)

    def nbytes(self):
        """Bytes that the branch takes beside the layer."""
        return sum(buffer.nbytes for buffer in self.buffers()) - (self.lora_down[:self.own].nbytes if self.shares else 0)

    def operands(self, x, dtype):
        """The last LayerOperands, on x's device in `dtype`: lora_down, lora_up, lora. () without LoRAs."""
        if self.lora_up is None:
            return ()
        return *(factor.to(x.device, dtype, non_blocking=True) for factor in (self.lora_down, self.lora_up)), self.lora

    def add(self, y, x, with_lora=True):
        """y (..., N) plus the terms of x (..., K), in place. with_lora: plus the joined LoRAs too, which y doesn't have yet."""
        if with_lora and self.lora_up is not None:
            y += reference.lora_product(x, self.lora_down[self.own:].to(x), self.lora_up.to(x), self.lora, y.shape[-1])
        for term in self.terms:
            y[..., slice(*term.rows)] += term(x[..., slice(*term.cols)])
        return y
