"""The supported model families: one file each, holding one frozen declaration (family.py defines its fields)."""

from importlib import import_module

from ..text import alternatives
from .discovered import KEY, discovered

# A new family is a file here and a line below. If a file's tensors match two families, the first one counts.
MODULES = (
    "flux1",
    "flux2",
    "chroma",
    "qwen_image",
    "z_image",
)
FAMILIES = tuple(import_module(f".{module}", __name__).FAMILY for module in MODULES)
TITLES = alternatives(family.title for family in FAMILIES)  # for messages and descriptions
EXAMPLES = FAMILIES[0].examples  # for the tooltip of exceptions: a pattern of layers, and one with a rank


def of_config(config):
    """The Family of a model with the configuration `config` of its file, or None: a declared one, or the one that was discovered in the
    model. Raises ValueError as discovered.discovered does."""
    return discovered(config[KEY]) if KEY in config else of_image_model(config.get("image_model"))


def of_image_model(image_model):
    """The Family with the host's configuration value `image_model`, or None."""
    return next((family for family in FAMILIES if family.image_model == image_model), None)


def of_tensors(keys):
    """The Family that has the tensors `keys` (names without prefix), or None."""
    return next((family for family in FAMILIES if "" in family.signature.prefixes(keys)), None)
