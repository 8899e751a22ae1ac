"""What to expect of two, four and eight GPUs, as arithmetic:  python benchmarks/several_gpus_estimate.py

A step of FLUX.1-dev in W4A8 with fused blocks, replayed as a CUDA graph. The work on tokens and in attention is that of one H200, divided
by the number of GPUs; the part of the former that does not grow with the tokens is not divided. Before and after attention of each block
the GPUs write q, k, v and the output into each other's memory: of L tokens of K channels in 16 bits each GPU sends 3 L K 2 (N - 1) / N^2
and L K 2 (N - 1) / N^2 bytes. A GPU's heads are attended in groups (peer_attention.py): the first group's q, k and v and the last one's
output are waited for, and the rest travels while attention runs.

Quantization: everything up to the file is divided, but for the start and the file.
"""

import json
from dataclasses import dataclass

import flux_model
from machine import ROOT, load_pack

STEPS, SEVERAL = (ROOT / "benchmarks" / "results" / f"{name}_h200.json" for name in ("flux_step", "several_gpus"))
BLOCKS = flux_model.DEV["depth"] + flux_model.DEV["depth_single_blocks"]
WIDTH, BYTES = flux_model.DEV["hidden_size"], 2
GROUPS, TILE, SMS = 4, 128, 132  # host.divided_steps.GROUPS, peer_attention.TILE, and an H200's


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second in one direction from one GPU; latency: seconds of an exchange without data."""

    name: str
    bandwidth: float
    latency: float


LINKS = (Link("NVLink 4", 280e9, 5e-6), Link("PCIe 5.0 x16", 45e9, 40e-6), Link("PCIe 4.0 x16", 22e9, 40e-6))


@dataclass(frozen=True)
class Work:
    """Seconds of a step on one GPU: of what takes as long for any number of tokens, on tokens, in attention, and of the processor."""

    fixed: float
    tokens: float
    attention: float
    processor: float


def tokens_of(pixels):
    return (pixels // 16) ** 2 + flux_model.TEXT_TOKENS


def work_of(pixels, entries):
    """The Work at a size, from the kernels' times at 512 x 512 and 1024 x 1024: attention's grows with the square of the tokens, and the
    rest along the line through the two. A kernel begins before the one before it has ended, so all times are made smaller by the factor
    with which those at 1024 x 1024 add up to the step."""
    ours = {entry["pixels"]: entry for entry in entries if entry["variant"] == "ours-fused-eager" and entry["batch"] == 1}
    alone = ours[1024]["ms"] / sum(ours[1024]["kernel_ms"].values())
    kernels = {size: {kind: alone * ms for kind, ms in entry["kernel_ms"].items()} for size, entry in ours.items()}
    small, usual = (sum(kernels[size].values()) - kernels[size]["attention"] for size in (512, 1024))
    slope = (usual - small) / (tokens_of(1024) - tokens_of(512))
    attention = kernels[1024]["attention"] * (tokens_of(pixels) / tokens_of(1024)) ** 2
    return Work((usual - slope * tokens_of(1024)) / 1e3, slope * tokens_of(pixels) / 1e3, attention / 1e3, ours[256]["ms"] / 1e3)


def bytes_sent(tokens, gpus):
    """(before, after) attention of a block, by each GPU."""
    one = tokens * WIDTH * BYTES * (gpus - 1) / gpus**2
    return 3 * one, one


def exchange_seconds(tokens, gpus, link, attention):
    """Of one block: what the exchanges add to the time of its attention on one of the GPUs, `attention`."""
    from comfyui_svdquant.quant.parallel.peer_attention import fitting_groups

    groups = fitting_groups(-(-tokens // TILE), flux_model.DEV["num_heads"] // gpus, GROUPS, SMS)
    of_group = 2 * link.latency + sum(bytes_sent(tokens, gpus)) / groups / link.bandwidth  # q, k and v, and the output
    return of_group + (groups - 1) * max(0.0, of_group - attention / groups)


def step_seconds(pixels, gpus, link, work):
    """A step."""
    if gpus == 1:
        return max(work.fixed + work.tokens + work.attention, work.processor)
    tokens = tokens_of(pixels)
    gathered = tokens * WIDTH * BYTES * (gpus - 1) / gpus / link.bandwidth
    exchanges = BLOCKS * exchange_seconds(tokens, gpus, link, work.attention / gpus / BLOCKS)
    return work.fixed + (work.tokens + work.attention) / gpus + exchanges + gathered


def quantize_seconds(gpus, one, start, file):
    """A quantization. one: seconds of one GPU up to the file; start: of them, those that can't be divided, plus what several take to find
    each other; file: those that writing the file takes."""
    return start + (one - start) / gpus + file


def tables():
    entries = json.loads(STEPS.read_text(encoding="utf-8"))["entries"]
    lines = ["| pixels | link | MB a block | 1 GPU | 2 | 4 | 8 |", "|---|---|---|---|---|---|---|"]
    for pixels in (1024, 2048):
        work = work_of(pixels, entries)
        for link in LINKS:
            times = [step_seconds(pixels, gpus, link, work) for gpus in (1, 2, 4, 8)]
            cells = [f"{times[0] * 1e3:.0f} ms", *(f"{time * 1e3:.0f} ms ({times[0] / time:.2f}x)" for time in times[1:])]
            lines.append(f"| {pixels} | {link.name} | {sum(bytes_sent(tokens_of(pixels), 2)) / 1e6:.0f} | {' | '.join(cells)} |")
    lines += ["", "| quantization of all blocks | 1 GPU | 2 | 4 | 8 |", "|---|---|---|---|---|", quantization()]
    return "\n".join(lines)


def quantization():
    """The row of FLUX.1-dev's quantization, from the measured part of its blocks: what does not grow with them is found from the times of
    one and two GPUs."""
    found = json.loads(SEVERAL.read_text(encoding="utf-8"))
    one, two = (found[f"quantize_{name}"]["lines"][0] for name in ("one", "two"))
    share = BLOCKS / sum(found["arguments"]["blocks"])
    start = max(0.0, 2 * two["seconds"] - one["seconds"])  # t2 = start + (t1 - start) / 2
    whole, file = start + (one["seconds"] - start) * share, (one["seconds_with_saving"] - one["seconds"]) * share
    times = [quantize_seconds(gpus, whole, start, file) for gpus in (1, 2, 4, 8)]
    return f"| seconds | {' | '.join(f'{time:.0f} ({time / times[0]:.2f})' for time in times)} |"


if __name__ == "__main__":
    load_pack()
    print(tables())
