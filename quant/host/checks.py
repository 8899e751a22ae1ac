"""Checks before a quantization begins. Each raises an error that says in one sentence what is wrong, why, and what to do."""

import hashlib

import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..layers.linear import PackedLinear
from ..parallel.alone import ALONE
from ..text import quoted
from . import resume
from .build import stored_config
from .carried import check_carried
from .model_family import family_of
from .patcher import PREFIX
from .weights import effective_weight

HOST_MODULES = "comfy."  # how the names of the host's modules begin


def check_model(patcher):
    """The Family of a 16-bit or 8-bit MODEL; None if it is of no declared family, so that its layers have to be discovered. Raises
    ValueError if the input is no MODEL, runs on another pack's classes, or is quantized."""
    if not isinstance(patcher, comfy.model_patcher.ModelPatcher):
        raise ValueError(f"The input model is {quoted(patcher)}, and not a MODEL; connect a node that loads a MODEL.")
    model, family = getattr(patcher.model, "diffusion_model", None), family_of(patcher.model)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("This MODEL is quantized already; connect the 16-bit model that it was made from.")
    if family is not None:
        if family.model_class not in {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}:
            raise ValueError(f"SVDQuant quantizes {family.title} models on ComfyUI's own classes, and this MODEL runs on another pack's "
                             f"{type(model).__name__}; load the 16-bit model with Load Diffusion Model or SVDQuant Load Model.")
        config = {**family.configuration.assumed, **patcher.model.model_config.unet_config}
        if (family.relative(config)
                or any(config.get(key, value) != value for key, value in family.configuration.fixed.items())
                or any(getattr(model, module, None) is None for module in family.needs)):
            family = None  # a relative on the same class
    if family is None and not type(model).__module__.startswith(HOST_MODULES):
        raise ValueError(f"SVDQuant quantizes models on ComfyUI's own classes, and this MODEL runs on another pack's "
                         f"{type(model).__name__}; load the 16-bit model with Load Diffusion Model.")
    return family


def check_extras(patcher):
    """Raise ValueError if a node has changed the MODEL's 16-bit modules in a way that quantization would lose."""
    wrappers = patcher.wrappers.get(comfy.patcher_extension.WrappersMP.APPLY_MODEL, {})
    if "torch.compile" in wrappers or "torch_compile_kwargs" in patcher.model_options:
        raise ValueError("This MODEL goes through TorchCompileModel or a similar node, which would keep running the 16-bit model; "
                         "put that node behind SVDQuant Quantize Model.")
    if patcher.additional_models.get("multigpu"):
        raise ValueError("This MODEL goes through MultiGPU CFG Split, whose other devices would keep running the 16-bit model; put that "
                         "node behind SVDQuant Quantize Model.")
    inside = [key for key in patcher.object_patches if key.startswith("diffusion_model")]
    if inside or patcher.injections:
        what = f"replaces {inside[0]}" if inside else "hooks into its layers, as a bypass LoRA does"
        raise ValueError(f"A node on this MODEL {what}, which can't be carried into 4 bits; put it behind SVDQuant Quantize Model, "
                         "or use the ordinary Load LoRA node.")
    check_carried(patcher)


def check_latent(patcher, latent):
    """Raise ValueError unless the MODEL can sample the latent."""
    samples, latent_format = latent["samples"], patcher.get_model_object("latent_format")
    channels = latent_format.latent_channels
    # The host adds the third dimension of the models that have one.
    if samples.ndim not in (4, 2 + latent_format.latent_dimensions) or (samples.shape[1] != channels and samples.any()):
        raise ValueError(f"The latent has shape {list(samples.shape)} and this model samples latents with {channels} channels; "
                         "connect an empty latent of your usual image size.")


def check_conditioning(family, patcher, conditioning):
    """Raise ValueError unless there is a prompt and every prompt's conditioning is as wide as the model's text input, which is unknown
    without a family."""
    if not conditioning:
        raise ValueError("The conditioning holds no prompt; connect a text encode node with a prompt.")
    if family is None:
        return
    width = stored_config(patcher.model)[family.text_width]
    for tensor, extras in conditioning:
        if family.pooled and extras.get("pooled_output") is None:
            raise ValueError(f"The conditioning has no pooled output, which {family.title} needs; encode the prompt with "
                             f"{family.title}'s text encoders, {family.encoders}.")
        if tensor.shape[-1] != width:
            raise ValueError(f"The conditioning is {tensor.shape[-1]} wide and this {family.title} model takes {width}; encode the prompt "
                             f"with the text encoders that belong to the model, {family.encoders}.")


def check_weights(family, patcher, check, ranks=ALONE):
    """Raise ValueError that names the first parameter that is not a floating point tensor, or that has NaN or Inf. Calibration would
    only show which layers such values reach. check: called often, to cancel; ranks: the processes of the run, which share the parameters.
    Returns a digest of all parameters, as the MODEL uses them."""
    unused = () if family is None else family.unused
    parameters = [(name, parameter) for name, parameter in patcher.model.diffusion_model.named_parameters() if name not in unused]
    lines = {}
    for name, parameter in ranks.share(parameters):
        check()
        lines[name] = f"{name} {_digest(patcher, name, parameter)}\n"
    lines = {name: line for found in ranks.gathered(lines) for name, line in found.items()}
    return hashlib.sha256("".join(lines[name] for name, _ in parameters).encode()).hexdigest()


def _digest(patcher, name, parameter):
    """The digest of a parameter as the MODEL uses it; raises as check_weights does."""
    if type(parameter).__name__.startswith("GGML") or hasattr(parameter, "tensor_type"):  # tensors of the GGUF loaders
        raise ValueError(f"The MODEL comes from a GGUF file ({name}), whose weights SVDQuant does not read; load a bf16, fp16 or fp8 "
                         "version of the model in safetensors format.")
    if not parameter.dtype.is_floating_point:
        raise ValueError(f"The MODEL's {name} is stored as {parameter.dtype}, in a packed format; load a bf16, fp16 or "
                         "fp8 version of the model.")
    stored = parameter.to(patcher.load_device)  # the device checks and hashes it faster
    # PyTorch has no isfinite for fp8.
    if not torch.isfinite(stored.half() if stored.dtype.itemsize == 1 else stored).all():
        raise ValueError(f"The MODEL's {name} holds NaN or Inf: its file is damaged or was merged incorrectly; load an "
                         "intact copy.")
    return resume.digest(effective_weight(patcher, name, patcher.load_device) if PREFIX + name in patcher.patches else stored)
