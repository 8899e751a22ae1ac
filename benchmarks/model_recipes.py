"""Recipes for a whole FLUX: every W4A4 layer on the inputs that it really has; the modulation layers are W4A16, and alike for all.

Others' recipes come from recipes.py. They get the layers that SVDQuant publishes: linear2 is two, of which one reads the attention and
one the GELU, each with a smoothing and a branch of its own; and where linear1 has two branches, for qkv and for the MLP, it gets
one of twice the rank, which leaves at most as much. Ours is what the node does: one branch for all of a layer.
"""

import time
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import layers
import recipes
import torch
from comfyui_svdquant.quant import calibration, flux, quantizer
from comfyui_svdquant.quant.host import build, quantize
from comfyui_svdquant.quant.linear import SVDQuantLinear


class Silent:
    """Progress that nobody watches."""

    def total(self, steps):
        pass

    def step(self, text):
        pass

    def check(self):
        pass


def layer_inputs(patcher, calls):
    """{layer name: (tokens, K) float32}: every input that the recorded calls give the W4A4 layers, on the patcher's device."""
    comfy.model_management.load_models_gpu([patcher])
    model, seen = patcher.model.diffusion_model, {}
    hooks = [module.register_forward_pre_hook(lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2)))
             for name, module in model.named_modules() if flux.W4A4.fullmatch(name)]
    try:
        for args, kwargs in calls:
            model(*calibration.to_device(args, patcher.load_device), **calibration.to_device(kwargs, patcher.load_device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(inputs).float() for name, inputs in seen.items()}


def parts(name, weight, inputs, unsigned_from):
    """[Layer]: the columns before and from the first that a GELU feeds, as layers of their own. weight: (N, K), inputs: (M, K)."""
    edges = sorted({0, unsigned_from, weight.shape[1]})
    return [layers.Layer(name, weight[:, start:stop], inputs[:, start:stop], inputs[:0, start:stop], start >= unsigned_from)
            for start, stop in zip(edges, edges[1:])]


def joined(packed):
    """The packed tensors of one layer from those of its parts, side by side along K: each part's branch reads its own columns."""
    return {"weight": torch.cat([part["weight"] for part in packed], dim=1),
            "weight_scale": torch.cat([part["weight_scale"] for part in packed]),
            "weight_smooth_factor": torch.cat([part["weight_smooth_factor"] for part in packed]),
            "weight_proj_down": torch.block_diag(*(part["weight_proj_down"] for part in packed)),
            "weight_proj_up": torch.cat([part["weight_proj_up"] for part in packed], dim=1),
            "bias": sum(part["bias"] for part in packed)}


def packed_layer(recipe, name, weight, bias, inputs, spec, rank):
    """{parameter name: tensor} of a whole layer by recipe(Layer, rank); its rank is the width of weight_proj_up."""
    rank = 2 * rank if name.endswith(".linear1") else rank
    with quantizer.threads_for(weight):
        tensors = joined([recipe(part, rank) for part in parts(name, weight, inputs, spec.unsigned_from)])
    if bias is not None:
        tensors["bias"] = tensors["bias"] + bias
    return {key: tensor.to(spec.dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def by_recipe(recipe, patcher, inputs, rank):
    """A 4-bit twin of the MODEL whose W4A4 layers come from recipe(Layer, rank). inputs: from layer_inputs."""
    twin, _ = quantize.quantize(patcher, quantizer.recipe("naive", rank), None, None, 1, 0, Silent())
    model = twin.model.diffusion_model
    for name, linear in twin.packed_layers().items():
        if not isinstance(linear, SVDQuantLinear):
            continue
        weight, bias = (quantize.effective_weight(patcher, f"{name}.{part}", patcher.load_device).float() for part in ("weight", "bias"))
        tensors = packed_layer(recipe, name, weight, bias, inputs[name], linear.spec, rank)
        build.swap(model, name, replace(linear.spec, rank=tensors["weight_proj_up"].shape[1]))
        model.get_submodule(name).load_state_dict({key: tensor.to(patcher.offload_device) for key, tensor in tensors.items()}, assign=True)
    return twin


@contextmanager
def one_search():
    """Within it, DeepCompressor's recipes search once for each layer, though there are two of them."""
    search, found = recipes.deepcompressor_state, {}

    def remembered(layer, rank):
        key = layer.kind, layer.unsigned
        if key not in found:
            found[key] = search(layer, rank)
        return found[key]

    recipes.deepcompressor_state = remembered
    try:
        yield
    finally:
        recipes.deepcompressor_state = search


def timed(make, *args):
    """(what make(*args) returns, seconds)."""
    start = time.perf_counter()
    made = make(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made, time.perf_counter() - start


def megabytes(patcher):
    """MB of the model's tensors, which is what its file takes but for the header."""
    return sum(tensor.nbytes for tensor in patcher.model.diffusion_model.state_dict().values()) / 1e6
