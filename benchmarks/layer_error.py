"""Output error of quantized linears, ours beside other recipes, on fresh tokens:  python benchmarks/layer_error.py

Prints a table and writes benchmarks/results/layer_error_<k>.json. --k 3072 and --k 12288 are FLUX.1's widths and want a GPU.
"""

import argparse
import json
import math
import platform
import sys
import time
from datetime import date

import torch
from machine import ROOT, commit, load_pack


def measure(args, layers, recipes):
    """{recipe: {"errors": {kind: [error a seed]}, "errors_w4a8": ..., "seconds": mean a layer}}."""
    found = {name: {"errors": {}, "errors_w4a8": {}, "seconds": 0.0} for name in recipes.RECIPES}
    total = len(layers.KINDS) * args.seeds
    for kind in layers.KINDS:
        for seed in range(args.seeds):
            layer = layers.make(kind, args.k, args.n, args.tokens, args.mild, seed, args.device)
            for name, recipe in recipes.RECIPES.items():
                start = time.perf_counter()
                tensors = recipe(layer, args.rank)
                found[name]["seconds"] += (time.perf_counter() - start) / total
                spec = recipes.spec_of(layer, tensors["weight_proj_up"].shape[1])
                for key, bits in (("errors", 4), ("errors_w4a8", 8)):
                    found[name][key].setdefault(kind, []).append(recipes.error(layer, tensors, spec, bits))
                print(f"{kind:8} seed {seed}  {name:26} {found[name]['errors'][kind][-1]:.4f}", file=sys.stderr, flush=True)
    return found


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def table(found, kinds):
    """The results as Markdown."""
    base = geometric_mean([e for kind in kinds for e in found["DeepCompressor default"]["errors"][kind]])
    lines = ["| recipe | " + " | ".join(kinds) + " | mean | to DeepCompressor | W4A8 mean | s a layer |",
             "|" + "---|" * (len(kinds) + 5)]
    for name, result in found.items():
        means = [geometric_mean(result["errors"][kind]) for kind in kinds]
        eight = geometric_mean([e for kind in kinds for e in result["errors_w4a8"][kind]])
        mean = geometric_mean(means)
        lines.append(f"| {name} | " + " | ".join(f"{m:.2%}" for m in means)
                     + f" | {mean:.2%} | {mean / base - 1:+.1%} | {eight:.2%} | {result['seconds']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--mild", action="store_true", help="outliers as mild as FLUX's published gains suggest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    load_pack()
    import layers
    import recipes

    began_at = commit()  # the run takes long enough for the checkout to move on
    found = measure(args, layers, recipes)
    print(table(found, layers.KINDS))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    record = {"date": date.today().isoformat(), "commit": began_at, "device": machine, "torch": torch.__version__,
              "arguments": vars(args), "results": found}
    name = f"layer_error_k{args.k}{'_mild' if args.mild else ''}.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
