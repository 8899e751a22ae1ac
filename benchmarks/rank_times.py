"""How long each process of a run computes, waits for the others, and exchanges."""

import functools
import sys
import time

import torch

MESSAGES = "gathered", "from_first", "exchanged"


class RankTimes:
    """The times at which a process's device enters and leaves each message of its Ranks. Between them the device does nothing else.

    Marks are CUDA events, so that the host runs ahead of the GPU as it does without them. A message that takes place while the GPU is
    still busy takes no time.
    """

    def __init__(self, ranks):
        self.ranks, self.inside = ranks, False
        self.marks, self.names = [self.mark()], []  # marks: the start, then the entry and the exit of each name
        self.gathered = ranks.gathered
        for message in MESSAGES:
            setattr(ranks, message, self.marked(getattr(ranks, message)))

    def mark(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def marked(self, run):
        """`run`, with marks around the outermost call. Its name is that of the function which calls it."""
        @functools.wraps(run)
        def timed(*args):
            if self.inside:
                return run(*args)
            self.inside = True
            self.names.append(sys._getframe(1).f_code.co_name)
            self.marks.append(self.mark())
            try:
                return run(*args)
            finally:
                self.marks.append(self.mark())
                self.inside = False

        return timed

    def spans(self):
        """[(name, seconds before the message, seconds in it)]; the last has no message."""
        marks = [*self.marks, self.mark()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            seconds = [before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:])]
        else:
            seconds = [after - before for before, after in zip(marks, marks[1:])]
        return list(zip([*self.names, "the end"], seconds[::2], [*seconds[1::2], 0.0]))

    def of_all(self):
        """[{"computes", "waits", "exchanges": seconds, "before": {name of the message's caller: [seconds of work, of waiting and
        exchange]}}] of the processes, which all call this.

        The process that comes last to a message does not wait, so the shortest time in it is the exchange, and what others take more they
        wait.
        """
        return shared(self.gathered(self.spans()))


def shared(spans):
    """RankTimes.of_all. spans: [RankTimes.spans() of each process]."""
    least = [min(inside for _, _, inside in same) for same in zip(*spans)]
    found = []
    for own in spans:
        by_name = {}
        for name, before, inside in own:
            known = by_name.setdefault(name, [0.0, 0.0])
            known[0] += before
            known[1] += inside
        exchanges = sum(least)
        found.append({"computes": sum(before for _, before, _ in own), "waits": sum(inside for _, _, inside in own) - exchanges,
                      "exchanges": exchanges, "before": by_name})
    return found
