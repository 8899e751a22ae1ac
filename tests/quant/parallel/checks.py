"""What the processes of test_ranks.py do, under torchrun: each check raises AssertionError in the process where it fails."""

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def load_pack():
    spec = importlib.util.spec_from_file_location("comfyui_svdquant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


class Block(torch.nn.Module):
    def __init__(self, width, skips):
        super().__init__()
        self.lin, self.skips = torch.nn.Linear(width, width), skips

    def forward(self, x):
        x += 1  # in place: what a layer has read must not change on the way to another process
        return torch.tanh(self.lin(x))


class Model(torch.nn.Module):
    def __init__(self, count=3, width=48):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(width, i == 1) for i in range(count))

    def forward(self, x, skip):
        for block in self.blocks:
            if not (skip and block.skips):
                x = block(x)
        return x


def statistics(ranks, owner_of, skipping, last=None):
    """{layer: (absmax, rms, sample, gram)} of the layers that this process owns, of seven calls. skipping: those that skip a block."""
    from comfyui_svdquant.quant.quantizer import calibration

    model, g = Model(), torch.Generator().manual_seed(1)
    calls = [((torch.randn(1, 20 + 3 * i, 48, generator=g), i in skipping), {}) for i in range(7)]
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    stream = calibration.stream_blocks(model, ranks.share(calls), calibration.Memory("cpu"), blocks, lambda name, block: {name: block.lin},
                                       lambda name: lambda x: x, with_gram=True, tokens_per_input=2, ranks=ranks, owner_of=owner_of,
                                       last=last)
    with torch.inference_mode():
        return {layer: (*found.spans().values(), found.sample(), found.gram()) for _, stats in stream for layer, found in stats.items()}


def check_statistics(ranks, alone):
    def owner_of(layer):
        return int(layer[-1]) % ranks.size

    for skipping, last in (((2, 5), None), ((2, 5), {"blocks.1"}), ((), {"blocks.1"})):
        expected, found = statistics(alone, lambda layer: 0, skipping), statistics(ranks, owner_of, skipping, last)
        assert set(found) == {layer for layer in expected if owner_of(layer) == ranks.rank}
        for layer, parts in found.items():
            assert all(torch.equal(*pair) for pair in zip(parts, expected[layer])), layer


def check_exchange(ranks):
    shared = torch.arange(5, dtype=torch.float32) + ranks.rank
    sent = {rank: {"text": f"{ranks.rank} to {rank}", "twice": [shared, shared], "half": torch.full((3, 2), ranks.rank).bfloat16(),
                   "none": torch.empty(0)} for rank in range(ranks.size)}
    for rank, value in enumerate(ranks.exchanged(sent)):
        assert value["text"] == f"{rank} to {ranks.rank}" and value["twice"][0] is value["twice"][1]
        assert torch.equal(value["twice"][0], torch.arange(5.0) + rank) and torch.equal(value["half"], torch.full((3, 2), rank).bfloat16())
        assert value["none"].shape == (0,)
    only = ranks.exchanged({0: "to the first"})
    assert only == ["to the first"] * ranks.size if ranks.rank == 0 else only == [None] * ranks.size
    assert ranks.gathered(ranks.rank) == list(range(ranks.size)) and ranks.from_first(ranks.rank + 7) == 7


def check_memory(ranks):
    from comfyui_svdquant.quant.quantizer import shared_replay

    def run():
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("of this one")

    try:
        shared_replay.together(ranks, run)
    except torch.OutOfMemoryError as error:
        assert ("of this one" in str(error)) == (ranks.rank == 1)
    else:
        raise AssertionError("all processes step down together")


def check_attention(ranks, attend=None):
    """Attention over divided tokens, in parts that the processes can't share evenly, is that of a single process. attend: in place of
    all_to_all.attend, whose bits it gives."""
    from comfyui_svdquant.quant.parallel import all_to_all

    attend = attend or all_to_all.attend

    g, heads, d = torch.Generator().manual_seed(2), 4, 8
    parts, k = (5, 9), heads * d
    q, key, v = torch.randn(3, 2, heads, sum(parts), d, generator=g).bfloat16()

    def attention(q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    division = all_to_all.Division(parts, ranks.rank, ranks.size)
    masks = torch.randn(2, 1, 1, sum(parts), generator=g).bfloat16(), torch.randn(2, 1, *[sum(parts)] * 2, generator=g).bfloat16()
    for images, groups, mask in ((1, 2, None), (2, 1, None), (1, 1, None), *((2, 2, mask) for mask in masks)):
        ordered, seen = None if mask is None else division.ordered(mask), []

        def of_heads(q, k, v, own, ordered=ordered, seen=seen):
            seen.append((own.start, own.stop))
            return attention(q, k, v, ordered)

        own = [division.own(x[:images], 2) for x in (q, key, v)]
        out = attend(*own, division, of_heads, groups)
        whole = attention(*(x[:images] for x in (q, key, v)), mask)
        # The order of the keys decides how the sums are rounded.
        assert (out - division.own(whole, 1)).float().norm() < 0.01 * whole.float().norm()
        count = heads // ranks.size
        groups = min(count, groups)
        assert seen == [(start, start + count // groups) for start in range(ranks.rank * count, (ranks.rank + 1) * count, count // groups)]
        assert torch.equal(out, all_to_all.attend(*own, division, of_heads, groups))
    image = all_to_all.gathered(division.own(whole, 1)[:, division.counts[ranks.rank][0]:], division, 1)
    assert image is None if ranks.rank else torch.equal(image, whole[:, parts[0]:])
    states = torch.randn(2, parts[1], k, generator=g)
    assert torch.equal(division.own_of_part(states, 1), division.own(torch.cat((torch.zeros(2, parts[0], k), states), 1), 1)
                       [:, division.counts[ranks.rank][0]:])


def check_peers(ranks):
    """Attention whose exchanges are writes into the other processes' memory, with waits of any length between its parts; and a process
    that has ended, or that can't share its memory."""
    import stand_in_peers
    from comfyui_svdquant.quant.parallel import all_to_all, peer_attention
    from comfyui_svdquant.quant.parallel import ranks as parallel_ranks

    stand_in_peers.install(ranks.rank)
    assert peer_attention.Peers().plan(ranks, torch.zeros(1, 4, 3, 6).bfloat16(), None, 1) is None, "rows of no whole pieces"
    check_attention(ranks, lambda *args: peer_attention.attend(ranks, *args))
    assert len(ranks.peers.plans) == 4 and len(ranks.peers.rooms) == 2, "a larger call has its own room, and the next ones find theirs"
    division, g = all_to_all.Division((3, 6), ranks.rank, ranks.size), torch.Generator().manual_seed(ranks.rank)
    previous = None
    for turn in range(40):
        q, k, v = torch.randn(3, 1, 4, division.tokens[ranks.rank], 8, generator=g).bfloat16()
        out = peer_attention.attend(ranks, q, k, v, division, stand_in_peers.slow_attention(g), 1 + turn % 2)
        assert torch.equal(out, all_to_all.attend(q, k, v, division, lambda q, k, v, own: (q + k - v).transpose(1, 2).flatten(2))), turn
        assert previous is None or out.data_ptr() == previous
        previous = out.data_ptr()
    check_a_refusal(ranks, q, division, parallel_ranks.Peers)
    if ranks.rank == 0:
        ranks.peers.stop()  # as the thread that sees a process end does; nothing comes from the others any more
        peer_attention.attend(ranks, q, k, v, division, lambda q, k, v, own: v.transpose(1, 2).flatten(2))


def check_a_refusal(ranks, q, division, peers):
    """What one process can't, none does; and what arrives wrong is not used."""
    import stand_in_peers

    for trouble in ("no handle", "not mapped", "wrong", "never"):
        with stand_in_peers.trouble(trouble, ranks.rank == ranks.size - 1):
            found = peers()
            assert found.plan(ranks, q, division, 1) is None and found.refused, trouble
            assert found.plan(ranks, q, division, 1) is None


def main():
    load_pack()
    from comfyui_svdquant.quant.parallel.alone import ALONE
    from comfyui_svdquant.quant.parallel.ranks import joined_run

    with joined_run() as ranks:
        check_exchange(ranks)
        check_statistics(ranks, ALONE)
        check_memory(ranks)
        if ranks.size != 3:  # it has four heads
            check_attention(ranks)
            check_peers(ranks)
        ranks.gathered(None)
        if ranks.rank == 0:
            print(f"{ranks.size} processes agree")


if __name__ == "__main__":
    main()
