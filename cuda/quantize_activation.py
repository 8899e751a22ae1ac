"""Kernel 1 of a linear: the activation's codes and scales, and the LoRA branch's x @ proj_down, in one pass over x.

kernels/quantize_registers.cu makes int8 codes on GPUs with clusters, if a cluster's registers hold its tokens; kernels/quantize.cu does
everything else. This module has the shapes of the kernels' outputs, the plans that divide x among a GPU's CTAs, and the launch.
"""

import functools
import math
from typing import NamedTuple, Optional

import torch
from torch.nn.functional import linear

from . import kernel_loader, runtime
from .activation_layout import BLOCK, RANK_BLOCK, ROWS, CodeStorage, padded
from .int4 import GROUP_SIZE
from .operands import NO_LORA
from .targets import MEASURED_BANDWIDTH

SOURCE, REGISTERS_SOURCE = "quantize.cu", "quantize_registers.cu"
DEPTH = 4         # blocks of x in flight, as in quantize.cu
REGISTERS_RANKS = 64  # the most ranks that quantize_registers.cu computes
FILLED = 0.75     # a persistent plan needs this fraction of its estimated resident CTAs; with fewer, another plan is faster
PEAK = 2.0**14    # an fp16 lora_act is scaled down to stay below this


class Quantized(NamedTuple):
    """A quantized activation, the GEMMs' input. Mp is M padded to 16, G = K / 64; rows from M on hold zeros.

    act: the codes in the activation layout. act_scale: float32; for INT8 (2, Mp), one scale for the columns before `unsigned_from` and one
    for the others; else (G, Mp). lora_act: (x @ proj_down) / lora_act_scale in the activation layout, then x @ lora_down^T * lora_strength
    likewise, where each part of the LoRA begins with a new block. lora_act_scale: (Mp,) float32, powers of two, ones in bf16. Both are None
    without ranks.
    """

    act: torch.Tensor
    act_scale: torch.Tensor
    lora_act: Optional[torch.Tensor]
    lora_act_scale: Optional[torch.Tensor]


def quantize(x, smooth, proj_down, unsigned_from, storage, plans, lora_down=None, lora_strength=None, lora=NO_LORA):
    """Quantize x on a GPU. Returns Quantized.

    x: (M, K) bf16 or fp16; smooth: (K,), proj_down: (K, R), lora_down: as in LayerOperands, contiguous, in x's dtype; unsigned_from: as in
    reference.py; storage: a CodeStorage; plans: as in launcher; lora_strength: as in LayerOperands; lora: the LoRASizes.
    """
    m, k = x.shape
    rank = proj_down.shape[1]
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # the kernel reads rows in pieces of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    launch, plan = launcher(m, k, rank, x.stride(0), unsigned_from, storage, plans, x.dtype, x.device, lora=lora)
    q = [None if o is None else torch.empty(o[0], dtype=o[1], device=x.device) for o in outputs(m, k, rank, storage, x.dtype, lora)]
    down = proj_down
    if plan.ranks < rank or lora.ranks:
        down, *scale = multiplied(x, proj_down, lora_down, lora_strength)
        q[3:] = scale or q[3:]
    launch(*map(runtime.address, (x, smooth, down, *q, *((lora_strength,) if lora.ranks else ()))))
    return Quantized(*q)


def outputs(m, k, ranks, storage, dtype, lora=NO_LORA):
    """(shape, dtype) of each tensor of a Quantized; None for those that are missing without ranks."""
    rows, blocks = padded(m, ROWS), -(-k // BLOCK)
    nibbles = storage == CodeStorage.INT4_NIBBLES
    act = ((blocks, rows, BLOCK // 2), torch.uint8) if nibbles else ((blocks, rows, BLOCK), torch.int8)
    act_scale = (2 if storage == CodeStorage.INT8 else k // GROUP_SIZE, rows), torch.float32
    blocks = -(-ranks // RANK_BLOCK) + lora.blocks(RANK_BLOCK)
    if not blocks:
        return act, act_scale, None, None
    return act, act_scale, ((blocks, rows, RANK_BLOCK), dtype), ((rows,), torch.float32)


def output_bytes(m, k, ranks, storage, dtype, lora=NO_LORA):
    """The size in bytes of each of outputs(); 0 for None."""
    return [math.prod(output[0]) * output[1].itemsize if output else 0 for output in outputs(m, k, ranks, storage, dtype, lora)]


# The kernel's arguments that multiplied()'s tensors replace, if the plan leaves the branch to cuBLAS, as always with a LoRA.
PRODUCT = {torch.bfloat16: ("proj_down",), torch.float16: ("proj_down", "lora_act_scale")}


def multiplied(x, proj_down, lora_down=None, lora_strength=None):
    """x @ proj_down / lora_act_scale (M, R) by cuBLAS, with a LoRA x @ lora_down^T instead, and in fp16 lora_act_scale (Mp,). In bf16 the
    kernel writes its ones, and multiplies the LoRA's ranks by their strengths.

    x: (M, K); the others as in LayerOperands.
    """
    if x.dtype == torch.bfloat16:
        return x @ proj_down if lora_down is None else linear(x, lora_down),
    down = proj_down if lora_down is None else lora_down.t()
    lora_act = x.float() @ down.float()  # tf32 is exact here: it has fp16's 11 significant bits
    if lora_down is not None:
        lora_act[:, proj_down.shape[1]:] *= lora_strength
    peak = lora_act.abs().amax(dim=-1)
    scale = torch.exp2(torch.ceil(torch.log2(peak / PEAK))).clamp(min=1)
    scale = torch.where(peak.isfinite(), scale, torch.ones_like(scale))
    return (lora_act / scale.unsqueeze(-1)).to(x.dtype), torch.nn.functional.pad(scale, (0, -x.shape[0] % ROWS))


@functools.lru_cache(maxsize=1024)
def launcher(m, k, rank, stride, unsigned_from, storage, plans, dtype, device, pdl=False, lora=NO_LORA):
    """(a function that launches the kernel, the Plan that it runs), for inputs of this shape with rows `stride` elements apart.

    The function takes the addresses of (x, smooth, proj_down, act, act_scale, lora_act, lora_act_scale), and of lora_strength if there is a
    LoRA. If the Plan has fewer ranks than
    `rank`, or if there is a LoRA, multiplied() replaces proj_down.
    plans: of plans_for, the fastest first; the first one whose clusters fit on the GPU runs. Raises ValueError if none fits.
    """
    if lora.ranks and any(plan.ranks for plan in plans):
        raise ValueError("With a LoRA, cuBLAS multiplies all ranks: the plans must be those of plans_for(..., fused=False).")
    for plan in plans:
        kernel = kernel_loader.kernel(*variant(dtype, storage, plan, bool(lora.ranks)), device, plan.shared)
        if plan.ctas == 1:
            break
        # GPUs of one model can hold different numbers of clusters, since their disabled multiprocessors differ.
        fit = kernel.active_clusters(plan.ctas, plan.threads) * plan.ctas
        if fit and (not plan.loop or fit >= min(plan.grid, FILLED * plan.fits)):
            if plan.loop:
                plan = plan._replace(grid=min(plan.grid, fit))
            break
    else:
        raise ValueError(f"no cluster of a plan for ({m}, {k}), rank {rank} fits on this GPU")
    of_lora = (*lora.arguments[:2], rank + sum(lora.ranks)) if lora.ranks else ()
    sizes = m, k, rank, stride, unsigned_from, *of_lora, *(() if plan.warps else (plan.slots, plan.kept))
    return kernel.launcher((plan.grid,), (plan.threads,), 7 + bool(lora.ranks), sizes, pdl), plan


# --- The plans -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How x is divided among CTAs and their shared memory."""

    ranks: int    # ranks that the kernel computes: all of the layer's, or 0
    tiles: int    # a CTA has 16 * tiles tokens at a time
    ctas: int     # CTAs of a cluster, which share the columns
    slots: int    # quantize.cu: blocks of x in shared memory
    kept: int     # quantize.cu: blocks of 1 / smooth in shared memory
    shared: int   # bytes of shared memory
    grid: int     # number of CTAs
    threads: int  # threads of a CTA
    warps: int    # quantize_registers.cu: warps of a CTA that hold x; 0: the plan is for quantize.cu
    loop: bool    # quantize_registers.cu: clusters are persistent and loop over runs of tokens
    fits: int     # with `loop`: estimated CTAs that fit on the GPU at once


def source(plan):
    """The kernel of a Plan, a file in kernels/."""
    return REGISTERS_SOURCE if plan.warps else SOURCE


def variant(dtype, storage, plan, lora=False):
    """(source, entry, defines) of one compiled kernel. lora: whether x @ proj_down also has LoRAs' ranks."""
    defines = (("HALF", int(dtype == torch.float16)), ("CODES", int(storage)), ("CTAS", plan.ctas),
               ("RANKS", padded(plan.ranks, RANK_BLOCK)), ("TILES", plan.tiles), ("LORA", int(lora)))
    if plan.warps:
        return source(plan), "quantize_registers", (*defines, ("WARPS", plan.warps), ("LOOP", int(plan.loop)))
    return source(plan), "quantize", defines


def plans_for(m, k, rank, storage, target, sms, registers=None, tiles=None, ctas=None, loop=None, fused=True):
    """The Plans for a GPU of a Target with `sms` multiprocessors, the fastest first, as a tuple.

    fused: whether a plan may compute x @ proj_down itself.
    registers, tiles, ctas, loop: restrict the plans to quantize_registers.cu (True) or quantize.cu (False), to this number of tiles, to
    clusters of this many CTAs, to persistent clusters or others. Raises ValueError if no plan is left.
    """
    plans, clusters = [], target.max_cluster > 1
    if not registers and loop is None:
        ranks = rank if fused and rank <= target.quantize_ranks else 0
        # Without clusters only the tokens are divided among CTAs. Small tiles then make enough CTAs; more than 64 ranks need two tiles.
        heights = (tiles,) if tiles else (1, 2) if clusters else (2,) if ranks > 64 else (1,)
        plans += [tile_plan(m, k, ranks, storage, target, sms, height, size)
                  for height in heights for size in (1, 2, 4, 8) if ctas in (None, size)]
    if registers is not False and storage == CodeStorage.INT8 and clusters:
        # Of the measured cluster sizes, these are the fastest for some shape.
        for ranks in {0, rank if fused and rank <= REGISTERS_RANKS else 0}:
            sizes = (ctas,) if ctas else (2, 6, 8, 16) if target.max_cluster >= 16 and ranks > RANK_BLOCK else (2, 6, 8)
            plans += [registers_plan(m, k, ranks, target, sms, height, size, loop)
                      for height in ((tiles,) if tiles else (1, 2)) for size in sizes]
    plans = [(plan[0] + multiplied_time(m, k, target), plan[1]) if plan[1].ranks < rank else plan for plan in plans if plan]
    if not plans:
        raise ValueError(f"no plan for ({m}, {k}), rank {rank} on {target.arch} with registers={registers}, tiles={tiles}, ctas={ctas}, "
                         f"loop={loop}")
    return tuple(plan for _, plan in sorted(plans))


# The time of a plan is an estimate in microseconds on an H100, where the constants were measured.


def room(sms, ctas):
    """How many multiprocessors clusters of `ctas` CTAs can use. A cluster runs within one GPC, a group of up to 18 multiprocessors, so that
    clusters of more than two CTAs leave some multiprocessors idle."""
    return sms if ctas <= 2 else sms * 10 // 11 // ctas * ctas


def faster_memory(target):
    """How much faster the memory of a GPU is than an H100's."""
    return target.bandwidth / MEASURED_BANDWIDTH


def multiplied_time(m, k, target):
    """The time of x @ proj_down by cuBLAS."""
    return 5 + m * k * 2 / 2.7e6 / faster_memory(target)


def most_warps(ranks):
    """How many warps of quantize_registers.cu fit in a multiprocessor's registers."""
    return 16 if ranks <= RANK_BLOCK else 12


def resident_ctas(warps, ranks):
    """How many CTAs of this many warps quantize_registers.cu should have on a multiprocessor: 1 to 4, as its registers allow."""
    return min(4, max(1, most_warps(ranks) // warps))


def registers_plan(m, k, ranks, target, sms, tiles, ctas, loop):
    """(time, Plan) of quantize_registers.cu, or None if x doesn't fit. loop: None to decide by the number of tokens."""
    blocks, cover = -(-k // BLOCK), -(-m // (16 * tiles))
    warps = -(-blocks // ctas)
    communication_warp = int(tiles == 1)
    if tiles > 2 or not 1 < ctas <= blocks or warps + communication_warp > most_warps(ranks):
        return None
    if ranks > RANK_BLOCK:  # a first product's sums can't overwrite proj_down, which a second product needs
        if loop is False:
            return None
        loop = True
    resident = resident_ctas(warps + communication_warp, ranks)
    loop = cover > room(sms * resident, ctas) // ctas if loop is None else loop
    if tiles > (1 if loop else target.register_tiles):  # a loop holds two tiles of x
        return None
    shared = registers_bytes(tiles, ctas, warps, padded(ranks, RANK_BLOCK), loop)
    resident = min(resident, target.shared_per_sm // (shared + 1024))  # CTAs on a multiprocessor
    fits = room(sms * resident, ctas) // ctas
    if not fits:
        return None
    # A round takes the longer of two times: the latency from x over the maxima and the other CTAs to codes, or the transfer of x and the
    # codes. Fewer than four warps per CTA aren't faster than four. CTAs on one multiprocessor drift apart, so that one's loads fill
    # another's waits and the last round is less idle. Clusters that aren't persistent run in waves. Loads arrive in the L1 cache, which
    # is small beside the largest shared memory.
    busy_warps, waves = max(warps, 4), -(-cover // fits)
    chain = 0.5 + 0.17 * busy_warps if not ranks else 1.2 + 0.2 * busy_warps if ranks <= RANK_BLOCK else 2.1 + 0.15 * busy_warps
    chain *= tiles * (0.86 + 0.14 * min(resident, -(-cover * ctas // sms)))
    memory = min(fits, cover) * 16 * tiles * k * 3 / (2.25e6 if resident == 1 else 2.6e6) / faster_memory(target)
    memory *= 1.5 if resident * (shared + 1024) > target.shared_per_sm * 7 // 8 else 1
    if loop:
        rounds = max(1, cover / fits)
        time = 2.6 + (rounds + (waves - rounds) / (1 + resident)) * max(chain, memory)
    else:
        time = 1.7 + 0.9 * tiles + waves * max(chain * (1 if waves == 1 else 1.5), memory)
    return time, Plan(ranks, tiles, ctas, 0, 0, shared, cover * ctas, 32 * (warps + communication_warp), warps, loop, fits * ctas)


def registers_bytes(tiles, ctas, warps, rank, loop):
    """Bytes of a CTA's shared memory, in quantize_registers.cu's order: barriers, maxima, sums, 1 / smooth, proj_down, the warps' sums."""
    rows, buffers = 16 * tiles, 2 if loop else 1
    own_rows = -(-rows // ctas)
    received = ctas * (2 * rows + own_rows * rank) * 4
    return 128 + buffers * received + warps * (2 * rows * 4 + 512 + 256 * rank) + (-(-warps // 2) * rows * rank * 4 if loop else 0)


def tile_plan(m, k, ranks, storage, target, sms, tiles, ctas):
    """(time, Plan) of quantize.cu, or None if there are no such clusters."""
    blocks, cover = -(-k // BLOCK), -(-m // (16 * tiles))
    if ctas > target.max_cluster or ctas > 1 and (ctas > blocks or not room(sms, ctas)):
        return None
    own_blocks = -(-blocks // ctas)
    most = target.shared_per_cta
    for_two = min(most, target.shared_per_sm // 2 - 1024)  # with two CTAs on a multiprocessor, one loads while the other encodes
    if storage == CodeStorage.INT8:
        # x stays in shared memory until its scale is known. Blocks that don't fit are read a second time.
        limit = for_two if tile_bytes(tiles, ranks, min(own_blocks, DEPTH), own_blocks) <= for_two else most
        kept = own_blocks if tile_bytes(tiles, ranks, min(own_blocks, DEPTH), own_blocks) <= most else 1
        slots = max(min(own_blocks, DEPTH), min(own_blocks, (limit - tile_bytes(tiles, ranks, 0, kept)) // (tiles * 16 * 256)))
    else:
        slots, kept = min(own_blocks, DEPTH), 1
    shared = tile_bytes(tiles, ranks, slots, kept)
    resident = max(1, min({1: 3, 2: 2, 4: 1}[tiles], target.shared_per_sm // (shared + 1024)))
    waves = -(-ctas * cover // (resident * room(sms, ctas)))
    busy = min(resident, -(-ctas * cover // sms)) * tiles  # tiles of 16 rows that a multiprocessor works on
    rereading = 1.5 if storage == CodeStorage.INT8 and slots < own_blocks else 1
    time = 4 + waves * (2.6 + own_blocks * rereading * (0.28 + 0.26 * busy))
    return time, Plan(ranks, tiles, ctas, slots, kept, shared, cover * ctas, 128 * tiles, 0, False, 0)


def tile_bytes(tiles, rank, slots, kept):
    """Bytes of a CTA's shared memory: x, proj_down, 1 / smooth, maxima and scales, in quantize.cu's order."""
    rows = 16 * tiles
    return slots * rows * 256 + padded(rank, RANK_BLOCK) * 256 + kept * 512 + (8 + 2 + 2) * rows * 4
