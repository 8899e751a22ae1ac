"""Run every kernel and mode once, on small shapes, for NVIDIA's compute-sanitizer:  python tests/cuda/sanitize.py [--tools memcheck ...]

Without --tools the cases run without a tool, and are compared with the reference. With --tools the script runs itself under each tool and
prints its summary; compute-sanitizer (of the CUDA toolkit) must be on the PATH. Tensors are made and compared on the CPU and allocated one
by one, so that the tools check only this pack's kernels, and detect accesses beyond a tensor's end.

The script works around two limits of the tools. initcheck doesn't see stores of the copy engine, which cuBLAS uses too: outputs are filled
with NaN first, and the CPU computes x @ proj_down in place of cuBLAS. racecheck counts an arrival at an mbarrier only for its own lane:
all lanes of a warp arrive (ALL_LANES_ARRIVE in common.cuh) instead of one.
"""

import argparse
import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SHAPES = [  # M, N, K, R, unsigned_from
    (1, 16, 64, 0, 64), (37, 80, 192, 32, 192), (70, 208, 384, 128, 0), (33, 400, 640, 32, 128), (45, 96, 704, 64, 64),
    (20, 48, 12288, 32, 0), (37, 208, 192, 32, 192), (45, 1600, 192, 16, 64), (70, 112, 192, 160, 192)]
LORAS = {208: ((24,),), 1600: ((40, 0, 8), 768), 112: ((8,),)}  # {N: LoRASizes} of the shapes that have a LoRA
AWQ = [(1, 48, 320), (8, 64, 3072), (11, 80, 448)]  # M, N, K
ERROR = 4e-3  # larger than in test_ops_gpu.py, since there are fewer outputs


def load_pack():
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    spec = importlib.util.spec_from_file_location("comfyui_svdquant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def expose_allocations():
    """Make the tools see every allocation and write. Work memory becomes a tensor, since PyTorch's allocator hides raw allocations; outputs
    get initial values and x @ proj_down is copied to the GPU, in ways that initcheck recognizes."""
    from comfyui_svdquant.cuda import quantize_activation, runtime

    held, new_empty, multiplied = {}, torch.Tensor.new_empty, quantize_activation.multiplied

    def take(size, stream):
        tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        held[tensor.data_ptr()] = tensor
        return tensor.data_ptr()

    runtime._take, runtime._give = take, held.pop
    torch.Tensor.new_empty = lambda x, *size: new_empty(x, *size).fill_(torch.nan)  # the ops allocate y with new_empty
    quantize_activation.multiplied = lambda *tensors: [
        product.cuda() for product in multiplied(*(tensor if tensor is None else tensor.cpu() for tensor in tensors))]


def switch_off_self_test():
    """The tools make it slow, and every case is compared with the reference anyway."""
    from comfyui_svdquant.cuda import self_test

    self_test.passes = lambda *args: True


def cuts(storage, m, k, rank, fused):
    """The plans of each quantize kernel, as (name, plans)."""
    from layers import plans_here

    registers = [dict(registers=True, tiles=1, loop=False), dict(registers=True, tiles=2, loop=False), dict(registers=True, loop=True)]
    for cut in (dict(registers=False), *registers):
        try:
            yield cut, plans_here(m, k, rank, storage, fused=fused, **cut)
        except ValueError:  # 4 bits, no clusters, too few columns
            continue


def svdquant_cases():
    """(name, y, the reference's output)"""
    from comfyui_svdquant.cuda import gemm_mma, gemm_wgmma, ops, quantize_activation, reference, targets
    from comfyui_svdquant.cuda.activation_layout import CodeStorage
    from layers import on_cuda, random_input, random_layer, with_lora, with_row_scale

    target, sms = targets.for_device("cuda"), targets.multiprocessors(torch.device("cuda", 0))
    for seed, (m, n, k, rank, split) in enumerate(SHAPES):
        layer, x = random_layer(n, k, rank, split, n != 80, seed=seed), random_input(m, k, torch.bfloat16, seed=seed)
        row = torch.randint(8, 16, (n,)) * 2.0**-11
        layer = layer._replace(weight_scale=(torch.randint(6, 17, (k // 64, n)) * row).bfloat16())
        there, tile = x.cuda(), gemm_mma.fastest_tile(gemm_mma.tiles_of(target), sms, m, n)

        if n in LORAS:
            layer = with_lora(layer, *LORAS[n])
        for operands in (layer, with_row_scale(layer)):
            act_bits, expected = operands.act_bits, reference.svdquant_linear(x.double(), operands, torch.float64)
            operands = on_cuda(operands)
            name = f"M={m} N={n} K={k} R={rank} from {split}, {operands.lora}, {act_bits} bits"
            yield name, ops.svdquant_linear(there, operands), expected
            # Kernels that choose() doesn't take on this device: the other GEMM, and all tiles.
            for storage in (CodeStorage.INT8,) if act_bits == 8 else (CodeStorage.INT4_BYTES, CodeStorage.INT4_NIBBLES):
                for cut, plans in cuts(storage, m, k, rank, not operands.lora.ranks):
                    q = quantize_activation.quantize(there, operands.smooth, operands.proj_down, split, storage, plans, operands.lora_down,
                                                     operands.lora_strength, operands.lora)
                    y = gemm_mma.gemm(storage, tile, q, operands, m)
                    yield f"{name}, {storage.name}, {cut}, by mma", y, expected
                residual, gate = torch.randn(m, n).bfloat16(), torch.randn(n).bfloat16()
                if gemm_mma.gates(storage):
                    y = gemm_mma.gemm(storage, tile, q, operands, m, residual.cuda(), gate.cuda())
                    yield f"{name}, {storage.name}, gated, by mma", y, residual.double() + gate.double() * expected
            if act_bits == 8 and target.wgmma and gemm_wgmma.takes(k, split) and k == 192:
                for pair in gemm_wgmma.STAGES:
                    out = torch.full((m, n), torch.nan, dtype=there.dtype, device="cuda")
                    yield f"{name}, tile {pair}", gemm_wgmma.gemm(pair, q, operands, m, out), expected
                    out = torch.full((m, n), torch.nan, dtype=there.dtype, device="cuda")
                    y = gemm_wgmma.gemm(pair, q, operands, m, out, residual.cuda(), gate.cuda())
                    yield f"{name}, tile {pair}, gated", y, residual.double() + gate.double() * expected


def awq_cases():
    from comfyui_svdquant.cuda import awq, int4, reference

    for m, n, k in AWQ:
        layer = (int4.pack(torch.randint(0, 16, (n, k))), torch.rand(k // 64, n).bfloat16(), torch.randn(k // 64, n).bfloat16(),
                 torch.randn(n).bfloat16())
        x = torch.randn(m, k).bfloat16()
        yield (f"W4A16 M={m} N={n} K={k}", awq.linear(awq.fastest_tiles(m), x.cuda(), *(t.cuda() for t in layer)),
               reference.awq_linear(x.double(), *layer))


def mlp_cases():
    """Both layers of an MLP in one pass, with every tile, against the two layers one after the other."""
    from comfyui_svdquant.cuda import gemm_mma, mlp, ops
    from comfyui_svdquant.cuda.activation_layout import CodeStorage
    from layers import on_cuda, random_input, random_layer

    x = random_input(70, 128, torch.bfloat16).cuda()
    first, second = on_cuda(random_layer(512, 128, 16, gelu_from=0)), on_cuda(random_layer(48, 512, 48, 0, seed=1))
    expected = ops.svdquant_linear(ops.svdquant_linear(x, first), second).cpu().double()
    chosen = ops.chosen(mlp.layers(70, 128, 512, 48, 16, 48, first.unsigned_from, second.unsigned_from, x.dtype), x.device)
    for storage in (CodeStorage.INT4_BYTES, CodeStorage.INT4_NIBBLES):
        for tile in gemm_mma.next_tiles_of(storage):
            kernels = chosen._replace(storage=storage, tile=tile)
            yield f"MLP, {storage.name}, {tile}", mlp.fused(x, first, second, kernels), expected


def block_cases():
    """The passes between a block's linears, with rows of one warp and of a team, tails, and images apart."""
    from comfyui_svdquant.cuda import block_ops, reference, rms_ops

    for b, tokens, k in ((1, 11, 256), (2, 5, 3072), (3, 3, 1000)):
        x, y = torch.randn(2, b, tokens, k).bfloat16()
        gate, scale, shift = torch.randn(b, 1, 3 * k).bfloat16().cuda().chunk(3, dim=-1)
        z, m = block_ops.gated_residual_norm(x.cuda(), y.cuda(), gate, scale, shift, 1e-6)
        exact = reference.modulate(x.double(), y.double(), *(part.cpu().double() for part in (gate, scale, shift)), dtype=torch.float64)
        yield f"residual B={b} L={tokens} K={k}", z, exact[0]
        yield f"residual and norm B={b} L={tokens} K={k}", m, exact[1]
        yield f"norm B={b} L={tokens} K={k}", block_ops.norm_modulate(z, scale, shift, 1e-6), exact[1]
    for b, text, image, head, heads in ((2, 3, 6, 128, 3), (1, 0, 5, 64, 5), (1, 1, 2, 256, 2)):
        streams = [(torch.randn(b, tokens, 3 * heads * head).bfloat16(), *torch.randn(2, head).bfloat16())
                   for tokens in (text, image) if tokens]
        pe = torch.randn(b, 1, text + image, head // 2, 2, 2)
        joined = block_ops.qk_norm_rope([[x.cuda() for x in stream] for stream in streams], pe.cuda(), heads, 3, 1e-6)
        exact = reference.qk_norm_rope([[x.double() for x in stream] for stream in streams], pe.double(), heads, 3, 1e-6, torch.float64)
        for part, x, expected in zip("qkv", joined, exact):
            yield f"{part} of {text} + {image} tokens, {heads} heads of {head}", x.transpose(1, 2), expected
        apart = [([x.contiguous().cuda() for x in rows.chunk(3, dim=-1)], *(norm.cuda() for norm in norms)) for rows, *norms in streams]
        pe = pe.bfloat16()
        exact = reference.qk_norm_rope([[x.double() for x in stream] for stream in streams], pe.double(), heads, 3, 1e-6, torch.float64)
        for part, x, expected in zip("qkv", block_ops.qk_norm_rope(apart, pe.cuda(), heads, 3, 1e-6), exact):
            yield f"{part} apart, {text} + {image} tokens, {heads} heads of {head}", x.transpose(1, 2), expected
    for b, tokens, k in ((1, 11, 256), (2, 5, 3840), (3, 3, 1000)):
        x, y = torch.randn(2, b, tokens, k).bfloat16()
        weights, vectors = torch.randn(2, k).bfloat16(), torch.randn(2, b, 1, k).bfloat16()
        operands = x, y, weights[0], vectors[0], weights[1], vectors[1]
        exact = reference.rms_modulate(*(t.double() for t in operands), 1e-5, torch.float64)
        for part, found, expected in zip(("residual", "and norm"), rms_ops.gated_residual_norm(*(t.cuda() for t in operands), 1e-5), exact):
            yield f"RMSNorm, {part} B={b} L={tokens} K={k}", found, expected
        yield f"SwiGLU B={b} L={tokens} K={k}", rms_ops.swiglu(x.cuda(), y.cuda()), reference.swiglu(x.double(), y.double(), torch.float64)


def branch_cases():
    """Branches in 8 bits, whose rows end within a CTA: by a launch each, and by one launch for all."""
    from comfyui_svdquant.cuda import expand_branch, reference

    sizes = (37, 141, 48), (64, 1, 16), (2, 300, 240)
    codes = [torch.randint(-127, 128, (k + n, rank), dtype=torch.int8) for k, n, rank in sizes]
    scales = [torch.rand(k + n).bfloat16() + 0.01 for k, n, _ in sizes]
    branches = [tuple(t.cuda() for t in (of[:k], of[k:], scale)) for (k, _, _), of, scale in zip(sizes, codes, scales)]
    for dtype in (torch.bfloat16, torch.float16):
        def expand(branches, layers, dtype=dtype):
            return expand_branch.expand_by(branches, lambda count: torch.full((count,), torch.nan, dtype=dtype, device="cuda"), layers)

        for how, found in (("alone", [y for branch in branches for y in expand([branch], 1)]), ("together", expand(branches, 16))):
            for size, y, of, scale in zip(sizes, found, codes, scales):
                yield f"branch {size}, {dtype}, {how}", y, reference.expand_branch(of, scale, dtype).double()


CASES = {"blocks": block_cases, "branches": branch_cases, "W4A16": awq_cases, "linears": svdquant_cases, "MLP": mlp_cases}


def run_cases(names):
    """Run these cases and return the number of wrong ones."""
    wrong = 0
    for cases in names:
        for name, y, expected in CASES[cases]():
            error = float((y.cpu().double() - expected).norm() / expected.norm())
            wrong += not error < ERROR
            print(f"{'ok   ' if error < ERROR else 'WRONG'} {error:.1e} {name}", flush=True)
    return wrong


def run_tool(tool, seconds, names):
    """Whether the tool found nothing in these cases. If it found errors, its report is printed."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", "--print-limit", "1000", "--show-backtrace", "no",
               sys.executable, __file__, "--cases", *names, "--lines", *(["--all-lanes"] if tool == "racecheck" else [])]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
        report, ended = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        report, ended = (error.stdout or b"").decode(errors="replace"), f"more than {seconds} s"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", report) or ["no summary"]
    print(f"{tool}: {len(re.findall('^ok ', report, re.M))} cases right, {summary[-1]}", flush=True)
    if ended:
        lines = collections.Counter(re.sub("0x[0-9a-f]+", "..", line) for line in re.findall("^=========(.*)", report, re.M))
        print("\n".join(f"{count:6}{line}" for line, count in lines.most_common(40)) or report[-3000:])
        print(f"{tool} ended with {ended}", flush=True)
    return ended == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", choices=TOOLS, help="run under these, one after the other")
    parser.add_argument("--seconds", type=int, default=120, help="for a tool")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which kernels")
    parser.add_argument("--lines", action="store_true", help="compile the kernels with their lines' numbers")
    parser.add_argument("--all-lanes", action="store_true", help="compile them so that all lanes arrive at mbarriers")
    args = parser.parse_args()
    if args.tools:
        raise SystemExit(not all([run_tool(tool, args.seconds, args.cases) for tool in args.tools]))
    load_pack()
    expose_allocations()
    switch_off_self_test()
    from comfyui_svdquant.cuda import compiler

    compiler.OPTIONS += ("-lineinfo",) * args.lines + ("-DALL_LANES_ARRIVE",) * args.all_lanes
    torch.manual_seed(0)
    with torch.inference_mode():
        raise SystemExit(1 if run_cases(args.cases) else 0)


if __name__ == "__main__":
    main()
