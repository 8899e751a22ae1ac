"""Time of one whole linear on FLUX.1's shapes, for this pack's kernels, bf16 and fp8:  python benchmarks/linears.py

A whole linear quantizes the activation, multiplies, and adds the branch and the bias. If comfy-kitchen with its CUDA backend is
installed, its svdquant_w4a4 runs on the same tensors. Needs a CUDA GPU; prints a table and writes
benchmarks/results/linears_<gpu>.json.
"""

import argparse
import functools
import importlib.util
import itertools
import json

import fp8_rowwise
import torch
from machine import description, graph_time, load_pack, result_path

SHAPES = {  # name: M, K, N
    "double.img_qkv": (4096, 3072, 9216), "double.img_proj": (4096, 3072, 3072), "double.img_mlp.0": (4096, 3072, 12288),
    "double.img_mlp.2": (4096, 12288, 3072), "double.txt_qkv": (512, 3072, 9216), "double.txt_mlp.2": (512, 12288, 3072),
    "single.linear1": (4608, 3072, 21504), "single.linear2": (4608, 15360, 3072)}
L2 = 50 << 20


def unsigned_from(name, k, n):
    return 0 if name.endswith("mlp.2") else n if name.endswith("linear2") else k


def rotating(make, nbytes):
    """A function that cycles through as many make()s as fill the L2 cache three times."""
    made = itertools.cycle([make() for _ in range(max(1, min(8, 3 * L2 // nbytes)))])
    return lambda: next(made)


def layer(n, k, rank):
    """The tensors of a random layer with integer group scales, as LayerOperands.tensors."""
    weight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device="cuda")
    scale = (torch.randint(8, 17, (k // 64, n), device="cuda") * 2.0**-12).bfloat16()
    down, up = (torch.randn(k, rank, device="cuda") / k**0.5).bfloat16(), torch.randn(n, rank, device="cuda").bfloat16() / 10
    return weight, scale, down, up, torch.rand(k, device="cuda").add_(0.5).bfloat16(), torch.randn(n, device="cuda").bfloat16()


def ours(name, m, k, n, x, rank, act_bits):
    """Microseconds of (the whole linear, its quantize pass, its GEMM)."""
    from comfyui_svdquant.cuda import gemm_mma, gemm_wgmma, ops, quantize_activation, row_scales
    from comfyui_svdquant.cuda.choose import Layer
    from comfyui_svdquant.cuda.operands import LayerOperands

    split = unsigned_from(name, k, n)
    kernels = ops.chosen(Layer(m, n, k, rank, split, act_bits, torch.bfloat16), x().device)

    def operands():
        tensors = layer(n, k, rank)
        return LayerOperands(*tensors, split, act_bits, row_scales.row_scale(tensors[1]) if act_bits == 8 else None)

    layers = rotating(operands, n * k // 2)

    def whole():
        return ops.svdquant_linear(x(), layers())

    def codes():
        one = layers()
        return quantize_activation.quantize(x(), one.smooth, one.proj_down, split, kernels.storage, kernels.plans)

    quantized = rotating(codes, m * k)

    def product():
        if kernels.wgmma:
            return gemm_wgmma.gemm(kernels.tile, quantized(), layers(), m)
        return gemm_mma.gemm(kernels.storage, kernels.tile, quantized(), layers(), m)

    return graph_time(whole), graph_time(codes), graph_time(product)


def bf16(m, k, n, x):
    weights = rotating(lambda: (torch.randn(n, k, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()), 2 * n * k)
    return graph_time(lambda: torch.nn.functional.linear(x(), *weights()))


@functools.cache
def compiled_quantized():
    return torch.compile(fp8_rowwise.quantized, dynamic=False)  # a kernel for each shape


def fp8(m, k, n, x):
    """fp8_rowwise.py's linear, its quantization compiled into one kernel."""
    def weight():
        codes, scale = fp8_rowwise.quantized(torch.randn(n, k, device="cuda"))
        return codes, scale.t().contiguous(), torch.randn(n, device="cuda").bfloat16()

    weights = rotating(weight, n * k)
    return graph_time(lambda: fp8_rowwise.product(*compiled_quantized()(x()), *weights()))


def comfy_kitchen(name, m, k, n, x, rank):
    """comfy-kitchen's kernels, which have the same layouts. A layer's columns are all signed or all unsigned there: linear2's are signed
    here, and the input of an MLP's second layer is shifted first, as those kernels expect."""
    import comfy_kitchen
    from comfyui_svdquant.cuda.int4 import GELU_SHIFT

    layers = rotating(lambda: layer(n, k, rank), n * k // 2)
    is_unsigned = unsigned_from(name, k, n) == 0

    def run():
        weight, scale, down, up, smooth, bias = layers()
        source = x()
        shifted = source + GELU_SHIFT if is_unsigned else source
        codes, code_scale, lora_act = comfy_kitchen.quantize_svdquant_w4a4(shifted, smooth, down, act_unsigned=is_unsigned, lora_x=source)
        return comfy_kitchen.scaled_mm_svdquant_w4a4(codes, weight, code_scale, scale, lora_act, up, bias, is_unsigned)[:m]

    return graph_time(run)


def measure(name, ranks):
    """{name: microseconds}, the smaller of two rounds in opposite order, because a GPU's clock falls under load."""
    m, k, n = SHAPES[name]
    x = rotating(lambda: torch.randn(m, k, device="cuda").bfloat16(), 2 * m * k)
    runs = {("bf16",): lambda: (bf16(m, k, n, x),)}
    if torch.cuda.get_device_capability() >= (8, 9):
        runs["fp8 rowwise",] = lambda: (fp8(m, k, n, x),)
    if importlib.util.find_spec("comfy_kitchen") and importlib.util.find_spec("comfy_kitchen.backends.cuda._C"):
        runs["comfy-kitchen W4A4 rank 32",] = lambda: (comfy_kitchen(name, m, k, n, x, 32),)
    for rank in ranks:
        for act_bits in (8, 4) if rank == 32 else (8,):
            label = f"W4A{act_bits} rank {rank}"
            runs[label, f"{label}, quantize", f"{label}, GEMM"] = functools.partial(ours, name, m, k, n, x, rank, act_bits)
    found = {}
    for labels in (*runs, *reversed(runs)):
        for label, time in zip(labels, runs[labels]()):
            found[label] = min(time, found.get(label, time))
    return {"m": m, "k": k, "n": n} | found


def table(shapes):
    """A result's shapes as Markdown, and the cost of the ranks. Single blocks have twice the rank of the others."""
    head = ("layer (M, K, N)", "rank", "bf16", "fp8", "**W4A8**", "to bf16", "to fp8", "its GEMM alone", "its quantize pass", "at rank 128",
            "W4A4", "comfy-kitchen")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, times in shapes.items():
        flop = 2e-6 * times["m"] * times["k"] * times["n"]
        speed = {key: f"{flop / time:.0f}" for key, time in times.items()}
        for rank in (64, 32) if name.startswith("single") else (32,):
            ours = f"W4A8 rank {rank}"
            ratios = (f"{times[key] / times[ours]:.2f}x" if key in times else "" for key in ("bf16", "fp8 rowwise"))
            cells = [f"{name} ({times['m']}, {times['k']}, {times['n']})", str(rank), speed["bf16"], speed.get("fp8 rowwise", ""),
                     f"**{speed[ours]}**", *ratios, speed[f"{ours}, GEMM"], f"{times[f'{ours}, quantize']:.0f} us", speed["W4A8 rank 128"],
                     *(speed.get(key, "") if rank == 32 else "" for key in ("W4A4 rank 32", "comfy-kitchen W4A4 rank 32"))]
            lines.append("| " + " | ".join(cells) + " |")
    for rank in (32, 64, 128):
        costs = [times[f"W4A8 rank {rank}"] / times["W4A8 rank 0"] - 1 for times in shapes.values()]
        lines.append(f"rank {rank} costs {min(costs):.0%} to {max(costs):.0%}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 32, 64, 128])
    parser.add_argument("--table", help="a result file: print its table, and measure nothing")
    parser.add_argument("--out", help="the result file; benchmarks/results/linears_<gpu>.json")
    args = parser.parse_args()
    if args.table:
        with open(args.table, encoding="utf-8") as file:
            print(table(json.load(file)["shapes"]))
        return
    load_pack()
    result = description() | {"unit": "microseconds", "shapes": {}}
    with torch.inference_mode():
        for name in SHAPES:
            found = result["shapes"][name] = measure(name, args.ranks)
            flop = 2e-6 * found["m"] * found["k"] * found["n"]
            cells = (f"{key} {time:.1f} us {flop / time:.0f}" for key, time in found.items() if key not in "mkn")
            print(f"{name} ({found['m']}, {found['k']}, {found['n']}): " + " | ".join(cells), flush=True)
    with open(args.out or result_path("linears", result["device"]), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
