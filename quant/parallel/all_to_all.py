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


def fitting_groups(heads, groups):
    """The number of groups, at most `groups`, that a process's heads form evenly."""
    return next(count for count in range(groups, 0, -1) if heads % count == 0)


def attend(q, k, v, division, attention, groups=1, group=None):
    """Attention of q, k, v (B, H, own tokens, D) to all tokens -> (B, own tokens, H * D).

    attention(q, k, v, heads): the output (B, all tokens, h * D) of h heads, `heads` their slice of all. Its tokens come in the order of
    Division.order. A process's heads are attended in `groups` groups, or in fewer that share them evenly: while one group is computed, the
    next one's q, k and v and the last one's output travel.
    """
    heads = q.shape[1] // division.size
    groups = fitting_groups(heads, groups)
    step = heads // groups
    parts = [x.unflatten(1, (division.size, groups, step)) for x in (q, k, v)]
    arrivals = [_to_heads([part[:, :, each] for part in parts], division, group) for each in range(groups)]
    returned, works = None, []
    for each, arrival in enumerate(arrivals):
        first = division.rank * heads + each * step
        out = attention(*arrival(), slice(first, first + step))
        if returned is None:
            returned = out.new_empty(groups, division.size, q.shape[0], q.shape[2], out.shape[2])
        works.append(_to_tokens(out, returned[each], division, group))
    for work in works:
        work.wait()
    return _copied(returned.permute(2, 3, 1, 0, 4)).flatten(2)


def _exchange(leaving, arriving, sizes_in, sizes_out, group):
    """Begin the all-to-all of flat tensors, and return its work. sizes_in, sizes_out: elements for and from each process. gloo doesn't know
    16-bit numbers, so that bytes travel."""
    even = len({*sizes_in, *sizes_out}) == 1
    splits = [None if even else [size * leaving.itemsize for size in sizes] for sizes in (sizes_out, sizes_in)]
    return dist.all_to_all_single(arriving.view(torch.uint8), leaving.view(torch.uint8), *splits, group=group, async_op=True)


def _to_heads(parts, division, group):
    """Begin to send q, k, v, each (B, size, h, own tokens, D). Returns a function that waits for those of all tokens and this process's h
    heads, each (B, h, all tokens, D) in memory of the order (B, tokens, h, D). The tokens are in the order of Division.order."""
    b, size, heads, length, d = parts[0].shape
    leaving = parts[0].new_empty(size, b, length, 3, heads, d)
    for i, part in enumerate(parts):
        _copy(part.permute(1, 0, 3, 2, 4), leaving[:, :, :, i])
    row = 3 * b * heads * d
    sizes = [row * tokens for tokens in division.tokens]
    arriving = leaving.new_empty(sum(sizes))
    work = _exchange(leaving.view(-1), arriving, [row * length] * size, sizes, group)

    def arrival():
        work.wait()
        if b == 1:  # each process's tokens lie side by side, in the order of the processes
            whole = arriving.view(b, -1, 3, heads, d)
        else:
            whole = torch.cat([part.view(b, -1, 3, heads, d) for part in arriving.split(sizes)], 1)
        return whole.permute(2, 0, 3, 1, 4).unbind(0)
    return arrival


def _to_tokens(out, arriving, division, group):
    """Begin to send the output (B, all tokens, h * D) of this process's h heads, and return the work.

    arriving: (size, B, own tokens, h * D) of the heads of each process.
    """
    b, _, width = out.shape
    if b > 1:
        out = torch.cat([part.reshape(-1) for part in out.split(division.tokens, 1)])
    own = b * division.tokens[division.rank] * width
    return _exchange(out.reshape(-1), arriving.view(-1), [b * tokens * width for tokens in division.tokens], [own] * division.size, group)


def _copied(x):
    """A contiguous copy."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _copy(x, y)
    return y


def _copy(source, target):
    """Copy a tensor over another of its shape: 16 bytes at a time where both lie so, since PyTorch copies strided memory element by
    element."""
    wide = torch.complex128.itemsize // source.itemsize
    if source.dtype == target.dtype and all(
            x.stride(-1) == 1 and not any(n % wide for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])) for x in (source, target)):
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)


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
