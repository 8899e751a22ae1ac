"""What newer versions of ComfyUI add to the node API. Older ones get the schemas without it."""

import dataclasses
import inspect

from comfy_api.latest import io

from ..quant import families

CATEGORY = "SVDQuant"
# Other words by which users search for the nodes.
ALIASES = ["nunchaku", "int4", "w4a4", "4-bit", "quantize", "low vram", "flux", *(family.title.lower() for family in families.FAMILIES)]

# Keyword arguments of io.Schema, and of an input that the page folds away.
SEARCH = {"search_aliases": ALIASES} if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)} else {}
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input).parameters else {}
