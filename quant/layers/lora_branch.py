"""The LoRA branch of a packed layer: what loaded LoRAs add, in 16 bits, beside the packed weights, which stay as they are.

    y = gain * (W x) + sum of the terms + bias

A term reads a range of the columns and adds to a range of the rows, so that a LoRA on k alone, or on the MLP's part of
a joined linear, costs no more than its own size. `gain` is a factor per row. It is rare: DoRA and nodes that scale weights need it.

The ranks of plain LoRAs are joined in one pair of factors (joined()), which a W4A4 layer's kernels take beside the layer's own low-rank
branch. The factors are the LoRAs' own numbers; each rank has a strength besides, so that a change of strengths alone rounds nothing again
and copies a few numbers (take_strengths). Other terms are added to the layer's output.

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
        first, *rest = self.factors()
        return type(self)(self.rows, self.cols, _with_rows_scaled(first, self.rows, rows, factor), *rest)


class LowRank(NamedTuple):
    """A term strength * up @ down, before it is joined with others: a LoRA's own tensors up (n, R), down (R, k), of any dtypes and on any
    devices. rows, cols: as of Term."""

    rows: tuple
    cols: tuple
    up: torch.Tensor
    down: torch.Tensor
    strength: float = 1.0

    def dense(self, device=None):
        up, down = (factor.to(device or self.up.device).float() for factor in (self.up, self.down))
        return self.strength * up @ down

    def scaled(self, rows, factor):
        """As Term.scaled."""
        if isinstance(factor, (int, float)) and rows[0] <= self.rows[0] and self.rows[1] <= rows[1]:
            return self._replace(strength=self.strength * factor)
        up = self.up if isinstance(factor, (int, float)) else self.up.to(factor.device)
        return self._replace(up=_with_rows_scaled(up.float(), self.rows, rows, factor))

    def balanced(self, dtype, device):
        """(up, down) of the same product on the device, which `dtype` can hold: in fp16 both are of the same size, in bf16 any size will
        do."""
        up, down = self.up.to(device), self.down.to(device)  # before any conversion, which takes longer on the CPU
        return _balanced(up.float(), down.float()) if dtype == torch.float16 else (up, down)

    def source(self):
        """What a branch's factors are made of, without keeping it: weak references to up and down, rows, cols."""
        return weakref.ref(self.up), weakref.ref(self.down), self.rows, self.cols

    def is_of(self, source):
        """Whether the term has the source() of another one."""
        up, down, rows, cols = source
        return up() is self.up and down() is self.down and (rows, cols) == (self.rows, self.cols)


class Kronecker(Term):
    """left (a, b), right (c, d): the weight is their Kronecker product, n = a c, k = b d, which is never computed."""

    names = ("left", "right")

    def dense(self, device=None):
        return torch.kron(self.left, self.right).to(device or self.left.device)

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

    def dense(self, device=None):
        return self.weight.to(device or self.weight.device)

    def forward(self, x):
        return linear(x, self.weight.to(x))


def _with_rows_scaled(weight, own, rows, factor):
    """A weight with the layer's rows `own`, times `factor` in those of `rows`; factor as of Term.scaled."""
    start, stop = max(rows[0], own[0]), min(rows[1], own[1])
    if start >= stop:
        return weight
    weight = weight.clone()
    weight[start - own[0]:stop - own[0]] *= factor if isinstance(factor, (int, float)) else factor[start - rows[0]:stop - rows[0]]
    return weight


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
    strength: torch.Tensor
    sizes: LoRASizes
    sources: tuple = ()  # LowRank.source() of each term


def joined(terms, shape, own, dtype, device):
    """The JoinedLoRAs of LowRank terms, in `dtype` on `device`. shape: the layer's (N, K); own: rows of `down` for its own ranks.

    Terms for some of the rows get parts of their own, if the rows' borders allow it and that takes less memory. Otherwise `up` is zero in
    the rows that a term doesn't reach, as `down` always is in such columns.
    """
    n, k = shape
    sizes = min(_possible_sizes(terms, n), key=lambda sizes: _numel(sizes, n, k))
    rows = sizes.rows(n)
    numel = [(stop - start) * rank for (start, stop), rank in zip(rows, sizes.ranks)]
    whole = sum(term.up.numel() + term.down.numel() for term in terms) == sum(sizes.ranks) * k + sum(numel)  # nothing stays zero
    new = torch.empty if whole else torch.zeros
    down, up = new(own + sum(sizes.ranks), k, dtype=dtype, device=device), new(sum(numel), dtype=dtype, device=device)
    ups = up.split(numel)
    for term, places in zip(terms, _places(terms, sizes, n)):
        term_up, term_down = term.balanced(dtype, device)
        for part, begin, end, first, last in places:
            (start, stop), part_first = rows[part], sum(sizes.ranks[:part])
            down[own + first:own + last, slice(*term.cols)].copy_(term_down)
            part_up = ups[part].view(stop - start, sizes.ranks[part])[begin - start:end - start, first - part_first:last - part_first]
            part_up.copy_(term_up[begin - term.rows[0]:end - term.rows[0]])
    return JoinedLoRAs(down, up, _strength(terms, sizes, n).to(device), sizes, tuple(term.source() for term in terms))


def _strength(terms, sizes, n):
    """JoinedLoRAs.strength, on the CPU."""
    strength = [1.0] * sum(sizes.ranks)
    for term, places in zip(terms, _places(terms, sizes, n)):
        for place in places:
            strength[place.first:place.last] = [term.strength] * (place.last - place.first)
    return torch.tensor(strength, dtype=torch.float32, device="cpu")


class Place(NamedTuple):
    """Where a term lies in joined factors: one part of the rows, and its ranks."""

    part: int
    begin: int  # first of the layer's rows in this part that the term reaches
    end: int    # last row + 1
    first: int  # first of the term's ranks among those of all parts
    last: int   # last rank + 1


def _places(terms, sizes, n):
    """[[Place]] of each term."""
    found, used = [], [sum(sizes.ranks[:part]) for part in range(len(sizes.ranks))]
    for term in terms:
        found.append([])
        for part, (first, last) in enumerate(sizes.rows(n)):
            begin, end = max(term.rows[0], first), min(term.rows[1], last)
            if begin < end:
                found[-1].append(Place(part, begin, end, used[part], used[part] + len(term.down)))
                used[part] += len(term.down)
    return found


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
        down, up, strength, self.lora, self.sources = lora or (None, None, None, NO_LORA, ())
        self.own = own
        self.has_terms, self.has_gain = len(terms) > 0, gain is not None  # a module finds its buffers and modules slowly
        self.shares = False  # whether the rows of the layer's own ranks are the layer's memory
        self.register_buffer("lora_down", down, persistent=False)
        self.register_buffer("lora_up", up, persistent=False)
        self.register_buffer("lora_strength", strength, persistent=False)
        self.terms = torch.nn.ModuleList(terms)
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("gelu_shift_correction", gelu_shift_correction, persistent=False)

    @classmethod
    def of(cls, terms, shape, dtype, device, own=0, gain=None, gelu_shift_correction=None):
        """The LoRABranch of terms in any order, in `dtype` on `device`. shape: the layer's (N, K); own: as in LoRABranch."""
        low_rank = [term for term in terms if isinstance(term, LowRank)]
        others = [term.stored(dtype, device) for term in terms if not isinstance(term, LowRank)]
        lora = joined(low_rank, shape, own, dtype, device) if low_rank else None
        return cls(lora, own, others, gain, gelu_shift_correction)

    def __getstate__(self):  # weak references can't be copied
        return self.__dict__ | {"sources": ()}

    def take_strengths(self, terms, n, dtype):
        """Whether the branch is that of these terms in `dtype`, without a gain, but for their strengths; then it takes those, in place.
        The factors stay as they are, so that strengths that change again and again add no rounding. n: the layer's N."""
        if (self.gain is not None or len(self.terms) or len(self.sources) != len(terms) or self.lora_up is None
                or self.lora_up.dtype != dtype or not all(isinstance(term, LowRank) and term.is_of(source)
                                                          for term, source in zip(terms, self.sources))):
            return False
        self.lora_strength.copy_(_strength(terms, self.lora, n))
        return True

    def is_finite(self):
        """Whether all its numbers are, beside the rows of the layer's own ranks, which may have no values yet."""
        own = [] if self.lora_up is None else [self.lora_down[self.own:], self.lora_up, self.lora_strength]
        numbers = [*own, *self.terms.buffers(), *([] if self.gain is None else [self.gain])]
        return bool(torch.stack([torch.isfinite(tensor).all() for tensor in numbers]).all())

    def nbytes(self):
        """Bytes that the branch takes beside the layer."""
        return sum(buffer.nbytes for buffer in self.buffers()) - (self.lora_down[:self.own].nbytes if self.shares else 0)

    def operands(self, x, dtype):
        """The last LayerOperands, on x's device in `dtype`: lora_down, lora_up, lora_strength, lora. () without LoRAs."""
        if self.lora_up is None:
            return ()
        return (*(factor.to(x.device, dtype, non_blocking=True) for factor in (self.lora_down, self.lora_up)),
                self.lora_strength.to(x.device, torch.float32, non_blocking=True), self.lora)

    def low_rank_parts(self, n):
        """[((start, stop), up (stop - start, R), down (R, K))] of the joined LoRAs, in float32, their strengths in `down`: up @ down is
        what they add to these rows of the weight. n: the layer's N."""
        if self.lora_up is None:
            return []
        sizes = [(stop - start, rank) for (start, stop), rank in zip(self.lora.rows(n), self.lora.ranks)]
        ups = self.lora_up.float().split([rows * rank for rows, rank in sizes])
        downs = (self.lora_down[self.own:] * self.lora_strength.unsqueeze(-1)).split(self.lora.ranks)
        return [(rows, up.view(size), down) for rows, up, size, down in zip(self.lora.rows(n), ups, sizes, downs)]

    def add(self, y, x, with_lora=True):
        """y (..., N) plus the terms of x (..., K), in place. with_lora: plus the joined LoRAs too, which y doesn't have yet."""
        if with_lora and self.lora_up is not None:
            y += reference.lora_product(x, self.lora_down[self.own:].to(x), self.lora_up.to(x), self.lora_strength.to(x.device), self.lora,
                                        y.shape[-1])
        for term in self.terms:
            y[..., slice(*term.rows)] += term(x[..., slice(*term.cols)])
        return y
