"""The family of a model in the host."""

from .. import families

ATTRIBUTE = "svdquant_family"


def family_of(model):
    """The Family of a BaseModel by its configuration, or None; of a quantized one that has no declared family, the one that was discovered
    (set_family). The class of its diffusion model is not checked."""
    if (found := getattr(model, "__dict__", {}).get(ATTRIBUTE)) is not None:
        return found
    config = getattr(getattr(model, "model_config", None), "unet_config", None) or {}
    return families.of_image_model(config.get("image_model"))


def set_family(model, family):
    """Note the Family of a BaseModel, which its configuration does not tell if it was discovered."""
    setattr(model, ATTRIBUTE, family)
