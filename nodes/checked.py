"""Checks of the nodes' inputs, whose sentences the page shows when Run is clicked, before any node works."""

from .progress import NodeProgress


def checked(node, check, *inputs):
    """The result of a node's validate_inputs: True if check(*inputs) passes, otherwise the sentence of its error, which is also shown on
    the node. node: its class, as ComfyUI passes it to validate_inputs. ComfyUI passes None for an input that comes from another node."""
    shown = NodeProgress.of(node)
    try:
        check(*inputs)
    except (ValueError, OSError) as error:
        shown.refuse(str(error))
        return str(error)
    shown.accept()
    return True


def choose(name, value, options):
    """options[value], where `value` is that of the input `name`. Raises ValueError for a value that is no option, as in workflows of
    other versions: ComfyUI 0.3.75 does not check the choices of this kind of node."""
    if value not in options:
        raise ValueError(f"The input {name} is {value!r}, which this version of SVDQuant does not offer; choose "
                         f"{', '.join(map(str, options))}.")
    return options[value]
