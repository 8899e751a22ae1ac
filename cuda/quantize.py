"""Kernel 1 of a linear: the activation's codes and scales, and the branch's x @ proj_down, in one pass over x.

kernels/quantize_ring.cu is for int8 codes of wide layers on GPUs with clusters, kernels/quantize.cu for everything else. Here are the
shapes of what they write, and how x is cut up for a GPU.
"""

import functools
from typing import NamedTuple, Optional

import torch

from . import compiler, images, runtime
from .int4 import GROUP_SIZE

# How codes are stored (images.py), in the kernels' numbers.
INT8 = 0     # 8-bit codes, a scale a token and part, INTEGER order
BYTES = 1    # 4-bit codes, a scale a token and group of 64, a byte each in GROUP order: for tensor cores without int4
NIBBLES = 2  # the same codes, two a byte in NIBBLE order

DEPTH = 4         # blocks of x under way, quantize.cu's
RING_WARPS = 16   # of a CTA, quantize_ring.cu's
SHARED_PER_SM = {75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228, 120: 100, 121: 100}  # KiB
PEAK = 2.0**14    # an fp16 `low` is scaled down to stay below


class Quantized(NamedTuple):
    """What the GEMM needs of x. Mp is M padded to 16, G = K / 64; rows from M on hold zeros.

    act: an image of codes. act_scale: float32, INT8 (2, Mp), one for the columns before and one from `unsigned_from`;
    else (G, Mp). low: the image of (x @ proj_down) / low_scale, low_scale: (Mp,) float32, powers of two. Both None
    without ranks.
    """

    act: torch.Tensor
    act_scale: torch.Tensor
    low: Optional[torch.Tensor]
    low_scale: Optional[torch.Tensor]


def storage(act_bits, arch):
    """How a GEMM on `arch` wants the codes of 4 or 8 bits."""
    if act_bits == 8:
        return INT8
    return NIBBLES if compiler.arch_number(arch) < 90 else BYTES  # Hopper and later have no int4 tensor cores


def quantize(x, smooth, proj_down, unsigned_from, codes, **cut):
    """x: (M, K) bf16 or fp16 on a GPU; smooth: (K,), proj_down: (K, R), contiguous, x's dtype; unsigned_from: as in
    reference.py; codes: INT8, BYTES or NIBBLES. cut: of plan_for's arguments, instead of what it would choose. Returns Quantized.
    """
    m, k = x.shape
    rank = proj_down.shape[1]
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # rows are read in pieces of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    launch, plan = launcher(m, k, rank, x.stride(0), unsigned_from, codes, x.dtype, x.device, **cut)
    q = [None if o is None else torch.empty(o[0], dtype=o[1], device=x.device) for o in outputs(m, k, rank, codes, x.dtype)]
    branch = proj_down
    if rank > plan.ranks:
        branch, scale = multiplied(x, proj_down)
        q[3] = q[3] if scale is None else scale
    launch(*map(runtime.address, (x, smooth, branch, *q)))
    return Quantized(*q)


def outputs(m, k, ranks, codes, dtype):
    """(shape, dtype) of each tensor of a Quantized; None where there is none."""
    rows, blocks = images.padded(m, images.ROWS), -(-k // images.BLOCK)
    act = ((blocks, rows, images.BLOCK // 2), torch.uint8) if codes == NIBBLES else ((blocks, rows, images.BLOCK), torch.int8)
    act_scale = (2 if codes == INT8 else k // GROUP_SIZE, rows), torch.float32
    if not ranks:
        return act, act_scale, None, None
    return act, act_scale, ((-(-ranks // images.RANK_BLOCK), rows, images.RANK_BLOCK), dtype), ((rows,), torch.float32)


def multiplied(x, proj_down):
    """x @ proj_down / low_scale (M, R) by cuBLAS, for ranks that the kernels don't take, and low_scale; None for the ones of
    bf16, which the kernel writes."""
    if x.dtype == torch.bfloat16:
        return x @ proj_down, None
    low = x.float() @ proj_down.float()  # fp16 has 11 significant bits, as has tf32: nothing is lost to it
    peak = low.abs().amax(dim=-1)
    scale = torch.exp2(torch.ceil(torch.log2(peak / PEAK))).clamp(min=1)
    scale = torch.where(peak.isfinite(), scale, torch.ones_like(scale))
    return (low / scale.unsqueeze(-1)).to(x.dtype), torch.nn.functional.pad(scale, (0, -x.shape[0] % images.ROWS))


@functools.lru_cache(maxsize=1024)
def launcher(m, k, rank, stride, unsigned_from, codes, dtype, device, **cut):
    """For inputs of this shape, with rows `stride` elements apart: (a function of the addresses of (x, smooth, proj_down, act, act_scale,
    low, low_scale); the plan). Where the plan has fewer ranks, x @ proj_down takes proj_down's place."""
    arch = compiler.architecture(device)
    half = dtype == torch.float16
    plan = plan_for(m, k, rank, codes, half, compiler.arch_number(arch), compiler.multiprocessors(device), **cut)
    source, entry, defines = variant(half, codes, plan)
    kernel = runtime.kernel(source, entry, defines, device, plan.shared)
    if plan.spans:  # how many clusters fit differs from one GPU to the next: not all have all of their multiprocessors
        clusters = min(-(-m // 16), kernel.active_clusters(plan.ctas, plan.threads))
        plan = plan._replace(grid=plan.ctas * clusters)
    sizes = m, k, rank, stride, unsigned_from, plan.slots, plan.kept
    return kernel.launcher((plan.grid,), (plan.threads,), 7, sizes), plan


# --- How x is cut up -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How x is cut up."""

    ranks: int    # that the kernel multiplies with: all, or none
    tiles: int    # a CTA has 16 * tiles tokens at a time
    ctas: int     # of a cluster: they share the columns
    slots: int    # blocks of x in shared memory; of a ring, tiles
    kept: int     # blocks of 1 / smooth in shared memory
    shared: int   # bytes of shared memory
    grid: int     # CTAs in all
    threads: int  # of a CTA
    spans: int    # of a ring: spans of 32 columns a warp; 0: no ring


def variant(half, codes, plan):
    """(source, entry, defines) of one compiled kernel."""
    defines = (("HALF", int(half)), ("CODES", codes), ("CTAS", plan.ctas), ("RANKS", images.padded(plan.ranks, images.RANK_BLOCK)))
    if plan.spans:
        return "quantize_ring.cu", "quantize_ring", (*defines, ("WARP_SPANS", plan.spans))
    return "quantize.cu", "quantize", (*defines, ("TILES", plan.tiles))


def variants(arch):
    """Variants that stand for all that `arch` compiles for FLUX's shapes, and some others."""
    number = compiler.arch_number(arch)
    found = []
    for half in (1,) if number < 80 else (0, 1):
        for codes in (INT8, storage(4, arch)):
            for rank in (0, 32, 64):
                for m, k in ((512, 3072), (4096, 3072), (4608, 3072), (4096, 12288), (4608, 15360)):
                    found.append(variant(half, codes, plan_for(m, k, rank, codes, half, number, 132)))
    return list(dict.fromkeys(found))


def most_ranks(arch):
    """The largest rank that the kernels multiply with. Hopper's cuBLAS is faster with more; Turing has shared memory for 64."""
    return 32 if arch >= 90 else 128 if arch > 75 else 64


def plan_for(m, k, rank, codes, half, arch, sms, ring=None, tiles=None, ctas=None):
    """The fastest Plan for a GPU of compute capability `arch` (90, ...) with `sms` multiprocessors.

    ring, tiles, ctas: only plans that are (not) a ring, have as many tiles, or clusters of as many CTAs. Raises ValueError where there is
    none.
    """
    ranks = rank if rank <= most_ranks(arch) else 0
    # Without clusters the tokens alone have to make enough CTAs, so tiles are small there, but for the ranks that need two.
    heights = (tiles,) if tiles else (1, 2) if arch >= 90 else (2,) if ranks > 64 else (1,)
    sizes = (ctas,) if ctas else (1, 2, 4, 8)
    plans = []
    if not ring:
        plans += [tile_plan(m, k, ranks, codes, arch, sms, height, size) for height in heights for size in sizes]
    if ring is not False and not tiles and codes == INT8 and arch >= 90:
        plans += [ring_plan(m, k, ranks, half, arch, sms, size) for size in sizes if size > 1]
    plans = [plan for plan in plans if plan]
    if not plans:
        raise ValueError(f"no plan for ({m}, {k}), rank {rank} on sm_{arch} with ring={ring}, tiles={tiles}, ctas={ctas}")
    return min(plans)[1]


# Plans are compared by the microseconds that they would take on an H100, where the constants were measured. Clusters of more than two CTAs
# leave some multiprocessors idle: each lies within one of the GPU's groups of up to 18 of them.


def room(sms, ctas):
    """How many multiprocessors clusters of `ctas` can use."""
    return sms if ctas <= 2 else sms * 10 // 11 // ctas * ctas


def ring_plan(m, k, ranks, half, arch, sms, ctas):
    """(time, Plan) of a ring, or None where it doesn't fit."""
    padded, blocks, tiles = images.padded(ranks, images.RANK_BLOCK), -(-k // images.BLOCK), -(-m // 16)
    share, groups = -(-blocks // ctas), RING_WARPS // max(1, padded // 16)
    spans = -(-4 * share // groups)
    slot = 16 * (256 * share + 64)
    fixed = 192 + 512 * ctas + 128 * RING_WARPS + (4 + groups) * 64 * padded + 512 * share  # Places in quantize_ring.cu
    slots = min(16, (_shared_per_sm(arch) - 1024 - fixed) // slot)
    clusters = min(tiles, room(sms, ctas) // ctas)
    if ctas > blocks or spans > (7 if half else 8) or clusters < 1:
        return None
    rounds = -(-tiles // clusters)
    if slots < min(3, rounds):
        return None
    slots = min(slots, rounds)
    time = 7 + (rounds + 1.5) * (0.9 + 0.25 * share if ranks else 0.6 + 0.2 * share)
    return time, Plan(ranks, 1, ctas, slots, share, fixed + slots * slot, clusters * ctas, 32 * RING_WARPS, spans)


def tile_plan(m, k, ranks, codes, arch, sms, tiles, ctas):
    """(time, Plan) without a ring, or None where there are no such clusters."""
    blocks, cover = -(-k // images.BLOCK), -(-m // (16 * tiles))
    if ctas > 1 and (arch < 90 or ctas > blocks):
        return None
    share = -(-blocks // ctas)
    per_sm = _shared_per_sm(arch)
    most = per_sm - 1024 if arch > 75 else per_sm
    half = min(most, per_sm // 2 - 1024)  # so that two CTAs share a multiprocessor: one loads while the other codes
    if codes == INT8:
        # x waits for its scale. What doesn't fit is read again.
        limit = half if tile_bytes(tiles, ranks, min(share, DEPTH), share) <= half else most
        kept = share if tile_bytes(tiles, ranks, min(share, DEPTH), share) <= most else 1
        slots = max(min(share, DEPTH), min(share, (limit - tile_bytes(tiles, ranks, 0, kept)) // (tiles * 16 * 256)))
    else:
        slots, kept = min(share, DEPTH), 1
    shared = tile_bytes(tiles, ranks, slots, kept)
    resident = max(1, min({1: 3, 2: 2, 4: 1}[tiles], per_sm // (shared + 1024)))
    waves = -(-ctas * cover // (resident * room(sms, ctas)))
    busy = min(resident, -(-ctas * cover // sms)) * tiles  # tiles of 16 rows that a multiprocessor works on
    again = 1.5 if codes == INT8 and slots < share else 1
    time = 4 + waves * (2.6 + share * again * (0.28 + 0.26 * busy))
    return time, Plan(ranks, tiles, ctas, slots, kept, shared, cover * ctas, 128 * tiles, 0)


def tile_bytes(tiles, rank, slots, kept):
    """Shared memory of a CTA: x, proj_down, 1 / smooth, maxima and scales, in quantize.cu's order."""
    rows = 16 * tiles
    return slots * rows * 256 + images.padded(rank, images.RANK_BLOCK) * 256 + kept * 512 + (8 + 2 + 2) * rows * 4


def _shared_per_sm(arch):
    return SHARED_PER_SM.get(arch, 100) << 10
