"""A MODEL's effective weights: with its LoRAs and merges baked in, whether or not patches are applied at the moment."""

from itertools import chain

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch

from .packed_layers import PREFIX
from .patches import new_shape, patch_of


def compute_dtype(patcher):
    """The dtype in which a model computes."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def storage_dtype(patcher):
    """The 16-bit dtype in which the quantized model's scales, branches and unpacked weights are stored."""
    first = next(patcher.model.diffusion_model.parameters())
    return torch.float16 if first.dtype == torch.float16 else torch.bfloat16


def effective_weight(patcher, name, device):
    """A parameter of the diffusion model with the MODEL's patches.

    Returns a tensor on `device`: in its own dtype if it has no patches, otherwise in float32. It may share the MODEL's memory, but is
    never its nn.Parameter.
    """
    return effective_tensor(patcher, PREFIX + name, device)


def effective_tensor(patcher, key, device):
    """effective_weight by its key in the patcher's whole model."""
    # The patcher's own get_key_patches fails for scaled fp8, whose scale is in the state dict only.
    stored, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:
        stored = patcher.backup[key].weight
    if key in patcher.hook_backup:
        stored = patcher.hook_backup[key][0]
    weight = stored.detach().to(device)
    if convert:
        weight = convert(weight, inplace=False)
    if key in patcher.patches:
        weight = comfy.lora.calculate_weight(patcher.patches[key], weight.to(torch.float32, copy=True), key)
    return weight


def unpatched_shape(patcher, name):
    """The shape of a parameter of the diffusion model without patches, whether or not they are applied at the moment."""
    key = PREFIX + name
    stored = patcher.backup[key].weight if key in patcher.backup else comfy.utils.get_attr(patcher.model.diffusion_model, name)
    return stored.shape


def effective_shapes(patcher):
    """{name: shape} of the diffusion model's parameters and buffers with the MODEL's patches, since some LoRAs widen a weight."""
    model, shapes = patcher.model.diffusion_model, {}
    for name, _ in chain(model.named_parameters(), model.named_buffers()):
        shape = unpatched_shape(patcher, name)
        reshaped = [reshape for patch in patcher.patches.get(PREFIX + name, ()) if (reshape := new_shape(patch_of(patch).value))]
        shapes[name] = max((torch.Size(new) for new in reshaped), key=torch.Size.numel, default=shape)
    return shapes
