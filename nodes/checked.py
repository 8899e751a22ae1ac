"""Checks of the nodes' inputs, whose sentences the page shows when Run is clicked, before any node works."""

import comfy.model_patcher
import torch

from ..quant.host.relied_on import HostError
from ..quant.text import bounded, quoted
from .progress import NodeProgress


def _is_image(value):
    return isinstance(value, torch.Tensor) and value.ndim == 4


def _is_conditioning(value):
    return isinstance(value, list) and all(isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], torch.Tensor)
                                           and isinstance(entry[1], dict) for entry in value)


# {type of an input: (whether a value has it, what to give instead)}. ComfyUI does not check a value that comes from another node, nor one
# that a workflow holds in place of a link.
KINDS = {
    "MODEL": (lambda value: isinstance(value, comfy.model_patcher.ModelPatcher), "connect a node that loads or changes a MODEL"),
    "CLIP": (lambda value: callable(getattr(value, "tokenize", None)), "connect a node that loads a CLIP"),
    "CONDITIONING": (_is_conditioning, "connect a text encode node"),
    "LATENT": (lambda value: isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor), "connect an empty latent"),
    "IMAGE": (_is_image, "connect a node that gives an IMAGE"),
    "VAE": (lambda value: callable(getattr(value, "decode", None)), "connect a node that loads a VAE"),
    "INT": (lambda value: isinstance(value, int) and not isinstance(value, bool), "give a whole number"),
    "FLOAT": (lambda value: isinstance(value, (int, float)) and not isinstance(value, bool), "give a number"),
    "BOOLEAN": (lambda value: isinstance(value, (bool, int)), "give true or false"),
    "STRING": (lambda value: isinstance(value, str), "give a text"),
    "COMBO": (lambda value: isinstance(value, str), "choose one of its options"),
}


def check_types(node, **values):
    """Raise ValueError, which names the input, unless all values have the types of the node's schema. An optional one may be None."""
    # Not GET_SCHEMA, which sets attributes of the class: ComfyUI runs a node on a copy of its class that refuses that.
    entries = {entry.id: entry for entry in (node.SCHEMA or node.define_schema()).inputs}
    for name, value in values.items():
        kind = str(entries[name].io_type)
        fits, remedy = KINDS[kind]
        if not fits(value) and not (value is None and entries[name].optional):
            raise ValueError(f"The input {name} is {quoted(value)}, and not of type {kind}; {remedy}.")


def checked(node, check, *inputs):
    """The result of a node's validate_inputs: True if check(*inputs) passes, otherwise the sentence of its error, which is also shown on
    the node. node: its class, as ComfyUI passes it to validate_inputs. ComfyUI passes None for an input that comes from another node."""
    shown = NodeProgress.of(node)
    try:
        check(*inputs)
    except (ValueError, OSError, HostError) as error:
        sentence = bounded(str(error))
        shown.refuse(sentence)
        return sentence
    shown.accept()
    return True


def choose(name, value, options):
    """options[value], where `value` is that of the input `name`. Raises ValueError for a value that is no option, as in workflows of
    other versions: ComfyUI 0.3.75 does not check the choices of this kind of node."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"The input {name} is {quoted(value)}, which this version of SVDQuant does not offer; choose "
                         f"{bounded(', '.join(map(str, options)), 400)}.")
    return options[value]
