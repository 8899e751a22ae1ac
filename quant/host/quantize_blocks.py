"""Quantizing the layers of a MODEL block by block, alone or divided among the processes of a run."""

import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict

import torch

from ..families.family import OUTSIDE
from ..layers import layout
from ..parallel import shares
from ..parallel.alone import ALONE
from ..quantizer import calibration, out_of_memory, pipeline
from ..quantizer.pace import Pace
from .background import Background
from .calibrate import block_statistics, stages
from .weights import effective_weight


class _Plan:
    """Which layers are quantized together, and where.

    groups: {block name: {first reader: [names of the layers that read the same input]}}; last: names of the blocks after which a batch is
    quantized (shares.batches); owners: {first reader: rank}.
    """

    def __init__(self, family, blocks, specs, done, propagate, size):
        self.groups = {block: {} for block in blocks}
        for name in specs:
            self.groups[family.block_of(name) or OUTSIDE].setdefault(family.first_reader(name), []).append(name)
        # With quantized propagation a block's input depends on the codes of the block before.
        batches = shares.batches([block for block in blocks if block not in done], size if propagate == "exact" else 1)
        self.last, self.owners = {batch[-1] for batch in batches}, {}
        for batch in batches:
            costs = {first: sum(shares.cost(specs[name].out_features, specs[name].in_features) for name in group)
                     for block in batch for first, group in self.groups[block].items()}
            # Layers of one name are neighbours: of equal size are also an image's and a text's, and an image has far more tokens to add up.
            names = {first: first.removeprefix(f"{block}.") for block in batch for first in self.groups[block]}
            self.owners |= shares.owners({first: costs[first] for first in sorted(costs, key=names.get)}, size)

    def layers(self, block):
        return [name for group in self.groups[block].values() for name in group]

    def order(self):
        """{layer name: its place in the report}"""
        return {name: place for place, name in enumerate(name for block in self.groups for name in self.layers(block))}


def quantize_blocks(family, patcher, specs, recipe, calls, progress, memory, kept, ranks=ALONE):
    """{tensor name: packed tensor} of the layers that are quantized to 4 bits, and the [LayerRecord] of all layers.

    The arguments are as in quantize.quantize; calls: this process's, or None if the run is not calibrated; kept: resume.Checkpoint or None.
    With several processes only process 0 gets tensors, unless the blocks run in 4 bits while the later ones are calibrated.
    """
    names = [name for name, _ in stages(family, patcher.model.diffusion_model)]
    everywhere = recipe.propagate == "quantized"
    done = _done_before(names, kept, ranks, everywhere)
    plan = _Plan(family, names, specs, done, recipe.propagate, ranks.size)
    packed, records, waiting = {}, [], {}
    pace, before = _pace(specs, {name: plan.layers(name) for name in names}, calls is not None, ranks.size), time.perf_counter()

    home = patcher.offload_device if ranks.size == 1 else None  # tensors that travel, or are copied in the background, stay on the GPU
    background = Background(patcher.offload_device, patcher.load_device) if ranks.size > 1 and not everywhere else None

    def owner_of(layer):
        return plan.owners.get(layer, 0)

    def keep(blocks):
        for block, (tensors, found) in blocks.items():
            if kept:
                kept.save(block, tensors, [asdict(record) for record in found])
            packed.update(tensors)

    # The stream holds parts of the MODEL on the device, so it is closed at once if this ends early.
    with background or nullcontext(), closing(block_statistics(family, patcher, calls, specs, recipe, memory, packed, set(done), ranks,
                                                               owner_of, plan.last if ranks.size > 1 else None)) as stream:
        for block_name, stats in stream:
            if block_name in pace.left:
                pace.done(block_name, None if block_name in done else time.perf_counter() - before)
            if block_name in done:
                tensors, found = done.pop(block_name)
                for record in found:
                    pace.done(record.name)
                    progress.step(f"{pace.text()}, done before")
                packed |= tensors
                records += found
            else:
                waiting[block_name] = stats
            if block_name in plan.last:
                own = {block: _quantize_block(patcher, plan, block, waiting[block], specs, recipe, memory, progress, pace, ranks.rank, home)
                       for block in waiting}
                blocks = _collected(own, ranks, everywhere)
                for found in [of_block[1] for of_block in blocks.values()]:
                    for record in found:
                        if record.name in pace.left:  # another process has quantized it
                            pace.done(record.name)
                            progress.step(pace.text())
                    pace.blocks += bool(found)
                    records += found
                if background:
                    background.move(blocks, keep)
                else:
                    keep(calibration.to_device(blocks, patcher.offload_device))
                waiting.clear()
                del own, blocks  # the next replays need the memory
            before = time.perf_counter()
    place = plan.order()
    return packed, sorted(records, key=lambda record: place[record.name])


def _done_before(names, kept, ranks, everywhere):
    """{block name: (tensors, records)} of the blocks that an interrupted run has finished. everywhere: whether all processes need the
    tensors; otherwise only process 0 gets them."""
    found = {name: block for name in names if kept and (block := kept.load_block(name))}
    finished = ranks.from_first({name: (tensors if everywhere else {}, records) for name, (tensors, records) in found.items()})
    return found or finished


def _pace(specs, layers_of, calibrated, processes):
    """The Pace of a run. layers_of: {block name: names of its layers}; calibrated: whether the run is; processes: their number."""
    shapes = {name: (spec.out_features, spec.in_features) for name, spec in specs.items()}
    blocks = {block: sum(math.prod(shapes[name]) for name in layers) for block, layers in layers_of.items() if layers and calibrated}
    return Pace({name: (spec.format == layout.AWQ, shapes[name]) for name, spec in specs.items()}, blocks, processes)


def _quantize_block(patcher, plan, block, stats, specs, recipe, memory, progress, pace, rank, home):
    """{tensor name: packed tensor} and [LayerRecord] of the layers of a block that fall to process `rank`. stats: {first reader:
    InputStats}; home: the device for the tensors, or None for the one on which they are made."""
    packed, records = {}, []
    for first, group in plan.groups[block].items():
        if plan.owners[first] != rank:
            continue
        inputs = stats.pop(first, None)
        before, smoothing = time.perf_counter(), _shared_smoothing(patcher, group, inputs, specs, recipe, memory, progress.check)
        for name in group:
            tensors, record = quantize_layer(patcher, name, inputs, specs[name], recipe, memory, progress.check, smoothing)
            packed |= {f"{name}.{part}": tensor if home is None else tensor.to(home) for part, tensor in tensors.items()}
            records.append(record)
            pace.done(name, time.perf_counter() - before)
            progress.step(pace.text())
            before = time.perf_counter()
    return packed, records


def _collected(own, ranks, everywhere):
    """{block name: (tensors, records)} of all processes. own: the same of this process; everywhere: whether each process gets them;
    otherwise only process 0 does, and the others get nothing."""
    to = range(ranks.size) if everywhere else [0]
    found = {block: ({}, []) for block in own}
    for blocks in ranks.exchanged(dict.fromkeys(to, own)):
        for block, (tensors, records) in (blocks or {}).items():
            found[block][0].update(tensors)
            found[block][1].extend(records)
    return found


def _shared_smoothing(patcher, names, stats, specs, recipe, memory, check):
    """pipeline.shared_smoothing of the layers `names`, which read the same input; None if fewer than two of them are smoothed."""
    names = [name for name in names if specs[name].format != layout.AWQ]
    if len(names) < 2:
        return None

    def run(device):
        weights = {name: effective_weight(patcher, f"{name}.weight", device) for name in names}
        return pipeline.shared_smoothing(weights, None if stats is None else stats.to(device), specs, recipe, check)

    return _attempt(patcher, names[0], memory, run)


def quantize_layer(patcher, name, stats, spec, recipe, memory, check, smoothing=None):
    """pipeline.quantize_layer of the MODEL's layer `name`: on its device, or on the CPU if the device runs out of memory."""
    def run(device):
        weight = effective_weight(patcher, f"{name}.weight", device)
        bias = effective_weight(patcher, f"{name}.bias", device) if spec.bias else None
        shared = None if smoothing is None else (smoothing[0].to(device), smoothing[1])
        return pipeline.quantize_layer(name, weight, bias, None if stats is None else stats.to(device), spec, recipe, check, shared)

    return _attempt(patcher, name, memory, run)


def _attempt(patcher, name, memory, run):
    """run(device) on the MODEL's device, or on the CPU if the device runs out of memory at layer `name`."""
    device = torch.device(patcher.load_device)
    for target in [device] * (1 + (memory.level == 0) + (memory.unload is not None)) + [torch.device("cpu")]:
        try:
            return run(target)
        except out_of_memory.ERRORS as error:
            if not (out_of_memory.on_device(error) or out_of_memory.on_host(error)):
                raise
            failure = calibration.first_line(error)
            if out_of_memory.on_host(error):
                break
        # Outside the except clause the exception is released, and with it the tensors that its frames held.
        if memory.level == 0:
            memory.step_down(name)
        else:
            calibration.empty_cache(device)
            memory.say(f"The GPU has no room for {name}: the CPU quantizes it, which takes longer.")
    raise MemoryError(f"There is not enough memory to quantize {name} ({failure}); close other programs and models, or keep "
                      "the layer in 16 bits with the input exceptions.")
