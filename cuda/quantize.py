"""Kernel 1 of a linear: the activation's codes and scales, and the branch's x @ proj_down, in one pass over x.

kernels/quantize_registers.cu is for int8 codes on GPUs with clusters, as long as a cluster's registers hold its tokens, kernels/quantize.cu
for everything else. Here are the shapes of what they write, and how x is cut up for a GPU.
"""

import functools
import math
from typing import NamedTuple, Optional

import torch

from . import compiler, images, runtime
from .int4 import GROUP_SIZE

# How codes are stored (images.py), in the kernels' numbers.
INT8 = 0     # 8-bit codes, a scale a token and part, INTEGER order
BYTES = 1    # 4-bit codes, a scale a token and group of 64, a byte each in GROUP order: for tensor cores without int4
NIBBLES = 2  # the same codes, two a byte in NIBBLE order

DEPTH = 4         # blocks of x under way, quantize.cu's
REGISTERS_RANKS = 64  # the most that quantize_registers.cu multiplies with
FILLED = 0.75     # of the CTAs that a plan of clusters that stay counts with, so many have to fit: else another plan is the faster
SHARED_PER_SM = {75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228, 120: 100, 121: 100}  # KiB
PEAK = 2.0**14    # an fp16 `low` is scaled down to stay below


class Quantized(NamedTuple):
    """What the GEMM needs of x. Mp is M padded to 16, G = K / 64; rows from M on hold zeros.

    act: an image of codes. act_scale: float32, INT8 (2, Mp), one for the columns before and one from `unsigned_from`;
    else (G, Mp). low: the image of (x @ proj_down) / low_scale, low_scale: (Mp,) float32, powers of two, in bf16
    ones. Both None without ranks.
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
    reference.py; codes: INT8, BYTES or NIBBLES. cut: of plans_for's arguments, instead of what it would choose. Returns Quantized.
    """
    m, k = x.shape
    rank = proj_down.shape[1]
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # rows are read in pieces of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    launch, plan = launcher(m, k, rank, x.stride(0), unsigned_from, codes, x.dtype, x.device, **cut)
    q = [None if o is None else torch.empty(o[0], dtype=o[1], device=x.device) for o in outputs(m, k, rank, codes, x.dtype)]
    branch = proj_down
    if rank > plan.ranks:
        branch, *scale = multiplied(x, proj_down)
        q[3:] = scale or q[3:]
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


def output_bytes(m, k, ranks, codes, dtype):
    """The bytes of each of outputs(); 0 where there is none."""
    return [math.prod(output[0]) * output[1].itemsize if output else 0 for output in outputs(m, k, ranks, codes, dtype)]


# Where the plan has no ranks, of which of the kernel's arguments multiplied() takes the place.
PRODUCT = {torch.bfloat16: ("proj_down",), torch.float16: ("proj_down", "low_scale")}


def multiplied(x, proj_down):
    """x @ proj_down / low_scale (M, R) by cuBLAS, and low_scale (Mp,) but for the ones of bf16, which the kernel writes."""
    if x.dtype == torch.bfloat16:
        return x @ proj_down,
    low = x.float() @ proj_down.float()  # fp16 has 11 significant bits, as has tf32: nothing is lost to it
    peak = low.abs().amax(dim=-1)
    scale = torch.exp2(torch.ceil(torch.log2(peak / PEAK))).clamp(min=1)
    scale = torch.where(peak.isfinite(), scale, torch.ones_like(scale))
    return (low / scale.unsqueeze(-1)).to(x.dtype), torch.nn.functional.pad(scale, (0, -x.shape[0] % images.ROWS))


@functools.lru_cache(maxsize=1024)
def launcher(m, k, rank, stride, unsigned_from, codes, dtype, device, pdl=False, **cut):
    """For inputs of this shape, with rows `stride` elements apart: (a function of the addresses of (x, smooth, proj_down, act, act_scale,
    low, low_scale); the plan). Where the plan has fewer ranks, x @ proj_down takes proj_down's place."""
    arch = compiler.architecture(device)
    half = dtype == torch.float16
    sms = compiler.multiprocessors(device)
    for plan in plans_for(m, k, rank, codes, compiler.arch_number(arch), sms, **cut):
        kernel = runtime.kernel(*variant(half, codes, plan), device, plan.shared)
        if plan.ctas == 1:
            break
        # How many clusters fit differs from one GPU to the next: not all have all of their multiprocessors, and some lend a few.
        fit = kernel.active_clusters(plan.ctas, plan.threads) * plan.ctas
        if fit and (not plan.loop or fit >= min(plan.grid, FILLED * plan.fits)):
            if plan.loop:
                plan = plan._replace(grid=min(plan.grid, fit))
            break
    else:
        raise ValueError(f"no cluster of a plan for ({m}, {k}), rank {rank} fits on this GPU")
    sizes = m, k, rank, stride, unsigned_from, *(() if plan.warps else (plan.slots, plan.kept))
    return kernel.launcher((plan.grid,), (plan.threads,), 7, sizes, pdl), plan


# --- How x is cut up -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How x is cut up."""

    ranks: int    # that the kernel multiplies with: all, or none
    tiles: int    # a CTA has 16 * tiles tokens at a time
    ctas: int     # of a cluster: they share the columns
    slots: int    # quantize.cu: blocks of x in shared memory
    kept: int     # quantize.cu: blocks of 1 / smooth in shared memory
    shared: int   # bytes of shared memory
    grid: int     # CTAs in all
    threads: int  # of a CTA
    warps: int    # quantize_registers.cu: of a CTA, that have x; 0: it is quantize.cu
    loop: bool    # quantize_registers.cu: clusters that stay, and take tokens after tokens
    fits: int     # then: CTAs that should fit the GPU at once


def variant(half, codes, plan):
    """(source, entry, defines) of one compiled kernel."""
    defines = (("HALF", int(half)), ("CODES", codes), ("CTAS", plan.ctas), ("RANKS", images.padded(plan.ranks, images.RANK_BLOCK)))
    defines = (*defines, ("TILES", plan.tiles))
    if plan.warps:
        return "quantize_registers.cu", "quantize_registers", (*defines, ("WARPS", plan.warps), ("LOOP", int(plan.loop)))
    return "quantize.cu", "quantize", defines


# FLUX's at 1024 x 1024, some of fewer tokens, and of few columns.
VARIANT_SHAPES = ((512, 3072), (1024, 3072), (4096, 3072), (4608, 3072), (512, 12288), (4096, 12288), (4608, 15360), (300, 192),
                  (9000, 1536))


def variants(arch):
    """Variants that stand for all that `arch` compiles for FLUX's shapes, and some others."""
    number = compiler.arch_number(arch)
    found = []
    for half in (1,) if number < 80 else (0, 1):
        for codes in (INT8, storage(4, arch)):
            for rank in (0, 32, 64):
                for m, k in VARIANT_SHAPES:
                    found.append(variant(half, codes, plan_for(m, k, rank, codes, number, 132)))
    return list(dict.fromkeys(found))


def tile_ranks(arch):
    """The largest rank that quantize.cu multiplies with. Hopper's cuBLAS is faster with more; Turing has shared memory for 64."""
    return 32 if arch >= 90 else 128 if arch > 75 else 64


def plan_for(m, k, rank, codes, arch, sms, **cut):
    """The first of plans_for."""
    return plans_for(m, k, rank, codes, arch, sms, **cut)[0]


def plans_for(m, k, rank, codes, arch, sms, registers=None, tiles=None, ctas=None, loop=None):
    """Plans for a GPU of compute capability `arch` (90, ...) with `sms` multiprocessors, the fastest first.

    registers, tiles, ctas, loop: only plans of (not) quantize_registers.cu, that have as many tiles, clusters of as many CTAs, clusters
    that (don't) stay. Raises ValueError where there is none.
    """
    plans = []
    if not registers and loop is None:
        ranks = rank if rank <= tile_ranks(arch) else 0
        # Without clusters the tokens alone have to make enough CTAs, so tiles are small there, but for the ranks that need two.
        heights = (tiles,) if tiles else (1, 2) if arch >= 90 else (2,) if ranks > 64 else (1,)
        plans += [tile_plan(m, k, ranks, codes, arch, sms, height, size)
                  for height in heights for size in (1, 2, 4, 8) if ctas in (None, size)]
    if registers is not False and codes == INT8 and arch >= 90:
        # Of the sizes of clusters that were measured, those that are the fastest for some shape; more than 8 CTAs on Hopper only.
        for ranks in {0, rank if rank <= REGISTERS_RANKS else 0}:
            sizes = (ctas,) if ctas else (2, 6, 8, 16) if arch == 90 and ranks > images.RANK_BLOCK else (2, 6, 8)
            plans += [registers_plan(m, k, ranks, arch, sms, height, size, loop)
                      for height in ((tiles,) if tiles else (1, 2)) for size in sizes]
    plans = [(plan[0] + multiplied_time(m, k), plan[1]) if plan[1].ranks < rank else plan for plan in plans if plan]
    if not plans:
        raise ValueError(f"no plan for ({m}, {k}), rank {rank} on sm_{arch} with registers={registers}, tiles={tiles}, ctas={ctas}, "
                         f"loop={loop}")
    return [plan for _, plan in sorted(plans)]


# Plans are compared by the microseconds that they would take on an H100, where the constants were measured. Clusters of more than two CTAs
# leave some multiprocessors idle: each lies within one of the GPU's groups of up to 18 of them.


def room(sms, ctas):
    """How many multiprocessors clusters of `ctas` can use."""
    return sms if ctas <= 2 else sms * 10 // 11 // ctas * ctas


def multiplied_time(m, k):
    """x @ proj_down by cuBLAS."""
    return 5 + m * k * 2 / 2.7e6


def most_warps(ranks):
    """Of quantize_registers.cu's, how many find the registers that they need on a multiprocessor."""
    return 16 if ranks <= images.RANK_BLOCK else 12


def resident_ctas(warps, ranks):
    """How many CTAs of so many warps quantize_registers.cu asks for on a multiprocessor."""
    return min(4, max(1, most_warps(ranks) // warps))


def registers_plan(m, k, ranks, arch, sms, tiles, ctas, loop):
    """(time, Plan) with x in registers, or None where it doesn't fit. loop: None for what the number of tokens asks for."""
    blocks, cover = -(-k // images.BLOCK), -(-m // (16 * tiles))
    warps = -(-blocks // ctas)
    messenger = int(tiles == 1)
    if tiles > 2 or not 1 < ctas <= blocks or warps + messenger > most_warps(ranks):
        return None
    if ranks > images.RANK_BLOCK:  # the sums of a first product can't take the place of proj_down, which a second one needs
        if loop is False:
            return None
        loop = True
    resident = resident_ctas(warps + messenger, ranks)
    loop = cover > room(sms * resident, ctas) // ctas if loop is None else loop
    if tiles > 1 and (loop or arch >= 100):  # a loop has x twice; for Blackwell ptxas spills
        return None
    shared = registers_bytes(tiles, ctas, warps, images.padded(ranks, images.RANK_BLOCK), loop)
    per_sm = _shared_per_sm(arch)
    resident = min(resident, per_sm // (shared + 1024))  # CTAs on a multiprocessor
    fits = room(sms * resident, ctas) // ctas
    if not fits:
        return None
    # A round: from x to maxima, to the others, and back to codes; or the time that its bytes take, x's and the codes'. CTAs of less
    # than four warps gain nothing. CTAs on one multiprocessor drift apart: one's loads fill another's waits, and the last round is
    # less idle. Clusters that don't stay come in waves. Loads arrive in the L1, of which shared memory leaves little at its largest.
    share, waves = max(warps, 4), -(-cover // fits)
    chain = 0.5 + 0.17 * share if not ranks else 1.2 + 0.2 * share if ranks <= images.RANK_BLOCK else 2.1 + 0.15 * share
    chain *= tiles * (0.86 + 0.14 * min(resident, -(-cover * ctas // sms)))
    memory = min(fits, cover) * 16 * tiles * k * 3 / (2.25e6 if resident == 1 else 2.6e6)
    memory *= 1.5 if resident * (shared + 1024) > per_sm * 7 // 8 else 1
    if loop:
        rounds = max(1, cover / fits)
        time = 2.6 + (rounds + (waves - rounds) / (1 + resident)) * max(chain, memory)
    else:
        time = 1.7 + 0.9 * tiles + waves * max(chain * (1 if waves == 1 else 1.5), memory)
    return time, Plan(ranks, tiles, ctas, 0, 0, shared, cover * ctas, 32 * (warps + messenger), warps, loop, fits * ctas)


def registers_bytes(tiles, ctas, warps, rank, loop):
    """Shared memory of a CTA, in quantize_registers.cu's order: barriers, maxima, sums, 1 / smooth, proj_down, the warps' sums."""
    rows, turns = 16 * tiles, 2 if loop else 1
    own_rows = -(-rows // ctas)
    received = ctas * (2 * rows + own_rows * rank) * 4
    return 128 + turns * received + warps * (2 * rows * 4 + 512 + 256 * rank) + (-(-warps // 2) * rows * rank * 4 if loop else 0)


def tile_plan(m, k, ranks, codes, arch, sms, tiles, ctas):
    """(time, Plan) of quantize.cu, or None where there are no such clusters."""
    blocks, cover = -(-k // images.BLOCK), -(-m // (16 * tiles))
    if ctas > 1 and (arch < 90 or ctas > blocks or not room(sms, ctas)):
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
    return time, Plan(ranks, tiles, ctas, slots, kept, shared, cover * ctas, 128 * tiles, 0, False, 0)


def tile_bytes(tiles, rank, slots, kept):
    """Shared memory of a CTA: x, proj_down, 1 / smooth, maxima and scales, in quantize.cu's order."""
    rows = 16 * tiles
    return slots * rows * 256 + images.padded(rank, images.RANK_BLOCK) * 256 + kept * 512 + (8 + 2 + 2) * rows * 4


def _shared_per_sm(arch):
    return SHARED_PER_SM.get(arch, 100) << 10
