"""The models that the pack knows: one file a model family, each one a frozen declaration (family.py says of what)."""

from importlib import import_module

# A new family is a file here and a line below. Where the tensors of a file would do for two of them, the first one is meant.
MODULES = (
    "chroma",
    "flux1",
)
FAMILIES = tuple(import_module(f".{module}", __name__).FAMILY for module in MODULES)
TITLES = " or ".join(sorted((family.title for family in FAMILIES), reverse=True))  # for messages


def of_image_model(image_model):
    """The Family with the host's configuration value `image_model`, or None."""
    return next((family for family in FAMILIES if family.image_model == image_model), None)


def of_tensors(keys):
    """The Family whose tensors `keys` (names without prefix) are, or None."""
    return next((family for family in FAMILIES if "" in family.signature.prefixes(keys)), None)
