"""The CLIP of packed text encoders: ComfyUI's own, except for its patcher and for saving."""

import comfy.sd

from .patcher import SVDQuantModelPatcher

SETTINGS = ("model_options", "object_patches", "attachments", "additional_models", "callbacks", "wrappers", "hook_mode", "is_clip",
            "force_cast_weights")


class SVDQuantClipPatcher(SVDQuantModelPatcher):
    """The patcher of a quantized model, for a CLIP's cond_stage_model: its parameters have no prefix in the keys of patches.

    recipe: {name of each packed encoder, as t5xxl: how it was quantized}.
    """

    unreadable = ("The weights of this CLIP are packed in 4 bits, and a node reads them as LoraSave does; give it what CLIPMergeSubtract "
                  "makes of 16-bit CLIPs.")
    kind, prefix = "CLIP", ""

    @property
    def root(self):
        return self.model

    def _warm_up(self):
        """An encoder's LoRAs run in PyTorch, and take no kernels."""


class QuantizedCLIP(comfy.sd.CLIP):
    """A CLIP with packed encoders."""

    @classmethod
    def of(cls, clip, patcher):
        """A CLIP with the settings of `clip` and its tokenizer, and with the model of `patcher`."""
        quantized = cls(no_init=True)
        vars(quantized).update(vars(clip))
        quantized.patcher, quantized.cond_stage_model = patcher, patcher.model
        quantized.tokenizer_options = clip.tokenizer_options.copy()
        return quantized

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        return self.of(clone, clone.patcher)

    def get_sd(self):
        """What ComfyUI's own nodes save of a CLIP."""
        raise ValueError("ComfyUI's own nodes can't save a CLIP in 4 bits, as their file would not say how its layers are packed; save it "
                         "with SVDQuant Save Text Encoder.")

    def state_dict_for_saving(self):
        return self.get_sd()


def packed_clip(clip, model, recipe, source):
    """A QuantizedCLIP. clip: a CLIP of ComfyUI's with the same encoders; model: the cond_stage_model with packed layers; recipe: {name of
    each packed encoder: how it was quantized}; source: what was quantized."""
    settings = clip.patcher.clone()
    model.to(settings.offload_device)
    patcher = SVDQuantClipPatcher(model, settings.load_device, settings.offload_device)
    for name in SETTINGS:
        setattr(patcher, name, getattr(settings, name))
    patcher.recipe, patcher.source = recipe, source
    return QuantizedCLIP.of(clip, patcher)
