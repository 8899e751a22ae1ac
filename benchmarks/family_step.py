"""One step of full-size models of the newer families, in bf16 and by this pack:

    python benchmarks/family_step.py --comfyui ~/ComfyUI                                       # all models, 1024 x 1024, batch 1
    python benchmarks/family_step.py --comfyui ~/ComfyUI --models z-image --variants bf16-eager ours-eager

The weights are random; the models are ComfyUI's own classes, made as the loader makes them. A variant is

    bf16-eager     ComfyUI's model
    fp8-compiled   a scale for every token and output channel, with fast accumulation, under torch.compile; W4A16 layers stay in bf16
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
from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

import flux_model
import fp8_rowwise
import step_entries
import torch
from machine import description, load_pack, result_path, synchronize, timed

VARIANTS = "bf16-eager", "fp8-compiled", "ours-eager", "ours-plain", "ours-w4a4"
FUSED = "SVDQUANT_FUSED"
STEPS = 8


class Model(NamedTuple):
    """image_model: of the family; config: of the published model; text: (tokens, width) of its text; latent(pixels): the shape of a latent;
    more: other arguments of a forward."""

    image_model: str
    config: dict
    text: tuple
    latent: Callable
    more: dict


def flux2(hidden, double, single, width, guidance=False):
    config = {"axes_dim": [32] * 4, "theta": 2000, "mlp_ratio": 3.0, "patch_size": 1, "out_channels": 128, "in_channels": 128,
              "hidden_size": hidden, "num_heads": hidden // 128, "depth": double, "depth_single_blocks": single, "context_in_dim": width,
              "guidance_embed": guidance}
    return Model("flux2", config, (512, width), lambda pixels: (1, 128, pixels // 16, pixels // 16), {"guidance": 3.5} if guidance else {})


def qwen_image(layers, heads):
    config = {"in_channels": 64, "out_channels": 16, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 128,
              "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56], "default_ref_method": "index", "use_additional_t_cond": False}
    return Model("qwen_image", config, (256, 3584), lambda pixels: (1, 16, 1, pixels // 8, pixels // 8), {})


def z_image(dim, layers):
    config = {"dim": dim, "n_layers": layers, "n_refiner_layers": 2, "n_heads": dim // 128, "n_kv_heads": dim // 128, "in_channels": 16,
              "patch_size": 2, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
              "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0, "pad_tokens_multiple": 32}
    return Model("lumina2", config, (256, 2560), lambda pixels: (1, 16, pixels // 8, pixels // 8), {"num_tokens": 256})


MODELS = {"flux2-klein-9b": flux2(4096, 8, 24, 12288), "z-image": z_image(3840, 30), "qwen-image": qwen_image(60, 24),
          "flux2-klein-4b": flux2(3072, 5, 20, 7680), "flux2-dev": flux2(6144, 8, 48, 15360, guidance=True)}
SMALL = {"flux2-klein-9b": flux2(256, 1, 1, 128), "z-image": z_image(256, 1), "qwen-image": qwen_image(1, 2)}  # for tests


def described(image_model, config):
    """(Family, {name: shape} of its 16-bit model, the host's configuration) of a model with these sizes."""
    import comfy.model_detection
    from comfyui_svdquant.quant import families
    from comfyui_svdquant.quant.host import build

    family = families.of_image_model(image_model)
    config = {**family.configuration.fixed, **config}
    shapes = family.tensors(config)
    tensors = build.shapes_as_tensors(shapes)
    host = family.configuration.added_to(comfy.model_detection.detect_unet_config(tensors, ""), config)
    return family, shapes, comfy.model_detection.model_config_from_unet_config(host, tensors)


def new_model(model, rank=None):
    """(the diffusion model of a Model with random values on the GPU, its Family). rank: of this pack's layers; None for bf16."""
    from comfyui_svdquant.quant.host import build
    from comfyui_svdquant.quant.layers import layout

    family, shapes, model_config = described(model.image_model, model.config)
    if rank is None:
        model_config.set_inference_dtype(torch.bfloat16, None)
        made = model_config.get_model({}, "", device=torch.device("meta"))
    else:
        specs = {name: layout.layer_spec(layer, name, shapes[f"{name}.weight"], rank * layer.branches, layer.bias, torch.bfloat16)
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
    """A variant of a Model: its diffusion model, or a function that torch.compile made of it."""
    from comfyui_svdquant.quant.families.family import Packing
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
    if kind == "fp8":
        for name in family.packed_names(dict(made.named_parameters())):
            if family.layer(name).packing is not Packing.W4A16:
                parent, _, child = name.rpartition(".")
                parent = made.get_submodule(parent)
                setattr(parent, child, fp8_rowwise.Linear(getattr(parent, child)))
        torch._dynamo.reset()
        return torch.compile(made, dynamic=False)
    return made


def inputs(model, pixels):
    """The positional and keyword arguments of a forward."""
    def normal(*shape):
        return torch.randn(*shape, device=flux_model.device()).bfloat16()

    tokens, width = model.text
    more = {name: value if isinstance(value, int) else normal(1).fill_(value) for name, value in model.more.items()}
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
    parser.add_argument("--rank", type=int, default=32)
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
