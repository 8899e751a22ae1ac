"""Autotune: the fastest of several possible choices, measured on the user's own card.

choose() compares tiles and plans by cost models that were measured on one generation (Target.measured). On the others, the first load of a
model measures the choices of its layers, in the background of loading: warm_up's threads first build and test the kernels of choose(),
then tune() times each alternative on random operands of the layer's own size. The fastest one of each layer is kept beside the compiled
kernels for this GPU, driver, compiler and sources (kernel_records.py), and later loads take it from there.

An alternative is a candidate only if it returns the same bits as choose()'s kernels, which is checked on these operands: they are random,
so that another order of sums shows. A layer's result therefore never depends on whether, when or with which outcome it was measured.

All measurements of a process take BUDGET seconds at most on each GPU, compilation aside; layers left over are measured by the next
process. SVDQUANT_AUTOTUNE=0 switches measuring and its results off; SVDQUANT_AUTOTUNE=1 measures on every GPU.
"""

import collections
import functools
import logging
import os
import threading
import time

import torch

from . import awq, compiler, gemm_mma, gemm_wgmma, kernel_records
from .choose import W4A16, AWQKernel, Layer, MLPKernels
from .errors import KernelsUnavailable
from .int4 import GROUP_SIZE
from .operands import LayerOperands

log = logging.getLogger(__name__)

VARIABLE = "SVDQUANT_AUTOTUNE"  # environment variable: 0 never, 1 on every GPU, otherwise on generations that were not measured
BUDGET = 2.0       # seconds of measurements in a process, on each GPU
ROUNDS = 3         # each candidate is timed this often, in turns with the others; its least time counts
LAUNCHES = 2       # number of launches of a layer that are timed together
GAIN = 0.97        # a candidate replaces another only if it takes less than this fraction of its time: timings vary by 2 %
HELD_CYCLES = 400_000  # clocks for which the GPU is held back, so that what is timed lies ready when it starts
PLANS = 4          # the plans of quantize_activation.py that are compared

_pending = collections.defaultdict(dict)  # {device: {layer: (kernels, alternatives, record)}} to be measured
_spent = collections.defaultdict(float)   # {device: seconds}
_tuning = threading.Lock()                # two measurements at a time would disturb each other


def wanted(target):
    """Whether choices on a GPU of this Target are measured."""
    setting = os.environ.get(VARIABLE, "")
    return setting == "1" or setting != "0" and not target.measured


# --- Choices ---------------------------------------------------------------------------------------------------------


def tuned(kernels, layer, target, device):
    """choose()'s kernels for a layer on `device`, a CUDA device with an index, or the alternative that was measured to be the fastest. If
    there are alternatives and none was measured, tune() will."""
    if kernels is None or not wanted(target):
        return kernels
    values = alternatives(kernels, layer, target)
    if not values:
        return kernels
    record = _record(kernels, layer, values, target, device)
    found = kernel_records.read(record)
    if _valid(found, values):
        return kernels._replace(**{field: values[field][index] for field, index in found.items()})
    _pending[device][layer] = kernels, values, record
    return kernels


def is_measured(kernels, layer, target, device):
    """Whether the choice among the alternatives of choose()'s kernels for a layer is on record for `device`; arguments as of tuned(). None
    if there are no alternatives."""
    values = alternatives(kernels, layer, target)
    return _valid(kernel_records.read(_record(kernels, layer, values, target, device)), values) if values else None


def _record(kernels, layer, values, target, device):
    """The file of the fastest choice. values: alternatives()."""
    return kernel_records.path("autotune", device, layer, kernels, values, target.arch, compiler.all_sources_digest())


def _valid(found, values):
    """Whether a record is {each field of `values`: an index of its values}."""
    return (isinstance(found, dict) and found.keys() == values.keys()
            and all(type(index) is int and 0 <= index < len(values[field]) for field, index in found.items()))


def alternatives(kernels, layer, target):
    """{field of `kernels`: the values that it may have, choose()'s first}; only fields with two or more."""
    if isinstance(kernels, AWQKernel):
        found = {"tiles": awq.TILES}
    elif isinstance(kernels, MLPKernels):
        found = {"tile": gemm_mma.next_tiles_of(kernels.storage), "second_tile": gemm_mma.tiles_of(target), "plans": _orders(kernels.plans)}
    elif kernels.wgmma:
        shared = gemm_wgmma.divisible(layer.k, layer.unsigned_from)
        found = {"tile": tuple(tile for tile in gemm_wgmma.STAGES if tile[2] == 1 or shared), "plans": _orders(kernels.plans)}
    else:
        found = {"tile": gemm_mma.tiles_of(target), "plans": _orders(kernels.plans)}
    found = {field: _first(getattr(kernels, field), values) for field, values in found.items()}
    return {field: values for field, values in found.items() if len(values) > 1}


def _first(value, values):
    return value, *(other for other in values if other != value)


def _orders(plans):
    """The tuples that put another plan first. A plan with another number of ranks or CTAs adds up x @ proj_down in another order, which
    changes bits."""
    best = plans[0]
    alike = [plan for plan in plans[:PLANS] if best.ranks == 0 == plan.ranks or (plan.ranks, plan.ctas) == (best.ranks, best.ctas)]
    return [(plan, *(other for other in plans if other != plan)) for plan in alike]


# --- Measurement -----------------------------------------------------------------------------------------------------


def tune(device, runners, changed):
    """Measure the layers that tuned() found unmeasured on `device`, until none is left or BUDGET is spent.

    runners: {type of layer: run}, where run(kernels, x, *operands) computes the layer by these kernels; changed: called if a layer has
    faster kernels than choose()'s. The kernels of choose() are built and tested by now.
    """
    faster = 0
    with _tuning, torch.inference_mode():
        while _pending[device] and _spent[device] < BUDGET and threading.main_thread().is_alive():
            layer = next(iter(_pending[device]))  # the most urgent one: warm_up prepares the usual sizes first
            kernels, values, record = _pending[device].pop(layer)
            try:
                found = _fastest(kernels, values, layer, device, runners[type(layer)])
            except torch.OutOfMemoryError:  # the model needs the memory more
                log.debug("no memory to measure %s", layer)
                break
            if found is None:
                break
            kernel_records.write(record, found)
            faster += any(found.values())
            log.debug("measured %s: %s", layer, found)
    if faster:
        changed()


def _fastest(kernels, values, layer, device, run):
    """{field: index of its fastest value} of a layer, None if the time or the memory left doesn't suffice. Fields are decided one after the
    other: each with the fastest values of those before it."""
    clock = _Clock(device)
    with clock:
        if torch.cuda.mem_get_info(device)[0] < 2 * _bytes(layer):  # the model needs the memory more
            return None
        operands = random_operands(layer, device)
    expected, best = run(kernels, *operands), dict.fromkeys(values, 0)
    for field, options in values.items():
        candidates = {0: kernels}
        for index, value in enumerate(options[1:], 1):
            candidate = kernels._replace(**{field: value})
            try:
                y = run(candidate, *operands)  # also compiles its kernels
            except KernelsUnavailable as error:
                log.debug("%s %s: %s", field, value, error)
                continue
            if y is not None and torch.equal(y.view(torch.uint8), expected.view(torch.uint8)):
                candidates[index] = candidate
                y.fill_(torch.nan)  # a kernel that writes nothing must not find another's result in its memory
            else:
                log.debug("%s %s gives other bits for %s", field, value, layer)
            del y
        if len(candidates) > 1:
            with clock:
                times = _times([functools.partial(run, candidate, *operands) for candidate in candidates.values()], device, clock)
            if times is None:
                return None
            by_index = dict(zip(candidates, times, strict=True))
            fastest = min(by_index, key=by_index.get)
            if by_index[fastest] < GAIN * by_index[0]:
                best[field], kernels = fastest, candidates[fastest]
    return best


def _bytes(layer):
    """The bytes of a layer's operands and of three outputs, of which an MLP's hidden states may be one."""
    layers = (layer,) if isinstance(layer, Layer) else layer
    return sum(2 * each.m * each.k + each.n * each.k // 2 + 6 * each.m * each.n for each in layers)


class _Clock:
    """Adds the time within its context to what was spent on a device."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.begin = time.perf_counter()

    def __exit__(self, *error):
        _spent[self.device] += time.perf_counter() - self.begin

    def left(self):
        """Seconds of the budget that are left now."""
        return BUDGET - _spent[self.device] - (time.perf_counter() - self.begin)


def _times(runs, device, clock):
    """The least seconds of each of `runs`, or None if the time left doesn't suffice. A first launch of each warms it up."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    with torch.cuda.device(device):
        best = [float("inf")] * len(runs)
        for turn in range(ROUNDS):
            for i, run in enumerate(runs):
                torch.cuda._sleep(HELD_CYCLES)
                events[0].record()
                for _ in range(LAUNCHES):
                    run()
                events[1].record()
                events[1].synchronize()
                best[i] = min(best[i], events[0].elapsed_time(events[1]) / 1000 / LAUNCHES)
            if turn == 0 and sum(best) * LAUNCHES * (ROUNDS - 1) > clock.left():
                return None
    return best


def random_operands(layer, device):
    """x and the operands that a runner takes after it, random and of the layer's size, on the device."""
    g = torch.Generator(device).manual_seed(0)
    if isinstance(layer, Layer):
        return _input(layer, device, g), *_layer_operands(layer, device, g)
    first, second = layer
    return _input(first, device, g), *_layer_operands(first, device, g), *_layer_operands(second, device, g)


def _input(layer, device, g):
    return torch.randn(layer.m, layer.k, generator=g, device=device, dtype=layer.dtype)


def _layer_operands(layer, device, g):
    """(LayerOperands,), or (weight, weight_scale, weight_zeros, bias) of a W4A16 layer."""
    n, k, dtype, groups = layer.n, layer.k, layer.dtype, layer.k // GROUP_SIZE

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=g, device=device, dtype=dtype).mul_(scale)

    weight = torch.randint(-128, 128, (n, k // 2), generator=g, device=device, dtype=torch.int8)
    if layer.act_bits == W4A16:
        return weight, normal(groups, n, scale=0.02), normal(groups, n, scale=0.02), normal(n)
    row_scale = torch.full((n,), 2.0**-9, device=device) if layer.act_bits == 8 else None
    weight_scale = torch.randint(1, 17, (groups, n), generator=g, device=device).to(dtype).mul_(2.0**-9)
    rank, ranks = layer.rank, layer.lora.ranks
    down = normal(rank + sum(ranks), k, scale=k**-0.5)  # rows of all ranks, the layer's own first
    lora_up = normal(sum((stop - start) * rank for (start, stop), rank in zip(layer.lora.rows(n), ranks)), scale=0.1) if ranks else None
    strength = torch.rand(sum(ranks), generator=g, device=device) if ranks else None
    return LayerOperands(weight, weight_scale, down[:rank].t().contiguous(), normal(n, rank, scale=0.1),
                         torch.ones(k, device=device, dtype=dtype), normal(n), layer.unsigned_from, layer.act_bits, row_scale,
                         layer.gelu_from, lora_down=down if ranks else None, lora_up=lora_up, lora_strength=strength,
                         lora=layer.lora),
