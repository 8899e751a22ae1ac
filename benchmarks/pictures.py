"""Pictures of a trained small model, 4-bit against bf16, with this pack's recipe and others:

    python benchmarks/pictures.py --comfyui ~/ComfyUI             every recipe
    python benchmarks/pictures.py --comfyui ~/ComfyUI --knobs     this pack's recipe by preset, rank and calibration
    python benchmarks/pictures.py --comfyui ~/ComfyUI --model tiny_qwen-image.safetensors    a model of train_families.py
    python benchmarks/pictures.py --table FILE                    the Markdown table of a result file

The model and its VAE are demo/tiny_flux, on ComfyUI's own FLUX, unless --model names another. ComfyUI's own sampler draws the pictures:
euler, simple, cfg 1, picture i with seed 1000 + i, from captions on which no recipe is calibrated. All recipes calibrate on the same
prompts, steps and seed. 4-bit layers run through cuda/reference.py, so that every recipe's scales are used exactly. With CUDA, one more row
runs this pack's recipe through the kernels. The result file is written after every row, and --resume continues it.
"""

import argparse
import fnmatch
import functools
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import tiny_families
import torch
from machine import ROOT, description, load_pack
from picture_metrics import interval, latent_error

DEMO = ROOT / "demo" / "tiny_flux"
FLUX1 = str(DEMO / "tiny_flux.safetensors")
SIDE = 24  # latents; 192 pixels
FIRST_SEED = 1000  # seed of the first picture; calibration uses the seeds from 0 on
CALIBRATION_CAPTIONS, PICTURE_CAPTIONS = 1, 2  # seeds of the two lists of captions
MOST_CALIBRATION = 16  # calibration prompts, from which no picture is drawn
BASE, OURS = "DeepCompressor default", "ours: best"
GPTQ, NARROW, MODULATED = "DeepCompressor + GPTQ", ", single blocks' branches half as wide", ", modulation layers as ours"
FLOOR = ("bf16, another attention kernel", "bf16, batches an eighth as large", "bf16, other arithmetic")
EQUAL = 119  # dB; pictures above it are equal, since psnr's bound is 120
BITS = {"w4a4": 4, "w4a8": 8}
# tokens: tokens per input channel of a layer for GPTQ and the refit; propagate: the earlier blocks' outputs on which a block is calibrated
KNOBS = {"preset": ("data-free", "fast", "best", "slow"), "rank": (16, 32, 64, 128), "prompts": (1, 2, 4, 8, 16),
         "steps": (1, 2, 4, 8, 20), "tokens": (1, 2, 4, 16), "propagate": ("exact", "quantized")}
MIXED, INT8 = "mixed, 4 of 28 layers", "single_blocks.[2-5].linear1 = int8"  # those that lose most by picture_sources.py


def captions(count, seed, taken=()):
    """`count` different captions of the small FLUX's grammar that are not among `taken`."""
    from tiny_flux import scenes

    drawn = scenes.sample(2 * count + len(taken), torch.Generator().manual_seed(seed)).captions()
    return [caption for caption in dict.fromkeys(drawn) if caption not in taken][:count]


def enter_comfy(folder, device):
    """Make ComfyUI, the pack and the demo's modules importable. Call it once per process, since it loads the pack."""
    from host import launch
    from tiny_flux import host

    launch.define_torchvision_ops()
    launch.define_torchaudio()
    host.find_comfyui(folder)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    load_pack()


class Studio:
    """The bf16 model, its pictures, and the comparison of other pictures with them."""

    def __init__(self, args):
        import comfy.model_management
        from comfyui_svdquant.quant.host import loader, model_family

        from tiny_flux import train

        self.args = args
        self.device = comfy.model_management.get_torch_device()
        self.known = captions(MOST_CALIBRATION, CALIBRATION_CAPTIONS)
        self.captions = captions(args.prompts, PICTURE_CAPTIONS, self.known)
        dtype = getattr(torch, args.compute) if args.compute else None
        self.patcher = loader.load_model(args.model, dtype)
        self.tiny = tiny_families.BY_IMAGE_MODEL[model_family.family_of(self.patcher.model).image_model]
        self.vae = train.load_vae(str(DEMO / "tiny_vae.safetensors"), self.device)
        self.latents = self.draw(self.patcher)
        self.pictures = self.decode(self.latents)

    def draw(self, patcher, batch=None):
        """(n, 16, SIDE, SIDE) latents in the VAE's scale, one per caption, drawn `batch` at a time."""
        import comfy.sample

        from tiny_flux import words

        latents, batch = [], batch or self.args.batch
        for start in range(0, len(self.captions), batch):
            context, pooled = words.embed(torch.tensor([words.word_ids(c) for c in self.captions[start:start + batch]]))
            empty = self.tiny.pack(torch.zeros(len(context), 16, SIDE, SIDE))
            noise = torch.cat([comfy.sample.prepare_noise(empty[:1], FIRST_SEED + start + i) for i in range(len(context))])
            prompt = [[context, {"pooled_output": pooled}]]
            latents.append(comfy.sample.sample(patcher, noise, self.args.steps, 1.0, "euler", "simple", prompt, prompt, empty,
                                               disable_pbar=True, seed=0))
        return self.tiny.unpack(self.patcher.model.process_latent_in(torch.cat(latents).float()))

    def decode(self, latents):
        """(n, 3, 192, 192) in [0, 1]."""
        from tiny_flux import train

        return torch.cat([train.decode(self.vae, part.to(self.device)) for part in latents.split(self.args.batch)])

    def compare(self, latents):
        """{"psnr", "ssim", "latent_error": [value of each picture]} against bf16."""
        from comfyui_svdquant.quant.picture_metrics import psnr, ssim

        pictures = self.decode(latents)
        return {"psnr": psnr(pictures, self.pictures).tolist(), "ssim": ssim(pictures, self.pictures).tolist(),
                "latent_error": latent_error(latents, self.latents).tolist()}

    def evaluate(self, quantized_model, by_kernels=False):
        """{"w4a4", "w4a8": compare(...)} of a 4-bit model. Layers to which the recipe gives 8-bit activations have them in both."""
        from comfyui_svdquant.quant.layers.linear import SVDQuantLinear

        layers = [layer for layer in quantized_model.packed_layers().values() if isinstance(layer, SVDQuantLinear)]
        found = {}
        with nullcontext() if by_kernels else by_definition():
            for key, bits in BITS.items():
                for layer in layers:
                    layer.act_bits = layer.spec.act_bits or bits
                found[key] = self.compare(self.draw(quantized_model))
        return found

    def calibration(self, prompts):
        """The conditioning and the latent for quantize."""
        from tiny_flux import words

        entries = [[context, {"pooled_output": pooled}] for context, pooled in map(words.encode, self.known[:prompts])]
        return entries, {"samples": self.tiny.pack(torch.zeros(1, 16, SIDE, SIDE))}


@contextmanager
def by_definition():
    """A context in which 4-bit layers run through cuda/reference.py on any device. The int8 kernels would round scales to multiples of a
    row scale, which this pack's scales are already and others' are not."""
    from comfyui_svdquant.cuda import dispatch

    on_gpu, dispatch.on_gpu = dispatch.on_gpu, lambda x: False
    try:
        yield
    finally:
        dispatch.on_gpu = on_gpu


# --- rows: each function returns {name: result} --------------------------------------------------------------------------------


def noise_floor(studio, *names):
    """The same bf16 model computed differently: with another attention kernel, smaller batches or another arithmetic."""
    from comfy.ldm.modules import attention
    from comfyui_svdquant.quant.host import loader, weights

    def other_attention(usual, *args, **kwargs):
        plain = usual is attention.attention_basic
        return (attention.attention_pytorch if plain else attention.attention_basic)(*args, **kwargs)

    attending = studio.patcher.clone()
    attending.model_options["transformer_options"]["optimized_attention_override"] = other_attention
    usual = weights.compute_dtype(studio.patcher)
    dtype = torch.bfloat16 if usual == torch.float32 else torch.float32
    other = loader.load_model(studio.args.model, dtype)
    drawn = [studio.draw(attending), studio.draw(studio.patcher, max(1, studio.args.batch // 8)), studio.draw(other)]
    return {name: {"arithmetic": [str(usual), str(dtype)], "w4a4": studio.compare(latents)} for name, latents in zip(names, drawn)}


def others(studio, *names, narrow=False, modulated=False):
    """Rows of the other recipes. A row's time includes the rows before it, whose results it may use. narrow: as in by_recipes; modulated:
    the W4A16 layers come from the preset best instead of round-to-nearest."""
    import model_recipes
    import recipes
    from comfyui_svdquant.quant.host import calibrate

    args, rows, plain = studio.args, {}, [name.removesuffix(NARROW).removesuffix(MODULATED) for name in names]
    entries, latent = studio.calibration(args.calibration_prompts)
    inputs, seconds = model_recipes.timed(lambda: model_recipes.layer_inputs(studio.patcher, calibrate.record_trajectory(
        studio.patcher, entries, latent, args.calibration_steps, 0, model_recipes.Silent())))
    chosen = [recipes.OTHERS[name] for name in plain]
    rest = ("best", entries, latent, args.calibration_steps) if modulated else ("naive",)
    made = model_recipes.by_recipes(chosen, studio.patcher, inputs, args.rank, rest, narrow)
    for name, recipe, (quantized_model, took) in zip(names, plain, made):
        seconds += took
        cost = {"seconds": seconds, "megabytes": model_recipes.megabytes(quantized_model)}
        with recipes.activations(recipe):
            rows[name] = cost | studio.evaluate(quantized_model)
        if name == BASE:
            rows[BASE + recipes.OUR_CODES] = cost | studio.evaluate(quantized_model)
    return rows


def ours(studio, name, preset="best", rank=None, prompts=None, steps=None, exceptions="", **changes):
    """A row of the node's recipe, with `changes` to its fields. rank: of its branches, which have 8 bits unless changed; by default they
    are as large as others' in 16 bits. With CUDA, `OURS` also runs through the kernels."""
    import model_recipes
    from comfyui_svdquant.quant.host import quantize
    from comfyui_svdquant.quant.quantizer import presets

    args = studio.args
    recipe = replace(presets.make_recipe(preset, rank or 2 * args.rank, exceptions), **changes)
    entries, latent = studio.calibration(prompts or args.calibration_prompts)
    (quantized_model, _), seconds = model_recipes.timed(quantize.quantize, studio.patcher, recipe, entries, latent,
                                             steps or args.calibration_steps, 0, model_recipes.Silent())
    cost = {"seconds": seconds, "megabytes": model_recipes.megabytes(quantized_model)}
    rows = {name: cost | studio.evaluate(quantized_model)}
    if name == OURS and studio.device.type == "cuda":
        rows[f"{OURS}, by the kernels"] = cost | studio.evaluate(quantized_model, by_kernels=True)
    return rows


def recipe_jobs(args):
    """[(function, row names, settings)] of the recipes, the longest first."""
    narrow = f"*.linear1 = {2 * args.rank}, *.linear2 = {2 * args.rank}"
    in_single_blocks = [(others, (BASE + NARROW,), {"narrow": True}), (ours, (OURS + NARROW,), {"exceptions": narrow})]
    return [(others, (BASE, GPTQ), {}), (others, (BASE + MODULATED,), {"modulated": True}), (ours, ("ours: slow",), {"preset": "slow"}),
            *(in_single_blocks if args.model == FLUX1 else ()),
            *((ours, (f"ours: {preset}",), {"preset": preset}) for preset in ("best", "fast", "data-free")),
            in_16_bits(args.rank, f"{OURS}, "),
            (noise_floor, FLOOR, {}), *((others, (name,), {}) for name in ("naive rounding", "SmoothQuant", "SVDQuant, one shot"))]


def knob_jobs(args):
    """[(function, row names, settings)] of the knobs, one changed at a time; the row of the defaults belongs to every knob."""
    from comfyui_svdquant.quant.quantizer.calibration import TOKENS_PER_INPUT

    usual = {"rank": 2 * args.rank, "prompts": args.calibration_prompts, "steps": args.calibration_steps, "tokens": TOKENS_PER_INPUT,
             "preset": "best", "propagate": "exact"}
    changed = [(knob, value) for knob, values in KNOBS.items() for value in values if value != usual[knob]]
    return [(ours, ("defaults",), {}), in_16_bits(args.rank, ""), (ours, (MIXED,), {"exceptions": INT8}),
            *((ours, (f"{knob} {value}",), {knob: value}) for knob, value in changed)]


def in_16_bits(rank, before):
    """The job of this pack's recipe with branches in 16 bits. before: the beginning of the row's name."""
    return ours, (f"{before}rank {rank} in 16 bits",), {"rank": rank, "branch_bits": 16}


# --- running ---------------------------------------------------------------------------------------------------------


def start_worker(args):
    """Initialize one process of several: limit its threads to its part of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    enter_comfy(args.comfyui, args.device)
    work.args = args


@functools.cache
def studio_of_process():
    return Studio(work.args)


def work(job):
    """{name: result} of one job on this process's Studio. A failing job prints its traceback to stderr and returns nothing."""
    function, names, settings = job
    try:
        with torch.inference_mode():
            return function(studio_of_process(), *names, **settings)
    except Exception:  # the other rows continue
        traceback.print_exc()
        return {}


def rows_of(args, jobs):
    """Yield {name: result} of each job when it ends; args.jobs of them run at a time."""
    if args.jobs == 1:
        work.args = args
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, start_worker, (args,)) as pool:
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            yield done.result()


def mean(values):
    return sum(values) / len(values)


def gain(found, name, base, bits=("w4a4", "w4a4")):
    """The mean difference in dB of two rows over the pictures, and its 95 % interval, as text. bits: of the row and of the base."""
    differences = [a - b for a, b in zip(found[name][bits[0]]["psnr"], found[base][bits[1]]["psnr"])]
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(mean(differences), *interval(differences))


def in_order(found):
    """The rows in the table's order: the noise of bf16, other recipes, this pack's recipes; or the knobs."""
    first = ["bf16", "naive", "SmoothQuant", "SVDQuant", BASE, GPTQ, "ours: data-free", "ours: fast", OURS, "ours",
             "defaults", "preset", "rank", "prompts", "steps", "tokens", "propagate", "mixed"]

    def place(name):
        number = next((int(word) for word in name.split() if word.isdecimal()), 0)
        return next(i for i, word in enumerate(first) if name.startswith(word)), number, name

    return {name: found[name] for name in sorted(found, key=place)}


def cell(found, name, key, measure, base):
    """The table's cells of a row with 4-bit or 8-bit activations (key)."""
    values = found[name].get(key)
    if values is None:
        return ""
    if measure == "gain":
        return gain(found, name, base, (key, "w4a4")) if base in found and not name.startswith("bf16") else ""
    if measure == "psnr":
        return "equal" if min(values["psnr"]) > EQUAL else f"{mean(values['psnr']):.2f}"
    return f"{mean(values[measure]):.2%}" if measure == "latent_error" else f"{mean(values[measure]):.4f}"


def table(found):
    """The results as Markdown: means over the pictures, and the interval of the difference from DeepCompressor's default at W4A4, or, for
    knobs, from the defaults."""
    knobs = "defaults" in found
    base = "defaults" if knobs else BASE
    columns = ([("w4a4", "psnr"), ("w4a4", "gain"), ("w4a4", "latent_error"), ("w4a8", "psnr")] if knobs else
               [(key, measure) for key in BITS for measure in ("psnr", "gain", "ssim", "latent_error")])
    words = {"psnr": "PSNR, dB", "gain": f"to {base}, W4A4", "ssim": "SSIM", "latent_error": "latent error"}
    head = [f"{key.upper()}: {words[measure]}" if measure == "psnr" else words[measure] for key, measure in columns]
    lines = ["| | " + " | ".join([*head, "MB", "s"]) + " |", "|" + "---|" * (len(columns) + 3)]
    for name, row in in_order(found).items():
        cost = [f"{row['megabytes']:.2f}", f"{row['seconds']:.0f}"] if "seconds" in row else ["", ""]
        lines.append(f"| {name} | " + " | ".join([cell(found, name, *column, base) for column in columns] + cost) + " |")
    if BASE in found and OURS in found:
        lines += ["", f"Both at W4A8, {OURS} is {gain(found, OURS, BASE, ('w4a8', 'w4a8'))} dB from {BASE}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="ComfyUI's folder (default: COMFYUI_PATH)")
    parser.add_argument("--model", default=FLUX1, help="a small model that reads the demo's captions (default: the demo's FLUX)")
    parser.add_argument("--knobs", action="store_true", help="this pack's recipe by preset, rank and calibration")
    parser.add_argument("--prompts", type=int, default=32, help="pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="pictures drawn at a time")
    parser.add_argument("--rank", type=int, default=32, help="rank of branches in 16 bits; those in 8 have twice as much")
    parser.add_argument("--calibration-prompts", type=int, default=8)
    parser.add_argument("--calibration-steps", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute", choices=("bfloat16", "float32"),
                        help="arithmetic of all that is not 4-bit, in the reference too (default: ComfyUI's choice for the device)")
    parser.add_argument("--only", default="*", help="pattern of the rows to make")
    parser.add_argument("--jobs", type=int, default=1, help="rows made at a time, each by a process of its own")
    parser.add_argument("--out", help="the result file; benchmarks/results/pictures[_<model>][_knobs]_<device>.json")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the result file has, of a run with the same arguments")
    parser.add_argument("--table", metavar="FILE", help="print a result file's table, and do nothing else")
    args = parser.parse_args()
    if args.table:
        with open(args.table, encoding="utf-8") as file:
            print(table(json.load(file)["results"]))
        return 0
    return run(args)


def recorded(args, *others):
    """A result file's description of the run: the arguments but for places, `others`, and the model's folder."""
    left_out = ("comfyui", "out", "table", *others)
    return {key: value for key, value in vars(args).items() if key not in left_out} | {"model": os.path.basename(args.model)}


def suffix(model):
    """The part of a result file's name that says the model; none for the demo's FLUX."""
    return "" if model == FLUX1 else f"_{os.path.splitext(os.path.basename(model))[0]}"


def run(args):
    start = time.perf_counter()
    enter_comfy(args.comfyui, args.device)
    machine = torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower() if args.device == "cuda" else "cpu"
    path = args.out or ROOT / "benchmarks" / "results" / f"pictures{suffix(args.model)}{'_knobs' if args.knobs else ''}_{machine}.json"
    record = description() | {"arguments": recorded(args, "resume"), "results": {}}
    if args.resume and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            record["results"] = json.load(file)["results"]
    jobs = [job for job in (knob_jobs(args) if args.knobs else recipe_jobs(args))
            if any(name not in record["results"] and fnmatch.fnmatchcase(name, args.only) for name in job[1])]
    for done, rows in enumerate(rows_of(args, jobs), 1):
        record["results"] = in_order(record["results"] | rows)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)
        for name, row in rows.items():
            figures = [f"{key} {mean(row[key]['psnr']):.2f} dB" for key in BITS if key in row]
            cost = [f"quantized in {row['seconds']:.1f} s"] if "seconds" in row else []
            print(f"[{time.perf_counter() - start:5.0f} s] {done}/{len(jobs)}  {name}: {', '.join(figures + cost)}", flush=True)
    print(table(record["results"]))
    return 0 if all(name in record["results"] for _, names, _ in jobs for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
