"""Kernel 1 of a linear: the activation's codes and scales, and the branch's x @ proj_down, in one pass over x.

Here are the shapes of what kernels/quantize.cu writes, and how x is cut up for a GPU.
"""

import functools
from typing import NamedTuple, Optional

import torch

from . import compiler, images
from .int4 import GROUP_SIZE

# How codes are stored (images.py), in the kernels' numbers.
INT8 = 0     # 8-bit codes, a scale a token and part, INTEGER order
BYTES = 1    # 4-bit codes, a scale a token and group of 64, a byte each in GROUP order: for tensor cores without int4
NIBBLES = 2  # the same codes, two a byte in NIBBLE order

DEPTH = 4         # blocks of x under way, quantize.cu's
SHARED_PER_SM = {75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228, 120: 100, 121: 100}  # KiB
PEAK = 2.0**14    # an fp16 `low` is scaled down to stay below


class Quantized(NamedTuple):
    """What the GEMM needs of x. Mp is M padded to 16, G = K / 64; rows from M on hold zeros.

    act: an image of codes. act_scale: float32, INT8 (2, Mp), one for the columns before and one from `unsigned_from`;
    else (G, Mp). low: the image of (x @ proj_down) / low_scale, low_scale: (Mp,) float32, powers of two; None without ranks.
    """

    act: torch.Tensor
    act_scale: torch.Tensor
    low: Optional[torch.Tensor]
    low_scale: Optional[torch.Tensor]


class Plan(NamedTuple):
    """How x is cut up."""

    tiles: int   # a CTA has 16 * tiles tokens at a time
    ctas: int    # of a cluster: they share the columns
    slots: int   # blocks of x in shared memory
    kept: int    # blocks of 1 / smooth in shared memory
    shared: int  # bytes of shared memory
    grid: int    # CTAs in all


def storage(act_bits, arch):
    """How a GEMM on `arch` wants the codes of 4 or 8 bits."""
    if act_bits == 8:
        return INT8
    return NIBBLES if compiler.arch_number(arch) < 90 else BYTES  # Hopper and later have no int4 tensor cores


def quantize(x, smooth, proj_down, unsigned_from, codes, tiles=None, ctas=None):
    """x: (M, K) bf16 or fp16 on a GPU; smooth: (K,), proj_down: (K, R), contiguous, x's dtype; unsigned_from: as in
    reference.py; codes: INT8, BYTES or NIBBLES. tiles, ctas: instead of what the plan says. Returns Quantized.
    """
    m, k = x.shape
    rank = proj_down.shape[1]
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # rows are read in pieces of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    fused = rank if rank <= fused_ranks(x.device) else 0
    launch, plan = _launch(m, k, fused, codes, x.dtype, x.device, tiles, ctas)
    rows, blocks = images.padded(m, images.ROWS), -(-k // images.BLOCK)
    if codes == NIBBLES:
        act = torch.empty(blocks, rows, images.BLOCK // 2, dtype=torch.uint8, device=x.device)
    else:
        act = torch.empty(blocks, rows, images.BLOCK, dtype=torch.int8, device=x.device)
    act_scale = torch.empty(2 if codes == INT8 else k // GROUP_SIZE, rows, dtype=torch.float32, device=x.device)
    low = low_scale = None
    if fused:
        low = torch.empty(-(-rank // images.RANK_BLOCK), rows, images.RANK_BLOCK, dtype=x.dtype, device=x.device)
        low_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch((plan.grid,), (128 * plan.tiles,), x, smooth, proj_down, act, act_scale, low, low_scale, m, k, fused, x.stride(0), unsigned_from,
           plan.slots, plan.kept)
    if rank > fused:
        low, low_scale = unfused_low(x, proj_down)
    return Quantized(act, act_scale, low, low_scale)


def fused_ranks(device):
    """The largest rank that the kernels take; cuBLAS multiplies larger branches. Turing has shared memory for 64."""
    return 64 if compiler.architecture(device) == "sm_75" else 128


def unfused_low(x, proj_down):
    """low and low_scale of a rank that the kernels don't take, by cuBLAS."""
    if x.dtype == torch.bfloat16:
        low = x @ proj_down
        scale = torch.ones(x.shape[0], device=x.device)
    else:
        low = x.float() @ proj_down.float()  # fp16 has 11 significant bits, as has tf32: nothing is lost to it
        peak = low.abs().amax(dim=-1)
        scale = torch.exp2(torch.ceil(torch.log2(peak / PEAK))).clamp(min=1)
        scale = torch.where(peak.isfinite(), scale, torch.ones_like(scale))
        low = (low / scale.unsqueeze(-1)).to(x.dtype)
    return images.branch_image(low), torch.nn.functional.pad(scale, (0, -x.shape[0] % images.ROWS))


@functools.lru_cache(maxsize=1024)
def _launch(m, k, rank, codes, dtype, device, tiles, ctas):
    """(kernel, plan) for inputs of this shape."""
    arch = compiler.architecture(device)
    plan = plan_for(m, k, rank, codes, compiler.arch_number(arch), compiler.multiprocessors(device), tiles, ctas)
    source, entry, defines = variant(dtype == torch.float16, codes, rank, plan)
    return compiler.kernel(source, entry, defines, device, plan.shared), plan


def variant(half, codes, rank, plan):
    """(source, entry, defines) of one compiled kernel."""
    ranks = images.padded(rank, images.RANK_BLOCK)
    return "quantize.cu", "quantize", (("HALF", int(half)), ("CODES", codes), ("CTAS", plan.ctas), ("RANKS", ranks), ("TILES", plan.tiles))


def variants(arch):
    """Variants that stand for all that `arch` compiles for FLUX's shapes, and some others."""
    number = compiler.arch_number(arch)
    found = []
    for half in (1,) if number < 80 else (0, 1):
        for codes in (INT8, storage(4, arch)):
            for rank in (0, 32, 64 if number < 80 else 128):
                for m, k in ((512, 3072), (4096, 3072), (4096, 12288), (4608, 15360)):
                    found.append(variant(half, codes, rank, plan_for(m, k, rank, codes, number, 132)))
    return list(dict.fromkeys(found))


def shared_bytes(tiles, rank, slots, kept):
    """Shared memory of a CTA: x, proj_down, 1 / smooth, maxima and scales, in quantize.cu's order."""
    rows = 16 * tiles
    return slots * rows * 256 + images.padded(rank, images.RANK_BLOCK) * 256 + kept * 512 + (8 + 2 + 2) * rows * 4


def plan_for(m, k, rank, codes, arch, sms, tiles=None, ctas=None):
    """The Plan for a GPU of compute capability `arch` (90, ...) with `sms` multiprocessors."""
    blocks = -(-k // images.BLOCK)
    # On RTX 50 the kernel for clusters of 8 spills registers with more than 64 ranks.
    clusters = [c for c in (1, 2, 4, 8) if c <= blocks and arch >= 90 and (c < 8 or arch < 120 or rank <= 64)] or [1]
    per_sm = SHARED_PER_SM.get(arch, 100) << 10
    most = per_sm - 1024 if arch > 75 else per_sm
    half = min(most, per_sm // 2 - 1024)  # so that two CTAs share a multiprocessor: one loads while the other codes

    def needs(tiles, ctas):
        share = -(-blocks // ctas)
        return shared_bytes(tiles, rank, share if codes == INT8 else min(share, DEPTH), share if codes == INT8 else 1)

    if tiles is None:
        # Few tokens: small tiles, so that there are enough CTAs. Without clusters the tokens alone have to make them.
        tiles = 2 if rank > 64 else 1 if arch < 90 or m <= 16 * sms else 2
    cover = -(-m // (16 * tiles))
    if ctas is None:
        # On an H100, a wave of CTAs took about as long as 6 blocks of columns and those that each of them has.
        fitting = [c for c in clusters if needs(tiles, c) <= (half if tiles < 4 else most)] or clusters[-1:]
        resident = sms * {1: 4, 2: 2, 4: 1}[tiles]
        ctas = min(fitting, key=lambda c: -(-c * cover // resident) * (6 + -(-blocks // c)))
    share = -(-blocks // ctas)
    kept = share if codes == INT8 else 1
    slots = share if codes == INT8 else min(share, DEPTH)
    if codes == INT8:
        # What doesn't fit is read again.
        limit = half if shared_bytes(tiles, rank, min(share, DEPTH), share) <= half else most
        if shared_bytes(tiles, rank, min(share, DEPTH), share) > most:
            kept = 1
        fixed = shared_bytes(tiles, rank, 0, kept)
        slots = max(min(share, DEPTH), min(share, (limit - fixed) // (tiles * 16 * 256)))
    return Plan(tiles, ctas, slots, kept, shared_bytes(tiles, rank, slots, kept), cover * ctas)
