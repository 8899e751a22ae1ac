"""The family of a model in the host."""

from .. import families


def family_of(model):
    """The Family of a BaseModel by its configuration, or None. The class of its diffusion model is not checked."""
    config = getattr(getattr(model, "model_config", None), "unet_config", None) or {}
    return families.of_image_model(config.get("image_model"))
