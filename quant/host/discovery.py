"""The layers of a MODEL of no declared family, found in the model itself.

A few of calibration's calls run once more, in 16 bits, with a hook on every module of the model's ModuleLists:

* A block is a module of a ModuleList that runs once a call and has linears. Of nested lists the outer one counts.
* Its linears are packed: W4A16 if they see a row or a few, W4A4 if they see tokens; with unsigned codes if the inputs never go below the
  GELU's minimum, as a GELU's or a ReLU's don't. Linears that read the same tensor share their smoothing.
* The blocks whose outputs a block reads are followed through the host's code between the blocks (Lineage). A trial of calibration's own
  replay, one block at a time, has to see the same inputs.

* Large linears outside the blocks are W4A16 if they see a row or a few, as layers that compute modulations for all blocks do.

Everything else stays in 16 bits.
"""

import json
from dataclasses import is_dataclass

import comfy.model_detection
import comfy.model_management
import torch
from torch.overrides import TorchFunctionMode

from ...cuda.choose import OUTPUTS
from ...cuda.int4 import GELU_SHIFT, GROUP_SIZE
from .. import families
from ..families.discovered import discovered
from ..families.family import OUTSIDE
from ..quantizer import calibration
from . import build
from .calibrate import stages
from .weights import unpatched_shape

CALLS = 3             # as many recorded calls run once more: the first, the last, and one between them
FEW_ROWS = 16         # a layer that never sees more rows than this in a call is W4A16
UNSIGNED_PEAK = 4     # an input that shall have unsigned codes reaches this many times the GELU shift: codes of smaller ones would be lost
AGREEMENT = 1e-3      # relative, between the inputs of a block that runs alone and those in the whole model
OUTSIDE_LEAST = 1 << 20  # numbers in the weight of a layer outside the blocks that is packed
MARK = "svdquant_lineage"


def title(patcher):
    """The name of a MODEL's architecture: that of a declared family's relative, or the host's."""
    config = patcher.model.model_config
    near = families.of_image_model(config.unet_config.get("image_model"))
    return near and near.relative(config.unet_config) or type(config).__name__


def check(patcher, calibrated, ranks):
    """Raise ValueError unless a MODEL of no declared family can be quantized: its layers are found by calibration, in one process, and its
    file is loaded through the host's own detection."""
    if ranks.size > 1:
        raise ValueError(f"This MODEL is {title(patcher)}, none of the families whose layers SVDQuant knows ({families.TITLES}); one "
                         "process has to find its layers, so quantize it without torchrun.")
    if not calibrated:
        raise ValueError(f"This MODEL is {title(patcher)}, none of the families whose layers SVDQuant knows ({families.TITLES}); its "
                         "layers are found by calibration, so choose the preset best, slow or fast.")
    for name, tensor in patcher.model.diffusion_model.state_dict().items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"The {name} of this MODEL ({title(patcher)}) is {tensor.dtype}, for which a file in 4 bits has no place; use "
                             "the MODEL as it is.")
    host_configuration(patcher)


def linears(diffusion_model):
    """{name: linear} of the linears in a model's ModuleLists."""
    lists = [name for name, module in diffusion_model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return {name: module for name, module in diffusion_model.named_modules()
            if isinstance(module, torch.nn.Linear) and any(name.startswith(f"{parent}.") for parent in lists)}


def host_configuration(patcher):
    """{key: value} of a MODEL's configuration that the host does not find in the shapes of its tensors. Raises ValueError if the host does
    not find the same architecture, since the file could not be loaded."""
    shapes = {name: unpatched_shape(patcher, name) for name in patcher.model.diffusion_model.state_dict()}
    tensors, own = build.shapes_as_tensors(shapes), patcher.model.model_config
    try:
        detected = comfy.model_detection.detect_unet_config(tensors, "")
        found = detected and comfy.model_detection.model_config_from_unet_config(detected, tensors)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError):  # it reads more than shapes
        found = None
    if type(found) is not type(own):
        raise ValueError(f"ComfyUI does not recognize this MODEL ({title(patcher)}) by its tensors' shapes, so that a file of it could not "
                         "be loaded; use it in 16 bits, or in a format of ComfyUI's own.")
    differing = {key: value for key, value in own.unet_config.items()
                 if not isinstance(value, torch.dtype) and _as_json(found.unet_config.get(key)) != _as_json(value)}
    return json.loads(json.dumps(differing, default=str))


def _as_json(value):
    return json.dumps(value, default=str)


def discover(patcher, calls):
    """(DiscoveredFamily, [sentences for the report]) of a MODEL. calls: from calibration.recorded_calls; at least one. Raises ValueError if
    the model has no blocks that can be calibrated one by one."""
    comfy.model_management.load_models_gpu([patcher])  # sampling has left it there, unless another model needed the room
    model = patcher.model.diffusion_model
    chosen = [calls[i] for i in sorted({0, len(calls) // 2, len(calls) - 1})][:CALLS]
    seen = [observed(model, call, patcher.load_device) for call in chosen]
    blocks = chosen_blocks(model, seen)
    if not blocks:
        raise ValueError(f"This MODEL ({title(patcher)}) has no list of blocks that run once a step, so that it can't be calibrated block "
                         "by block; use it in 16 bits, or in a format of ComfyUI's own.")
    layers = chosen_layers(model, seen, blocks)
    reads = lineage(model, chosen[0], patcher.load_device, blocks, layers)
    shapes = {name: list(unpatched_shape(patcher, name)) for name in model.state_dict()}
    cls, config = type(model), patcher.model.model_config
    family = discovered({
        "title": title(patcher), "image_model": config.unet_config.get("image_model"),
        "model_class": f"{cls.__module__}.{cls.__qualname__}", "host": host_configuration(patcher), "outside": reads.pop(OUTSIDE),
        "blocks": reads, "layers": layers,
        "tensors": shapes, "tokens": usual_tokens(seen, layers)})
    check_replay(family, patcher, chosen[0], seen[0])
    return family, notes(family, model, blocks)


def notes(family, model, blocks):
    """Sentences on what was found, for the report and the node."""
    whole = linears(model)
    apart = {name: module for name, module in whole.items() if name not in family.packed and family.block_of(name)}
    odd = [name for name, module in apart.items() if module.out_features % OUTPUTS]
    unseen = [name for name in apart if name not in odd]
    outside = [name for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and not family.block_of(name) and name not in family.packed]
    found = [f"{family.title} is not a family that SVDQuant was measured on ({families.TITLES}): its {len(blocks)} blocks and "
             f"{len(family.packed)} layers were found by calibration; compare its images with those in 16 bits."]
    if odd:
        found.append(f"These layers stay in 16 bits, since their outputs are not a multiple of {OUTPUTS}: {', '.join(odd)}.")
    if unseen:
        found.append(f"These layers of its blocks stay in 16 bits, since calibration did not see them: {', '.join(unseen)}.")
    if outside:
        found.append(f"These layers outside its blocks stay in 16 bits: {', '.join(outside)}.")
    return found


# --- One call, observed ------------------------------------------------------------------------------------------------


class Seen:
    """What a call shows. order: [module's name] of the ModuleLists' modules, as they ran; runs: {name: number of runs}; inputs: {linear:
    (rows, lowest, highest, first reader)} of linears that ran, in running order."""

    def __init__(self):
        self.order, self.runs, self.inputs, self.last = [], {}, {}, None

    def note_run(self, name):
        self.order.append(name)
        self.runs[name] = self.runs.get(name, 0) + 1

    def note_input(self, name, x):
        rows, low, high = x.numel() // x.shape[-1], *map(float, x.detach().aminmax())
        first, others = name, self.inputs.get(name)
        # The tensor itself is kept until another one comes, so that its address is not used again.
        if self.last is not None and _is_same(self.last[1], x) and self.last[2] == (low, high):
            first = self.last[0]
        else:
            self.last = name, x, (low, high)
        if others is not None:  # it runs more than once a call
            rows, low, high, first = max(rows, others[0]), min(low, others[1]), max(high, others[2]), name
        self.inputs[name] = rows, low, high, first


def _is_same(x, y):
    return x is y or (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


def observed(model, call, device):
    """The Seen of one call."""
    seen, hooks = Seen(), []
    for parent, modules in model.named_modules():
        if isinstance(modules, torch.nn.ModuleList):
            hooks += [module.register_forward_pre_hook(lambda _module, _args, name=f"{parent}.{i}": seen.note_run(name))
                      for i, module in enumerate(modules)]
    hooks += [linear.register_forward_pre_hook(lambda _module, args, name=name: seen.note_input(name, args[0]))
              for name, linear in model.named_modules() if isinstance(linear, torch.nn.Linear)]
    try:
        _run(model, call, device)
    finally:
        for hook in hooks:
            hook.remove()
    seen.last = None
    return seen


def _run(model, call, device):
    args, kwargs = calibration.to_device(call, device, copy=True)
    with torch.no_grad():
        model(*args, **kwargs)


def chosen_blocks(model, seen):
    """[name] of the blocks, in running order."""
    layers, chosen = seen[0].inputs, []
    for name in sorted(seen[0].order, key=lambda name: name.count(".")):
        inside = any(layer.startswith(f"{name}.") for layer in layers)
        if inside and all(call.runs.get(name) == 1 for call in seen) and not any(name.startswith(f"{block}.") for block in chosen):
            chosen.append(name)
    return [name for name in seen[0].order if name in chosen]


def chosen_layers(model, seen, blocks):
    """The description's entries of the layers to pack. Layers of which calls see different things get what holds for all of them."""
    found = {}
    for name, (*_, first) in seen[0].inputs.items():
        linear, block = model.get_submodule(name), next((block for block in blocks if name.startswith(f"{block}.")), None)
        if linear.out_features % OUTPUTS or not all(name in call.inputs for call in seen):
            continue
        rows, low, high = (how(call.inputs[name][i] for call in seen) for i, how in enumerate((max, min, max)))
        unsigned = low >= -GELU_SHIFT and high >= UNSIGNED_PEAK * GELU_SHIFT
        few = rows <= FEW_ROWS
        if block is None and not (few and linear.weight.numel() >= OUTSIDE_LEAST and linear.in_features % GROUP_SIZE == 0):
            continue
        found[name] = {"w4a16": few, "unsigned": unsigned and not few, "bias": linear.bias is not None, "reads": name}
        same = found.get(first)
        if same and block and first.startswith(f"{block}.") and all(same[flag] == found[name][flag] for flag in ("w4a16", "unsigned")):
            found[name]["reads"] = first
    return found


def usual_tokens(seen, layers):
    """The numbers of tokens to compile kernels for at first: the three that most layers of the first call have."""
    rows = [seen[0].inputs[name][0] for name, entry in layers.items() if not entry["w4a16"]] or [1]
    counts = sorted(set(rows), key=lambda count: (-rows.count(count), -count))
    return [counts[min(i, len(counts) - 1)] for i in range(3)]


# --- Which blocks read which -------------------------------------------------------------------------------------------


class Lineage(TorchFunctionMode):
    """While it is active, a tensor that is computed from a block's output, outside the blocks, is marked with the block's name."""

    def __init__(self):
        super().__init__()
        self.inside = 0  # blocks that run now

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            marks = marks_of((args, kwargs))
            if marks:
                written = args[:1] if result is None or result is args[0] else ()  # by x[...] = y, or in place
                for tensor in tensors_in((result, written)):
                    mark(tensor, marks)
        return result


def tensors_in(value):
    """The tensors in nested lists, tuples, dicts and dataclasses, such as modulations."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    return [tensor for item in value.values() for tensor in tensors_in(item)] if isinstance(value, dict) else []


def marks_of(value):
    return frozenset().union(*(getattr(tensor, MARK, ()) for tensor in tensors_in(value)))


def mark(tensor, marks):
    for each in (tensor, tensor._base):
        if each is not None:
            setattr(each, MARK, getattr(each, MARK, frozenset()) | marks)


def lineage(model, call, device, blocks, layers):
    """{block: [names of the blocks whose outputs it reads]}, in running order, and OUTSIDE with those that the `layers` outside the blocks
    read."""
    reads, outside, mode, hooks = {}, set(), Lineage(), []

    def enter(name, args, kwargs):
        reads[name] = [block for block in blocks if block in marks_of((args, kwargs))]
        mode.inside += 1

    def leave(name, output):
        mode.inside -= 1
        # A block may return one of its arguments, changed in place.
        for tensor in tensors_in(output):
            setattr(tensor, MARK, frozenset((name,)))

    for name in layers:
        if not any(name.startswith(f"{block}.") for block in blocks):
            hooks.append(model.get_submodule(name).register_forward_pre_hook(lambda _module, args: outside.update(marks_of(args))))
    for name in blocks:
        block = model.get_submodule(name)
        hooks.append(block.register_forward_pre_hook(lambda _module, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _module, _args, output, name=name: leave(name, output)))
    try:
        with torch.inference_mode(False), mode:  # an inference tensor does not know the tensor of which it is a view
            _run(model, call, device)
    finally:
        for hook in hooks:
            hook.remove()
    return reads | {OUTSIDE: [block for block in blocks if block in outside]}


def check_replay(family, patcher, call, seen):
    """Raise ValueError unless calibration's replay of one block at a time sees the inputs that the whole model has."""
    model = patcher.model.diffusion_model
    replayed = stages(family, model)
    stream = calibration.stream_blocks(
        model, [call], calibration.Memory(patcher.load_device), replayed,
        lambda name, block: family.outer_layers(block) if name == OUTSIDE else family.block_layers(name, block), None,
        sources=family.sources(model))
    with torch.no_grad():
        for block, stats in stream:
            for name, found in stats.items():
                _, low, high, _ = seen.inputs[name]
                peak = max(-low, high)
                if not abs(float(found.spans()["absmax"].max()) - peak) <= AGREEMENT * peak:
                    raise ValueError(f"The block {block} of this MODEL ({family.title}) can't be calibrated on its own: between its blocks "
                                     "the model does more than SVDQuant can follow; use it in 16 bits, or in a format of ComfyUI's own.")
