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
        # A process's tokens lie side by side; in the sequence each part of them has a place of its own.
        self.places = [[(sum(parts[:p]) + sum(self.counts[before][p] for before in range(each)), count) for p, count in enumerate(own)]
                       for each, own in enumerate(self.counts)]  # [rank][part]: (start, count)

    @property
    def length(self):
        return sum(self.parts)

    def own(self, x, dim):
        """This process's tokens of the whole sequence x, along dimension `dim`, in the memory layout of x."""
        return torch.cat([x.narrow(dim, start, count) for start, count in self.places[self.rank]], dim)

    def own_of_part(self, x, part, dim=1):
        """This process's tokens of one part x of the sequence."""
        before = sum(self.parts[:part])
        start, count = self.places[self.rank][part]
        return x.narrow(dim, start - before, count).contiguous()

    def tokens(self, rank):
        """The number of tokens of a process."""
        return sum(self.counts[rank])


def _exchange(leaving, arriving, group):
    """all-to-all of lists of flat tensors, one a process. gloo doesn't know 16-bit numbers, so that bytes travel."""
    sizes = [[tensor.numel() * tensor.itemsize for tensor in tensors] for tensors in (arriving, leaving)]
    dtype, device = leaving[0].dtype, leaving[0].device
    received = torch.empty(sum(sizes[0]), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat([tensor.reshape(-1) for tensor in leaving]).view(torch.uint8), *sizes, group=group)
    return [part.view(dtype).view(tensor.shape) for part, tensor in zip(received.split(sizes[0]), arriving)]


def to_heads(q, k, v, division, group=None):
    """q, k, v (B, H, own tokens, D) -> (B, H / size, all tokens, D) of this process's heads, in memory of the order (B, tokens, H, D)."""
    b, heads, _, d = q.shape
    own = heads // division.size

    def block(rank):
        return torch.stack([x[:, rank * own:(rank + 1) * own].transpose(1, 2) for x in (q, k, v)])

    shapes = [torch.empty(3, b, division.tokens(rank), own, d, dtype=q.dtype, device="meta") for rank in range(division.size)]
    found = _exchange([block(rank) for rank in range(division.size)], shapes, group)
    whole = torch.empty(3, b, division.length, own, d, dtype=q.dtype, device=q.device)
    for rank, part in enumerate(found):
        for (start, count), tokens in zip(division.places[rank], part.split(division.counts[rank], dim=2)):
            whole.narrow(2, start, count).copy_(tokens)
    return [x.transpose(1, 2) for x in whole]


def to_tokens(out, division, group=None):
    """The output (B, all tokens, H / size * D) of this process's heads -> (B, own tokens, H * D) of all heads."""
    b, _, width = out.shape
    leaving = [torch.cat([out.narrow(1, start, count) for start, count in places], 1) for places in division.places]
    own = torch.empty(b, division.tokens(division.rank), width, dtype=out.dtype, device="meta")
    return torch.cat(_exchange(leaving, [own] * division.size, group), dim=-1)


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
