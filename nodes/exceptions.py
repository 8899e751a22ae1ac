"""The input of the quantizing nodes with the layers that are quantized otherwise than the others."""

from comfy_api.latest import io

from .newer import ADVANCED


def exceptions_input(examples, more=""):
    """The input, a text whose exceptions presets.entries reads. examples: names or patterns of layers; more: what else an exception can
    say, as the rest of the tooltip's sentence."""
    return io.String.Input("exceptions", default="", multiline=True, optional=True,
                           tooltip="Exceptions, one per line or separated by commas: a layer name or pattern keeps its layers in 16 bits, "
                                   f"such as {examples}{more}.", **ADVANCED)
