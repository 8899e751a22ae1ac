"""A forward of a full-size FLUX.1-dev, 1024 x 1024, while ComfyUI is held to so many GB of GPU memory, in bf16, in fp8 and in 4 bits:

    python benchmarks/memory_caps.py --comfyui ~/ComfyUI

A cap counts all that the process takes of the GPU: weights, activations, the CUDA context. ComfyUI sees a GPU of that size, and decides
which weights stay offloaded; its code is not changed. PyTorch can't allocate beyond the cap. The weights are random. Needs a CUDA GPU of
32 GB and 64 GB of host memory; prints a table and writes benchmarks/results/memory_caps_<gpu>.json.
"""

import argparse
import contextlib
import gc
import json
import sys

import flux_model
import torch
from flux_model import DEV, random_
from machine import description, load_pack, result_path, timed

GB = 1 << 30  # as cards are sold
CAPS = 24, 16, 12, 8, 6, 4


def new_config(**smaller):
    """ComfyUI's own configuration of a FLUX.1-dev. smaller: arguments of Flux that replace FLUX.1-dev's."""
    from comfy.ldm.flux.model import FluxParams
    from comfy.model_detection import model_config_from_unet_config

    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    return model_config_from_unet_config({"image_model": "flux", **DEV, **newer, **smaller}, {})


def filled(model):
    """The BaseModel with random weights, in host memory."""
    for name, parameter in model.diffusion_model.named_parameters():
        parameter.data.copy_(random_(torch.empty_like(parameter, device=flux_model.device()), name))
    return model


def plain_patcher(dtype):
    import comfy.model_management
    import comfy.model_patcher

    config = new_config()
    config.set_inference_dtype(dtype, None if dtype == torch.bfloat16 else torch.bfloat16)
    model = filled(config.get_model({}, "", device="cpu"))
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


def packed_patcher(rank, **smaller):
    """This pack's patcher for a FLUX.1-dev. smaller: as in new_config."""
    from comfyui_svdquant.quant.families.flux1 import FAMILY
    from comfyui_svdquant.quant.host import build, patcher
    from comfyui_svdquant.quant.layers import layout

    shapes = {name: p.shape for name, p in build.empty_model(new_config(**smaller), {}, torch.bfloat16).diffusion_model.named_parameters()}
    specs = {}
    for name in FAMILY.packed_names(shapes):
        kind = FAMILY.layer(name)
        specs[name] = layout.layer_spec(kind, name, shapes[f"{name}.weight"], kind.branches * rank, True, torch.bfloat16)
    model = build.empty_model(new_config(**smaller), specs, torch.bfloat16)
    model.diffusion_model.to_empty(device="cpu")
    return build.make_patcher(filled(model), patcher.SVDQuantModelPatcher)


@contextlib.contextmanager
def held_to(cap):
    """Let ComfyUI and PyTorch use `cap` bytes of the GPU, or all of it if None."""
    if cap is None:
        yield
        return
    mem_get_info = torch.cuda.mem_get_info
    free, total = mem_get_info()
    others = total - free - torch.cuda.memory_reserved()  # the CUDA context and loaded kernels

    def capped(device=None):
        free, total = mem_get_info(device)
        return max(0, cap - (total - free)), cap

    torch.cuda.set_per_process_memory_fraction((cap - others) / total)
    torch.cuda.mem_get_info = capped
    try:
        yield
    finally:
        torch.cuda.mem_get_info = mem_get_info
        torch.cuda.set_per_process_memory_fraction(1.0)


def load(patcher):
    """Load the model as ComfyUI's sampler does."""
    import comfy.model_management
    import comfy.sampler_helpers

    comfy.model_management.unload_all_models()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    required, minimum = comfy.sampler_helpers.estimate_memory(patcher, flux_model.latent_shape(), {})
    comfy.model_management.load_models_gpu([patcher], memory_required=required, minimum_memory_required=minimum)


def measure(patcher, inputs, cap, expected, repeats):
    """({"ms": median of a forward after the first, "first_ms", "offloaded_gb", "peak_gb"}, the output). A peak above the cap, or other bits
    than `expected`, raises AssertionError."""
    with held_to(cap):
        load(patcher)
        model = patcher.model.diffusion_model
        times, y = timed(lambda: model(**inputs), repeats + 1)
        free, total = torch.cuda.mem_get_info()
        peak, taken = torch.cuda.max_memory_allocated(), total - free
    assert expected is None or torch.equal(y, expected), "A budget changed the model's output."
    assert cap is None or max(peak, taken) <= cap, f"{max(peak, taken) / GB:.2f} GB were taken of {cap / GB:.0f}."
    offloaded = sum(p.nbytes for p in model.parameters() if p.device.type == "cpu")
    return {"ms": sorted(times[1:])[repeats // 2], "first_ms": times[0], "offloaded_gb": offloaded / GB, "peak_gb": peak / GB}, y


def sweep(patcher, caps, repeats):
    """{measure's key: {"none" or a cap in GB: number}}; None where the model does not run under a cap."""
    inputs, result, expected = flux_model.inputs(), {}, None
    for cap in (None, *caps):
        try:
            found, y = measure(patcher, inputs, cap and cap * GB, expected, repeats)
        except torch.cuda.OutOfMemoryError:
            found, y = {"ms": None}, None
        expected = y if expected is None else expected
        del y
        for key, number in found.items():
            result.setdefault(key, {})[str(cap or "none")] = number
        print(cap or "none", found, flush=True)
    return result


def table(variants, caps):
    """Lines of the README's table, in milliseconds."""
    heads = ["no cap", *(f"{cap} GB" for cap in caps)]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, found in variants.items():
        numbers = [found["ms"].get(str(cap)) for cap in ("none", *caps)]
        lines.append(f"| {name} | " + " | ".join("-" if ms is None else f"{ms:.0f}" for ms in numbers) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--variants", nargs="+", choices=("4 bits", "fp8", "bf16"), default=("4 bits", "fp8", "bf16"))
    parser.add_argument("--caps", nargs="+", type=int, default=CAPS, help="in GB")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", help="the result file; benchmarks/results/memory_caps_<gpu>.json")
    args = parser.parse_args()
    sys.path.insert(0, args.comfyui)
    load_pack()
    makers = {"4 bits": lambda: packed_patcher(args.rank), "fp8": lambda: plain_patcher(torch.float8_e4m3fn),
              "bf16": lambda: plain_patcher(torch.bfloat16)}
    result = description() | {"rank": args.rank, "variants": {}}
    with torch.inference_mode():
        for name in args.variants:
            print(name, flush=True)
            result["variants"][name] = sweep(makers[name](), args.caps, args.repeats)
            gc.collect()
            with open(args.out or result_path("memory_caps", result["device"]), "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
    print(table(result["variants"], args.caps))


if __name__ == "__main__":
    main()
