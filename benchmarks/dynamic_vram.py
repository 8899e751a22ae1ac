"""A sampling step of a FLUX.1 while only so many GB of GPU memory are free: in 4 bits, which this pack streams, and in ComfyUI's own
formats, which its Dynamic VRAM streams:

    python benchmarks/dynamic_vram.py --comfyui ~/ComfyUI

Another process takes the rest of the GPU's memory, as other programs do; ComfyUI itself decides which weights stay offloaded. A format runs
in a process of its own, which starts as ComfyUI's main.py does. The model has FLUX.1-dev's layers with random weights, in fewer blocks.
Needs a ComfyUI with the comfy-aimdo and comfy-kitchen of its requirements, and a CUDA GPU of 16 GB; prints a table and writes
benchmarks/results/dynamic_vram_<gpu>.json.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import children

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = "4 bits", "float8_e4m3fn", "int8_tensorwise", "asym_w4a8_int8", "bf16"
GB = 1 << 30


def leave_free():
    """Read numbers of bytes, one a line, and take the GPU's memory but for that many; 0: take nothing. Writes a line when that is done."""
    import torch

    taken = []
    for line in sys.stdin:
        taken.clear()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if int(line):
            taken.append(torch.empty(max(0, free - int(line)), dtype=torch.uint8, device="cuda"))
        print(children.MARK, flush=True)


@contextlib.contextmanager
def other_program():
    """A function: bytes, or 0 for all -> only so many bytes of the GPU's memory stay free beside what this process has."""
    with subprocess.Popen([sys.executable, __file__, "--leave-free"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def leave(nbytes):
            process.stdin.write(f"{nbytes}\n")
            process.stdin.flush()
            if process.stdout.readline().strip() != children.MARK.strip():
                raise RuntimeError("The process that takes the GPU's memory has ended.")

        yield leave
        process.stdin.close()


def child(args):
    """Measure one variant in this process; print a line with each entry."""
    sys.path.insert(0, str(ROOT / "demo"))
    from host import launch

    dynamic = launch.enter_as_main(Path(args.comfyui), *(["--cpu"] if args.cpu else []))  # before anything imports torch
    import dynamic_vram_models
    import torch
    from machine import load_pack

    load_pack()
    import comfyui_version

    if not dynamic and not args.cpu:
        raise SystemExit("Dynamic VRAM is off: this ComfyUI is too old for it, or comfy-aimdo is not installed.")
    smaller = {"depth": args.blocks[0], "depth_single_blocks": args.blocks[1]}
    if args.hidden:
        smaller |= {"hidden_size": args.hidden, "num_heads": args.hidden // 128}
    (variant,) = args.variants
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        leave = stack.enter_context(other_program()) if not args.cpu else None
        patcher = dynamic_vram_models.patcher(variant, args.rank, smaller)
        shared = {"variant": variant, "comfyui": comfyui_version.__version__, "model_gb": round(patcher.model_size() / GB, 3)}
        for pixels in args.pixels:
            expected = None
            for free in (0, *args.free) if leave else (0,):
                found, latent = dynamic_vram_models.measure(patcher, pixels, lambda: leave and leave(int(free * GB)))
                expected = latent if expected is None else expected
                found["same_bits"] = torch.equal(latent, expected)
                print(children.MARK + json.dumps(shared | {"pixels": pixels, "free_gb": free or None} | found), flush=True)


def table(entries):
    """Lines of a table for each size: milliseconds of a step, and the GB of weights that were on the GPU."""
    lines = []
    for pixels in dict.fromkeys(entry["pixels"] for entry in entries):
        chosen = [entry for entry in entries if entry["pixels"] == pixels]
        limits = list(dict.fromkeys(entry["free_gb"] for entry in chosen))
        heads = ["all" if limit is None else f"{limit:g} GB" for limit in limits]
        lines += [f"| {pixels} x {pixels}, free: | GB | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
        for name in dict.fromkeys(entry["variant"] for entry in chosen):
            own = {entry["free_gb"]: entry for entry in chosen if entry["variant"] == name}
            cells = [f"{own[limit]['ms']:.1f} ms ({own[limit]['resident_gb']:.1f})" if own.get(limit, {}).get("ms") else "-"
                     for limit in limits]
            lines.append(f"| {name} | {next(iter(own.values()))['model_gb']:.1f} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="ComfyUI's folder")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:4])
    parser.add_argument("--free", nargs="+", type=float, default=(6, 4, 3, 2.5, 2), help="GB of GPU memory")
    parser.add_argument("--pixels", nargs="+", type=int, default=(1024, 512))
    parser.add_argument("--blocks", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"), default=(6, 12))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--hidden", type=int, help="width of a smaller model, a multiple of 128")
    parser.add_argument("--out", help="the result file; benchmarks/results/dynamic_vram_<gpu>.json")
    for hidden in ("--child", "--cpu", "--leave-free"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.leave_free and not args.comfyui:
        parser.error("--comfyui is needed to measure")
    return args


def main():
    args = parsed()
    if args.leave_free:
        leave_free()
    elif args.child:
        child(args)
    else:
        import torch
        from machine import description, result_path

        of_child = ["--child", *([] if torch.cuda.is_available() else ["--cpu"])]
        result = description() | {"rank": args.rank, "blocks": list(args.blocks), "entries": []}
        path = args.out or result_path("dynamic_vram", result["device"])
        for variant in args.variants:
            for entry in children.entries_of([sys.executable, __file__, *sys.argv[1:], *of_child, "--variants", variant]):
                print(entry, flush=True)
                result["entries"].append(entry)
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(result, file, indent=1)
        print(table(result["entries"]))


if __name__ == "__main__":
    main()
