"""put.cu on one GPU: two memories and two streams, each of which stands for a process."""

import itertools
import time

import pytest
import torch
from comfyui_svdquant.cuda import peer_memory, put
from comfyui_svdquant.quant.parallel import all_to_all, peer_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("inference_mode")]
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def two():
    """A function of (q, divisions, groups) that returns each process's Plan."""
    stopped = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def made(q, divisions, groups):
        needed = peer_attention.needed(q, divisions[0])
        memories = [peer_memory.PeerMemory(put.CONTROL + sum(needed), DEVICE) for _ in divisions]
        for memory in memories:
            memory.addresses[:] = [each.address for each in memories]
        return [peer_attention.planned(peer_attention.Room(memory, *needed), q, division, groups, 1, stopped)
                for memory, division in zip(memories, divisions)]

    made.stopped = stopped
    return made


def lies(x, how):
    """The same numbers: by head, by token, or as a part of longer rows."""
    if how == "by head":
        return x.contiguous()
    rows = x.transpose(1, 2).contiguous()
    return (rows if how == "by token" else torch.cat((rows, rows), 3)[..., :x.shape[3]]).transpose(1, 2)


@pytest.mark.parametrize(("b", "parts", "d", "dtype"), [(1, (5, 8), 128, torch.bfloat16), (2, (7, 3), 64, torch.float16),
                                                        (2, (1, 1), 8, torch.float32), (1, (512, 4096), 128, torch.bfloat16)])
def test_rows_lie_where_their_readers_want_them(two, b, parts, d, dtype):
    heads, size = 8, 2
    divisions = [all_to_all.Division(parts, rank, size) for rank in range(size)]
    whole = torch.randn(3, b, heads, sum(parts), d, device=DEVICE).to(dtype)
    plans = two(whole[0], divisions, 2)
    order = divisions[0].order(DEVICE)
    streams = [torch.cuda.Stream(DEVICE) for _ in divisions]

    def each(run):
        """run(division, plan) on each process's stream."""
        torch.cuda.synchronize()
        for stream, *process in zip(streams, divisions, plans):
            with torch.cuda.stream(stream):
                run(*process)
        torch.cuda.synchronize()

    for how, turn in itertools.product(("by head", "by token", "longer rows"), range(2)):
        whole += turn
        qkv = {division.rank: [lies(division.own(x, 2), how) for x in whole] for division in divisions}

        def heads_to_their_process(division, plan):
            for group in range(2):
                plan.send_heads(qkv[division.rank], group)

        def outputs_to_their_process(division, plan):
            for group, arrival in enumerate(plan.arrivals):
                plan.send_output(arrival[2].transpose(1, 2).flatten(2), group, 2 * group)

        each(heads_to_their_process)
        for division, plan in zip(divisions, plans):
            for group, arrival in enumerate(plan.arrivals):
                first = division.rank * 4 + group * 2
                assert all(torch.equal(arrived, x[:, first:first + 2].index_select(2, order)) for x, arrived in zip(whole, arrival)), how
        each(outputs_to_their_process)
        for division, plan in zip(divisions, plans):
            assert torch.equal(plan.returned, division.own(whole[2], 2).transpose(1, 2).flatten(2)), how


def test_a_wait_ends_when_it_is_stopped_and_nothing_is_written_from_then_on(two):
    divisions = [all_to_all.Division((4,), rank, 2) for rank in range(2)]
    q = torch.randn(1, 2, 2, 64, device=DEVICE).bfloat16()
    plan, other = two(q, divisions, 1)
    plan.send_heads([q] * 3, 0)  # the other one's never come
    event = torch.cuda.Event()
    event.record()
    plan.send_heads([q + 1] * 3, 0)
    time.sleep(0.05)
    assert not event.query()
    two.stopped.fill_(1)
    torch.cuda.synchronize()
    assert torch.equal(other.arrivals[0][0][:, :, :2], q[:, 1:])
