"""Quantizing a MODEL in the graph: calibrate it, pack its layers block by block, build the quantized model."""

import logging
from contextlib import nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import NamedTuple

from comfy.model_management import InterruptProcessingException

from ..families.family import Family
from ..layers import layout
from ..parallel.alone import ALONE
from ..quantizer import calibration, presets
from ..text import quoted
from . import build, checks, discovery, resume
from .attachments import SOURCE
from .calibrate import record_trajectory, sized
from .patcher import SVDQuantModelPatcher
from .quantize_blocks import quantize_blocks
from .weights import compute_dtype, effective_shapes, effective_weight, storage_dtype, unpatched_shape

log = logging.getLogger(__name__)

RESUMES = "stopped; finished blocks are kept, Run goes on"
WIDENED = "in_channels"  # the configuration key that a LoRA on the MODEL may change, as those of control models do


def layer_specs(family, diffusion_model, recipe, dtype):
    """({layer name: LayerSpec} of the layers that will be packed, [a sentence on layers that can't be]). Raises ValueError if an exception
    of the recipe matches no layer, or if no layer is left."""
    linears = {name: layer for block_name, block in family.running_blocks(diffusion_model)
               for name, layer in family.block_layers(block_name, block).items()} | family.outer_layers(diffusion_model)
    for pattern in (*recipe.keep, *(pattern for pattern, _ in recipe.ranks), *recipe.int8):
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"No layer is called {quoted(pattern)}; layers are called like {next(iter(linears))}, and * stands "
                             "for any text.")
    quantized = {name: layer for name, layer in linears.items() if not recipe.keeps(name)}
    if not quantized:
        raise ValueError(f"These exceptions leave no layer to quantize: they keep all {len(linears)} in 16 bits; remove a pattern, "
                         "or use the MODEL as it is.")
    specs, misfits = {}, {}
    for name, layer in quantized.items():
        try:
            specs[name] = layout.spec_of(family.layer(name), layer.weight.shape, recipe.rank_of(name, family.layer(name).branches),
                                         layer.bias is not None, dtype, recipe.act_bits_of(name), recipe.branch_bits)
        except ValueError as error:
            misfits.setdefault(str(error), []).append(name)
    notes = [f"{' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))} can't be packed in 4 bits and "
             f"{'stay' if len(names) > 1 else 'stays'} in 16: {'each' if len(names) > 1 else 'it'} {why}."
             for why, names in misfits.items()]
    if not specs:
        raise ValueError(f"No layer of this MODEL can be quantized: {notes[0]} Use the MODEL as it is.")
    return specs, notes


def quantize(patcher, recipe, conditioning, latent, steps, seed, progress, folder=None, ranks=ALONE):
    """The quantized model of a MODEL. The MODEL itself does not change, not even when this fails or is cancelled.

    recipe: presets.Recipe; conditioning, latent: the inputs of calibration, or None if the recipe needs none; progress:
    .total(n), .step(text), .say(text) and .check(), which raises to cancel; folder: where finished blocks are kept until the run ends, so
    that an interrupted run of the same inputs resumes; None to keep nothing; ranks: the processes of the run (parallel.alone), each of
    which has the same arguments. The result does not depend on their number.
    Returns (SVDQuantModelPatcher, [LayerRecord]); the patcher's recipe has "notes", sentences about unusual events of the run. Only process
    0 gets a patcher, and the others get None in its place.
    """
    family = checks.check_model(patcher)
    checks.check_extras(patcher)
    weights = checks.check_weights(family, patcher, progress.check, ranks)
    calibrated = recipe.smooth == "search"
    presets.check_calibrated(recipe, conditioning is not None, latent is not None)
    if family is None:
        discovery.check(patcher, calibrated, ranks)
    plan = family and Plan.of(family, patcher, recipe)
    count = len(plan.specs if plan else discovery.linears(patcher.model.diffusion_model))
    progress.total(count + (len(ranks.share(conditioning)) * steps if calibrated else 0))
    if calibrated:
        checks.check_conditioning(family, patcher, conditioning)
        checks.check_latent(patcher, latent)
    inputs = (conditioning, sized(patcher, latent), steps, seed) if calibrated else ()
    memory = calibration.Memory(patcher.load_device)
    nbytes = plan.nbytes() if plan else patcher.model_size() // 3
    kept = ranks.rank == 0 and _kept(patcher, folder, nbytes, weights, recipe.as_dict(), inputs)
    try:
        with kept or nullcontext():
            calls = record_trajectory(patcher, conditioning, latent, steps, seed, progress, kept, ranks) if calibrated else None
            if plan is None:
                plan = _discovered(patcher, recipe, calls, progress, memory)
            family, specs = plan.family, plan.specs
            for note in plan.misfits:
                memory.say(note)
            packed, records = quantize_blocks(family, patcher, specs, recipe, calls, progress, memory, kept, ranks)
    except InterruptProcessingException:
        progress.say(RESUMES if kept and kept.holds_anything() else "stopped")
        raise
    notes = list(dict.fromkeys(note for own in ranks.gathered(memory.notes) for note in own))
    if ranks.rank:
        return None, records
    calibrated_on = {"prompts": len(conditioning), "steps": steps, "seed": seed} if calibrated else {"prompts": 0}
    metadata = recipe.as_dict() | {"calibration": calibrated_on, "notes": notes, "layers": [_stored(record) for record in records]}
    specs = {name: spec for name, spec in specs.items() if f"{name}.weight" in packed}
    quantized = _quantized_model(family, patcher, specs, packed, plan.config, metadata)
    if kept:
        kept.remove()
    return quantized, records


class Plan(NamedTuple):
    """What is to be quantized. specs: {layer name: LayerSpec}; misfits: sentences on layers that can't be packed; config: the host's
    configuration of the quantized model."""

    family: Family
    specs: dict
    misfits: list
    config: dict

    @classmethod
    def of(cls, family, patcher, recipe):
        specs, misfits = layer_specs(family, patcher.model.diffusion_model, recipe, storage_dtype(patcher))
        return cls(family, specs, misfits, _configuration(family, patcher, specs))

    def nbytes(self):
        """Bytes of all packed tensors."""
        return sum(spec.nbytes() for spec in self.specs.values())


def _discovered(patcher, recipe, calls, progress, memory):
    """The Plan of a MODEL of no declared family."""
    progress.say("looking for the model's layers")
    family, notes = discovery.discover(patcher, calls)
    for note in notes:
        memory.say(note)
    return Plan.of(family, patcher, recipe)


def _configuration(family, patcher, specs):
    """The host's configuration of the quantized model, whose input is as wide as the MODEL's with its LoRAs. Raises ValueError if a LoRA
    gives a parameter a shape that no model has, or changes the shape of a layer that will be packed."""
    shapes, stored = effective_shapes(patcher), patcher.model.model_config.unet_config
    usual = {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items() if key in family.configuration.usual}
    try:
        config = family.configuration.of({family.stored_name(name): shape for name, shape in shapes.items()}, usual)
    except ValueError as error:
        raise ValueError(f"This MODEL {error}, so it can't be quantized; load an intact copy of the model.") from None
    expected = build.empty_like(patcher.model, {}, compute_dtype(patcher), config, family).diffusion_model.state_dict()
    for name in shapes:
        changed = shapes[name] != unpatched_shape(patcher, name)
        if changed and (name.removesuffix(".weight") in specs or name not in expected or expected[name].shape != shapes[name] or
                        any(config[key] != stored.get(key, config[key]) for key in config if key != WIDENED)):
            raise ValueError(f"A LoRA on this MODEL gives {name} the shape {list(shapes[name])}, which a {family.title} in 4 bits can't "
                             "have; remove that LoRA, or put it behind SVDQuant Quantize Model.")
    return config


def _kept(patcher, folder, nbytes, *inputs):
    """The run's resume.Checkpoint; None if there is no folder, or if the run's inputs can't be compared between runs."""
    if folder is None:
        return None
    try:
        return resume.Checkpoint(folder, resume.run_digest(patcher, *inputs), nbytes)
    except resume.Unknown as kind:
        log.info("Can't resume this quantization if it is interrupted: a %s can't be compared between runs.", kind)
        return None


def _stored(record):
    """A LayerRecord as the file holds it: without the time that it took, so that equal quantizations give equal files."""
    return {key: value for key, value in asdict(record).items() if key != "seconds"}


def _quantized_model(family, patcher, specs, packed, config, recipe):
    """A patcher around a new model with the packed layers; all its other parameters are the MODEL's weights in 16 bits."""
    model = build.empty_like(patcher.model, specs, compute_dtype(patcher), config, family)
    dtype = storage_dtype(patcher)
    # Its parameters have the names of the MODEL's, so nothing is renamed on the way.
    rest = {name: effective_weight(patcher, name, patcher.offload_device).to(dtype)
            for name in model.diffusion_model.state_dict() if name not in packed}
    model.diffusion_model.load_state_dict(packed | rest, assign=True)
    quantized = build.make_patcher(model, SVDQuantModelPatcher)
    _carry_over(patcher, quantized)
    quantized.recipe = recipe
    quantized.source = patcher.get_attachment(SOURCE) or family.title
    return quantized


def _carry_over(patcher, quantized):
    """Copy the settings that other nodes have put on the MODEL, except weights: sampling settings, attention patches, wrappers."""
    settings = patcher.clone()
    quantized.model_options = settings.model_options
    quantized.object_patches = {key: value for key, value in settings.object_patches.items() if key != "manual_cast_dtype"}
    for attribute in ("attachments", "additional_models", "callbacks", "wrappers"):
        setattr(quantized, attribute, getattr(settings, attribute))
