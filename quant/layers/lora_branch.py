"""The LoRA branch of a packed layer: 16-bit terms beside the packed weights, which stay as they are.

    y = gain * (W x) + sum of the terms + bias

A term reads a range of the columns and adds to a range of the rows, so that a LoRA on k alone, or on the MLP's part of
a joined linear, costs no more than its own size. `gain` is a factor per row. It is rare: DoRA and nodes that scale weights need it.

N outputs, K inputs of the layer; n, k those of a term.
"""

import torch
from torch.nn.functional import linear


class Term(torch.nn.Module):
    """One addend of the weight. rows, cols: (start, stop) within the layer; its tensors are buffers, so that they move
    with the layer, and not persistent, so that they belong to no checkpoint."""

    def __init__(self, rows, cols, *factors):
        super().__init__()
        self.rows, self.cols = rows, cols
        for name, factor in zip(self.names, factors):
            self.register_buffer(name, factor, persistent=False)

    def factors(self):
        return [getattr(self, name) for name in self.names]

    def stored(self, dtype, device):
        """The same term as it is kept: in 16 bits, on the layer's device."""
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
    """up (n, R), down (R, k)."""

    names = ("up", "down")

    def dense(self):
        return self.up @ self.down

    def forward(self, x):
        return linear(linear(x, self.down.to(x)), self.up.to(x))

    def stored(self, dtype, device):
        return LowRank(self.rows, self.cols, *_balanced(self.up, self.down)).to(device, dtype)


class Kronecker(Term):
    """left (a, b), right (c, d): the weight is their Kronecker product, n = a c, k = b d; it is never formed."""

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
    """Both factors at the same size, by a power of two, which rounds nothing: alpha/rank may make one too small for
    fp16, or the other too large."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = left.abs().amax().clamp_min(tiny) / right.abs().amax().clamp_min(tiny)
    factor = torch.exp2((ratio.log2() / 2).round())
    return left / factor, right * factor


class LoRABranch(torch.nn.Module):
    """All that is added to one layer.

    terms: [Term]; gain: (N,) or None; gelu_shift_correction: (N,) with a gain, the part of the layer's bias that belongs to W x
    (PackedLinear.gelu_shift_correction).
    """

    def __init__(self, terms, gain=None, gelu_shift_correction=None):
        super().__init__()
        self.terms = torch.nn.ModuleList(terms)
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("gelu_shift_correction", gelu_shift_correction, persistent=False)

    def nbytes(self):
        return sum(buffer.nbytes for buffer in self.buffers())

    def add(self, y, x):
        """y (..., N) plus the terms of x (..., K), in place."""
        for term in self.terms:
            y[..., slice(*term.rows)] += term(x[..., slice(*term.cols)])
        return y


def merged(terms):
    """Low-rank terms over the same rows and columns as one of all their ranks."""
    windows = {}
    for term in terms:
        window = (term.rows, term.cols) if isinstance(term, LowRank) else term
        windows.setdefault(window, []).append(term)
    return [group[0] if len(group) == 1 else
            LowRank(group[0].rows, group[0].cols, torch.cat([term.up for term in group], dim=1),
                    torch.cat([term.down for term in group], dim=0))
            for group in windows.values()]
