"""Recipes for a whole FLUX: every W4A4 layer on the inputs that it really has; the modulation layers are W4A16, by our presets.

Others' recipes come from recipes.py. They get the layers that SVDQuant publishes: linear2 is two, of which one reads the attention and
one the GELU, each with a smoothing and a branch of its own; and where linear1 has two branches, for qkv and for the MLP, it gets
one of twice the rank, which leaves at most as much. Ours is what the node does: one branch of twice the rank for each of the two.
"""

import time
from dataclasses import replace

import comfy.model_management
import layers
import torch
from comfyui_svdquant.quant.families.family import Packing
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import build, quantize, weights
from comfyui_svdquant.quant.layers.linear import SVDQuantLinear
from comfyui_svdquant.quant.quantizer import calibration, pipeline, presets


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
             for name, module in model.named_modules() if (kind := FAMILY.layer(name)) and kind.packing is Packing.W4A4]
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


def packed_layer(made, bias, dtype):
    """{parameter name: tensor} of a whole layer from those of its parts."""
    tensors = joined(made)
    if bias is not None:
        tensors["bias"] = tensors["bias"] + bias
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def by_recipes(chosen, patcher, inputs, rank, around=("naive",), narrow=False):
    """[(4-bit twin of the MODEL, seconds)], one for each recipe(Layer, rank) of `chosen`, which pack its W4A4 layers.

    inputs: from layer_inputs; around: the preset of ours, and what it watches, that packs the other layers; narrow: the branches of a
    single block's layers are half as wide. Part by part the recipes run one after the other, so that each can use what the last one
    found.
    """
    preset, *watched = around
    twins = [quantize.quantize(patcher, presets.make_recipe(preset, rank), *(watched or (None, None, 1)), 0, Silent())[0] for _ in chosen]
    seconds = [0.0] * len(chosen)
    layers_of_twin = twins[0].packed_layers()
    for name in [name for name, linear in layers_of_twin.items() if isinstance(linear, SVDQuantLinear)]:
        spec = layers_of_twin[name].spec
        weight, bias = (weights.effective_weight(patcher, f"{name}.{part}", patcher.load_device).float() for part in ("weight", "bias"))
        made = [[] for _ in chosen]
        pieces = parts(name, weight, inputs[name], spec.unsigned_from)
        branch = rank // len(pieces) if narrow else 2 * rank if name.endswith(".linear1") else rank
        for part in pieces:
            for i, recipe in enumerate(chosen):
                with pipeline.threads_for(weight):
                    tensors, took = timed(recipe, part, branch)
                made[i].append(tensors)
                seconds[i] += took
        for twin, tensors in zip(twins, made):
            put(twin, name, packed_layer(tensors, bias, spec.dtype))
    return list(zip(twins, seconds))


def put(twin, name, tensors):
    """Give a 4-bit model a packed layer in the place of its own; the rank is the width of weight_proj_up."""
    model = twin.model.diffusion_model
    build.swap(model, name, replace(model.get_submodule(name).spec, rank=tensors["weight_proj_up"].shape[1]))
    on_host = {key: tensor.to(twin.offload_device) for key, tensor in tensors.items()}
    model.get_submodule(name).load_state_dict(on_host, assign=True)


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
