"""The calls of a calibration, divided among the processes of a run.

Process r replays the calls r, r + N, r + 2 N, ... of N processes and keeps only their states. A layer's statistics are made in one place:
what each call contributes (calibration.Part) travels to the process that quantizes the layer, which adds the parts in the order of the
calls. That is the order in which a single process adds them, and every part comes from one call alone, so the sums have the same bits for
any number of processes.
"""

import itertools

import torch

from . import out_of_memory


def numbers(ranks, count):
    """The numbers, in the order of the whole calibration, of this process's `count` calls."""
    return [ranks.rank + ranks.size * place for place in range(count)]


def dealt(ranks, groups):
    """This process's calls. groups: {i: [calls]} of the groups with i % ranks.size == ranks.rank; the whole calibration has all the groups
    in the order of i."""
    counts = {i: count for each in ranks.gathered({i: len(calls) for i, calls in groups.items()}) for i, count in each.items()}
    first = dict(zip(sorted(counts), itertools.accumulate((counts[i] for i in sorted(counts)), initial=0)))
    outgoing = {rank: [] for rank in range(ranks.size)}
    for i, calls in groups.items():
        for number, call in enumerate(calls, first[i]):
            outgoing[number % ranks.size].append((number, call))
    arrived = itertools.chain.from_iterable(ranks.exchanged(outgoing))
    return [call for _, call in sorted(arrived, key=lambda item: item[0])]


def running_order(ranks, own):
    """[(number, rank)] of all calls, in order. own: the numbers of this process's calls, without those that skip a block."""
    return sorted((number, rank) for rank, found in enumerate(ranks.gathered(own)) for number in found)


def block_groups(blocks, last):
    """[range of the indices of blocks that are replayed together]. last: names of the blocks that end a group, or None: all do."""
    ends = [index for index, (name, _) in enumerate(blocks, 1) if last is None or name in last or index == len(blocks)]
    return [range(*pair) for pair in zip([0, *ends], ends)]


def must_part(group, result, ranks):
    """Whether the blocks of a group have to be replayed on their own: the device has no room for all of them, or a call skips one, and then
    counts for none of the later ones. result: of this process's replays, (statistics, outputs) or None."""
    return len(group) > 1 and any(ranks.gathered(result is None or any(len(found) < len(group) for found in result[1])))


def replay_all(ranks, order, replay, stats, owner_of):
    """Replay this process's calls, and add what all calls contribute to the layers of this process.

    order: from running_order; replay(number, add) -> the call's outputs, calling add(layer, x) for each layer's input; stats: {layer:
    InputStats} of all layers; owner_of(layer): rank. Returns ({layer: InputStats} of the layers that this process owns, [outputs]).
    """
    outputs = []
    if ranks.size == 1:
        for number, _ in order:
            outputs.append(replay(number, lambda layer, x: stats[layer].add(x)))
        return stats, outputs
    for start in range(0, len(order), ranks.size):
        outgoing = {rank: [] for rank in range(ranks.size)}

        def run_own():
            for number, rank in order[start:start + ranks.size]:
                if rank == ranks.rank:
                    def add(layer, x):
                        part = stats[layer].part(x)
                        # The model may write to x before the parts are sent.
                        rows = None if part.rows is None else part.rows.clone()
                        outgoing[owner_of(layer)].append((number, layer, part._replace(rows=rows)))

                    outputs.append(replay(number, add))

        together(ranks, run_own)
        arrived = sorted(itertools.chain.from_iterable(ranks.exchanged(outgoing)), key=lambda item: item[0])

        def merge():
            for _, layer, part in arrived:
                stats[layer].merge(part)

        together(ranks, merge)
    return {layer: found for layer, found in stats.items() if owner_of(layer) == ranks.rank}, outputs


def together(ranks, run):
    """run() in every process. If one of them runs out of memory, torch.OutOfMemoryError is raised in all, so that all step down."""
    failure = None
    try:
        run()
    except out_of_memory.ERRORS as error:
        if not out_of_memory.on_device(error):
            raise
        failure = str(error)
    # Outside the except clause the exception is released, and with it the tensors that its frames held.
    if any(ranks.gathered(failure is not None)):
        raise torch.OutOfMemoryError(failure or "Another process of this run is out of memory.")
