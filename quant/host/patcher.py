"""The ModelPatcher of a quantized model: ComfyUI's own, except for packed weights."""

import logging

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from ..layers.linear import PackedLinear
from ..layers.preparation import warm_up
from ..layers.streaming import WeightStream, block_bytes, offload_order, ring_bytes
from . import allocation_log, lora, mapping, step_graphs
from .model_family import family_of
from .packed_layers import PREFIX, branch_bytes, packed_layers
from .patches import padded, patch_of, widened_columns, widest_last

BRANCH_SHARE = 4  # LoRA branches of offloaded layers stay on the GPU if they take at most a quarter of the budget
CACHED_SVDS = 4  # per packed layer: two LoRAs beside each other, and the two before them


def refuse_to_save(*args, **kwargs):
    """Replaces the BaseModel's state_dict_for_saving, which ComfyUI's saving nodes call, with arguments that depend on the version."""
    raise ValueError("ComfyUI's own nodes can't save a MODEL in 4 bits, as their file would not say how its layers are packed; save it "
                     "with SVDQuant Save Model.")


class SVDQuantModelPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's classic patcher, which moves and offloads whole layers: all tensors of a packed layer together.

    Patches of packed weights stay where ComfyUI puts them, in `patches` and `hook_patches`. They never touch the weights:
    loading turns them into LoRA branches on the layers (lora.py), unloading takes those away.

    The parameters of offloaded layers reach a GPU through a WeightStream, whose ring counts as loaded memory while a part of the model is
    offloaded. The layers' LoRA branches stay on the GPU.

    source: the name of the model that was quantized; recipe: how. Both go into a saved file.
    """

    source = ""
    recipe = None
    dying = False
    unreadable = ("The weights of this MODEL are packed in 4 bits, and a node reads them as LoraSave does; give it what "
                  "ModelMergeSubtract makes of 16-bit models, or of a 16-bit model1 and this MODEL as model2.")
    kind, prefix = "MODEL", PREFIX  # what ComfyUI calls the model, and what precedes the names of `root`'s parameters in keys of patches

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.state_dict_for_saving = refuse_to_save
        # Kept on the BaseModel, which clones share; MultiGPU clones on other devices must not share them.
        if not hasattr(self.model, "svdquant_decomposed"):
            self.model.svdquant_decomposed = {}  # lora.build's cache of the loaded patches' SVDs
            self.model.svdquant_unhooked = {}  # {key: the LoRA branch that a hook has replaced, or None}
            self.model.svdquant_attached = None  # the patches_uuid that the LoRA branches were made for
            self.model.svdquant_casts = None  # _casts of the patcher that was loaded last
            self.model.svdquant_stream = WeightStream(
                lambda tensor: comfy.model_management.pin_memory(tensor), lambda tensor: comfy.model_management.unpin_memory(tensor))
            self.model.svdquant_branches_stay = False  # on the GPU, while their layers are offloaded
        self.keeps_device = False  # while a loaded model changes its patches
        self.logged = set()  # lines that are in the log already
        self.hook_notes = []  # lora.build's notes on the hooks that are being applied

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.source, clone.recipe = self.source, self.recipe
        clone.size = self.size  # not model_size(), which ComfyUI has passed on and which counts the patches
        return clone

    @property
    def root(self):
        """The module that holds the packed layers."""
        return self.model.diffusion_model

    def packed_layers(self):
        """{name: packed layer}, names relative to `root`."""
        return packed_layers(self.root)

    def packed_at(self, key):
        """The packed layer whose weight `key` is, else None."""
        return self._layer_of(key) if key.endswith(".weight") else None

    def _layer_of(self, key):
        """The packed layer that has the parameter `key`, else None."""
        if not key.startswith(self.prefix):
            return None
        try:
            layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        except AttributeError:  # another model's
            return None
        return layer if isinstance(layer, PackedLinear) else None

    def model_size(self):
        packed = ((self.packed_at(key), entries) for key, entries in self.patches.items())
        return super().model_size() + sum(lora.branch_size(layer, entries, self.load_device) for layer, entries in packed if layer)

    # --- taking patches --------------------------------------------------------------------------------------------

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        unchanged = []
        if strength_patch == 0 and strength_model == 1:  # merging nodes give these for parameters that stay as model1 has them
            unchanged = [key for key, value in patches.items() if isinstance(value, list) and self._layer_of(key)]
            patches = {key: value for key, value in patches.items() if key not in unchanged}
        self._check(patches, strength_model)
        taken = super().add_patches(patches, strength_patch, strength_model)
        for key in {target if isinstance(target, str) else target[0] for target in taken}:
            self.patches[key] = widest_last(self.patches[key])
        return taken + unchanged

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        self._check(patches, strength_model)
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def add_weight_wrapper(self, name, function):
        # The bias counts too: training in bypass mode wraps nothing else, and mistakes the packed weight's size for the layer's.
        if self._layer_of(name):
            raise ValueError(f"A node, as those that train LoRAs do, puts a function of its own around {name}, and a {self.kind} in 4 bits "
                             "has no 16-bit weights for that; train on the 16-bit model, and use the LoRA on this one.")
        super().add_weight_wrapper(name, function)

    def _check(self, patches, strength_model):
        # Each key's layer is looked up: some loaders add their patches key by key, and a walk over the modules for each takes seconds.
        for target, value in patches.items():
            key, offset = (target, None) if isinstance(target, str) else target[:2]
            if layer := self._layer_of(key):
                name, _, parameter = key.removeprefix(self.prefix).rpartition(".")
                lora.check(name, layer, parameter, value, strength_model, offset)

    def model_state_dict(self, filter_prefix=None):
        if filter_prefix is not None:  # LoraSave, which would mistake the codes for weights; others only look for names
            raise ValueError(self.unreadable)
        return super().model_state_dict()

    def get_key_patches(self, *args, **kwargs):
        """For merging this model into a 16-bit one: packed weights in dense form, biases without the GELU shift correction."""
        found = super().get_key_patches(*args, **kwargs)
        for name, layer in self.packed_layers().items():
            for parameter in layer.spec.tensors():
                key = f"{self.prefix}{name}.{parameter}"
                if key not in found:
                    continue
                stored = found[key][0][0]
                if parameter == "weight":
                    found[key][0] = (stored, lambda w, inplace=False, layer=layer: layer.dense(w.device).to(w.dtype))
                elif parameter == "bias":
                    found[key][0] = (stored, lambda b, inplace=False, layer=layer: b - layer.gelu_shift_correction(b.device).to(b.dtype))
                else:
                    del found[key]
        return found

    # --- loading and unloading -------------------------------------------------------------------------------------

    def _branch(self, key, layer, entries, notes, in_place=False):
        """The LoRABranch of patches `entries`, or None; lora.build's notes are appended to `notes`. in_place: as in lora.build."""
        branch, more = lora.build(key, layer, entries, self.load_device, self.model.svdquant_decomposed, in_place)
        notes.extend(more)
        return branch

    def _log(self, notes):
        for line in lora.lines(notes):
            if line not in self.logged:
                logging.info(line)
                self.logged.add(line)

    def _attach(self):
        """Give every packed layer the LoRA branch of this patcher's patches, on the layer's own device, unless it has it."""
        if self.model.svdquant_attached == self.patches_uuid:
            return
        notes, layers, new = [], self.packed_layers(), False
        own = not self.model.svdquant_unhooked  # a hook's branch comes back as it was
        for name, layer in layers.items():
            key = f"{self.prefix}{name}.weight"
            branch = self._branch(key, layer, self.patches[key], notes, in_place=own) if key in self.patches else None
            if branch is not layer.lora_branch:
                step_graphs.release(self.root)  # a recorded step keeps the old branch's memory
                layer.set_lora_branch(branch)
                new = new or branch is not None
        for oldest in list(self.model.svdquant_decomposed)[:-CACHED_SVDS * len(layers)]:
            del self.model.svdquant_decomposed[oldest]
        self.model.svdquant_attached = self.patches_uuid
        self._log(notes)
        if new:  # LoRAs take kernels of their own, compiled while the model is moved
            self._warm_up()

    def _warm_up(self):
        if not allocation_log.forbids_threads():
            warm_up(self.root, self.load_device, self.model.get_dtype(), family_of(self.model).tokens)

    def _load_list(self, *args, **kwargs):
        # ComfyUI loads the entries with the largest first number first, and offloads the others. It has no public way to set the order, nor
        # to say what a layer takes: by its own numbers it would reserve room to cast and patch a packed weight as a dense one, count no
        # LoRA branch, and offload one part of the model as a whole.
        entries = super()._load_list(*args, **kwargs)
        sizes = {name: block_bytes(module) for _, _, name, module, *_ in entries if isinstance(module, PackedLinear) and module.streams}
        largest = max(sizes.values(), default=0)
        numbers = {name: largest + place for place, name in enumerate(offload_order(sizes))}

        def sized(offload, size, name, module, *rest):
            if name not in numbers:
                return offload + largest + len(numbers), size, name, module, *rest
            if module.lora_branch and not self.model.svdquant_branches_stay:
                size += module.lora_branch.nbytes()
            return numbers[name], size, name, module, *rest

        return [sized(*entry) for entry in entries]

    def patch_weight_to_device(self, key, *args, **kwargs):
        if layer := self.packed_at(key):
            self._attach()  # for node packs that replace ComfyUI's loading by their own
            return layer.weight
        if key in self.backup and not kwargs.get("return_weight"):  # patched in place already: its patches start from the original again
            patched = comfy.utils.get_attr(self.model, key)
            comfy.utils.set_attr_param(self.model, key, self.backup[key].weight.to(patched.device, copy=True))
        return super().patch_weight_to_device(key, *args, **kwargs)

    def _patch_in_place(self, key):
        """Patch the 16-bit parameter `key` once, and not at every call. The load device computes it wherever it lies: another device adds a
        product's terms in another order."""
        if key not in self.backup:
            pinned, device = key in self.pinned, comfy.utils.get_attr(self.model, key).device
            self.unpin_weight(key)
            self.patch_weight_to_device(key, self.load_device)
            comfy.utils.set_attr_param(self.model, key, comfy.utils.get_attr(self.model, key).to(device))
            if pinned:
                self.pin_weight_to_device(key)
        path, _, parameter = key.rpartition(".")
        module, functions = comfy.utils.get_attr(self.model, path), f"{parameter}_function"
        if hasattr(module, functions):
            setattr(module, functions, [function for function in getattr(module, functions) if not isinstance(function, LowVramPatch)])

    def _patch_once(self):
        """Patch every 16-bit parameter in place after ComfyUI has moved a part of the model.

        ComfyUI patches those of offloaded modules at every call, by a LowVramPatch. That computes in another dtype, so that a picture would
        depend on how much of the model was loaded. Parameters that are patched in place get one too, modules such as norms in some versions
        get none, and the width of the image input, which ComfyUI reads from the parameter, stays as it was. A packed layer's bias keeps
        its LowVramPatch: it shares pinned memory with the weight, and the layer computes as a patch in place does (operations.py).
        """
        for key in self.patches:
            if not self.packed_at(key) and (self._layer_of(key) is None or key in self.backup):
                self._patch_in_place(key)

    def _streams(self):
        """Whether offloaded layers can be streamed: only copies from pinned memory overlap with computation."""
        return self.load_device.type == "cuda" and comfy.model_management.MAX_PINNED_MEMORY > 0

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        step_graphs.release(self.root)
        self.unpatch_hooks()
        self._attach()
        layers, stream, ring, branches = self.packed_layers().values(), self.model.svdquant_stream, 0, 0
        self.model.svdquant_branches_stay = False
        if self._streams():
            branches = branch_bytes(layers)
            self.model.svdquant_branches_stay = full_load or BRANCH_SHARE * branches <= lowvram_model_memory
            if not full_load:
                ring = ring_bytes(layers)
                branches = branches if self.model.svdquant_branches_stay else 0
        stream.fit(self.load_device, 0 if full_load else stream.size)  # super().load() pins layers for this device
        super().load(device_to, max(0, lowvram_model_memory - ring - branches), force_patch_weights, full_load)
        self.model.svdquant_casts = self._casts()
        if not self.model.model_lowvram:
            ring = 0
        stream.fit(self.load_device, ring)
        if not full_load:  # else ComfyUI counts the whole model
            # ComfyUI does not count modules that a larger budget has loaded before, and which it leaves where they are.
            loaded = sum(size for _, size, _, module, *_ in self._load_list() if getattr(module, "comfy_patched_weights", False))
            self.model.model_loaded_weight_memory = max(self.model.model_loaded_weight_memory, loaded) + ring + branches
        self._keep_branches()
        self._patch_once()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        stream, ring = self.model.svdquant_stream, 0
        step_graphs.release(self.root)
        stream.forget()
        if self._streams() and not self.model.model_lowvram:  # the ring comes into being
            ring = ring_bytes(self.packed_layers().values())
            stream.fit(self.load_device, ring)
        freed = super().partially_unload(device_to, memory_to_free + ring, force_patch_weights)
        self.model.model_loaded_weight_memory += ring
        self._keep_branches()
        self._patch_once()
        return max(0, freed - ring)

    def _branch_device(self, layer):
        return self.load_device if self.model.svdquant_branches_stay else layer.weight.device

    def _keep_branches(self):
        """Bring LoRA branches back to the GPU that were offloaded with their layers."""
        if self.model.svdquant_branches_stay:
            for layer in self.packed_layers().values():
                if layer.lora_branch:
                    layer.lora_branch.to(self.load_device)

    # --- pinned memory ---------------------------------------------------------------------------------------------

    # ComfyUI pins and unpins the parameters of offloaded modules one by one, by their keys. Those of a packed layer are one block, which
    # the key of its weight stands for.

    def pin_weight_to_device(self, key):
        layer = self._layer_of(key)
        if layer is None:
            super().pin_weight_to_device(key)
        elif layer.streams and self._streams() and self.model.svdquant_stream.pin(layer):
            self.pinned.add(f"{key.rpartition('.')[0]}.weight")

    def unpin_weight(self, key):
        layer = self._layer_of(key)
        if layer is None:
            super().unpin_weight(key)
        elif key in self.pinned and not self.dying:
            self.pinned.remove(key)
            self.model.svdquant_stream.unpin(layer)

    def __del__(self):
        # ComfyUI unpins what a patcher that goes has pinned, while its clones still run the model.
        self.dying = True
        super().__del__()

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            step_graphs.release(self.root)
            self.unpatch_hooks()
            for layer in self.packed_layers().values():
                layer.set_lora_branch(None)
            self.model.svdquant_attached = None
        keeps_device, self.keeps_device = self.keeps_device, False
        super().unpatch_model(None if keeps_device else device_to, unpatch_weights)
        if unpatch_weights:
            self.model.svdquant_stream.release()

    def _change_patches(self, room):
        """Give a model that is whole on its device this patcher's patches in place of another clone's, without the walks over all modules
        that ComfyUI makes for this. room: bytes by which it may grow. Where this isn't possible, nothing is changed and ComfyUI does it."""
        model, patched = self.model, self.model.current_weight_patches_uuid
        replaced = any(key.startswith(self.prefix.rstrip(".")) for key in (*self.object_patches, *self.object_patches_backup))
        if (patched in (None, self.patches_uuid) or replaced or self._casts() != model.svdquant_casts
                or self.get_all_callbacks(CallbacksMP.ON_LOAD) or self.model_size() - model.model_loaded_weight_memory > room):
            return
        layers = self.packed_layers().values()
        try:
            self.unpatch_hooks()
            before = branch_bytes(layers)
            for key, original in self.backup.items():
                restore = comfy.utils.copy_to_param if original.inplace_update else comfy.utils.set_attr_param
                restore(model, key, original.weight.to(model.device))  # the originals are on the offload device
            self.backup.clear()
            self._attach()
            for key in self.patches:
                if not self.packed_at(key):
                    self._patch_in_place(key)
        except BaseException:  # as ComfyUI does where a load fails, also out of memory or cancelled
            self.keeps_device = False
            self.detach()
            raise
        model.model_loaded_weight_memory += branch_bytes(layers) - before
        model.current_weight_patches_uuid = self.patches_uuid

    def _casts(self):
        """What a load sets on modules beside patches: whether they cast their weights, and other nodes' functions around weights."""
        return self.force_cast_weights, dict(self.weight_wrapper_patches)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        mapping.check(self.model)
        # A model that is whole on its device stays there when its patches change; ComfyUI would carry it out and in.
        whole = self.keeps_device = self.model.device == device_to and not self.model.model_lowvram
        try:
            if whole and not force_patch_weights:
                self._change_patches(extra_memory)
            loaded = super().partially_load(device_to, extra_memory, force_patch_weights)
        finally:
            self.keeps_device = False
        if whole and self.model.model_lowvram:  # it no longer fits as a whole
            for name, module in self.model.named_modules():
                if hasattr(module, "comfy_cast_weights") and not getattr(module, "comfy_patched_weights", False):
                    module.to(self.offload_device)
                    for parameter, _ in module.named_parameters(recurse=False):
                        self.pin_weight_to_device(f"{name}.{parameter}")
            self._keep_branches()
        return loaded

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _hook(self, key, layer, branch):
        if key not in self.model.svdquant_unhooked:
            self.model.svdquant_unhooked[key] = layer.lora_branch
        layer.set_lora_branch(branch and branch.to(self._branch_device(layer)))

    def _before_hook(self, key):
        """A hook's weight is the patched one with the hook's patches: a LowVramPatch would add the MODEL's own a second time, or undo the
        hook's."""
        if key in self.patches and key not in self.hook_backup:
            self._patch_in_place(key)

    def _fitting(self, key, combined_patches):
        """A hook's patches of a 16-bit weight, made to fit where a LoRA on the MODEL has widened it. Raises ValueError where the hook
        itself would widen it, which ComfyUI can't do for a part of the steps."""
        if key not in combined_patches:
            return combined_patches
        hooked, weight = widest_last(combined_patches[key]), comfy.utils.get_attr(self.model, key)
        if widened_columns(patch_of(hooked[-1]).value) > weight.shape[-1]:
            raise ValueError(f"The LoRA of a hook makes {key} wider, which a hook can't; put that LoRA on the MODEL with Load LoRA.")
        if key in self.backup and weight.ndim == 2:
            hooked = padded(hooked, self.backup[key].weight.shape[1], weight.shape[1])
        return combined_patches | {key: hooked}

    def _patch_hook_weight(self, hooks, combined_patches, key, *args, **kwargs):
        """Patch the 16-bit parameter `key` in its own memory, which may be pinned; the load device computes it, as in _patch_in_place."""
        self._before_hook(key)
        weight = comfy.utils.get_attr(self.model, key)
        comfy.utils.set_attr_param(self.model, key, weight.to(self.load_device))
        try:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)
        finally:
            comfy.utils.copy_to_param(self.model, key, comfy.utils.set_attr(self.model, key, weight))  # set_attr returns the old value

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *args, **kwargs):
        layer = self.packed_at(key)
        if layer is None or key not in combined_patches:
            return self._patch_hook_weight(hooks, self._fitting(key, combined_patches), key, *args, **kwargs)
        branch = self._branch(key, layer, self.patches.get(key, []) + combined_patches[key], self.hook_notes)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = branch
        self._hook(key, layer, branch)

    def patch_hooks(self, hooks):
        self.model.svdquant_stream.forget()  # ComfyUI patches biases in place
        self.hook_notes = []
        super().patch_hooks(hooks)
        self._log(self.hook_notes)

    def patch_cached_hook_weights(self, cached_weights, key, *args, **kwargs):
        if layer := self.packed_at(key):
            return self._hook(key, layer, cached_weights[key])
        self._before_hook(key)
        return super().patch_cached_hook_weights(cached_weights, key, *args, **kwargs)

    def unpatch_hooks(self, whitelist_keys_set=None):
        self.model.svdquant_stream.forget()
        for key in list(self.model.svdquant_unhooked):
            if not whitelist_keys_set or key in whitelist_keys_set:
                layer, branch = self.packed_at(key), self.model.svdquant_unhooked.pop(key)
                layer.set_lora_branch(branch and branch.to(self._branch_device(layer)))
        super().unpatch_hooks(whitelist_keys_set)
