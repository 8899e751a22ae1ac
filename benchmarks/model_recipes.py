"""Recipes for a whole model: every W4A4 layer is quantized on its real inputs; this pack's presets quantize the modulation layers to W4A16.

The other recipes come from recipes.py. They quantize the layers as published SVDQuant files have them. linear2 is two layers, one for the
attention and one for the GELU, each with its own smoothing and branch. linear1 has two branches in those files, for qkv and for the MLP;
here one branch of twice the rank replaces them, and its error is at most as large. This pack's recipe is the node's: one branch of twice
the rank for linear1, and one for linear2.
"""

import time
from dataclasses import replace

import comfy.model_management
import layers
import torch
from comfyui_svdquant.quant.families.family import Packing
from comfyui_svdquant.quant.host import build, quantize, weights
from comfyui_svdquant.quant.host.model_family import family_of
from comfyui_svdquant.quant.layers.linear import SVDQuantLinear
from comfyui_svdquant.quant.quantizer import calibration, pipeline, presets


class Silent:
    """Progress without output."""

    def total(self, steps):
        pass

    def step(self, text):
        pass

    def check(self):
        pass


def layer_inputs(patcher, calls):
    """{layer name: (tokens, K) float32}: all inputs of the W4A4 layers in the recorded calls, on the patcher's device."""
    comfy.model_management.load_models_gpu([patcher])
    model, seen, family = patcher.model.diffusion_model, {}, family_of(patcher.model)
    hooks = [module.register_forward_pre_hook(lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2)))
             for name, module in model.named_modules() if (kind := family.layer(name)) and kind.packing is Packing.W4A4]
    try:
        for args, kwargs in calls:
            model(*calibration.to_device(args, patcher.load_device), **calibration.to_device(kwargs, patcher.load_device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(inputs).float() for name, inputs in seen.items()}


def parts(name, weight, inputs, unsigned_from, second=None):
    """[Layer]: the columns before `second` and those from it on, as separate layers. weight: (N, K), inputs: (M, K); second: the first
    column of the second of two layers side by side; the first unsigned column if None."""
    edges = sorted({0, unsigned_from if second is None else second, weight.shape[1]})
    return [layers.Layer(name, weight[:, start:stop], inputs[:, start:stop], inputs[:0, start:stop], start >= unsigned_from)
            for start, stop in zip(edges, edges[1:])]


def joined(packed):
    """The packed tensors of a layer's parts, joined along K. Each part's branch reads only the part's columns."""
    return {"weight": torch.cat([part["weight"] for part in packed], dim=1),
            "weight_scale": torch.cat([part["weight_scale"] for part in packed]),
            "weight_smooth_factor": torch.cat([part["weight_smooth_factor"] for part in packed]),
            "weight_proj_down": torch.block_diag(*(part["weight_proj_down"] for part in packed)),
            "weight_proj_up": torch.cat([part["weight_proj_up"] for part in packed], dim=1),
            "bias": sum(part["bias"] for part in packed)}


def packed_layer(made, bias, dtype):
    """{parameter name: tensor} of a whole layer from the tensors of its parts."""
    tensors = joined(made)
    correction = tensors.pop("bias")  # it makes up for the GELU shift; layers without a bias need none
    if bias is not None:
        tensors["bias"] = correction + bias
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def by_recipes(chosen, patcher, inputs, rank, rest=("naive",), narrow=False):
    """[(quantized model, seconds)], one for each recipe(Layer, rank) of `chosen`, which quantize the W4A4 layers of the MODEL.

    inputs: from layer_inputs; rest: the preset that quantizes the other layers, and its calibration inputs; narrow: the branches of
    single blocks' layers are half as wide. For each part, the recipes run one after the other, so that each can use the results of the
    previous one.
    """
    preset, *calibration_inputs = rest
    settings = presets.make_recipe(preset, rank, branch_bits=16), *(calibration_inputs or (None, None, 1)), 0
    quantized_models = [quantize.quantize(patcher, *settings, Silent())[0] for _ in chosen]
    seconds = [0.0] * len(chosen)
    packed_layers = quantized_models[0].packed_layers()
    for name in [name for name, linear in packed_layers.items() if isinstance(linear, SVDQuantLinear)]:
        spec, joined_by = packed_layers[name].spec, family_of(patcher.model).layer(name).joined
        weight, bias = (weights.effective_weight(patcher, f"{name}.{part}", patcher.load_device).float() if part != "bias" or spec.bias
                        else None for part in ("weight", "bias"))
        made = [[] for _ in chosen]
        second = joined_by.at(spec.in_features, spec.out_features) if joined_by and not joined_by.rows else None
        pieces = parts(name, weight, inputs[name], spec.unsigned_from, second)
        branch = rank // len(pieces) if narrow else 2 * rank if joined_by and joined_by.rows else rank
        for part in pieces:
            for i, recipe in enumerate(chosen):
                with pipeline.threads_for(weight):
                    tensors, took = timed(recipe, part, branch)
                made[i].append(tensors)
                seconds[i] += took
        for quantized_model, tensors in zip(quantized_models, made):
            put(quantized_model, name, packed_layer(tensors, bias, spec.dtype))
    return list(zip(quantized_models, seconds))


def put(quantized_model, name, tensors):
    """Replace a layer of a quantized model by one with these packed tensors. Its rank is the width of weight_proj_up."""
    model = quantized_model.model.diffusion_model
    build.swap(model, name, replace(model.get_submodule(name).spec, rank=tensors["weight_proj_up"].shape[1]))
    on_host = {key: tensor.to(quantized_model.offload_device) for key, tensor in tensors.items()}
    model.get_submodule(name).load_state_dict(on_host, assign=True)


def timed(make, *args):
    """(the result of make(*args), seconds)."""
    start = time.perf_counter()
    made = make(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made, time.perf_counter() - start


def megabytes(patcher):
    """MB of the model's tensors: the size of its file without the header."""
    return sum(tensor.nbytes for tensor in patcher.model.diffusion_model.state_dict().values()) / 1e6
