"""Models on ComfyUI's own classes: they are built on the meta device, then filled with tensors."""

import comfy.model_management
import torch

from ..families.discovered import DiscoveredFamily
from ..layers.linear import SVDQuantLinear
from ..layers.preparation import compute_in, prepare
from . import find_nan, mapping
from .fused_blocks import fuse
from .model_family import family_of, set_family
from .operations import Operations
from .packed_layers import packed_layers, unpatched
from .patcher import SVDQuantModelPatcher
from .step_graphs import record_steps


def shapes_as_tensors(shapes):
    """{name: tensor on the meta device}, for ComfyUI's model detection, which reads shapes from tensors."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def empty_model(model_config, specs, compute_dtype, family=None):
    """A BaseModel of ComfyUI's own class on the meta device, with packed layers {name: LayerSpec} in place of its linears.

    compute_dtype: None for ComfyUI's choice; family: the model's Family if it was discovered.
    """
    if compute_dtype is None:
        supported, device = list(model_config.supported_inference_dtypes), comfy.model_management.get_torch_device()
        stored = comfy.model_management.unet_dtype(supported_dtypes=supported)
        # With --fp8_e4m3fn-unet and the like, ComfyUI stores weights in `stored` and computes in another dtype.
        compute_dtype = comfy.model_management.unet_manual_cast(stored, device, supported) or stored
    model_config.set_inference_dtype(compute_dtype, None)
    model_config.custom_operations = Operations
    model = model_config.get_model({}, "", device=torch.device("meta"))
    if family is not None:
        set_family(model, family)
    family = family_of(model)
    for name in family.unused:
        if hasattr(model.diffusion_model, module := name.partition(".")[0]):
            delattr(model.diffusion_model, module)
    for name, spec in specs.items():
        swap(model.diffusion_model, name, spec)
    if specs:
        take_over_activations(family, model.diffusion_model)
        # A fused block runs several layers as one op, which hides the first one with a NaN.
        if family.fused and not find_nan.is_on() and fuse(model.diffusion_model, family):
            record_steps(model.diffusion_model)
    return model


def swap(diffusion_model, name, spec):
    """Replace linear `name` by a packed layer. If it replaces a packed layer that has taken over a GELU, it applies that GELU too; `gated`
    is the other's too.
    Raises ValueError unless both have the same features."""
    parent, _, child = name.rpartition(".")
    linear = diffusion_model.get_submodule(name)
    if (linear.in_features, linear.out_features) != (spec.in_features, spec.out_features):
        raise ValueError(f"layer {name} is {spec.out_features} x {spec.in_features} where the model has "
                         f"{linear.out_features} x {linear.in_features}")
    packed = Operations.packed(spec)
    packed.gelu_from, packed.gated = getattr(linear, "gelu_from", None), getattr(linear, "gated", False)
    setattr(diffusion_model.get_submodule(parent), child, packed)


def tanh_gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


class TakenOver(torch.nn.Identity):
    """Replaces a GELU that the packed layer before it applies to its own output. While that layer can't apply it
    (PackedLinear.activates_from), this module does."""

    def __init__(self, layer):
        super().__init__()
        # The tuple keeps the layer from becoming a submodule. The reference is to the layer and not to its parent: a reference cycle would
        # keep the model in memory after its last user.
        self.layer = (layer,)

    def forward(self, x):
        return x if self.layer[0].activates_from() is not None else tanh_gelu(x)


class TakenOverWithin(torch.nn.Module):
    """Replaces a module of the host's that computes a linear, its only child, and a GELU, which the packed layer now applies; as TakenOver
    does, it applies the GELU while the layer can't."""

    def __init__(self, name, layer):
        super().__init__()
        self.add_module(name, layer)

    def forward(self, x):
        [layer] = self._modules.values()
        return layer(x) if layer.activates_from() is not None else tanh_gelu(layer(x))


def take_over_activations(family, diffusion_model):
    """Let W4A4 layers apply the GELU that is the only reader of their output, and let the two layers of an MLP run as one op.

    A block's parts decide, not its class: a layer takes over a tanh GELU that lies between it and the next layer, where the family
    declares it (family.Gelu), if nothing changes the number of columns on the way. All other activations stay.
    """
    for blocks in family.blocks:
        for block in getattr(diffusion_model, blocks.name):
            modules = dict(block.named_modules())
            for name, layer in blocks.layers.items():
                if layer.gelu and {name, layer.gelu.module, layer.gelu.reader} <= modules.keys():
                    reader = blocks.layers[layer.gelu.reader]
                    _take_over(block, name, layer.gelu, modules[layer.gelu.reader], reader)
            for name in blocks.mlps:
                mlp = block.get_submodule(name)
                if type(mlp) is torch.nn.Sequential and len(mlp) == 3 and isinstance(mlp[1], TakenOver):
                    setattr(block, name, Operations.PackedMLP(*mlp))


def _take_over(block, name, gelu, following, reader):
    """Let layer `name` of a block apply its Gelu, if possible. following: the module that reads the GELU's output; reader: its Layer."""
    packed, activation = block.get_submodule(name), block.get_submodule(gelu.module)
    n, k = packed.out_features, packed.in_features
    first = gelu.columns_from(k, n)
    read = following.in_features - reader.unsigned_from(following.in_features, following.out_features)
    kind = f"{type(activation).__module__}.{type(activation).__qualname__}"
    # If the numbers of columns differ, something else changes the outputs on the way, such as a gate.
    if (isinstance(packed, SVDQuantLinear) and kind == gelu.module_class and activation.approximate == "tanh" and n - first == read
            and list(activation.children()) in ([], [packed])):
        packed.gelu_from = first
        parent, _, child = gelu.module.rpartition(".")
        within = list(activation.named_children())
        setattr(block.get_submodule(parent), child, TakenOverWithin(*within[0]) if within else TakenOver(packed))


def fill(model, tensors):
    """Give an empty model its tensors, {name: tensor} in the file's naming. The tensors are used without a copy."""
    tensors = model.model_config.process_unet_state_dict(dict(tensors))
    model.diffusion_model.load_state_dict({name: tensors[name] for name in model.diffusion_model.state_dict()}, assign=True)


def make_patcher(model, patcher_class):
    """A patcher_class patcher for a filled model, on the devices that ComfyUI uses for diffusion models."""
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    compute_in(model, model.get_dtype(), device)
    model.device = offload_device
    model.to(offload_device)
    prepare(model, device)
    find_nan.watch(model.diffusion_model)
    patcher = patcher_class(model, device, offload_device)
    if patcher_class is SVDQuantModelPatcher:
        # Newer ComfyUI calls this to build the model again for another device. It does not read the file, which may have changed or may
        # not exist.
        patcher.cached_patcher_init = copied, (model, patcher.backup)
    return patcher


def copied(model, backup, disable_dynamic=False):
    """A patcher for a copy of a quantized model without its patches (packed_layers.unpatched). disable_dynamic: an argument of ComfyUI's,
    which changes nothing here, since these patchers are never dynamic."""
    mapping.check(model)
    layers = packed_layers(model.diffusion_model)
    copy = empty_like(model, {name: layer.spec for name, layer in layers.items()}, model.get_dtype())
    for name, layer in layers.items():
        if isinstance(layer, SVDQuantLinear):
            copy.diffusion_model.get_submodule(name).act_bits = layer.act_bits
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in unpatched(model.diffusion_model, backup).items()}
    copy.diffusion_model.load_state_dict(tensors, assign=True)
    return make_patcher(copy, SVDQuantModelPatcher)


def empty_like(model, specs, compute_dtype, config=None, family=None):
    """An empty model with another model's configuration and packed layers {name: LayerSpec}. config: {key: value} that override the
    configuration; family: the model's Family, which it has itself unless it was just discovered."""
    family = family or family_of(model)
    # Neither copy.copy nor hasattr works on newer model configs: they return None for every missing attribute.
    model_config = object.__new__(type(model.model_config))
    vars(model_config).update(vars(model.model_config))
    model_config.unet_config = family.configuration.added_to(model_config.unet_config, config or {})
    # These describe how the source stores its own weights (scaled fp8 and the like), which the new model does not have.
    for attribute in ("scaled_fp8", "layer_quant_config", "quant_config"):
        setattr(model_config, attribute, None)
    return empty_model(model_config, specs, compute_dtype, family)


def stored_config(model):
    """The host's configuration to store in a file, as a JSON-able dict."""
    family = family_of(model)
    configuration = family.configuration
    if isinstance(family, DiscoveredFamily):
        return configuration.of({})
    config = {**configuration.assumed, **model.model_config.unet_config}
    return {key: list(value) if isinstance(value := config[key], (list, tuple)) else value for key in configuration.keys if key in config}


def stored_name(model, name):
    """The name that a parameter of a BaseModel's diffusion model has in a file."""
    return family_of(model).stored_name(name)
