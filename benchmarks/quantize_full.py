"""Quantize FLUX.1-dev at full size, as in the graph:  python benchmarks/quantize_full.py --comfyui ~/ComfyUI

The model has random weights that keep activations at ordinary sizes, in bf16 in host memory, as after a loader. The node's own function
quantizes it from random conditioning, and it is saved to a temporary folder. The script prints the seconds per stage, the peaks of GPU
and host memory, the file's size and the errors, and writes them to benchmarks/results/quantize_full_<device>.json.

--vram-gb limits ComfyUI and PyTorch to that much GPU memory. --blocks D,S quantizes a model of D double and S single blocks, and
estimates the time of all 19 and 38; --hidden 256 --size 64 and the like make it small enough for a CPU.
"""

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from statistics import fmean, median

import torch
from flux_model import DEV, random_
from machine import ROOT, description, load_pack

CONTEXT_BYTES = 5e8  # GPU memory that CUDA itself uses, which PyTorch's limit does not count
BLOCKS = {"double": DEV["depth"], "single": DEV["depth_single_blocks"]}


class Stages:
    """Seconds by stage and kind of block, and the peaks of GPU memory by stage. A stage's time excludes the stages inside it."""

    def __init__(self):
        self.seconds, self.kind = {}, "rest"
        self.allocated, self.reserved = {}, {}  # {label: bytes}
        self.running = ["everything else"]
        self.last = time.perf_counter()

    def switch(self):
        """Add the time and memory since the last switch to the running stage."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            for peaks, found in ((self.allocated, torch.cuda.max_memory_allocated()), (self.reserved, torch.cuda.max_memory_reserved())):
                peaks[self.running[-1]] = max(peaks.get(self.running[-1], 0), found)
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        key = self.running[-1], self.kind
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self.last
        self.last = now

    @contextmanager
    def stage(self, label):
        self.switch()
        self.running.append(label)
        try:
            yield
        finally:
            self.switch()
            self.running.pop()

    def set_kind(self, name):
        """name: a block's name, or that of a layer in it; "rest" is everything outside the blocks."""
        self.switch()
        self.kind = name.split("_")[0] if "_blocks." in name else "rest"

    def time(self, owner, name, label):
        """Count every call of owner.name as `label`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def run(*args, **kwargs):
            with self.stage(label):
                return original(*args, **kwargs)

        setattr(owner, name, run)

    def by_label(self, factors):
        """{label: seconds}, each kind of block times its factor."""
        found = {}
        for (label, kind), seconds in self.seconds.items():
            found[label] = found.get(label, 0.0) + seconds * factors[kind]
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def time_stages(stages):
    """Time the parts of the pipeline, and record the kind of the current block."""
    from comfyui_svdquant.quant.checkpoint import native
    from comfyui_svdquant.quant.host import calibrate, checks, quantize, quantize_blocks, resume
    from comfyui_svdquant.quant.quantizer import calibration, gptq, lowrank, pipeline

    for owner, name, label in (
            (checks, "check_weights", "checking the weights"), (quantize, "record_trajectory", "sampling"),
            (resume.Checkpoint, "save", "keeping the progress"),
            (calibrate, "make_room", "unloading the model"), (calibration, "_replay", "replay"),
            (calibration.InputStats, "add", "statistics"), (quantize_blocks, "effective_weight", "a layer's weight to the device"),
            (pipeline, "choose_smoothing", "smoothing"), (pipeline, "alternate", "branch and codes in turn"),
            (pipeline, "find_scales", "scale search"), (gptq, "damped_cholesky", "Cholesky factor"), (gptq, "gptq_round", "GPTQ"),
            (lowrank, "refit", "refit"), (pipeline, "pack_awq", "modulation layers"), (pipeline, "layer_error", "errors"),
            (pipeline, "naive_error", "errors"), (quantize, "_quantized_model", "the quantized model"), (native, "save", "saving")):
        stages.time(owner, name, label)
    replay, layer, on_device = calibration._replay, quantize_blocks.quantize_layer, calibrate.on_device

    def replay_in(diffusion_model, call, memory, blocks, pass_through, group, *states):
        stages.set_kind(blocks[group[-1]][0])
        return replay(diffusion_model, call, memory, blocks, pass_through, group, *states)

    def layer_in(patcher, name, *args):
        stages.set_kind(name)
        return layer(patcher, name, *args)

    @contextmanager
    def timed_on_device(*args):
        context = on_device(*args)
        with stages.stage("a block's weights to the device"):
            context.__enter__()
        with context_exit(context):
            yield

    calibration._replay, quantize_blocks.quantize_layer, calibrate.on_device = replay_in, layer_in, timed_on_device


@contextmanager
def context_exit(entered):
    """A context that exits another context, which is entered already."""
    try:
        yield
    except BaseException:
        if not entered.__exit__(*sys.exc_info()):
            raise
    else:
        entered.__exit__(None, None, None)


class HostMemory:
    """The largest resident set of this process in each stage, above its size before the run. It is sampled 20 times a second.

    peaks: {label: (bytes above the start, of which bytes mapped from files, such as libraries' code)}
    """

    def __init__(self, stages):
        import psutil

        self.process, self.stages, self.peaks, self.done = psutil.Process(), stages, {}, threading.Event()
        self.before = self.now()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def now(self):
        info = self.process.memory_info()
        return info.rss, getattr(info, "shared", 0)  # only Linux reports shared memory

    def look(self):
        above = tuple(now - before for now, before in zip(self.now(), self.before))
        label = self.stages.running[-1]
        self.peaks[label] = max(self.peaks.get(label, (0, 0)), above)

    def sample(self):
        while not self.done.wait(0.05):
            self.look()

    def stop(self):
        """The largest of the peaks."""
        self.done.set()
        self.thread.join()
        self.look()
        return max(self.peaks.values())


class Progress:
    """The node's progress as lines of text."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        self.done = self.steps = 0

    def total(self, steps):
        self.steps = steps

    def step(self, text):
        self.done += 1
        now = time.perf_counter()
        if now - self.last > 5 or self.done == self.steps:
            print(f"{now - self.began:6.0f} s  {self.done} of {self.steps}: {text}", flush=True)
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


def new_model(hidden, depth, depth_single):
    """The MODEL of a loader: a ModelPatcher around a FLUX.1-dev of random bf16 weights in host memory."""
    import comfy.model_detection
    import comfy.model_patcher
    from comfy.ldm.flux.model import FluxParams
    from comfyui_svdquant.quant.host import build

    # Newer ComfyUIs also ask for the position axes that count for the text; FLUX.1 has none.
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    config = {"image_model": "flux", **DEV, "hidden_size": hidden, "num_heads": hidden // 128, "depth": depth,
              "depth_single_blocks": depth_single, **newer}
    # Detection of a FLUX reads only the configuration; there are no tensors here.
    model_config = comfy.model_detection.model_config_from_unet_config(config, {})
    model_config.set_inference_dtype(torch.bfloat16, None)
    model = model_config.get_model({}, "", device=torch.device("meta"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {name: random_(torch.empty(parameter.shape, dtype=torch.bfloat16, device=device), name).cpu()
               for name, parameter in model.diffusion_model.state_dict().items()}
    model.diffusion_model.load_state_dict(weights, assign=True)
    return build.make_patcher(model, comfy.model_patcher.ModelPatcher)


def conditioning(prompts, tokens):
    """Random conditioning in the form of a text encode node's output."""
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(1, tokens, DEV["context_in_dim"], generator=g),
             {"pooled_output": torch.randn(1, DEV["vec_in_dim"], generator=g), "guidance": 3.5}] for _ in range(prompts)]


def save(patcher, folder):
    """Save as the node does. Returns the file's size in bytes."""
    from comfyui_svdquant.quant.checkpoint import native
    from comfyui_svdquant.quant.host import build

    path = os.path.join(folder, "flux_svdquant.safetensors")
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


def measure(args):
    """The result file's content."""
    from comfyui_svdquant.quant.host import quantize
    from comfyui_svdquant.quant.quantizer import presets

    depths = dict(zip(BLOCKS, args.blocks))
    began = time.perf_counter()
    patcher = new_model(args.hidden, *args.blocks)
    gc.collect()
    parameters = sum(p.numel() for p in patcher.model.diffusion_model.parameters())
    print(f"{parameters / 1e9:.2f} B parameters, {patcher.model_size() / 1e9:.2f} GB, made in {time.perf_counter() - began:.0f} s",
          flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    latent = {"samples": torch.zeros(1, 16, args.size // 8, args.size // 8)}
    prompts, recipe = conditioning(args.prompts, args.text_tokens), presets.make_recipe(args.preset, args.rank)
    stages = Stages()
    memory = HostMemory(stages)
    time_stages(stages)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        quantized, records = quantize.quantize(patcher, recipe, prompts, latent, args.steps, 0, Progress(),
                                               os.path.join(folder, "progress"))
        stages.set_kind("rest")
        seconds = time.perf_counter() - began
        file_bytes = save(quantized, folder)
    stages.switch()
    host, mapped = memory.stop()
    result = {"parameters": parameters, "model_gb": patcher.model_size() / 1e9, "seconds": seconds,
              "seconds_with_saving": time.perf_counter() - began, "stages": stages.by_label({"double": 1, "single": 1, "rest": 1}),
              "host_gb_above_the_model": host / 1e9, "host_gb_mapped_from_files": mapped / 1e9,
              "host_gb_by_stage": {label: peak[0] / 1e9 for label, peak in memory.peaks.items()},
              "file_gb": file_bytes / 1e9, "errors": errors(records),
              "notes": quantized.recipe.get("notes", [])}
    if torch.cuda.is_available():
        result |= {"gpu_gb_allocated": max(stages.allocated.values()) / 1e9, "gpu_gb_reserved": max(stages.reserved.values()) / 1e9,
                   "gpu_gb_allocated_by_stage": {label: peak / 1e9 for label, peak in stages.allocated.items()}}
    if depths != BLOCKS:
        # The time of work that is done once per model grows with its number of blocks.
        factors = {kind: BLOCKS[kind] / depths[kind] for kind in BLOCKS}
        result["stages_of_all_blocks"] = stages.by_label(factors | {"rest": sum(BLOCKS.values()) / sum(depths.values())})
        result["seconds_of_all_blocks_with_saving"] = sum(result["stages_of_all_blocks"].values())
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--vram-gb", type=float, default=12, help="limit of GPU memory in GB; 0: none")
    parser.add_argument("--blocks", type=lambda text: tuple(map(int, text.split(","))), default=tuple(BLOCKS.values()),
                        help="double and single blocks, such as 1,2")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=512, help="text tokens of each prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024, help="side in pixels of the pictures drawn for calibration")
    parser.add_argument("--hidden", type=int, default=DEV["hidden_size"], help="width of the model, a multiple of 128")
    parser.add_argument("--out", help="the result file; benchmarks/results/quantize_full_<device>.json")
    args = parser.parse_args()
    arguments = {name: value for name, value in vars(args).items() if name not in ("comfyui", "out")}
    result = {"arguments": arguments}  # recorded now, since the checkout may change during the run
    enter_comfyui(args.comfyui, args.vram_gb)
    load_pack()
    result |= description()
    with torch.inference_mode():
        result |= measure(args)
    print(json.dumps({key: value for key, value in result.items() if key != "arguments"}, indent=1))
    name = result["device"].replace("NVIDIA ", "").split()[0].lower() if torch.cuda.is_available() else "cpu"
    path = args.out or ROOT / "benchmarks" / "results" / f"quantize_full_{name}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
