"""The ModelPatcher of a quantized model: what differs from ComfyUI's own because weights are packed."""

import comfy.model_patcher

from ..linear import PackedLinear


class SVDQuantModelPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's classic patcher: it moves and offloads whole layers, all tensors of a packed one together.

    source: the name of the model that was quantized; recipe: how. Both go into a saved file.
    """

    source = ""
    recipe = None

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.source, clone.recipe = self.source, self.recipe
        return clone

    def packed_layers(self):
        """{name: packed layer}, names relative to the diffusion model."""
        return {name: module for name, module in self.model.diffusion_model.named_modules()
                if isinstance(module, PackedLinear)}

    def add_patches(self, patches, *args, **kwargs):
        # ComfyUI would add a dense difference to the packed bytes, or drop it with a line in the log: the picture
        # would come out without the LoRA and nobody would know.
        packed = {f"diffusion_model.{name}.weight" for name in self.packed_layers()}
        blocked = packed.intersection(key if isinstance(key, str) else key[0] for key in patches)
        if blocked:
            raise ValueError(f"A LoRA or weight patch for {sorted(blocked)[0].removesuffix('.weight')} can't be added "
                             "to a model that is already in 4 bits; apply it to the 16-bit model, then quantize that: "
                             "SVDQuant Quantize Model bakes it in.")
        return super().add_patches(patches, *args, **kwargs)
