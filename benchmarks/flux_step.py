"""One step of a full-size FLUX.1-dev, by this pack and by its peers:

    python benchmarks/flux_step.py --comfyui ~/ComfyUI                                   # all variants, 1024 x 1024, batch 1
    python benchmarks/flux_step.py --comfyui ~/ComfyUI --variants ours-eager ours-graph --sizes 256 512 1024x4 --kernels
    python benchmarks/flux_step.py --table benchmarks/results/flux_step_h200.json

The weights are random; the classes are ComfyUI's own, with other linears. A variant is MODEL-MODE:

    bf16           ComfyUI's model
    fp8            a scale for every token and output channel, with fast accumulation; the modulation layers stay in bf16 (fp8_rowwise.py)
    comfyui-fp8    ComfyUI's weight_dtype fp8_e4m3fn under --fast fp8_matrix_mult
    nf4            bitsandbytes' NF4
    ours           this pack's layers in W4A8 in ComfyUI's blocks;  ours-w4a4: in W4A4;  ours-fused: in W4A8 in this pack's fused blocks
                   ours-fused-16-bit-branch: the same with low-rank branches of half the rank in 16 bits
    eager, compiled (torch.compile of the whole model, for one size), graph (the eager step as a CUDA graph)

Each variant runs in a process of its own, whose caches of compiled kernels are empty at its start, and takes the sizes in their order. Each
is merged into the result file as soon as it is measured. Needs a CUDA GPU of 32 GB, and the package bitsandbytes for nf4.
"""

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone

import children
import flux_model
import kernel_time
import step_entries
import step_variants
import torch
from machine import description, load_pack, recorded, result_path, synchronize, timed

CACHES = "SVDQUANT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
BUDGET_MS, LEAST, MOST = 2500, 3, 8  # how long a step is timed repeatedly, and how often at least and at most


def size(text):
    """ "PIXELS" or "PIXELSxBATCH" -> (pixels, batch), for argparse."""
    pixels, by, batch = text.partition("x")
    try:
        found = int(pixels), int(batch) if by else 1
    except ValueError:
        found = 0, 0
    if min(found) < 1 or found[0] % 16:
        raise argparse.ArgumentTypeError(f"{text} is no size: write PIXELS or PIXELSxBATCH, with PIXELS a multiple of 16.")
    return found


def step_of(flux, mode, inputs):
    """A function that runs one step in one of step_variants.MODES."""
    step = functools.partial(flux, **inputs)
    if mode == "compiled":
        torch._dynamo.reset()
        return functools.partial(torch.compile(flux, dynamic=False), **inputs)
    if mode == "graph":
        flux_model.wait_for_compilation()  # its tests of kernels would end the capture
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):  # the second one launches as all later ones do
                step()
        torch.cuda.synchronize()
        return recorded(step, 1, stream).replay
    return step


def requested_bytes():
    """Bytes of GPU memory that living tensors asked for, without the rest of their blocks, which depends on what was freed before."""
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0) if torch.cuda.is_available() else 0  # no keys at first


def measure(flux, mode, pixels, batch, kernels):
    """{"ms": median of a step, "least_ms" and "most_ms" of the same steps, "first_s": seconds until the first step of this size is done,
    with compilation and capture, "peak_gb": the most GPU memory during the steps; with `kernels` also "kernel_ms": {kind: milliseconds a
    step}}. Raises ValueError if the model's output is not finite."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    inputs = flux_model.inputs(pixels, batch)
    synchronize()
    start = time.perf_counter()
    step = step_of(flux, mode, inputs)
    y = step()
    synchronize()
    first = time.perf_counter() - start
    if y is not None and not y.isfinite().all():  # a graph's replay returns nothing
        raise ValueError("The model's output is not finite.")
    flux_model.wait_for_compilation()
    (second,), _ = timed(step, 1)
    times = sorted(timed(step, max(LEAST, min(MOST, int(BUDGET_MS / second))))[0])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = {"ms": times[len(times) // 2], "least_ms": times[0], "most_ms": times[-1], "first_s": first, "peak_gb": peak / 1e9}
    if kernels:
        found["kernel_ms"] = {kind: round(ms, 2) for kind, ms in kernel_time.by_kind(kernel_time.kernel_times(step)).items()}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def child(args):
    """Measure one variant in this process; print a line with the entry of each size."""
    from host import launch

    launch.enter(args.comfyui, *([] if torch.cuda.is_available() else ["--cpu"]))
    load_pack()
    import comfyui_version

    (model, mode), = args.variants
    shared = {"variant": f"{model}-{mode}", "comfyui": comfyui_version.__version__}
    if step_variants.MODELS[model].ranked:
        shared["rank"] = args.rank
    with torch.inference_mode():
        before = requested_bytes()
        flux = step_variants.MODELS[model].make(args.rank, smaller(args))
        gc.collect()
        shared["weights_gb"] = round((requested_bytes() - before) / 1e9, 3)
        for pixels, batch in args.sizes:
            try:
                found = measure(flux, mode, pixels, batch, args.kernels)
            except torch.cuda.OutOfMemoryError:
                found = {"not_measured": "out of memory"}
            print(children.MARK + json.dumps({"pixels": pixels, "batch": batch, **shared, **found}), flush=True)


def smaller(args):
    """The arguments of Flux that replace FLUX.1-dev's."""
    found = {"hidden_size": args.hidden, "num_heads": args.hidden // 128} if args.hidden else {}
    return found | (dict(zip(("depth", "depth_single_blocks"), args.blocks)) if args.blocks else {})


def measured(variant, args):
    """Yield the entries of a variant, each as soon as it is measured."""
    name, reason = "-".join(variant), step_variants.missing(variant[0])
    if reason:
        yield from ({"variant": name, "pixels": pixels, "batch": batch, "not_measured": reason} for pixels, batch in args.sizes)
        return

    def command(sizes):  # argparse takes the last of several options with one name
        return [sys.executable, __file__, *sys.argv[1:], "--child", "--variants", name, "--sizes",
                *(f"{pixels}x{batch}" for pixels, batch in sizes)]

    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {name: os.path.join(caches, name) for name in CACHES}
        entries = []
        for entry in children.entries_of(command(args.sizes), environment):
            entries.append(entry)
            yield entry
        if args.restart:
            again, = children.entries_of(command(args.sizes[:1]), environment)
            yield entries[0] | {"first_warm_s": again["first_s"]}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="ComfyUI's folder")
    parser.add_argument("--variants", nargs="+", type=step_variants.variant, metavar="MODEL-MODE",
                        default=[step_variants.variant(text) for text in step_variants.DEFAULT])
    parser.add_argument("--sizes", nargs="+", type=size, metavar="PIXELS[xBATCH]", default=[(1024, 1)])
    parser.add_argument("--rank", type=int, default=64, help="of low-rank branches in 8 bits")
    parser.add_argument("--kernels", action="store_true", help="also measure the kernels' time by kind")
    parser.add_argument("--restart", action="store_true", help="also take the first step in a second process, with the caches of the first")
    parser.add_argument("--hidden", type=int, help="width of a smaller model, a multiple of 128")
    parser.add_argument("--blocks", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"), help="blocks of a smaller model")
    parser.add_argument("--table", help="a result file: print its tables, and measure nothing")
    parser.add_argument("--out", help="the result file; benchmarks/results/flux_step_<gpu>.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.table and not args.comfyui:
        parser.error("--comfyui is needed to measure")
    if smaller(args) and not args.out:
        parser.error("a smaller model's results need a file of their own: --out")
    return args


def main():
    args = parsed()
    if args.table:
        print(step_entries.tables(step_entries.read(args.table)["entries"]))
        return
    if args.child:
        child(args)
        return
    run = description()
    device = run.pop("device")
    run["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    path, failed = args.out or result_path("flux_step", device), []
    step_entries.read(path)  # a file of another form is an error now, not after the first measurement
    for variant in args.variants:
        start = time.perf_counter()
        try:
            for entry in measured(variant, args):
                step_entries.add(path, device, [run | entry])
                print(" | ".join(step_entries.cells(entry)), f"| {entry['pixels']} x {entry['pixels']}, batch {entry['batch']}", flush=True)
        except subprocess.CalledProcessError:
            failed.append("-".join(variant))
        print(f"{'-'.join(variant)} took {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"These variants failed, as their processes wrote: {', '.join(failed)}")


if __name__ == "__main__":
    main()
