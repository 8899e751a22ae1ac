"""Quantize a model at full size, as in the graph:

    python benchmarks/quantize_full.py --comfyui ~/ComfyUI                                       # FLUX.1-dev
    python benchmarks/quantize_full.py --comfyui ~/ComfyUI --model qwen-image --vram-gb 16

The model is one of family_models.py. Its random weights, which keep activations at ordinary sizes, are in bf16 in host memory, as after a
loader. The node's own function quantizes it from random conditioning, and it is saved to a temporary folder. The script prints the seconds
per stage as they pass, the peaks of GPU and host memory, the file's size and the errors, and merges them into
benchmarks/results/quantize_full_<gpu>.json, which has an entry for each model, limit of GPU memory and number of blocks.

--vram-gb limits ComfyUI and PyTorch to that much GPU memory. --blocks D,S quantizes a FLUX of D double and S single blocks, --blocks N
another model of N main blocks, and estimates the time of the whole; --hidden 256 --size 64 and the like make it small enough for a CPU.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from statistics import fmean, median

import family_models
import quantize_stages
import step_entries
import torch
from flux_model import random_in_host_memory
from machine import description, load_pack, result_path

CONTEXT_BYTES = 5e8  # GPU memory that CUDA itself uses, which PyTorch's limit does not count
KEY = "model", "vram_gb", "blocks"  # an entry of the result file
DEFAULTS = {"model": "flux1-dev", "vram_gb": 12, "preset": "best", "rank": 64, "prompts": 8, "steps": 8, "size": 1024}


class Progress:
    """The node's progress as lines of text. stages: quantize_stages.Stages whose text is added, or None."""

    def __init__(self, stages=None):
        self.stages = stages
        self.began = self.last = time.perf_counter()
        self.done = self.steps = 0

    def total(self, steps):
        self.steps = steps

    def step(self, text):
        self.done += 1
        now = time.perf_counter()
        if now - self.last > 5 or self.done == self.steps:
            stages = f" ({self.stages.text()})" if self.stages else ""
            print(f"{now - self.began:6.0f} s  {self.done} of {self.steps}: {text}{stages}", flush=True)
            self.last = now

    def check(self):
        pass


def enter_comfyui(folder, vram_gb):
    """Import ComfyUI, and limit it and PyTorch to this much GPU memory."""
    options = ["main.py"]
    if not torch.cuda.is_available():
        options += ["--cpu"]
    elif vram_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        options += ["--reserve-vram", f"{(total - vram_gb * 1e9) / 2**30 + 0.4:.2f}"]
        torch.cuda.set_per_process_memory_fraction((vram_gb * 1e9 - CONTEXT_BYTES) / total)
    sys.path.insert(0, folder)
    from host import launch

    launch.define_torchvision_ops()
    launch.define_torchaudio()
    import comfy.options

    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, options
    try:
        import comfy.cli_args  # reads sys.argv, once
    finally:
        sys.argv = arguments


def new_model(model):
    """The MODEL of a loader: a ModelPatcher around a family_models.Model of random bf16 weights in host memory. Raises ValueError if a
    tensor of the host's class has no value."""
    import comfy.model_patcher
    from comfyui_svdquant.quant.host import build

    made = family_models.on_meta(family_models.described(model.image_model, model.config)[2])
    diffusion_model = made.diffusion_model
    diffusion_model.load_state_dict(
        random_in_host_memory({name: tensor.shape for name, tensor in diffusion_model.state_dict().items()}), assign=True)
    missing = [name for name, tensor in [*diffusion_model.named_parameters(), *diffusion_model.named_buffers()] if tensor.is_meta]
    if missing:
        raise ValueError(f"{', '.join(missing)} of {model.image_model} got no values; give them some here.")
    return build.make_patcher(made, comfy.model_patcher.ModelPatcher)


def conditioning(prompts, tokens, model):
    """Random conditioning of a family_models.Model, in the form of a text encode node's output."""
    g = torch.Generator().manual_seed(0)
    pooled = [{"pooled_output": torch.randn(1, model.pooled, generator=g) if model.pooled else None} for _ in range(prompts)]
    guidance = {key: value for key, value in model.more.items() if key == "guidance"}
    return [[torch.randn(1, tokens, model.text[1], generator=g), own | guidance] for own in pooled]


def block_counts(model):
    """{name of a list of blocks: their number} of a family_models.Model."""
    family, shapes, _ = family_models.described(model.image_model, model.config)
    return dict(Counter(block.rpartition(".")[0] for block in {family.block_of(name) for name in family.packed_names(shapes)} - {None}))


def save(patcher, folder):
    """Save as the node does. Returns the file's size in bytes."""
    from comfyui_svdquant.quant.checkpoint import native
    from comfyui_svdquant.quant.host import build

    path = os.path.join(folder, "svdquant.safetensors")
    tensors = {build.stored_name(patcher.model, name): tensor for name, tensor in patcher.model.diffusion_model.state_dict().items()}
    specs = {name: layer.spec for name, layer in patcher.packed_layers().items()}
    native.save(path, tensors, specs, build.stored_config(patcher.model), patcher.recipe, patcher.source, False)
    return os.path.getsize(path)


def errors(records):
    """{format: mean, median, largest error and plain rounding's mean}"""
    found = {}
    for form in dict.fromkeys(record.format for record in records):
        own = [record for record in records if record.format == form]
        found[form] = {"layers": len(own), "mean": fmean(r.error for r in own), "median": median(r.error for r in own),
                       "largest": max(r.error for r in own), "mean_of_plain_rounding": fmean(r.error_naive for r in own)}
    return found


def quantized(args, model, patcher, stages):
    """Quantize and save, timing the stages. Returns (seconds, seconds with saving, file's bytes, patcher, records)."""
    from comfyui_svdquant.quant.host import quantize
    from comfyui_svdquant.quant.quantizer import presets

    latent = {"samples": torch.zeros(model.latent(args.size))}
    prompts, recipe = conditioning(args.prompts, args.text_tokens, model), presets.make_recipe(args.preset, args.rank)
    began = stages.begin()
    with tempfile.TemporaryDirectory() as folder:
        made, records = quantize.quantize(patcher, recipe, prompts, latent, args.steps, 0, Progress(stages),
                                          os.path.join(folder, "progress"))
        stages.set_kind("rest")
        seconds = time.perf_counter() - began
        file_bytes = save(made, folder)
    stages.switch()
    return seconds, time.perf_counter() - began, file_bytes, made, records


def measure(args):
    """The result's figures."""
    model = family_models.resized(family_models.MODELS[args.model], args.hidden, args.blocks)
    blocks, all_blocks = block_counts(model), block_counts(family_models.MODELS[args.model])
    began = time.perf_counter()
    patcher = new_model(model)
    gc.collect()
    parameters = sum(p.numel() for p in patcher.model.diffusion_model.parameters())
    print(f"{args.model}: {parameters / 1e9:.2f} B parameters, {patcher.model_size() / 1e9:.2f} GB, made in "
          f"{time.perf_counter() - began:.0f} s", flush=True)
    stages = quantize_stages.Stages(blocks)
    memory = quantize_stages.Memory(stages)
    quantize_stages.time_stages(stages)
    seconds, with_saving, file_bytes, made, records = quantized(args, model, patcher, stages)
    host, mapped = memory.stop()
    packed = made.packed_layers()
    result = {"parameters": parameters, "model_gb": patcher.model_size() / 1e9, "seconds": seconds, "seconds_with_saving": with_saving,
              "stages": stages.by_label(), "host_gb_above_the_model": host / 1e9, "host_gb_mapped_from_files": mapped / 1e9,
              "host_gb_by_stage": {label: peak[0] / 1e9 for label, peak in memory.peaks.items()}, "packed_layers": len(packed),
              "file_gb": file_bytes / 1e9, "errors": errors(records), "notes": made.recipe.get("notes", [])}
    if torch.cuda.is_available():
        result |= {"gpu_gb_allocated": max(stages.allocated.values()) / 1e9, "gpu_gb_reserved": max(stages.reserved.values()) / 1e9,
                   "gpu_gb_of_the_device": memory.device / 1e9,
                   "gpu_gb_allocated_by_stage": {label: peak / 1e9 for label, peak in stages.allocated.items()}}
    if blocks != all_blocks:
        # The time of work that is done once per model grows with its number of blocks.
        factors = {kind: all_blocks[kind] / count for kind, count in blocks.items()}
        result["stages_of_all_blocks"] = stages.by_label(factors | {"rest": sum(all_blocks.values()) / sum(blocks.values())})
        result["seconds_of_all_blocks_with_saving"] = sum(result["stages_of_all_blocks"].values())
    return result


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--model", choices=family_models.MODELS)
    parser.add_argument("--vram-gb", type=float, help="limit of GPU memory in GB; 0: none")
    parser.add_argument("--blocks", type=lambda text: tuple(map(int, text.split(","))),
                        help="number of blocks, for a FLUX of double and single ones, such as 1,2")
    parser.add_argument("--preset")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--text-tokens", type=int, help="text tokens of each prompt; as many as family_models.py says")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, help="side in pixels of the pictures drawn for calibration")
    parser.add_argument("--hidden", type=int, help="width of the model, a multiple of 128")
    parser.add_argument("--out", help="the result file; benchmarks/results/quantize_full_<gpu>.json")
    args = parser.parse_args()
    model = family_models.MODELS[args.model]
    args.text_tokens, args.blocks = args.text_tokens or model.text[0], args.blocks or family_models.depths(model)
    if len(args.blocks) != len(family_models.depths(model)):
        parser.error(f"{args.model} has {len(family_models.depths(model))} kinds of blocks that --blocks counts.")
    return args


def main():
    args = arguments()
    enter_comfyui(args.comfyui, args.vram_gb)
    load_pack()
    run = description()  # recorded now, since the checkout may change during the run
    device = run.pop("device")
    entry = {name: value for name, value in vars(args).items() if name not in ("comfyui", "out")}
    path = args.out or result_path("quantize_full", device if torch.cuda.is_available() else "cpu")
    step_entries.read(path)  # a file of another form is an error now, not after the measurement
    with torch.inference_mode():
        entry |= run | measure(args)
    print(json.dumps(entry, indent=1))
    step_entries.add(path, device, [entry], KEY)


if __name__ == "__main__":
    main()
