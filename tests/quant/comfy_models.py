"""Helpers for the tests of models in a real ComfyUI: make a small random FLUX, quantize it, sample with it, save it."""

from dataclasses import replace

import comfy.sample
import torch
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.host import build, loader, quantize, saving
from comfyui_svdquant.quant.quantizer import presets
from safetensors.torch import save_file

from .random_flux import flux_tensors

CONTEXT, POOLED, HIDDEN = 128, 64, 256


class Progress:
    """Counts steps; raises KeyboardInterrupt at `cancel_at`."""

    def __init__(self, cancel_at=None):
        self.texts, self.cancel_at, self.steps = [], cancel_at, None

    def total(self, steps):
        self.steps = steps

    def say(self, text):
        self.texts.append(text)

    def step(self, text):
        self.texts.append(text)
        self.check()

    def check(self):
        if self.cancel_at is not None and len(self.texts) >= self.cancel_at:
            raise KeyboardInterrupt


def write_flux(path, prefix="", **changes):
    save_file({prefix + name: tensor for name, tensor in flux_tensors(**changes).items()}, path)
    return str(path)


def prompts(count=2, width=CONTEXT):
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(1, 12, width, generator=g), {"pooled_output": torch.randn(1, POOLED, generator=g)}] for _ in range(count)]


LATENT = {"samples": torch.zeros(1, 16, 8, 8)}


def sample(patcher, seed=5, steps=2, cond=None):
    cond = cond or prompts(1)
    noise = comfy.sample.prepare_noise(LATENT["samples"], seed)
    return comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", cond, cond, LATENT["samples"],
                               disable_pbar=True, seed=seed)


def quantized(patcher, preset="fast", rank=16, progress=None, conditioning=None):
    return quantize.quantize(patcher, presets.make_recipe(preset, rank), prompts() if conditioning is None else conditioning,
                             LATENT, 2, 0, progress or Progress())


def save(patcher, path, overwrite=False):
    """Save a quantized model at `path`, as SVDQuant Save Model does in its folder."""
    saving.write_model(patcher, str(path), "native", overwrite)
    return str(path)


def save_expanded(patcher, path):
    """save() of a model whose branches have 8 bits, with the expanded branches in 16."""
    tensors, specs = saving.stored_tensors(patcher), {}
    for name, layer in patcher.packed_layers().items():
        specs[name] = replace(layer.spec, branch_bits=16)
        if layer.spec.branch_bits == 8:
            del tensors[f"{name}.weight_proj_scale"]
            tensors |= zip((f"{name}.weight_proj_down", f"{name}.weight_proj_up"), layer.branch("cpu"))
    native.save(str(path), tensors, specs, build.stored_config(patcher.model), patcher.recipe, patcher.source)
    return str(path)


def saved_and_loaded(patcher, path):
    """(path, the MODEL that was loaded from it), with the same tensors to the bit."""
    loaded = loader.load_model(save(patcher, path))
    first, second = (model.model.diffusion_model.state_dict() for model in (patcher, loaded))
    assert first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
    return str(path), loaded
