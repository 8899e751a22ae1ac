"""Attention over tokens that are divided among processes (Ulysses, arXiv:2309.14509): before attention the processes exchange their tokens'
q, k and v for all tokens of a share of the heads, and afterwards the outputs back. Every other part of a block works on a process's own
tokens. Attention itself sees all tokens in their order, so that only its number of heads differs from a single process's.
"""

import torch
import torch.distributed as dist


class Division:
    """How the tokens of one forward are divided.

    parts: the lengths of the parts of the sequence, such as text and image; each part is divided among the processes. rank, size: as in
    parallel.alone.Alone.
    """

    def __init__(self, parts, rank, size):
        self.parts, self.rank, self.size = tuple(parts), rank, size
        self.counts = [[length // size + (each < length % size) for length in parts] for each in range(size)]  # [rank][part]
        self.tokens = [sum(own) for own in self.counts]
        # A process's tokens lie side by side; in the sequence each part of them has a place of its own.
        self.places = [[(sum(parts[:p]) + sum(self.counts[before][p] for before in range(each)), count) for p, count in enumerate(own)]
                       for each, own in enumerate(self.counts)]  # [rank][part]: (start, count)

    def own(self, x, dim):
        """This process's tokens of the whole sequence x, along dimension `dim`, in the memory layout of x."""
        return torch.cat([x.narrow(dim, start, count) for start, count in self.places[self.rank]], dim)

    def own_range(self, part):
        """This process's tokens of one part of the sequence, as a slice of the part."""
        start, count = self.places[self.rank][part]
        before = sum(self.parts[:part])
        return slice(start - before, start - before + count)

    def own_of_part(self, x, part):
        """This process's tokens of one part x (B, length, K) of the sequence."""
        return x[:, self.own_range(part)].contiguous()

    def order(self, device):
        """(L,) positions in the sequence of the tokens that attention sees, which come process by process."""
        return torch.cat([torch.arange(start, start + count, device=device) for places in self.places for start, count in places])

    def ordered(self, mask):
        """An attention mask (..., queries or 1, L) of the whole sequence, for tokens in this order."""
        order, length = self.order(mask.device), sum(self.parts)
        for dim in (-2, -1):
            if mask.ndim >= -dim and mask.shape[dim] == length:
                mask = mask.index_select(dim, order)
        return mask


def _exchange(leaving, sizes_in, sizes_out, group):
    """all-to-all of a flat tensor. sizes_in, sizes_out: elements for and from each process. gloo doesn't know 16-bit numbers, so that bytes
    travel."""
    even = len({*sizes_in, *sizes_out}) == 1
    arriving = torch.empty(sum(sizes_out), dtype=leaving.dtype, device=leaving.device)
    splits = [None if even else [size * leaving.itemsize for size in sizes] for sizes in (sizes_out, sizes_in)]
    dist.all_to_all_single(arriving.view(torch.uint8), leaving.view(torch.uint8), *splits, group=group)
    return arriving


def to_heads(q, k, v, division, group=None):
    """q, k, v (B, H, own tokens, D) -> (B, H / size, all tokens, D) of this process's heads, in memory of the order (B, tokens, H, D). The
    tokens are in the order of Division.order."""
    b, heads, length, d = q.shape
    size = division.size
    own = heads // size
    # As few calls as possible: at 1024 x 1024 pixels the processor is not much faster than the GPU.
    leaving = torch.stack([x.unflatten(1, (size, own)).permute(1, 0, 3, 2, 4) for x in (q, k, v)], 1)  # (size, 3, B, own tokens, h, D)
    row = 3 * b * own * d
    sizes = [row * tokens for tokens in division.tokens]
    arrived = _exchange(leaving.view(-1), [row * length] * size, sizes, group)
    whole = torch.cat([part.view(3, b, -1, own, d) for part in arrived.split(sizes)], 2)
    return whole.transpose(2, 3).unbind(0)


def to_tokens(out, division, group=None):
    """The output (B, all tokens, H / size * D) of this process's heads -> (B, own tokens, H * D) of all heads."""
    b, _, width = out.shape
    if b > 1:  # otherwise each process's tokens lie side by side
        out = torch.cat([part.reshape(-1) for part in out.split(division.tokens, 1)])
    own = b * division.tokens[division.rank] * width
    arrived = _exchange(out.reshape(-1), [b * tokens * width for tokens in division.tokens], [own] * division.size, group)
    return torch.cat(arrived.view(division.size, b, -1, width).unbind(0), -1)


def gathered(x, division, part, group=None):
    """This process's tokens x (B, own tokens, K) of one part -> the whole part (B, length, K) in process 0, and None in the others."""
    found = [x]
    if division.rank:
        messages = [dist.P2POp(dist.isend, x.contiguous().view(torch.uint8).reshape(-1), 0, group)]
    else:
        found += [torch.empty(x.shape[0], division.counts[rank][part], x.shape[2], dtype=x.dtype, device=x.device)
                  for rank in range(1, division.size)]
        messages = [dist.P2POp(dist.irecv, tokens.view(torch.uint8).view(-1), rank, group) for rank, tokens in enumerate(found[1:], 1)]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return None if division.rank else torch.cat(found, 1)
