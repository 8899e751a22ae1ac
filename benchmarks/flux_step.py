"""One forward of a full-size FLUX.1-dev, 1024 x 1024, in bf16 and in 4 bits:  python benchmarks/flux_step.py --comfyui ~/ComfyUI

The weights are random. The classes are ComfyUI's own, with this pack's layers in place of its linears. Needs a CUDA GPU of 32 GB; prints a
table and writes benchmarks/results/flux_step_<gpu>.json.
"""

import argparse
import gc
import json
import sys

import torch
from machine import ROOT, description, load_pack

DEV = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56],
       "mlp_ratio": 4.0, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096, "vec_in_dim": 768, "qkv_bias": True,
       "guidance_embed": True, "theta": 10000}
LATENT = 1, 16, 128, 128  # the shape of a latent for 1024 x 1024 pixels


def new_flux(operations, device):
    from comfy.ldm.flux.model import Flux, FluxParams

    # Newer ComfyUIs also ask for the position axes that count for the text; FLUX.1 has none.
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    return Flux(dtype=torch.bfloat16, device=device, operations=operations, **DEV, **newer)


def random_(tensor, name):
    """Fill a tensor of the model with values that keep activations at ordinary sizes."""
    if tensor.dtype == torch.int8:
        return tensor.copy_(torch.randint(-128, 128, tensor.shape, dtype=torch.int8, device=tensor.device))
    if name.endswith("weight_scale"):
        return tensor.copy_(torch.randint(8, 17, tensor.shape, device=tensor.device) * 2.0**-12)
    if name.endswith(("norm.scale", "norm.weight", "smooth_factor")):
        return tensor.fill_(1)
    return tensor.normal_(std=0.002 if name.endswith(("bias", "zeros")) else 0.02)


def plain_flux():
    import comfy.ops

    flux = new_flux(comfy.ops.disable_weight_init, "cuda")
    for name, parameter in flux.named_parameters():
        random_(parameter.data, name)
    return flux


def packed_flux(rank):
    from comfyui_svdquant.quant.families.flux1 import FAMILY
    from comfyui_svdquant.quant.host import build, operations
    from comfyui_svdquant.quant.layers import layout

    flux = new_flux(operations.Operations, "meta")
    shapes = {name: parameter.shape for name, parameter in flux.named_parameters()}
    for name in FAMILY.packed_names(shapes):
        kind = FAMILY.layer(name)
        build.swap(flux, name, layout.layer_spec(kind, name, shapes[f"{name}.weight"], kind.branches * rank, True, torch.bfloat16))
    build.take_over_activations(FAMILY, flux)
    flux.to_empty(device="cuda")
    for name, parameter in flux.named_parameters():
        random_(parameter.data, name)
    return flux


def inputs():
    """The inputs of a forward at 1024 x 1024, batch 1."""
    return {"x": torch.randn(*LATENT, device="cuda").bfloat16(), "timestep": torch.full((1,), 0.5, device="cuda").bfloat16(),
            "context": torch.randn(1, 512, 4096, device="cuda").bfloat16(), "y": torch.randn(1, 768, device="cuda").bfloat16(),
            "guidance": torch.full((1,), 3.5, device="cuda").bfloat16()}


def timed_forwards(flux, kwargs, count):
    """(milliseconds of each of `count` forwards, the last output)"""
    times = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        y = flux(**kwargs)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times, y


def measure(make, repeats=8):
    """{"ms": median of a forward, "first_s", "weights_gb", "peak_gb"}"""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    flux = make()
    times, _ = timed_forwards(flux, inputs(), repeats + 1)
    return {"ms": sorted(times[1:])[repeats // 2], "first_s": times[0] / 1e3,
            "weights_gb": sum(p.nbytes for p in flux.parameters()) / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--out", help="the result file; benchmarks/results/flux_step_<gpu>.json")
    args = parser.parse_args()
    sys.path.insert(0, args.comfyui)
    load_pack()
    from comfyui_svdquant.quant.layers.preparation import set_act_bits

    def with_bits(act_bits):
        flux = packed_flux(args.rank)
        set_act_bits(flux, act_bits)
        return flux

    variants = {"bf16": plain_flux, "W4A8": lambda: with_bits(8), "W4A4": lambda: with_bits(4)}
    result = description() | {"rank": args.rank, "variants": {}}
    with torch.inference_mode():
        for name, make in variants.items():
            found = result["variants"][name] = measure(make)
            print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    gpu = result["device"].replace("NVIDIA ", "").split()[0].lower()
    with open(args.out or ROOT / "benchmarks" / "results" / f"flux_step_{gpu}.json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
