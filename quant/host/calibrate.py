"""Calibration in the graph: sample the prompts with a MODEL, then run its blocks on the device one by one."""

from contextlib import ExitStack, contextmanager, nullcontext

import comfy.model_management
import comfy.sample
import torch

from ..families.family import OUTSIDE
from ..parallel.alone import ALONE
from ..quantizer import calibration, pooled_rows, shared_replay
from . import build, resume
from .patcher import PREFIX

MAX_CALLS = 32  # recorded calls of the model, distributed over prompts and noise levels
WEIGHT_COPIES, GRAM_COPIES = 8, 3  # float32 copies that exist at the peak of pipeline.pack_svdquant
EVERYTHING = 2**62  # bytes to ask ComfyUI to free, so that it moves all models off the device


def sized(patcher, latent):
    """The samples of a latent, in the shape in which the MODEL samples it; of an empty latent as the host's own samplers do it."""
    # Newer nodes note for which models' latents an empty one was made, so that it can be resized.
    ratios = {key: latent[key] for key in ("downscale_ratio_spacial", "downscale_ratio_temporal") if latent.get(key) is not None}
    return comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)


def record_trajectory(patcher, conditioning, latent, steps, seed, progress, kept=None, ranks=ALONE):
    """Sample every prompt once and return recorded calls of the diffusion model, at most MAX_CALLS at even intervals.

    kept: resume.Checkpoint or None. The model's outputs are saved to it; if it already has them, they replace running the model. ranks:
    the processes of the run, which share the prompts; only process 0 has a `kept`, and each gets its own calls (shared_replay.dealt).
    """
    model = patcher.model.diffusion_model
    every = -(-len(conditioning) * steps // MAX_CALLS)
    samples = sized(patcher, latent)
    saved = ranks.from_first(kept and kept.load(resume.TRAJECTORY))
    calls, outputs = {}, {}  # {prompt: [calls]}, {prompt: [outputs]}
    for i, entry in ranks.share(list(enumerate(conditioning))):
        prompt_seed = (seed + i) % 2**64  # the largest seed that PyTorch takes
        noise = comfy.sample.prepare_noise(samples, prompt_seed)
        known = saved and [saved[0][key] for key in sorted(saved[0]) if key.startswith(f"{i:06}.")]
        played, calls[i] = calibration.played_back(model, known) if saved else nullcontext(), []
        # Each prompt starts at another step; otherwise some steps would never be recorded.
        with played, calibration.recorded_outputs(model) as outputs[i], calibration.recorded_calls(model, calls[i], every, i % every):
            comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", [entry], [entry], samples,
                                callback=lambda *_: progress.step(f"sampling prompt {i + 1} of {len(conditioning)}"),
                                disable_pbar=True, seed=prompt_seed)
    calls = shared_replay.dealt(ranks, calls)
    if not any(ranks.gathered(len(calls))):
        raise ValueError("The model was never called during calibration; check the timestep range of the conditioning.")
    if ranks.from_first(kept is not None) and not saved:
        found = {f"{i:06}.{j:06}": output for each in ranks.exchanged({0: outputs}) if each for i, own in each.items()
                 for j, output in enumerate(own)}
        if kept:
            kept.save(resume.TRAJECTORY, found, None)
    return calls


def stages(family, model):
    """[(name, module)] that calibration replays: the blocks in running order, and OUTSIDE if the family has layers there."""
    return [*family.running_blocks(model), *([(OUTSIDE, model)] if family.outer else [])]


def block_statistics(family, patcher, calls, specs, recipe, memory, packed, done, ranks=ALONE, owner_of=lambda layer: 0,
                     last=None):
    """Yield (name, {layer: InputStats}) for each of `stages`, for the first of the layers that read the same input (Family.first_reader).
    The dict is empty without calls and for blocks in `done`.

    calls: this process's, or None if the run is not calibrated; specs: {layer name: LayerSpec}; memory: calibration.Memory; packed: {tensor
    name: packed tensor}, which the caller fills between the blocks; done: names of the blocks that were quantized before; ranks,
    owner_of, last: as in calibration.stream_blocks; blocks are replayed together only if every process has the whole MODEL on its device.
    """
    model = patcher.model.diffusion_model
    blocks = family.running_blocks(model)
    replayed = stages(family, model)
    if calls is None:
        yield from ((name, {}) for name, _ in replayed)
        return
    inside = {module for _, block in blocks for module in block.modules()}
    outside = [(name, module) for name, module in model.named_modules() if module not in inside]

    def loaded(name, block):
        if whole or name == OUTSIDE:
            return nullcontext()  # modules outside the blocks are on the device the whole time
        return on_device(patcher, [(f"{name}.{inner}", module) for inner, module in block.named_modules()])

    @contextmanager
    def quantized(name, block):
        layers = {layer: specs[layer] for layer in family.block_layers(name, block) if f"{layer}.weight" in packed}
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
        layers = family.outer_layers(block) if name == OUTSIDE else family.block_layers(name, block)
        return {layer: module for layer, module in layers.items() if family.first_reader(layer) == layer}

    whole = make_room(patcher, working_memory(family, blocks, recipe.needs_gram()))
    with ExitStack() as contexts:
        def unload():
            nonlocal whole
            whole = False
            comfy.model_management.free_memory(EVERYTHING, patcher.load_device)
            contexts.enter_context(on_device(patcher, outside))

        if not whole:
            contexts.enter_context(on_device(patcher, outside))
        elif unloadable(patcher):
            memory.unload = unload
        yield from calibration.stream_blocks(model, calls, memory, replayed, layers_of, family.pass_through, recipe.needs_gram(),
                                             recipe.tokens, loaded, quantized if recipe.propagate == "quantized" else None,
                                             {OUTSIDE: (blocks[-1][0],)} | family.sources(model), ranks, owner_of,
                                             last if all(ranks.gathered(whole)) else None,
                                             pooled_rows.PooledRows.of(family, model, calls, ranks))


def make_room(patcher, needed):
    """Load the whole MODEL on its device if it fits with `needed` bytes free beside it, and return True. Otherwise move it and all other
    models off the device, and return False."""
    management, device, dynamic = comfy.model_management, patcher.load_device, is_dynamic(patcher)
    fits = patcher.model_size() + needed + management.extra_reserved_memory() < management.get_total_memory(device)
    if dynamic or device == patcher.offload_device or fits:
        management.load_models_gpu([patcher], memory_required=needed)
        if dynamic or not patcher.model.model_lowvram:
            return True
    management.free_memory(EVERYTHING, device)
    return False


def is_dynamic(patcher):
    """Whether ComfyUI moves the MODEL's weights to the device when a layer runs (Dynamic VRAM)."""
    return getattr(patcher, "is_dynamic", lambda: False)()


def unloadable(patcher):
    """Whether a MODEL that make_room has loaded whole can leave the device again. ComfyUI moves it by itself with Dynamic VRAM, and keeps
    it there with --highvram."""
    return not is_dynamic(patcher) and patcher.load_device != patcher.offload_device


@contextmanager
def on_device(patcher, modules):
    """A context in which the modules' own parameters and buffers are on the MODEL's device, with its LoRAs applied. Afterwards the
    modules have their original tensors.

    modules: [(name in the diffusion model, module)]; none of them may be loaded.
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
            patcher.backup.pop(key, None)  # `stored` has restored the original


def working_memory(family, blocks, with_gram):
    """Bytes of device memory that quantizing the largest layer needs beside the model: float32 copies of its weight and, for GPTQ or
    refit, of its inputs' Gram matrix."""
    shapes = [layer.weight.shape for name, block in blocks for layer in family.block_layers(name, block).values()]
    weights = max(n * k for n, k in shapes) * 4 * WEIGHT_COPIES
    return weights + (max(k for _, k in shapes) ** 2 * 4 * GRAM_COPIES if with_gram else 0)
