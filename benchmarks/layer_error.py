"""Output error of quantized linears on held-out tokens, for this pack's recipe and others:  python benchmarks/layer_error.py

Prints a table and writes benchmarks/results/layer_error_k<k>.json. --k 3072 --n 3072 and --k 12288 --n 3072 are FLUX.1's widths
and need a GPU. --knobs measures the effect of each setting of this pack's recipe instead, into knobs_k<k>.json.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from machine import ROOT, commit, load_pack

BASE = "best"  # the knobs' default row: this preset with --rank and all --tokens
KNOB_RANKS = (16, 64, 128, 256)
KNOB_TOKENS = (0.25, 0.5, 1, 2, 4)  # calibration tokens per input channel
KNOB_PRESETS = ("data-free", "fast", "slow")


def measured(layer, name, recipe, rank, recipes):
    """{"errors": with 4-bit activations, "errors_w4a8": with 8-bit ones, "seconds"} of one layer under one recipe."""
    start = time.perf_counter()
    tensors = recipe(layer, rank)
    if layer.weight.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    spec = recipes.spec_of(layer, tensors["weight_proj_up"].shape[1])
    with recipes.activations(name):
        return {"errors": recipes.error(layer, tensors, spec), "errors_w4a8": recipes.error(layer, tensors, spec, 8),
                "seconds": seconds}


def recipe_runs(_args, recipes):
    """[(name, recipe, rank or None for --rank, calibration tokens or None for all)]"""
    return [(name, recipe, None, None) for name, recipe in recipes.RECIPES.items()]


def knob_runs(args, recipes):
    """The same for each knob alone, with the others as in BASE."""
    best = recipes.ours("best")
    return [(BASE, best, None, None), *((f"rank {rank}", best, rank, None) for rank in KNOB_RANKS),
            *((f"{tokens:g} K tokens", best, None, int(tokens * args.k)) for tokens in KNOB_TOKENS),
            *((f"preset {preset}", recipes.ours(preset), None, None) for preset in KNOB_PRESETS)]


def measure(args, runs, layers, recipes):
    """{name: {"errors": {kind: [error of each seed]}, "errors_w4a8": ..., "seconds": mean per layer}}."""
    found = {name: {"errors": {}, "errors_w4a8": {}, "seconds": 0.0} for name, *_ in runs}
    total, began = len(args.kinds) * args.seeds, time.perf_counter()
    for kind in args.kinds:
        for seed in range(args.seeds):
            layer = layers.make(kind, args.k, args.n, args.tokens, args.mild, seed, args.device)
            for name, recipe, rank, tokens in runs:
                seen = layer if tokens is None else replace(layer, calibration=recipes.evenly_spaced_rows(layer.calibration, tokens))
                result = measured(seen, name, recipe, rank or args.rank, recipes)
                for key in ("errors", "errors_w4a8"):
                    found[name][key].setdefault(kind, []).append(result[key])
                found[name]["seconds"] += result["seconds"] / total
                print(f"{time.perf_counter() - began:6.0f} s  {kind:8} seed {seed}  {name:26} {result['errors']:.4f} "
                      f"in {result['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_error(result, key="errors"):
    return geometric_mean([geometric_mean(errors) for errors in result[key].values()])


def table(found, base):
    """The results as Markdown; `base` is the run that the others are compared with."""
    kinds = list(found[base]["errors"])
    lines = ["| | " + " | ".join(kinds) + f" | mean | to {base} | W4A8 mean | s a layer |", "|" + "---|" * (len(kinds) + 5)]
    for name, result in found.items():
        means = [geometric_mean(errors) for errors in result["errors"].values()]
        lines.append(f"| {name} | " + " | ".join(f"{m:.2%}" for m in means)
                     + f" | {mean_error(result):.2%} | {mean_error(result) / mean_error(found[base]) - 1:+.1%} | "
                     + f"{mean_error(result, 'errors_w4a8'):.2%} | {result['seconds']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--tokens", type=int, help="calibration tokens (default: 8 K for K up to 1024 and for --knobs, else 4 K)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", help="layer kinds (default: all)")
    parser.add_argument("--mild", action="store_true", help="outliers as mild as FLUX's published gains suggest")
    parser.add_argument("--knobs", action="store_true", help="this pack's recipe by rank, calibration tokens and preset, one at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="result file")
    args = parser.parse_args()
    load_pack()
    import layers
    import recipes

    args.kinds = args.kinds or list(layers.KINDS)
    args.tokens = args.tokens or (8 if args.knobs or args.k <= 1024 else 4) * args.k
    began_at = commit()  # recorded now, since the checkout may change during the run
    found = measure(args, (knob_runs if args.knobs else recipe_runs)(args, recipes), layers, recipes)
    print(table(found, BASE if args.knobs else "DeepCompressor default"))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"date": date.today().isoformat(), "commit": began_at, "device": machine, "torch": torch.__version__,
              "arguments": arguments, "results": found}
    if args.device == "cuda":
        record["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    name = f"{'knobs' if args.knobs else 'layer_error'}_k{args.k}{'_mild' if args.mild else ''}.json"
    out = args.out or ROOT / "benchmarks" / "results" / name
    out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
