"""Quantizing from a file to a file, without a graph: what quantize.py runs once ComfyUI can be imported."""

import os
from dataclasses import replace

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..checkpoint import write
from ..parallel.alone import ALONE
from ..quantizer import presets, report
from . import checks, conditioning, loader, saving
from .quantize import quantize

PROGRESS = "svdquant_progress"


def run(options, progress, ranks=ALONE):
    """Quantize as batch.options.parsed says, and print the report. progress: as in quantize.quantize; ranks: the processes of the run.

    Raises ValueError, CheckpointError or OSError with a sentence for the user. A file is written completely or not at all.
    """
    if options.target and ranks.rank == 0:
        saving.check_overwritten(options.target)
        write.check_target(options.target, options.overwrite)
    with torch.inference_mode():
        progress.say(f"reading {options.source}")
        patcher = loader.load_model(options.source, name=os.path.basename(options.source))
        family = checks.check_model(patcher)
        for path, strength in options.lora:
            patcher = with_lora(patcher, path, strength)
        _compare(ranks, patcher.load_device, progress)
        recipe = replace(presets.make_recipe(options.preset, options.rank, options.exceptions, options.branch_bits), tokens=options.tokens)
        prompts = _prompts(family, options, progress) if ranks.rank == 0 else None
        if options.write_conditioning:
            if ranks.rank == 0:
                conditioning.write(options.write_conditioning, prompts)
            return
        prompts = ranks.from_first(prompts)
        width, height = options.size
        channels = patcher.get_model_object("latent_format").latent_channels
        latent = {"samples": torch.zeros(1, channels, height // family.cell, width // family.cell)}
        quantized, records = quantize(patcher, recipe, prompts, latent, options.steps, options.seed, progress,
                                      _folder(options.progress), ranks)
        if ranks.rank == 0:
            progress.say(f"saving {options.target}")
            saving.write_model(quantized, options.target, options.layout, options.overwrite)
            _report(options, records, recipe, quantized.recipe["notes"], progress)


def with_lora(patcher, path, strength):
    """The MODEL with a LoRA, as Load LoRA gives it. Raises ValueError if nothing in the file is for the model."""
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(path, safe_load=True), strength, 0.0)
    if sum(map(len, patched.patches.values())) == sum(map(len, patcher.patches.values())):
        raise ValueError(f"{os.path.basename(path)} has no LoRA for this model; leave it out, or choose one that was trained on it.")
    return patched


def _compare(ranks, device, progress):
    """Say if the processes' GPUs are of different kinds, whose products are rounded differently."""
    kinds = sorted(set(ranks.gathered(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)))
    if len(kinds) > 1:
        progress.say(f"The GPUs are of different kinds ({', '.join(kinds)}): which one quantizes a layer decides its last bits.")


def _prompts(family, options, progress):
    """The conditioning of a run; None for one that needs none."""
    if options.conditioning:
        return conditioning.with_guidance(conditioning.read(options.conditioning), options.guidance)
    if not options.prompts:
        return None
    with open(options.prompts, encoding="utf-8") as file:
        prompts = conditioning.prompts_of(file.read())
    progress.say(f"encoding {len(prompts)} prompts")
    return conditioning.with_guidance(conditioning.encode(family, options.text_encoder, prompts), options.guidance)


def _folder(name):
    """The folder of --progress; None if nothing is kept."""
    named = {"output": folder_paths.get_output_directory, "temp": folder_paths.get_temp_directory}
    if name == "off":
        return None
    return os.path.join(named[name](), PROGRESS) if name in named else os.path.abspath(name)


def _report(options, records, recipe, notes, progress):
    if options.report:
        with open(options.report, "w", encoding="utf-8") as file:
            file.write(report.as_json(records, recipe, notes) if options.report.endswith(".json") else report.text(records, recipe, notes))
    progress.say(report.summary(records))
