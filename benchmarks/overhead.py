"""Host time of a layer's call, and compile time of the kernels:  python benchmarks/overhead.py [--compile]

Microseconds of Python, PyTorch and the driver per call, for layers so small that the GPU waits for the host. With
--compile instead: seconds until every kernel of FLUX.1-dev at 1024 x 1024 is ready, in new processes, with an empty cache and with a
full one. Needs a CUDA GPU.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import description, load_pack

# (M, N, K, unsigned_from, gelu_from) of a step's linears in the model's order. The modulation layers are listed separately.
FLUX = [(4096, 9216, 3072, 3072, None), (512, 9216, 3072, 3072, None), (4096, 3072, 3072, 3072, None), (4096, 12288, 3072, 3072, 0),
        (4096, 3072, 12288, 0, None), (512, 3072, 3072, 3072, None), (512, 12288, 3072, 3072, 0), (512, 3072, 12288, 0, None),
        (4608, 21504, 3072, 3072, 9216), (4608, 3072, 15360, 3072, None)]
MODULATION = [(1, 18432, 3072), (1, 9216, 3072)]
SMALL = 16, 256, 256  # M, N, K


def layer(spec):
    from comfyui_svdquant.quant.layers import layout
    from comfyui_svdquant.quant.layers.linear import AWQLinear, SVDQuantLinear

    made = (AWQLinear if spec.format == layout.AWQ else SVDQuantLinear)(spec, "cuda")
    for p in made.parameters():
        p.data.copy_(torch.randint(-8, 8, p.shape, device="cuda") if p.dtype == torch.int8 else torch.rand(p.shape, device="cuda") + 0.5)
    return made


def microseconds(run, calls=200, repeats=5):
    """Microseconds per call: the least of `repeats` runs of `calls` calls each. No call waits for the GPU."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(times) * 1e6 / calls


def overheads(rounds=8):
    """{name: microseconds per call}, the least of several rounds, because a shared machine can be slower for seconds."""
    runs = calls()
    return {key: min(times) for key, times in zip(runs, zip(*([microseconds(run) for run in runs.values()] for _ in range(rounds))))}


def calls():
    """{name: a function without arguments that makes the call}"""
    from comfyui_svdquant.cuda import group_error, kernel_loader, ops
    from comfyui_svdquant.quant.layers import layout
    from comfyui_svdquant.quant.layers.linear import operands

    m, n, k = SMALL
    x, found = torch.randn(1, m, k, device="cuda").bfloat16(), {}
    for rank in (32, 128):
        for act_bits in (8, 4):
            module = layer(layout.LayerSpec(layout.SVDQUANT, k, n, rank, k))
            module.act_bits = act_bits
            p, row_scale = module._parameters, module.row_scale(module.weight_scale) if act_bits == 8 else None
            own = operands(p, p["bias"], k, act_bits, row_scale)
            name = f"W4A{act_bits} rank {rank}"
            found[f"{name}, layer"] = functools.partial(module, x)
            found[f"{name}, op"] = functools.partial(ops.svdquant_linear, x, own)
            found[f"{name}, op through the dispatcher"] = functools.partial(torch.ops.svdquant.linear, x, *own.flat())
    found["W4A16, layer"] = functools.partial(layer(layout.LayerSpec(layout.AWQ, k, n)), x[:, 0])
    found["bf16, layer"] = functools.partial(torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), x)
    found["an allocation"] = functools.partial(x.new_empty, 1000)
    stream = torch.cuda.current_stream().cuda_stream
    free, take = torch.cuda.caching_allocator_delete, torch._C._cuda_cudaCachingAllocator_raw_alloc
    found["an allocation without a tensor"] = lambda: free(take(2000, stream))
    launch = kernel_loader.kernel(group_error.SOURCE, group_error.ENTRY, (), x.device).launcher((1,), (group_error.THREADS,), 7)
    found["a launch"] = functools.partial(launch, 0, 0, 0, 0, 0, 0, 1)  # K is 0, so that it reads nothing
    return found


def prepare(how, act_bits):
    """Seconds from the end of the imports until every kernel is ready, built one after the other or by ops.warm_up's threads."""
    from comfyui_svdquant.cuda import ops
    from comfyui_svdquant.cuda.choose import W4A16

    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1, device=device)
    layers = [(m, n, k, 32, split, act_bits, torch.bfloat16, gelu_from) for m, n, k, split, gelu_from in FLUX]
    layers += [(m, n, k, 0, k, W4A16, torch.bfloat16) for m, n, k in MODULATION]
    start = time.perf_counter()
    for one in ([layer] for layer in layers) if how == "serial" else [layers]:
        for future in ops.warm_up(one, device):
            future.result()
    return time.perf_counter() - start


def compile_times(act_bits):
    """{name: seconds} in new processes: an empty cache in threads, then the full cache, then an empty cache one after the other."""
    found = {}
    for how in ("threads", "serial"):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm") if how == "threads" else ("cold",):
                command = [sys.executable, __file__, "--child", how, "--act-bits", str(act_bits)]
                done = subprocess.run(command, env=os.environ | {"SVDQUANT_CACHE_DIR": folder}, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found[f"{state}, {how}"] = float(done.stdout.split()[-1])
                kernels = sum(1 for _ in Path(folder).glob("*.cubin"))
                print(f"W4A{act_bits} {state}, {how}: {found[f'{state}, {how}']:.2f} s ({kernels} kernels)", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="measure compile times instead")
    parser.add_argument("--act-bits", type=int, default=8, choices=(4, 8), help="activation bits of the layers")
    parser.add_argument("--child", choices=("serial", "threads"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a result file")
    args = parser.parse_args()
    load_pack()
    if args.child:
        print(prepare(args.child, args.act_bits))
        return
    if args.compile:
        found = {"unit": "seconds", "compile": compile_times(args.act_bits)}
    else:
        with torch.inference_mode():
            found = {"unit": "microseconds", "overhead": overheads()}
        for name, time_ in found["overhead"].items():
            print(f"{name:40s} {time_:6.1f} us")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(description() | found, file, indent=1)


if __name__ == "__main__":
    main()
