"""What torch.compile makes of the pack's functions."""

import torch


def constant(function):
    """Decorator: torch.compile calls `function` while it traces, and its graph has the result as a constant. The arguments must be
    constants as well.

    PyTorch 2.5 also stores the result among the globals of the traced code, under the name that the function's code has. That would
    replace the function itself by its last result where it is a global of that name, so its code gets another name.
    """
    function.__code__ = function.__code__.replace(co_name=f"constant_{function.__name__}")
    return torch.compiler.assume_constant_result(function)
