"""The time that is left of a run, from the time that its finished parts took.

A part takes about as long per element as finished parts of the nearest shape. One number for all layers would not do: GPTQ takes longer per
element the more inputs a layer has, and a modulation layer takes a fraction of that time.
"""

import math
from collections import Counter
from statistics import median_low

CALIBRATION = "calibration"  # the kind of the part in which a block's inputs are recorded


class Pace:
    """The parts of a run, and the times of the finished ones.

    layers: {name: (kind, (N, K))}; layers of one kind run the same algorithm. blocks: {name: elements of its layers} of the blocks that are
    calibrated. processes: the number of processes that quantize layers at the same time.
    """

    def __init__(self, layers, blocks, processes=1):
        self.processes = processes
        self.layers, self.left = layers, layers | {name: (CALIBRATION, (elements, 1)) for name, elements in blocks.items()}
        self.blocks = 0  # number of blocks that were computed
        self._rates = {}  # {kind: {shape: [seconds per element]}}

    def done(self, name, seconds=None):
        """Part `name` is finished. seconds: None if it was not computed, but read from an interrupted run."""
        kind, shape = self.left.pop(name)
        if seconds is not None:
            self._rates.setdefault(kind, {}).setdefault(shape, []).append(seconds / math.prod(shape))

    def seconds_left(self):
        """The seconds that the parts to come will take."""
        return sum(count * math.prod(shape) * self._rate(kind, shape) / (1 if kind == CALIBRATION else self.processes)
                   for (kind, shape), count in Counter(self.left.values()).items())

    def text(self):
        """"layer 23 of 42, about 2 min left". The time is given once two blocks are computed: the first one also compiles kernels."""
        count = f"layer {len(self.layers) - len(self.left.keys() & self.layers.keys())} of {len(self.layers)}"
        return f"{count}, about {duration(self.seconds_left())} left" if self.blocks > 1 and self.left else count

    def _rate(self, kind, shape):
        rates = self._rates.get(kind) or {known: found for shapes in self._rates.values() for known, found in shapes.items()}

        def distance(known):  # columns count twice, since the work grows with their square
            return abs(math.log(known[0] / shape[0])) + 2 * abs(math.log(known[1] / shape[1]))

        return median_low(rates[min(rates, key=distance)])


def duration(seconds):
    """A time as text, rounded by at most a fifth, and to at least 10 s."""
    minutes = seconds / 60
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if minutes < 55:
        return f"{round(2 * minutes) / 2 if minutes < 3 else round(minutes):g} min"
    return f"{round(2 * minutes / 60) / 2:g} h"
