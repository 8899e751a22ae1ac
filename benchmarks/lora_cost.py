"""What LoRAs cost a step of a full-size FLUX.1-dev in 4 bits:  python benchmarks/lora_cost.py --comfyui ~/ComfyUI

Random LoRAs on every W4A4 layer of flux_model.py's model, added and loaded by ComfyUI's model patcher as its LoRA nodes do. Measures a step
at 1024 x 1024, once no thread compiles or tests kernels any more, the part of it that Python takes, the time from another strength to a
model that is ready to draw, and the GPU memory. Where Python takes two thirds of a step or more, the GPU waits for it in the double blocks,
which have the most layers for their time: such a host makes every LoRA look dearer than it is. Needs a CUDA GPU of 32 GB; prints a table
and writes benchmarks/results/lora_cost_<gpu>.json: {"none": ms, a set of LoRAs: ms, ..., "python_ms": {...}, "change_s": {...},
"memory_gb": {...}, "factors_gb": {...}}.
"""

import argparse
import json
import sys
import time
import types

import flux_model
import torch
from machine import description, load_pack, result_path, timed

# {name: (number of LoRAs, rank of each, whether q, k, v and the MLP's part have factors of their own, as in diffusers' LoRAs)}
SETS = {"rank 16": (1, 16, False), "rank 64": (1, 64, False), "3 of rank 32": (3, 32, False), "rank 16, q k v apart": (1, 16, True),
        "rank 64, q k v apart": (1, 64, True), "rank 128": (1, 128, False)}


class Model(torch.nn.Module):
    """The part of ComfyUI's BaseModel that its model patcher needs."""

    def __init__(self, flux):
        super().__init__()
        self.diffusion_model = flux
        self.device = torch.device("cpu")
        self.current_patcher = None
        self.model_config = types.SimpleNamespace(unet_config={"image_model": "flux"})

    def get_dtype(self):
        return torch.bfloat16

    def memory_required(self, *args, **kwargs):
        return 0


def windows(layer, apart, hidden):
    """The (start, rows) of the factors of one LoRA on a layer."""
    n = layer.out_features
    if not apart or n not in (3 * hidden, 7 * hidden):
        return [(0, n)]
    rest = [(3 * hidden, n - 3 * hidden)] if n > 3 * hidden else []
    return [(0, hidden), (hidden, hidden), (2 * hidden, hidden), *rest]


def adapters(patcher, count, rank, apart, hidden, seed=0):
    """[patches of one LoRA], as ComfyUI's loader makes them from a file: 16-bit factors on the CPU."""
    from comfy.weight_adapter import LoRAAdapter
    from comfyui_svdquant.quant.layers.linear import SVDQuantLinear

    generator, loras = torch.Generator("cuda").manual_seed(seed), []
    for _ in range(count):
        patches = {}
        for name, layer in patcher.packed_layers().items():
            if not isinstance(layer, SVDQuantLinear):
                continue
            for start, rows in windows(layer, apart, hidden):
                up, down = (torch.randn(*shape, generator=generator, device="cuda").mul_(0.01).bfloat16().cpu()
                            for shape in ((rows, rank), (rank, layer.in_features)))
                key = f"diffusion_model.{name}.weight"
                target = key if rows == layer.out_features else (key, (0, start, rows))
                patches[target] = LoRAAdapter(set(), (up, down, float(rank), None, None, None))
        loras.append(patches)
    return loras


def numel(loras):
    return sum(factor.numel() for patches in loras for adapter in patches.values() for factor in adapter.weights[:2])


def with_loras(patcher, loras, strength):
    """A clone of the MODEL with the LoRAs, as a LoRA node returns it."""
    clone = patcher.clone()
    for patches in loras:
        clone.add_patches(patches, strength)
    return clone


def load(patcher):
    """Load a MODEL as ComfyUI does before it draws; returns the seconds that it takes."""
    import comfy.model_management

    torch.cuda.synchronize()
    start = time.perf_counter()
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def warm(flux, inputs):
    """Run the model's kernels, and wait until the others are compiled and tested."""
    timed(lambda: flux(**inputs), 2)
    flux_model.wait_for_compilation()


def step(flux, inputs, repeats=10):
    """(the median of a forward's milliseconds, that of the milliseconds until Python has launched it, the output)"""
    python_ms = []

    def launched():
        start = time.perf_counter()
        y = flux(**inputs)
        python_ms.append((time.perf_counter() - start) * 1e3)
        return y

    timed(launched, 2)
    python_ms.clear()
    times, y = timed(launched, repeats)
    return sorted(times)[repeats // 2], sorted(python_ms)[repeats // 2], y


def measure(patcher, act_bits):
    """{result file's key: value} of the model with each set of LoRAs."""
    flux = patcher.model.diffusion_model
    inputs, hidden = flux_model.inputs(), flux.hidden_size
    result = {"python_ms": {}, "change_s": {}, "memory_gb": {}, "factors_gb": {}}
    load(patcher)
    warm(flux, inputs)
    result["none"], result["python_ms"]["none"], plain = step(flux, inputs)
    weights = torch.cuda.memory_allocated()
    print(f"W4A{act_bits}: {result['none']:.1f} ms a step, {result['python_ms']['none']:.0f} of them Python", flush=True)
    for name, (count, rank, apart) in SETS.items():
        loras = adapters(patcher, count, rank, apart, hidden)
        clone = with_loras(patcher, loras, 1.0)
        load(clone)
        warm(flux, inputs)
        clone = with_loras(patcher, loras, 0.8)
        seconds = load(clone)
        result[name], result["python_ms"][name], y = step(flux, inputs)
        result["change_s"][name], result["memory_gb"][name] = seconds, (torch.cuda.memory_allocated() - weights) / 1e9
        result["factors_gb"][name] = 2 * numel(loras) / 1e9
        changed = not torch.equal(y, plain)
        print(f"{name}: {result[name]:.1f} ms ({result[name] / result['none'] - 1:+.1%}), {result['python_ms'][name]:.0f} of them Python, "
              f"ready {seconds * 1e3:.0f} ms after a change, {result['memory_gb'][name]:.3f} GB for factors of "
              f"{result['factors_gb'][name]:.3f} GB"
              + ("" if changed else "; THE LORA CHANGED NOTHING"), flush=True)
        del clone, y
        load(patcher)
        if not torch.equal(step(flux, inputs, 1)[-1], plain):
            raise RuntimeError(f"Without the LoRAs of {name} the model doesn't give its earlier output.")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--rank", type=int, default=64, help="the model's own rank, in 8 bits")
    parser.add_argument("--act-bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--out", help="the result file; benchmarks/results/lora_cost_<gpu>.json")
    args = parser.parse_args()
    sys.path.insert(0, args.comfyui)
    load_pack()
    from comfyui_svdquant.quant.host.patcher import SVDQuantModelPatcher

    result = description() | {"rank": args.rank, "act_bits": args.act_bits}
    with torch.inference_mode():
        result["bf16"] = step(flux_model.plain_flux(), flux_model.inputs())[0]
        print(f"bf16: {result['bf16']:.1f} ms a step, with LoRAs merged or without", flush=True)
        flux = flux_model.packed_flux(args.rank, args.act_bits, fused=True)
        result |= measure(SVDQuantModelPatcher(Model(flux), torch.device("cuda"), torch.device("cpu")), args.act_bits)
    with open(args.out or result_path("lora_cost", result["device"]), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
