"""The ModelPatcher of a quantized model: what differs from ComfyUI's own because weights are packed."""

import logging

import comfy.hooks
import comfy.model_patcher
import comfy.utils

from ..linear import PackedLinear
from . import lora

PREFIX = "diffusion_model."
CACHED_SVDS = 4  # a packed layer: two LoRAs beside each other, and the two before them


def refuse_to_save(*args, **kwargs):
    """Stands in for the state_dict_for_saving of a quantized model, which every ComfyUI's nodes end at, each with arguments of its own."""
    raise ValueError("ComfyUI's own nodes can't save a MODEL in 4 bits, as their file would not say how its layers are packed; save it "
                     "with SVDQuant Save Model.")


class SVDQuantModelPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's classic patcher: it moves and offloads whole layers, all tensors of a packed one together.

    Patches of packed weights stay where ComfyUI puts them, in `patches` and `hook_patches`. They never touch the weights:
    loading turns them into side branches on the layers (lora.py), unloading takes those away.

    source: the name of the model that was quantized; recipe: how. Both go into a saved file.
    """

    source = ""
    recipe = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.state_dict_for_saving = refuse_to_save
        # As hook_backup is, these two are shared by the clones of one model.
        self.decomposed = {}  # SVDs of what the loaded patches add: lora.build's cache
        self.unhooked = {}  # {key: the side branch that a hook has replaced, or None}
        self.stays = False  # while a loaded model changes its patches
        self.told = set()  # lines in the log
        self.hook_notes = []  # what they will tell of the hooks that are being applied

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.source, clone.recipe = self.source, self.recipe
        clone.size = self.size  # not model_size(), which ComfyUI has passed on and which counts the patches
        if clone.model is self.model:
            clone.decomposed, clone.unhooked = self.decomposed, self.unhooked
        return clone

    def packed_layers(self):
        """{name: packed layer}, names relative to the diffusion model."""
        return {name: module for name, module in self.model.diffusion_model.named_modules()
                if isinstance(module, PackedLinear)}

    def packed_at(self, key):
        """The packed layer whose weight `key` is, else None."""
        name, _, parameter = key.rpartition(".")
        if not key.startswith(PREFIX) or parameter != "weight":
            return None
        layer = comfy.utils.get_attr(self.model, name)
        return layer if isinstance(layer, PackedLinear) else None

    def model_size(self):
        return super().model_size() + sum(lora.nbytes(self.patches[key]) for key in self.patches if self.packed_at(key))

    # --- taking patches --------------------------------------------------------------------------------------------

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        self._check(patches, strength_model)
        added = super().add_patches(patches, strength_patch, strength_model)
        for key in {target if isinstance(target, str) else target[0] for target in added}:
            self.patches[key] = lora.widest_last(self.patches[key])
        return added

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        self._check(patches, strength_model)
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def add_weight_wrapper(self, name, function):
        if self.packed_at(name):
            raise lora.refusal(name, "a node wraps the weight in a function of its own, and there is no 16-bit weight")
        super().add_weight_wrapper(name, function)

    def _check(self, patches, strength_model):
        layers = self.packed_layers()
        for target, value in patches.items():
            key, offset = (target, None) if isinstance(target, str) else target[:2]
            name, _, parameter = key.removeprefix(PREFIX).rpartition(".")
            if name in layers:
                lora.check(name, layers[name], parameter, value, strength_model, offset)

    def get_key_patches(self, *args, **kwargs):
        """For merging this model into a 16-bit one: packed weights in dense form, biases without the GELU's shift."""
        patches = super().get_key_patches(*args, **kwargs)
        for name, layer in self.packed_layers().items():
            for parameter in layer.spec.tensors():
                key = f"{PREFIX}{name}.{parameter}"
                if key not in patches:
                    continue
                stored = patches[key][0][0]
                if parameter == "weight":
                    patches[key][0] = (stored, lambda w, inplace=False, layer=layer: layer.dense(w.device).to(w.dtype))
                elif parameter == "bias":
                    patches[key][0] = (stored, lambda b, inplace=False, layer=layer: b - layer.fold(b.device).to(b.dtype))
                else:
                    del patches[key]
        return patches

    # --- loading and unloading -------------------------------------------------------------------------------------

    def _side(self, key, layer, patches, notes):
        side, more = lora.build(key, layer, patches, self.load_device, self.decomposed)
        notes.extend(more)
        return side

    def _tell(self, notes):
        for line in lora.lines(notes):
            if line not in self.told:
                logging.info(line)
                self.told.add(line)

    def _attach(self):
        """Give every packed layer the side branch of this patcher's patches, beside the layer's own tensors."""
        notes, layers = [], self.packed_layers()
        for name, layer in layers.items():
            key = f"{PREFIX}{name}.weight"
            layer.side = self._side(key, layer, self.patches[key], notes) if key in self.patches else None
        for what in list(self.decomposed)[:-CACHED_SVDS * len(layers)]:
            del self.decomposed[what]
        self._tell(notes)

    def _load_list(self, *args, **kwargs):
        # ComfyUI would reserve room to patch a packed weight in 32 bits; a side branch needs its own size only.
        patches = self.patches
        self.patches = {key: patches[key] for key in patches if not self.packed_at(key)}
        try:
            entries = super()._load_list(*args, **kwargs)
        finally:
            self.patches = patches
        return [(offload + layer.side.nbytes(), size + layer.side.nbytes(), name, layer, *rest)
                if isinstance(layer, PackedLinear) and layer.side else (offload, size, name, layer, *rest)
                for offload, size, name, layer, *rest in entries]

    def patch_weight_to_device(self, key, *args, **kwargs):
        if layer := self.packed_at(key):
            return layer.weight
        return super().patch_weight_to_device(key, *args, **kwargs)

    def load(self, *args, **kwargs):
        self.unpatch_hooks()
        if self.model.current_weight_patches_uuid != self.patches_uuid:
            self._attach()
        super().load(*args, **kwargs)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.unpatch_hooks()
            for layer in self.packed_layers().values():
                layer.side = None
        stays, self.stays = self.stays, False
        super().unpatch_model(None if stays else device_to, unpatch_weights)

    def partially_load(self, device_to, *args, **kwargs):
        # A model that is whole on its device stays there when its patches change; ComfyUI would carry it out and in.
        whole = self.stays = self.model.device == device_to and not self.model.model_lowvram
        try:
            loaded = super().partially_load(device_to, *args, **kwargs)
        finally:
            self.stays = False
        if whole and self.model.model_lowvram:  # it is whole no longer
            for module in self.model.modules():
                if hasattr(module, "comfy_cast_weights") and not getattr(module, "comfy_patched_weights", False):
                    module.to(self.offload_device)
        return loaded

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _hook(self, key, layer, side):
        if key not in self.unhooked:
            self.unhooked[key] = layer.side
        layer.side = side and side.to(layer.weight.device)

    def _fitting(self, key, combined_patches):
        """A hook's patches of a 16-bit weight, made to fit where a LoRA on the MODEL has widened it. Raises ValueError where the hook
        itself would widen it, which ComfyUI can't do for a part of the steps."""
        if key not in combined_patches:
            return combined_patches
        patches, weight = lora.widest_last(combined_patches[key]), comfy.utils.get_attr(self.model, key)
        if lora.widens_to(patches[-1][1]) > weight.shape[-1]:
            raise ValueError(f"The LoRA of a hook makes {key} wider, which a hook can't; put that LoRA on the MODEL with Load LoRA.")
        if key in self.backup and weight.ndim == 2:
            patches = lora.padded(patches, self.backup[key].weight.shape[1], weight.shape[1])
        return combined_patches | {key: patches}

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *args, **kwargs):
        layer = self.packed_at(key)
        if layer is None or key not in combined_patches:
            return super().patch_hook_weight_to_device(hooks, self._fitting(key, combined_patches), key, *args, **kwargs)
        notes = []
        side = self._side(key, layer, self.patches.get(key, []) + combined_patches[key], notes)
        self.hook_notes += notes
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = side
        self._hook(key, layer, side)

    def patch_hooks(self, hooks):
        self.hook_notes = []
        super().patch_hooks(hooks)
        self._tell(self.hook_notes)

    def patch_cached_hook_weights(self, cached_weights, key, *args, **kwargs):
        if layer := self.packed_at(key):
            return self._hook(key, layer, cached_weights[key])
        return super().patch_cached_hook_weights(cached_weights, key, *args, **kwargs)

    def unpatch_hooks(self, whitelist_keys_set=None):
        for key in list(self.unhooked):
            if not whitelist_keys_set or key in whitelist_keys_set:
                layer, side = self.packed_at(key), self.unhooked.pop(key)
                layer.side = side and side.to(layer.weight.device)
        super().unpatch_hooks(whitelist_keys_set)
