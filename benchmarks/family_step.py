"""One step of full-size models of the newer families, in bf16 and by this pack:

    python benchmarks/family_step.py --comfyui ~/ComfyUI                                       # all models, 1024 x 1024, batch 1
    python benchmarks/family_step.py --comfyui ~/ComfyUI --models z-image --variants bf16-eager ours-eager

The weights are random; the models are ComfyUI's own classes, made as the loader makes them. A variant is

    bf16-eager     ComfyUI's model
    fp8-compiled   a scale for every token and output channel, with fast accumulation; W4A16 layers stay in bf16. torch.compile makes one
                   code for all blocks of a kind (regional compilation, which PyTorch recommends for repeated blocks)
    ours-eager     this pack's layers in W4A8, in fused blocks where the family has some
    ours-plain     the same in ComfyUI's own blocks
    ours-w4a4      ours-eager in W4A4

Each is merged into the result file as soon as it is measured; one that has no memory, or would begin after --seconds, is left out. Needs a
CUDA GPU that holds the largest model in bf16.
"""

import argparse
import functools
import gc
import os
import time
from datetime import datetime, timezone

import flux_model
import fp8_rowwise
import step_entries
import torch
from family_models import MODELS, described, flux2, on_meta, qwen_image, z_image
from machine import description, load_pack, result_path, synchronize, timed

VARIANTS = "bf16-eager", "fp8-compiled", "ours-eager", "ours-plain", "ours-w4a4"
FUSED = "SVDQUANT_FUSED"
STEPS = 8
SMALL = {"flux2-klein-9b": flux2(256, 1, 1, 128), "z-image": z_image(256, 1), "qwen-image": qwen_image(1, 2)}  # for tests


def new_model(model, rank=None):
    """(the diffusion model of a Model with random values on the GPU, its Family). rank: of the branches, in 8 bits; None for bf16."""
    from comfyui_svdquant.quant.host import build
    from comfyui_svdquant.quant.layers import layout

    family, shapes, model_config = described(model.image_model, model.config)
    if rank is None:
        made = on_meta(model_config)
    else:
        specs = {name: layout.layer_spec(layer, name, shapes[f"{name}.weight"], rank * layer.branches, layer.bias, torch.bfloat16, 8)
                 for name in family.packed_names(shapes) for layer in (family.layer(name),)}
        made = build.empty_model(model_config, specs, torch.bfloat16)
    filled = flux_model.filled(made.diffusion_model.to_empty(device=flux_model.device()))
    return filled if rank is None else with_shared_smoothing(filled, specs, family), family


def with_shared_smoothing(diffusion_model, names, family):
    """The model, whose packed layers `names` that read one tensor have one smoothing, as the quantizer gives them."""
    for name in names:
        layer, first = (diffusion_model.get_submodule(each) for each in (name, family.first_reader(name)))
        if layer is not first:
            layer.weight_smooth_factor.data.copy_(first.weight_smooth_factor)
    return diffusion_model


def variant_of(model, variant, rank):
    """A variant of a Model: its diffusion model."""
    from comfyui_svdquant.quant.host import fused_blocks
    from comfyui_svdquant.quant.layers import preparation

    kind, how = variant.split("-")
    if kind == "ours":
        os.environ[FUSED] = "0" if how == "plain" else "1"
        fused_blocks.fused_class.cache_clear()
        made, family = new_model(model, rank)
        preparation.set_act_bits(made, 4 if how == "w4a4" else 8)
        preparation.prepare(made, flux_model.device())
        others = fused_blocks.preparations(made, torch.bfloat16, flux_model.device(), family.tokens)
        for future in preparation.warm_up(made, flux_model.device(), torch.bfloat16, family.tokens, others):
            future.result()
        return made
    made, family = new_model(model)
    return with_compiled_blocks(in_fp8(made, family), family) if kind == "fp8" else made


def in_fp8(diffusion_model, family):
    """The model, whose layers that this pack has in W4A4 are in fp8."""
    from comfyui_svdquant.quant.families.family import Packing

    for name in family.packed_names(dict(diffusion_model.named_parameters())):
        if family.layer(name).packing is not Packing.W4A16:
            parent, _, child = name.rpartition(".")
            parent = diffusion_model.get_submodule(parent)
            setattr(parent, child, fp8_rowwise.Linear(getattr(parent, child)))
    return diffusion_model


def with_compiled_blocks(diffusion_model, family, backend="inductor"):
    """The model, whose blocks torch.compile compiles when they first run. Blocks of a kind share the code of the first, since PyTorch takes
    their parameters as its inputs. What it fuses lies within a block, and little runs outside them, so a step should be as fast as that of
    a model compiled as a whole; compilation takes as long for one block of a kind as for all."""
    torch._dynamo.reset()
    for _, block in family.running_blocks(diffusion_model):
        block.compile(dynamic=False, backend=backend)
    return diffusion_model


def inputs(model, pixels):
    """The positional and keyword arguments of a forward."""
    def normal(*shape):
        return torch.randn(*shape, device=flux_model.device()).bfloat16()

    tokens, width = model.text
    more = {name: value if isinstance(value, int) else normal(1).fill_(value) for name, value in model.more.items()}
    if model.pooled:
        more["y"] = normal(1, model.pooled)
    return (normal(*model.latent(pixels)), normal(1).fill_(0.5), normal(1, tokens, width)), more


def measure(model, variant, pixels, rank):
    """{"ms": median of a step, "least_ms", "most_ms", "first_s": seconds until the first step is done, with torch.compile's compilation and
    without that of this pack's kernels, "weights_gb", "peak_gb"}. Raises ValueError if the model's output is not finite."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    made = variant_of(model, variant, rank)
    gc.collect()
    weights = torch.cuda.memory_allocated() - before if on_gpu else 0
    arguments, more = inputs(model, pixels)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    y = made(*arguments, **more)
    synchronize()
    first = time.perf_counter() - start
    if not y.isfinite().all():
        raise ValueError(f"The output of {variant} is not finite.")
    timed(functools.partial(made, *arguments, **more), 3)  # steps that may be recorded are, by the third
    times = sorted(timed(functools.partial(made, *arguments, **more), STEPS)[0])
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    found = {"ms": times[len(times) // 2], "least_ms": times[0], "most_ms": times[-1], "first_s": first, "weights_gb": weights / 1e9,
             "peak_gb": peak / 1e9}
    return {key: round(value, 3) for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["flux2-klein-9b", "z-image", "qwen-image"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64, help="of low-rank branches in 8 bits")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no variant after this time")
    parser.add_argument("--small", action="store_true", help="models of one block, to try the benchmark")
    parser.add_argument("--out", help="the result file; benchmarks/results/family_step_<gpu>.json")
    args = parser.parse_args()
    start = time.perf_counter()
    from host import launch

    launch.enter(args.comfyui, *([] if torch.cuda.is_available() else ["--cpu"]))
    load_pack()
    import comfyui_version

    run = description()
    device = run.pop("device")
    run |= {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"), "comfyui": comfyui_version.__version__, "rank": args.rank}
    for name, variant in ((name, variant) for name in args.models for variant in args.variants):
        if time.perf_counter() - start > args.seconds:
            print(f"{name} {variant}: no time left", flush=True)
            continue
        entry = {"variant": f"{name} {variant}", "pixels": args.pixels, "batch": 1}
        try:
            with torch.inference_mode():
                entry |= measure((SMALL if args.small else MODELS)[name], variant, args.pixels, args.rank)
        except torch.cuda.OutOfMemoryError:
            entry["not_measured"] = "out of memory"
        step_entries.add(args.out or result_path("family_step", device), device, [run | entry])
        print(" | ".join(step_entries.cells(entry)), f"| {time.perf_counter() - start:.0f} s", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
