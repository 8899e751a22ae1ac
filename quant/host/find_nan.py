"""With SVDQUANT_FIND_NAN=1 in the environment, a model stops at its first layer with a NaN or an infinity, and says which one it is.

The hook is PyTorch's global one: hooks on the layers themselves would keep them from applying a GELU to their own outputs, and the model
would compute something else. Each check waits for the device, so drawing is slow.
"""

import functools
import os
import weakref

import torch

SWITCH = "SVDQUANT_FIND_NAN"
_names = weakref.WeakKeyDictionary()  # {module: its name}


def is_on():
    return os.environ.get(SWITCH, "") not in ("", "0")


def watch(diffusion_model):
    """Check all modules of a model from now on, if the switch is on when the model is built."""
    if not is_on():
        return
    _names.update({module: name for name, module in diffusion_model.named_modules() if name})
    _install()


@functools.cache
def _install():
    """The handle of the hook, which is registered once."""
    return torch.nn.modules.module.register_module_forward_hook(_check)


def _check(module, args, output):
    name = _names.get(module)
    if name is None or _sound(output):
        return
    kind, given = type(module).__name__, [value for value in args if isinstance(value, torch.Tensor)]
    if not all(map(_sound, given)):
        raise FloatingPointError(f"The input of {name} ({kind}) has NaN or infinity already, and no layer before it had: the operation "
                                 "between them made it, such as attention or a node's patch; run without other nodes' patches.")
    largest = max((value.abs().max().item() for value in given if value.numel()), default=0.0)
    raise FloatingPointError(f"{name} ({kind}) is the first layer whose output has NaN or infinity (its largest input is {largest:.3g}); "
                             "keep it in 16 bits with the exceptions of SVDQuant Quantize Model, or compute in bf16.")


def _sound(value):
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
