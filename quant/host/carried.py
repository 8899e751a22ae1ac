"""Find settings of a MODEL that hold its own modules, and therefore can't be carried over to the quantized model.

Nodes put functions and objects on a MODEL: model options, wrappers, callbacks, object patches, attachments. An object that holds the
diffusion model, as a step cache does, would have no effect on the quantized model and would keep the 16-bit model in memory.
"""

import functools
import gc
import types
import weakref
from collections import deque

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MAX_DEPTH, MAX_OBJECTS = 24, 200_000
LEAVES = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.CodeType, types.FrameType, torch.dtype,
          torch.device, torch.Size)
BOUND = types.MethodType, types.BuiltinMethodType, types.MethodWrapperType


def _references(thing):
    """Yield (step of the path in words, object) for each object that `thing` references. A function's globals are left out: they lead to
    everything that is loaded."""
    if isinstance(thing, (torch.Tensor, *LEAVES)):
        return
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield f"[{key!r}]" if isinstance(key, str | int) else "[...]", value
            yield " as a key", key
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from (("[...]", value) for value in thing)
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or ()):
            try:
                yield f" (its variable {name})", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield " (its defaults)", (thing.__defaults__, thing.__kwdefaults__)
    elif isinstance(thing, functools.partial):
        yield " (its function)", thing.func
        yield " (its arguments)", (thing.args, thing.keywords)
    elif isinstance(thing, weakref.ref):
        yield " (a weak reference)", thing()
    elif isinstance(thing, torch.nn.Module):
        yield from ((f".{name}", child) for name, child in [*thing._modules.items(), *thing._parameters.items(), *thing._buffers.items()])
    elif not _attributes(thing):  # objects without Python attributes, such as iterators of other libraries
        yield from ((" (inside it)", held) for held in gc.get_referents(thing))
    yield from ((f".{name}", value) for name, value in _attributes(thing) if name not in ("_modules", "_parameters", "_buffers"))


def _attributes(thing):
    """[(name, value)] of an object's own attributes, in its __dict__ and its slots; for a bound method also its object and function."""
    found = list(getattr(thing, "__dict__", {}).items())
    for base in type(thing).__mro__:
        slots = vars(base).get("__slots__", ())
        found += [(name, getattr(thing, name)) for name in ([slots] if isinstance(slots, str) else slots)
                  if name not in ("__dict__", "__weakref__") and hasattr(thing, name)]
    if isinstance(thing, BOUND):
        found += [(name, getattr(thing, name)) for name in ("__self__", "__func__") if hasattr(thing, name)]
    return found


def _addresses(tensor):
    """{address} of a tensor's memory. For a wrapper of other tensors, such as ComfyUI's quantized weights, the addresses are those of its
    parts, since its own storage has none."""
    if is_traceable_wrapper_subclass(tensor):
        return {address for name in tensor.__tensor_flatten__()[0] for address in _addresses(getattr(tensor, name))}
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return set()
    return {tensor.untyped_storage().data_ptr()} - {0}


def reaches(objects, modules):
    """The path, in words, from one of `objects`, {words: object}, to one of `modules` or their parameters; None if there is none.

    The search follows containers, attributes, closures, bound methods, partials and weak references, at most MAX_DEPTH steps.
    """
    ids = {id(held) for module in modules for held in (module, *module.parameters(recurse=False))}
    memory = {address for module in modules for p in module.parameters(recurse=False) for address in _addresses(p)}

    def is_found(thing):
        return id(thing) in ids or isinstance(thing, torch.Tensor) and not memory.isdisjoint(_addresses(thing))

    queue = deque((thing, words, 0) for words, thing in objects.items())
    seen = {}  # {id: object}; holding the object keeps Python from reusing its id
    while queue:
        thing, words, depth = queue.popleft()
        if is_found(thing):
            return words
        if id(thing) in seen or depth == MAX_DEPTH or len(seen) == MAX_OBJECTS:
            continue
        seen[id(thing)] = thing
        queue.extend((held, words + step, depth + 1) for step, held in _references(thing) if not isinstance(held, LEAVES))
    return None


def carried(patcher):
    """{words: object} of the settings that quantization carries over from a MODEL."""
    found = {f"its {name}": value for name, value in patcher.model_options.items() if name != "transformer_options"}
    found |= {f"its transformer option {name}": value for name, value in patcher.model_options.get("transformer_options", {}).items()}
    found |= {f"its {name} wrapper": value for name, value in patcher.wrappers.items()}
    found |= {f"its {name} callback": value for name, value in patcher.callbacks.items()}
    found |= {f"its object patch of {name}": value for name, value in patcher.object_patches.items()}
    found |= {f"its attachment {name}": value for name, value in patcher.attachments.items()}
    return found | {f"its additional model {name}": value for name, value in patcher.additional_models.items()}


def check_carried(patcher):
    """Raise ValueError if a node has put an object on the MODEL that holds parts of the MODEL's own modules."""
    path = reaches(carried(patcher), [patcher.model, *patcher.model.diffusion_model.modules()])
    if path:
        raise ValueError(f"A node on this MODEL, such as a step cache, holds parts of the 16-bit model ({path}), which can't be carried "
                         "into 4 bits; put that node behind SVDQuant Quantize Model.")
