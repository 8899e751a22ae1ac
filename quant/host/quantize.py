"""Quantizing a MODEL in the graph: sample with it, stream its blocks, build its 4-bit twin."""

import hashlib
import logging
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase

import comfy.ldm.flux.model
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.supported_models
import torch

from ..families import flux1 as flux
from ..layers.linear import PackedLinear
from ..quantizer import calibration, pipeline
from . import build, resume
from .attachments import SOURCE
from .patcher import PREFIX, SVDQuantModelPatcher

log = logging.getLogger(__name__)

# What of FLUX's parameters FLUX.1 has not, and whose it is.
RELATIVES = {"global_modulation": "Flux2", "yak_mlp": "Ovis-Image"}
MAX_CALLS = 32  # recorded calls of the model, spread over prompts and noise levels
WEIGHT_COPIES, GRAM_COPIES = 8, 3  # at the peak of pipeline.pack_svdquant
OUTSIDE = "outside"  # stands for a block's name where layers are in none: the block is then the whole model
NOTHING_ELSE = 2**62  # bytes that ComfyUI is asked to free where everything is to leave the device


def check_model(patcher):
    """Raise ValueError unless the MODEL is a FLUX.1 in 16 or 8 bits."""
    model = getattr(patcher.model, "diffusion_model", None)
    config = getattr(patcher.model, "model_config", patcher.model)
    name = type(config).__name__
    if isinstance(model, comfy.ldm.flux.model.Flux):
        name = next((relative for feature, relative in RELATIVES.items() if getattr(model.params, feature, False)), name)
        is_flux = name not in RELATIVES.values() and getattr(model, "vector_in", None) is not None
    else:
        is_flux = False
        if isinstance(config, comfy.supported_models.Flux):
            raise ValueError(f"SVDQuant quantizes FLUX.1 models on ComfyUI's own FLUX, and this MODEL runs on another pack's "
                             f"{type(model).__name__}; load the 16-bit model with Load Diffusion Model or SVDQuant Load Model.")
    if not is_flux:
        raise ValueError(f"SVDQuant quantizes FLUX.1 models, and this MODEL is {name}; connect a FLUX.1 model.")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("This MODEL is quantized already; connect the 16-bit model that it was made from.")


def check_extras(patcher):
    """Raise ValueError where a node has put something on the MODEL that lives in its 16-bit modules and would be lost."""
    wrappers = patcher.wrappers.get(comfy.patcher_extension.WrappersMP.APPLY_MODEL, {})
    if "torch.compile" in wrappers or "torch_compile_kwargs" in patcher.model_options:
        raise ValueError("This MODEL goes through TorchCompileModel or a node like it, which would go on running the 16-bit model; "
                         "put that node behind SVDQuant Quantize Model.")
    if patcher.additional_models.get("multigpu"):
        raise ValueError("This MODEL goes through MultiGPU CFG Split, whose other devices would go on drawing with the 16-bit model; put "
                         "that node behind SVDQuant Quantize Model.")
    inside = [key for key in patcher.object_patches if key.startswith("diffusion_model")]
    if inside or patcher.injections:
        what = f"replaces {inside[0]}" if inside else "hooks into its layers, as a bypass LoRA does"
        raise ValueError(f"A node on this MODEL {what}, which can't be carried into 4 bits; put it behind SVDQuant Quantize Model, "
                         "or use the ordinary Load LoRA node.")


def check_latent(patcher, latent):
    """Raise ValueError unless the latent is one that the MODEL can draw."""
    samples, channels = latent["samples"], patcher.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or (samples.shape[1] != channels and samples.any()):
        raise ValueError(f"The latent has shape {list(samples.shape)} and this model draws pictures with {channels} channels; "
                         "connect an empty latent of your usual picture size.")


def check_conditioning(patcher, conditioning):
    """Raise ValueError unless there are prompts and each one's conditioning is as wide as the model's text input."""
    if not conditioning:
        raise ValueError("The conditioning holds no prompt; connect a text encode node with a prompt.")
    width = patcher.model.diffusion_model.params.context_in_dim
    for tensor, extras in conditioning:
        if extras.get("pooled_output") is None:
            raise ValueError("The conditioning has no pooled output, which FLUX.1 needs; encode the prompt with FLUX.1's text "
                             "encoders, clip_l and t5xxl.")
        if tensor.shape[-1] != width:
            raise ValueError(f"The conditioning is {tensor.shape[-1]} wide and this FLUX model takes {width}; encode "
                             "the prompt with the text encoders that belong to the model.")


def check_weights(patcher, check):
    """Raise ValueError naming the first parameter that is no floating point tensor, or holds NaN or Inf: calibration would only
    show where it arrives. Returns a digest of them all, as the MODEL uses them."""
    told = hashlib.sha256()
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        check()
        if not parameter.dtype.is_floating_point:
            raise ValueError(f"The MODEL's {name} is stored as {parameter.dtype}, in a format of its own; load a bf16, fp16 or "
                             "fp8 version of the model.")
        stored = parameter.to(patcher.load_device)  # which is quicker at it
        # fp8 has no isfinite of its own.
        if not torch.isfinite(stored.half() if stored.dtype.itemsize == 1 else stored).all():
            raise ValueError(f"The MODEL's {name} holds NaN or Inf: its file is damaged or was merged wrongly; load a "
                             "sound copy.")
        used = effective_weight(patcher, name, patcher.load_device) if PREFIX + name in patcher.patches else stored
        told.update(f"{name} {resume.digest(used)}\n".encode())
    return told.hexdigest()


def compute_dtype(patcher):
    """The dtype in which a model computes."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def storage_dtype(patcher):
    """The 16-bit dtype that the quantized model's scales, branches and unpacked weights are stored in."""
    weight = patcher.model.diffusion_model.img_in.weight
    return torch.float16 if weight.dtype == torch.float16 else torch.bfloat16


def effective_weight(patcher, name, device):
    """A parameter of the diffusion model as the MODEL uses it, LoRAs and merges baked in.

    Returns it in its own dtype where nothing is applied to it, else in float32; on `device`. It may share the MODEL's memory, and
    is never its nn.Parameter, which what comes after would learn from or have for its own.
    """
    key = PREFIX + name
    # The patcher's own get_key_patches stumbles over the scale that a weight in scaled fp8 has in the state dict, and nowhere else.
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


def record_trajectory(patcher, conditioning, latent, steps, seed, progress, kept=None):
    """Sample every prompt once and return recorded calls of the diffusion model, at most MAX_CALLS, evenly spread.

    kept: resume.Checkpoint or None. What the model answers goes into it, or comes out of it.
    """
    model = patcher.model.diffusion_model
    every = -(-len(conditioning) * steps // MAX_CALLS)
    samples = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"])
    answers = kept and kept.load(resume.TRAJECTORY)
    answered = calibration.played_back(model, [answers[0][key] for key in sorted(answers[0])]) if answers else nullcontext()
    calls = []
    with answered, calibration.recorded_outputs(model) as outputs:
        for i, entry in enumerate(conditioning):
            prompt_seed = (seed + i) % 2**64  # what torch takes as a seed
            noise = comfy.sample.prepare_noise(samples, prompt_seed)
            # From prompt to prompt other steps are kept, or the last ones might never be.
            with calibration.recorded_calls(model, calls, every, i % every):
                comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", [entry], [entry], samples,
                                    callback=lambda *_: progress.step(f"sampling prompt {i + 1} of {len(conditioning)}"),
                                    disable_pbar=True, seed=prompt_seed)
    if not calls:
        raise ValueError("The model was never called while it was watched; check the timestep range of the conditioning.")
    if kept and not answers:
        kept.save(resume.TRAJECTORY, {f"{i:06}": output for i, output in enumerate(outputs)}, None)
    return calls


def block_statistics(patcher, calls, blocks, specs, recipe, memory, packed, done):
    """Yield (block name, {layer: InputStats}) block by block, last OUTSIDE; without calls, and for those that are done, there are none.

    packed: {tensor name: packed tensor}, filled by the caller between the blocks.
    """
    model = patcher.model.diffusion_model
    stages = [*blocks, (OUTSIDE, model)]
    if not calls:
        yield from ((name, {}) for name, _ in stages)
        return
    inside = {module for _, block in blocks for module in block.modules()}
    outside = [(name, module) for name, module in model.named_modules() if module not in inside]

    def loaded(name, block):
        if name == OUTSIDE:
            return nullcontext()  # what is in no block is on the device all the time
        return on_device(patcher, [(f"{name}.{inner}", module) for inner, module in block.named_modules()])

    @contextmanager
    def quantized(name, block):
        layers = {layer: specs[layer] for layer in flux.block_layers(name, block) if f"{layer}.weight" in packed}
        stored = {layer: model.get_submodule(layer) for layer in layers}
        try:
            for layer, spec in layers.items():
                build.swap(model, layer, spec)
                tensors = {part: packed[f"{layer}.{part}"].to(patcher.load_device) for part in spec.tensors()}
                model.get_submodule(layer).load_state_dict(tensors, assign=True)
            yield
        finally:
            for layer, module in stored.items():
                parent, _, child = layer.rpartition(".")
                setattr(model.get_submodule(parent), child, module)

    def layers_of(name, block):
        if name in done:
            return {}
        return flux.outer_layers(block) if name == OUTSIDE else flux.block_layers(name, block)

    whole = make_room(patcher, working_memory(blocks, recipe.needs_gram()))
    with nullcontext() if whole else on_device(patcher, outside):
        yield from calibration.stream_blocks(model, calls, memory, stages, layers_of, recipe.needs_gram(), recipe.tokens,
                                             quantized=quantized if recipe.propagate == "quantized" else None,
                                             **({} if whole else {"loaded": loaded}))


def make_room(patcher, needed):
    """Whether the whole MODEL is on its device, with `needed` bytes free beside it; else nothing of it is there, and what else
    ComfyUI had loaded has made room too."""
    management, device = comfy.model_management, patcher.load_device
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()  # ComfyUI then moves weights in and out by itself
    fits = patcher.model_size() + needed + management.extra_reserved_memory() < management.get_total_memory(device)
    if dynamic or device == patcher.offload_device or fits:
        management.load_models_gpu([patcher], memory_required=needed)
        if dynamic or not patcher.model.model_lowvram:
            return True
    management.free_memory(NOTHING_ELSE, device)
    return False


@contextmanager
def on_device(patcher, modules):
    """Within it the modules' own parameters and buffers lie on the MODEL's device, with its LoRAs applied; then they are again the
    very tensors that they were.

    modules: [(name in the diffusion model, module)], none of which is loaded.
    """
    stored, patched = [], []
    try:
        for name, module in modules:
            for tensors in (module._parameters, module._buffers):
                for leaf, tensor in tensors.items():
                    if tensor is None:
                        continue
                    stored.append((tensors, leaf, tensor))
                    key = f"{PREFIX}{name}.{leaf}"
                    if key in patcher.patches:
                        patched.append(key)
                        patcher.patch_weight_to_device(key, patcher.load_device)
                    moved = tensors[leaf].to(patcher.load_device)
                    tensors[leaf] = torch.nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved
        yield
    finally:
        for tensors, leaf, tensor in stored:
            tensors[leaf] = tensor
        for key in patched:
            patcher.backup.pop(key, None)  # it was in `stored`


def working_memory(blocks, with_gram):
    """Bytes on the device that quantizing the widest layer takes beside the model: copies of its weight in float32 and, with
    GPTQ or refit, of its inputs' Gram matrix."""
    shapes = [layer.weight.shape for name, block in blocks for layer in flux.block_layers(name, block).values()]
    weights = max(n * k for n, k in shapes) * 4 * WEIGHT_COPIES
    return weights + (max(k for _, k in shapes) ** 2 * 4 * GRAM_COPIES if with_gram else 0)


def layer_specs(diffusion_model, recipe, dtype):
    """{layer name: LayerSpec} of everything that will be packed. Raises ValueError where a layer does not fit, where an exception
    of the recipe meets no layer, or where its exceptions keep them all."""
    linears = {name: layer for block_name, block in flux.blocks(diffusion_model)
               for name, layer in flux.block_layers(block_name, block).items()} | flux.outer_layers(diffusion_model)
    for pattern in (*recipe.keep, *(pattern for pattern, _ in recipe.ranks)):
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"No layer is called {pattern!r}; layers are called like {next(iter(linears))}, and * stands "
                             "for any text.")
    quantized = {name: layer for name, layer in linears.items() if not recipe.keeps(name)}
    if not quantized:
        raise ValueError(f"These exceptions leave no layer to quantize: they keep all {len(linears)} in 16 bits; take a pattern out, "
                         "or use the MODEL as it is.")
    return {name: flux.layer_spec(name, layer.weight.shape, recipe.rank_of(name), layer.bias is not None, dtype)
            for name, layer in quantized.items()}


def quantize(patcher, recipe, conditioning, latent, steps, seed, progress, folder=None):
    """A 4-bit twin of a FLUX MODEL; the MODEL itself is left as it was, also when this fails or is cancelled.

    recipe: presets.Recipe; conditioning, latent: what the MODEL draws while it is watched, or None where the recipe
    needs no calibration; progress: .total(n), .step(text) and .check(), which raises to cancel; folder: where what is finished is
    kept until all is, so that a run of the same inputs goes on from there; None: nowhere.
    Returns (SVDQuantModelPatcher, [LayerRecord]); the patcher's recipe has "notes", sentences of what was unusual.
    """
    check_model(patcher)
    check_extras(patcher)
    weights = check_weights(patcher, progress.check)
    calibrated = recipe.smooth == "search"
    if calibrated and (conditioning is None or latent is None):
        raise ValueError(f"The preset {recipe.preset} watches the model draw: connect positive and latent, or choose "
                         "the preset data-free.")
    specs = layer_specs(patcher.model.diffusion_model, recipe, storage_dtype(patcher))
    progress.total(len(specs) + (len(conditioning) * steps if calibrated else 0))
    if calibrated:
        check_conditioning(patcher, conditioning)
        check_latent(patcher, latent)
    watched = (conditioning, latent["samples"], steps, seed) if calibrated else ()
    memory = calibration.Memory(patcher.load_device)
    with _kept(patcher, folder, sum(spec.nbytes() for spec in specs.values()), weights, recipe.as_dict(), watched) as kept:
        calls = record_trajectory(patcher, conditioning, latent, steps, seed, progress, kept) if calibrated else []
        packed, records = _quantize_blocks(patcher, specs, recipe, calls, progress, memory, kept)
    watched = {"prompts": len(conditioning), "steps": steps, "seed": seed} if calibrated else {"prompts": 0}
    told = recipe.as_dict() | {"calibration": watched, "notes": memory.notes, "layers": [asdict(record) for record in records]}
    twin = _twin(patcher, {name: spec for name, spec in specs.items() if f"{name}.weight" in packed}, packed, told)
    if kept:
        kept.remove()
    return twin, records


def _kept(patcher, folder, nbytes, *inputs):
    """The run's resume.Checkpoint; a context without one where there is no folder, or no telling this run from others."""
    if folder is None:
        return nullcontext()
    try:
        return resume.Checkpoint(folder, resume.run_digest(patcher, *inputs), nbytes)
    except resume.Unknown as what:
        log.info("This quantization can't be resumed if it is interrupted: of a %s on the MODEL or the conditioning there is no telling "
                 "whether it is the same the next time.", what)
        return nullcontext()


def _quantize_blocks(patcher, specs, recipe, calls, progress, memory, kept):
    """{tensor name: packed tensor} of all the layers that come out in 4 bits, and the records of all."""
    blocks = flux.blocks(patcher.model.diffusion_model)
    done = {name: found for name in [*dict(blocks), OUTSIDE] if kept and (found := kept.load_block(name))}
    packed, records = {}, []
    # Closed at once when this ends early: it has parts of the MODEL on the device.
    with closing(block_statistics(patcher, calls, blocks, specs, recipe, memory, packed, done)) as stream:
        for block_name, stats in stream:
            if block_name in done:
                tensors, found = done.pop(block_name)
                for record in found:
                    progress.step(f"{record.name}: error {record.error:.1%}, done before")
            else:
                names = [name for name in specs if _block_of(name) == block_name]
                tensors, found = _quantize_block(patcher, names, stats, specs, recipe, memory, progress)
                if kept:
                    kept.save(block_name, tensors, [asdict(record) for record in found])
            packed |= tensors
            records += found
    return packed, records


def _block_of(name):
    """The block of layer `name`, or OUTSIDE."""
    return ".".join(name.split(".")[:2]) if "_blocks." in name else OUTSIDE


def _quantize_block(patcher, names, stats, specs, recipe, memory, progress):
    """{tensor name: packed tensor} and [LayerRecord] of the layers `names`."""
    packed, records = {}, []
    for name in names:
        tensors, record = quantize_layer(patcher, name, stats.pop(name, None), specs[name], recipe, memory, progress.check)
        packed |= {f"{name}.{part}": tensor.to(patcher.offload_device) for part, tensor in tensors.items()}
        records.append(record)
        progress.step(f"{name}: error {record.error:.1%}")
    return packed, records


def quantize_layer(patcher, name, stats, spec, recipe, memory, check):
    """quantizer.quantize_layer of the MODEL's layer `name`: on its device or, where that has no room for it, on the CPU."""
    def run(device):
        weight = effective_weight(patcher, f"{name}.weight", device)
        bias = effective_weight(patcher, f"{name}.bias", device) if spec.bias else None
        return pipeline.quantize_layer(name, weight, bias, None if stats is None else stats.to(device), spec, recipe, check)

    device = torch.device(patcher.load_device)
    for place in (device, torch.device("cpu")) if memory.level else (device, device, torch.device("cpu")):
        try:
            return run(place)
        except RuntimeError as error:
            if not calibration.is_out_of_memory(error):
                raise
            failure = str(error)
        # Out here the exception is gone, and what its frames held with it.
        if memory.level == 0:
            memory.step_down(name)
        else:
            calibration.empty_cache(device)
            memory.say(f"The GPU has no room for {name}: the CPU quantizes it, which takes longer.")
    raise MemoryError(f"There is not enough memory to quantize {name}: {failure}")


def _twin(patcher, specs, packed, recipe):
    """A patcher around a new model that has the packed layers and, for the rest, the MODEL's weights in 16 bits."""
    twin = build.empty_like(patcher.model, specs, compute_dtype(patcher))
    dtype = storage_dtype(patcher)
    # The twin's parameters have the names of the MODEL's, so nothing is renamed on the way.
    rest = {name: effective_weight(patcher, name, patcher.offload_device).to(dtype)
            for name in twin.diffusion_model.state_dict() if name not in packed}
    twin.diffusion_model.load_state_dict(packed | rest, assign=True)
    quantized = build.make_patcher(twin, SVDQuantModelPatcher)
    _carry_over(patcher, quantized)
    quantized.recipe = recipe
    quantized.source = patcher.get_attachment(SOURCE) or "FLUX.1"
    return quantized


def _carry_over(patcher, quantized):
    """What other nodes have put on the MODEL beside weights: sampling settings, attention patches, wrappers."""
    settings = patcher.clone()
    quantized.model_options = settings.model_options
    quantized.object_patches = {key: value for key, value in settings.object_patches.items() if key != "manual_cast_dtype"}
    for attribute in ("attachments", "additional_models", "callbacks", "wrappers"):
        setattr(quantized, attribute, getattr(settings, attribute))
