"""The time left of a run, with a clock that follows what the layers of FLUX.1 cost on an H100."""

import math
import random

import pytest
from comfyui_svdquant.quant.quantizer.pace import Pace, duration

HIDDEN, MLP = 3072, 12288
DOUBLE = {"qkv": (3 * HIDDEN, HIDDEN), "proj": (HIDDEN, HIDDEN), "mlp.0": (MLP, HIDDEN), "mlp.2": (HIDDEN, MLP)}
SINGLE = {"linear1": (3 * HIDDEN + MLP, HIDDEN), "linear2": (HIDDEN, HIDDEN + MLP), "modulation": (3 * HIDDEN, HIDDEN)}


def blocks(doubles=19, singles=38):
    """{block: {layer: (is modulation, shape)}}."""
    found = {f"double_blocks.{i}": {f"double_blocks.{i}.{stream}_{name}": (name == "mod", shape) for stream in ("img", "txt")
                                    for name, shape in (DOUBLE | {"mod": (6 * HIDDEN, HIDDEN)}).items()} for i in range(doubles)}
    return found | {f"single_blocks.{i}": {f"single_blocks.{i}.{name}": (name == "modulation", shape) for name, shape in SINGLE.items()}
                    for i in range(singles)} | {"outside": {"time_in.out_layer": (True, (HIDDEN, HIDDEN))}}


def cost(modulation, shape, speed):
    """Seconds for a layer: products with the weight, GPTQ and the Cholesky factor, whose terms grow with the width; a fixed part."""
    n, k = shape
    return (0.01 + 1e-9 * n * k) / speed if modulation else (0.05 + 4e-9 * n * k + 1.2e-13 * n * k * k + 3e-14 * k**3) / speed


def run(speed=1.0, noise=0.1, warm_up=6.0, calibrated=True, resumed=0):
    """[(true seconds left, estimate)] after each layer, once there is an estimate."""
    random.seed(0)
    structure, times, estimates = blocks(), [], []
    sizes = {name: sum(math.prod(shape) for _, shape in layers.values()) for name, layers in structure.items()} if calibrated else {}
    pace = Pace({name: part for layers in structure.values() for name, part in layers.items()}, sizes)
    now = 0.0
    for index, (name, layers) in enumerate(structure.items()):
        if calibrated:
            seconds = 3e-9 * sizes[name] * (1 if "double" in name else 1.5) / speed * random.uniform(1 - noise, 1 + noise)
            now += seconds
            pace.done(name, None if index < resumed else seconds)
        for layer, (modulation, shape) in layers.items():
            seconds = 0.0 if index < resumed else cost(modulation, shape, speed) * random.uniform(1 - noise, 1 + noise)
            seconds, warm_up = seconds + (warm_up if index >= resumed else 0), 0.0 if index >= resumed else warm_up
            now += seconds
            pace.done(layer, None if index < resumed else seconds)
            if pace.blocks > 1:
                estimates.append(pace.seconds_left())
                times.append(now)
        pace.blocks += index >= resumed
    return [(now - time, estimate) for time, estimate in zip(times, estimates)]


@pytest.mark.parametrize("settings", [{}, {"speed": 0.02}, {"calibrated": False}, {"resumed": 8}, {"resumed": 30}, {"warm_up": 30.0}])
def test_the_estimate_is_right_within_a_third(settings):
    found = run(**settings)
    assert len(found) > 20
    wrong = [(left, estimate) for left, estimate in found if left > 5 and not 2 / 3 < estimate / left < 4 / 3]
    assert wrong == []


def test_the_text():
    pace = Pace({f"a.{i}": (False, (64, 64)) for i in range(40)} | {"b": (True, (64, 64))}, {})
    pace.done("b", 60.0)
    for i in range(21):
        pace.done(f"a.{i}", 3.0)
    assert pace.text() == "layer 22 of 41", "no block is finished"
    pace.blocks = 2
    assert pace.text() == "layer 22 of 41, about 1 min left"
    for i in range(21, 40):
        pace.done(f"a.{i}")
    assert pace.text() == "layer 41 of 41"


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "10 s"), (44, "40 s"), (58, "1 min"), (98, "1.5 min"), (119, "2 min"),
                                               (290, "5 min"), (3200, "53 min"), (3500, "1 h"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
