"""The passes of cuda/block_ops.py at FLUX.1-dev's sizes, beside a copy of the same tensor:  python benchmarks/block_passes.py

Bytes count each tensor once, as read or as written; vectors and the position embedding, which caches hold, are left out. The tensors of
successive calls are others, so that they come from memory. Needs a CUDA GPU; prints a table and writes
benchmarks/results/block_passes_<gpu>.json: {"<tokens> <pass>": {"us": microseconds, "gb_s": GB/s, "of_copy": share of the copy's GB/s}}.
"""

import argparse
import itertools
import json

import torch
from machine import description, load_pack, recorded, result_path

HIDDEN, HEADS, TEXT, IMAGE = 3072, 24, 512, 4096
CALLS, BUFFERS = 30, 8


def microseconds(run):
    """Of one run(), from a CUDA graph of CALLS of them."""
    for _ in range(3):
        run()
    graph, events = recorded(run, CALLS), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(5):
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / CALLS * 1e3)
    return sorted(times)[2]


def passes(tokens):
    """{name: (bytes, a function that runs the pass)} for hidden states of so many tokens."""
    from comfyui_svdquant.cuda import block_ops

    states = itertools.cycle([torch.randn(1, tokens, HIDDEN, device="cuda").bfloat16() for _ in range(BUFFERS)])
    gate, scale, shift = torch.randn(1, 1, 3 * HIDDEN, device="cuda").bfloat16().chunk(3, dim=-1)
    nbytes = tokens * HIDDEN * 2
    return {"copy": (2 * nbytes, lambda: next(states).clone()),
            "norm": (2 * nbytes, lambda: block_ops.norm_modulate(next(states), scale, shift, 1e-6)),
            "residual": (3 * nbytes, lambda: block_ops.gated_residual(next(states), next(states), gate)),
            "residual and norm": (4 * nbytes, lambda: block_ops.gated_residual_norm(next(states), next(states), gate, scale, shift, 1e-6))}


def rope_passes():
    """The same before attention: of a single block, whose q, k, v are the first columns of wider rows, and of a double block."""
    from comfyui_svdquant.cuda import block_ops

    def rows(tokens, columns):
        return itertools.cycle([torch.randn(1, tokens, columns, device="cuda").bfloat16() for _ in range(2)])

    head, tokens = HIDDEN // HEADS, TEXT + IMAGE
    norms, pe = torch.ones(2, head, device="cuda").bfloat16(), torch.randn(1, 1, tokens, head // 2, 2, 2, device="cuda")
    wide, text, image = rows(tokens, 7 * HIDDEN), rows(TEXT, 3 * HIDDEN), rows(IMAGE, 3 * HIDDEN)
    nbytes = tokens * HIDDEN * 2
    return {"q, k: RMSNorm and RoPE": (4 * nbytes, lambda: block_ops.qk_norm_rope([(next(wide), *norms)], pe, HEADS, 2, 1e-6)),
            "q, k, v of text and image": (6 * nbytes, lambda: block_ops.qk_norm_rope(
                [(next(text), *norms), (next(image), *norms)], pe, HEADS, 3, 1e-6))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="the result file; benchmarks/results/block_passes_<gpu>.json")
    args = parser.parse_args()
    load_pack()
    result, copied = description(), {}
    with torch.inference_mode():
        for tokens in (IMAGE, TEXT + IMAGE):
            for name, (nbytes, run) in {**passes(tokens), **(rope_passes() if tokens > IMAGE else {})}.items():
                us = microseconds(run)
                speed = nbytes / us / 1e3
                copied.setdefault(tokens, speed)
                found = result[f"{tokens} {name}"] = {"us": round(us, 1), "gb_s": round(speed), "of_copy": round(speed / copied[tokens], 3)}
                print(f"{tokens} tokens, {name}: {found['us']} us, {found['gb_s']} GB/s, {found['of_copy']:.0%} of the copy's", flush=True)
    with open(args.out or result_path("block_passes", result["device"]), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
