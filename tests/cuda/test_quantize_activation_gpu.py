"""The quantize kernel against float64: its codes, read back through activation_layout.py, its scales, and x @ proj_down.

    python -m pytest tests/cuda/test_quantize_activation_gpu.py -s        prints the timings too
"""

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.cuda import quantize_activation, reference, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage, padded, read_codes, read_lora_act
from comfyui_svdquant.cuda.int4 import GELU_SHIFT
from machine import graph_time

from .layers import plans_here

pytestmark = pytest.mark.gpu

INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
TINY = 2.0**-100  # the kernel treats a smaller maximum as zero
POISON = 0x5A


def random_case(m, k, rank, dtype=torch.bfloat16, seed=0):
    """x with a few outlier channels, smooth over six octaves, and proj_down, on the GPU."""
    g = torch.Generator("cuda").manual_seed(seed + m + k)
    x = torch.randn(m, k, generator=g, device="cuda")
    x[:, torch.randperm(k, generator=g, device="cuda")[: max(1, k // 50)]] *= 40
    smooth = torch.exp2(torch.rand(k, generator=g, device="cuda") * 6 - 3)
    down = torch.randn(k, rank, generator=g, device="cuda") / k**0.5
    return x.to(dtype), smooth.to(dtype), down.to(dtype)


def poisoned(monkeypatch):
    """Make torch.empty return memory in which every byte is wrong; floats are NaN."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)
        return tensor

    monkeypatch.setattr(torch, "empty", filled)


def quantize(x, smooth, down, unsigned_from, storage, **cut):
    """The kernel with the fastest plan, or with a plan that `cut` selects."""
    plans = plans_here(*x.shape, down.shape[1], storage, **cut)
    return quantize_activation.quantize(x, smooth, down, unsigned_from, storage, plans)


def expected(x, smooth, unsigned_from, storage):
    """In float64: (the values to encode, the scales (M, G) of the kernel's contract, the codes' range)."""
    m, k = x.shape
    _, scales = reference.quantize_activation(x, smooth, unsigned_from, 8 if storage == INT8 else 4, torch.float64)
    shift = (torch.arange(k, device=x.device) >= unsigned_from).double() * GELU_SHIFT
    v = (x.double() + shift) / smooth.double()
    high = torch.full((k,), 127.0 if storage == INT8 else 7.0, device=x.device, dtype=torch.float64)
    low = -high if storage == INT8 else -high - 1
    if storage != INT8:
        high[unsigned_from:], low[unsigned_from:] = 15, 0
    scales = torch.where(scales.abs() * torch.maximum(high, -low)[::64] < TINY, 0.0, scales)
    if storage == INT8 and 0 < unsigned_from < k:  # the two parts' scales stay within a factor of 16
        first, second = scales[:, :1], scales[:, -1:]
        first, second = torch.maximum(first, second / 16), torch.maximum(second, first / 16)
        scales = torch.where(torch.arange(k // 64, device=x.device) < unsigned_from // 64, first, second)
    return v, scales, low, high


def read_back(result, shape, unsigned_from, storage):
    """(codes (M, K) float64, scales (M, G), all padding)."""
    m, k = shape
    got = read_codes(result.act, storage, (result.act.shape[1], 128 * result.act.shape[0]))
    if storage == INT4_NIBBLES:
        got[:, :unsigned_from] = (got[:, :unsigned_from] ^ 8) - 8
    scales = result.act_scale
    assert scales.shape == (2 if storage == INT8 else k // 64, padded(m, 16))
    if storage == INT8:
        unused = [part for part, used in ((0, unsigned_from > 0), (1, unsigned_from < k)) if not used]
        assert (scales[unused] == 0).all(), "the scale of a part without columns isn't 0"
        scales = scales[(torch.arange(k // 64) >= unsigned_from // 64).long()]
    return got[:m, :k].double(), scales[:, :m].t().double(), (got[m:], got[:, k:], scales[:, m:])


def check(x, smooth, down, unsigned_from, storage, **cut):
    """Check every output against float64. Returns the result."""
    m, k = x.shape
    rank = down.shape[1]
    result = quantize(x, smooth, down, unsigned_from, storage, **cut)
    v, scales, low, high = expected(x, smooth, unsigned_from, storage)
    got, got_scales, padding = read_back(result, x.shape, unsigned_from, storage)
    for rest in padding:
        assert (rest == 0).all(), "padding that isn't 0"

    # A NaN or Inf makes the scale of its group, or of its row if a row has one scale, NaN. The codes are 0.
    broken = ~scales.isfinite()
    if storage == INT8:
        broken = broken.any(dim=1, keepdim=True).expand_as(broken)
    assert torch.equal(got_scales.isnan(), broken), "NaN scales are not where x has a NaN or Inf"
    # If the largest and the smallest value have equal magnitudes up to float32 rounding, either may get code -8.
    groups = v.view(m, -1, 64)
    tied = ((groups.amax(dim=-1) + groups.amin(dim=-1)).abs() < 1e-6 * groups.abs().amax(dim=-1)) & (storage != INT8)
    scales = torch.where(tied & (got_scales == -got_scales.abs() * scales.sign()), -scales, scales)
    # Two roundings: of the largest value (x / smooth is a sum, a reciprocal of 1 ulp and a product), and of its product with 1 / 127.
    off = ((got_scales - scales).abs() / scales.abs().clamp(min=1e-300)).masked_fill(broken | (scales == 0), 0)
    assert off.max() < 5e-7, f"scales are off by {off.max():.2e}"
    assert (got_scales[scales == 0] == 0).all(), "the scale of zeros isn't 0"

    # float32 changes v / scale, which is at most 127, by about 5e-7 of itself: a code is the nearest one except near ties.
    width = broken.repeat_interleave(64, dim=1)
    divisor = scales.repeat_interleave(64, dim=1)
    q = torch.where(divisor == 0, 0.0, v / torch.where(divisor == 0, 1.0, divisor))
    q = torch.minimum(torch.maximum(q, low), high).masked_fill(width, 0)
    off = (got - q).abs()
    wrong = (off > 0.5001).nonzero()
    assert not len(wrong), (f"{len(wrong)} of {got.numel()} codes are wrong; rows {sorted(set(wrong[:, 0].tolist()))[:9]}, columns "
                            f"{sorted(set(wrong[:, 1].tolist()))[:20]}, first: {got[tuple(wrong[0])]} for {q[tuple(wrong[0])]}")

    if rank == 0:
        assert result.lora_act is None and result.lora_act_scale is None
        return result
    rows = read_lora_act(result.lora_act, (result.lora_act.shape[1], 32 * result.lora_act.shape[0]))
    assert (rows[m:] == 0).all() and (rows[:, rank:] == 0).all(), "padding of lora_act isn't 0"
    assert (result.lora_act_scale[m:] == 0).all(), "padding of lora_act_scale isn't 0"
    scale = result.lora_act_scale[:m].double().unsqueeze(1)
    assert (torch.frexp(scale)[0] == 0.5).all(), "lora_act_scale isn't a power of two"
    if x.dtype == torch.bfloat16:
        assert (scale == 1).all()
    got, exact = rows[:m, :rank].double() * scale, x.double() @ down.double()
    size = x.double().abs() @ down.double().abs()
    # Half a unit in the last place of 16 bits, fp16's smallest step, and float32 sums (one lost term of K is 2^-14 of them).
    bound = exact.abs() * (2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11) + size * 2.0**-18
    bound = bound + (scale * 2.0**-25 if x.dtype == torch.float16 else 1e-38)
    sound = x.isfinite().all(dim=1)
    if x.dtype == torch.float16:
        assert rows[:m][sound].abs().max() <= 2**14, "lora_act is nearer to fp16's limit than promised"
    worst = ((got - exact).abs() / bound)[sound]
    assert not worst.numel() or worst.max() <= 1, (f"x @ proj_down is off by {worst.max():.3g} times its bound, columns "
                                                   f"{(worst > 1).any(dim=0).nonzero().flatten().tolist()[:9]}")
    return result


# M, K, rank, unsigned_from (None: K), tiles, ctas (None: as planned), dtype
CASES = [
    (1, 64, 0, None, None, None, torch.bfloat16),
    (1, 64, 16, 0, None, None, torch.float16),
    (16, 128, 32, None, 1, 1, torch.bfloat16),
    (37, 192, 48, 64, 2, 1, torch.bfloat16),
    (100, 320, 32, 128, 2, 2, torch.float16),
    (300, 1088, 128, None, 2, 8, torch.bfloat16),
    (129, 1536, 160, 1024, None, None, torch.bfloat16),
    (33, 640, 144, 0, None, None, torch.float16),
    (65, 3072, 32, None, 4, 2, torch.bfloat16),
    (300, 3072, 32, 0, None, None, torch.bfloat16),
    (77, 3072, 128, 512, 2, 4, torch.float16),
    (50, 12288, 32, 0, 2, 8, torch.bfloat16),
    (40, 15360, 32, 3072, 2, 8, torch.bfloat16),
    (24, 15360, 32, 3072, 1, 1, torch.bfloat16),   # int8: x exceeds shared memory
    (48, 14976, 16, None, 4, 1, torch.bfloat16),
    (9, 4160, 32, 4096, 1, 8, torch.float16),
]

# M, K, rank, unsigned_from, tiles, ctas, loop, dtype: int8, by quantize_registers.cu.
REGISTERS_CASES = [
    (1, 192, 16, None, 1, 2, False, torch.bfloat16),
    (17, 192, 32, 128, 1, 2, True, torch.float16),
    (37, 704, 16, 64, 2, 6, False, torch.bfloat16),
    (100, 1216, 128, 0, 1, 8, False, torch.float16),
    (77, 3072, 64, 1024, 1, 6, False, torch.bfloat16),
    (500, 3072, 32, None, 1, 6, False, torch.bfloat16),
    (1300, 3072, 32, 2048, 1, 2, False, torch.float16),   # more clusters than fit at once
    (300, 12288, 32, 0, 2, 6, False, torch.float16),
    (512, 12288, 0, 3072, 2, 6, False, torch.bfloat16),
    (130, 12224, 48, None, 2, 6, False, torch.bfloat16),
    (2500, 1536, 32, 512, 1, 2, True, torch.bfloat16),    # several rounds
    (2500, 3072, 32, None, 1, 2, True, torch.float16),
    (2500, 3072, 0, 1024, 1, 6, True, torch.bfloat16),
    (4608, 3072, 64, None, 1, 6, True, torch.bfloat16),
    (4608, 3072, 32, 1536, 1, 6, True, torch.float16),
    (1300, 3072, 48, 0, 1, 2, True, torch.float16),
    (1300, 12288, 32, 0, 1, 8, True, torch.bfloat16),
    (1001, 12224, 16, 4096, 1, 8, True, torch.float16),
    (2500, 15360, 32, 3072, 1, 8, True, torch.bfloat16),
    (1500, 15360, 64, 3072, 1, 8, True, torch.float16),
    (37, 704, 64, 64, 1, 2, True, torch.bfloat16),         # two products
    (2500, 3072, 64, 1024, 1, 6, True, torch.float16),
    (1300, 3072, 48, 0, 1, 8, True, torch.bfloat16),
    (700, 12288, 64, 0, 1, 16, True, torch.float16),
    (900, 15360, 48, 3072, 1, 16, True, torch.bfloat16),
    (65536, 192, 16, 64, 1, 2, True, torch.bfloat16),
    (65535, 256, 0, None, 1, 2, True, torch.bfloat16),
]


@pytest.mark.parametrize("storage", CodeStorage, ids=lambda storage: storage.name)
@pytest.mark.parametrize(("m", "k", "rank", "unsigned_from", "tiles", "ctas", "dtype"), CASES)
def test_is_float64s(m, k, rank, unsigned_from, tiles, ctas, dtype, storage, monkeypatch):
    if ctas and ctas > 1 and targets.for_device("cuda").max_cluster == 1:
        pytest.skip("clusters came with Hopper")
    poisoned(monkeypatch)
    cut = dict(registers=False, tiles=tiles, ctas=ctas) if tiles else {}
    check(*random_case(m, k, rank, dtype), k if unsigned_from is None else unsigned_from, storage, **cut)


@pytest.mark.parametrize(("m", "k", "rank", "unsigned_from", "tiles", "ctas", "loop", "dtype"), REGISTERS_CASES)
def test_registers_is_float64s(m, k, rank, unsigned_from, tiles, ctas, loop, dtype, monkeypatch):
    """Two runs have the same bits, although a cluster's CTAs receive each other's data in any order."""
    if targets.for_device("cuda").max_cluster == 1:
        pytest.skip("clusters came with Hopper")
    poisoned(monkeypatch)
    x, smooth, down = random_case(m, k, rank, dtype)
    split, cut = k if unsigned_from is None else unsigned_from, dict(registers=True, tiles=tiles, ctas=ctas, loop=loop)
    first = check(x, smooth, down, split, INT8, **cut)
    for _ in range(3):
        for a, b in zip(first, quantize(x, smooth, down, split, INT8, **cut)):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("rank", [32, 128])
def test_little_shared_memory(rank, monkeypatch):
    """As on other GPUs, shared memory is too small for all of x and for all of 1 / smooth."""
    small = replace(targets.for_device("cuda"), shared_per_sm=72 << 10, shared_per_cta=71 << 10)
    monkeypatch.setattr(targets, "for_device", lambda device: small)
    poisoned(monkeypatch)
    assert plans_here(40, 12288, rank, INT8, registers=False, tiles=2, ctas=1)[0].kept == 1
    check(*random_case(40, 12288, rank), 8192, INT8, registers=False, tiles=2, ctas=1)


# The plans of int8: quantize.cu, and the forms of quantize_registers.cu.
CUTS = [dict(registers=False), dict(registers=True, tiles=1, loop=False), dict(registers=True, tiles=2, loop=False),
        dict(registers=True, loop=True)]
STORAGE_CUTS = [(INT4_BYTES, {}), (INT4_NIBBLES, {}), *((INT8, cut) for cut in CUTS)]


@pytest.mark.parametrize(("storage", "cut"), STORAGE_CUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_rows(storage, cut, dtype, monkeypatch):
    if cut.get("registers") and targets.for_device("cuda").max_cluster == 1:
        pytest.skip("clusters came with Hopper")
    poisoned(monkeypatch)
    x, smooth, down = random_case(40, 512, 32, dtype)
    x[1] = 0
    x[2] = torch.finfo(dtype).tiny / 4  # denormal
    x[3] = 1.5
    x[4, 100] = torch.finfo(dtype).max / 64
    x[5, 200] = torch.nan
    x[6, 300] = torch.inf
    x[7, 64:128] = 0
    x[8, 511] = -torch.inf
    x[9] = -GELU_SHIFT
    x[10] = torch.finfo(dtype).max / (1024 if dtype == torch.bfloat16 else 1)  # its product with 1 / smooth must fit float32
    x[11] = -torch.finfo(dtype).max / 1024
    x[12] = torch.finfo(dtype).smallest_normal
    x[20, 0] = torch.nan
    x[20, 400] = torch.nan
    smooth[:8] = 1
    for unsigned_from in (512, 256, 0):
        result = check(x, smooth, down, unsigned_from, storage, **cut)
        lora_act = read_lora_act(result.lora_act, (40, 32))
        # 512 times fp16's largest number is beyond fp16, and lora_act_scale brings it back.
        assert sorted(set((~lora_act.isfinite()).nonzero()[:, 0].tolist())) == [5, 6, 8, 20]


@pytest.mark.parametrize("storage", CodeStorage, ids=lambda storage: storage.name)
def test_strided_rows(storage):
    wide, smooth, down = random_case(70, 1024, 32)[0], *random_case(70, 512, 32)[1:]
    for x in (wide[:, 256:768], wide[:, 1:513], wide[::2, :512], wide[:, :512].t().contiguous().t()):
        plain = quantize(x.contiguous(), smooth, down, 512, storage)
        for a, b in zip(plain, check(x, smooth, down, 512, storage)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("storage", CodeStorage, ids=lambda storage: storage.name)
@pytest.mark.parametrize(("m", "k", "rank"), [(300, 3072, 32), (4096, 1536, 32), (4608, 3072, 32), (64, 12288, 128)])
def test_same_bits(m, k, rank, storage):
    """Two runs have the same bits, and a token's outputs don't depend on its position in the batch."""
    x, smooth, down = random_case(m, k, rank)
    first = quantize(x, smooth, down, k // 2, storage)
    for _ in range(5):
        for a, b in zip(first, quantize(x, smooth, down, k // 2, storage)):
            assert torch.equal(a, b)
    turned = quantize(x.roll(7, dims=0), smooth, down, k // 2, storage)
    for read in (lambda r: read_back(r, (m, k), k // 2, storage)[0], lambda r: read_back(r, (m, k), k // 2, storage)[1],
                 lambda r: read_lora_act(r.lora_act, (m, rank)), lambda r: r.lora_act_scale[:m].unsqueeze(1)):
        assert torch.equal(read(turned), read(first).roll(7, dims=0))


def test_fp16_branch_beyond_fp16():
    """Sums of 1e7 exceed fp16, and are stored with a lora_act_scale."""
    x, smooth, down = random_case(20, 1024, 32, torch.float16)
    x[3], down[:, 5] = 60000, 1
    for ranks in (down, torch.cat([down] * 5, dim=1)):
        result = check(x, smooth, ranks.contiguous(), 1024, INT8)
        assert result.lora_act_scale[3] >= 2**12 and result.lora_act_scale[0] == 1


# --- Timing ----------------------------------------------------------------------------------------------------------

SHAPES = [(4096, 3072), (4608, 3072), (1024, 3072), (512, 3072), (256, 3072), (64, 3072), (4096, 12288), (512, 12288), (128, 12288),
          (4608, 15360)]


def microseconds(calls):
    """Microseconds per call, with all calls recorded back to back in one CUDA graph."""
    cycle = itertools.cycle(calls)
    return graph_time(lambda: next(cycle)(), len(calls))


def copy_bandwidth():
    """Bytes per microsecond of a large device-to-device copy, reads and writes together."""
    a, b = torch.empty(2, 1 << 28, dtype=torch.uint8, device="cuda")
    return 2 * a.numel() / microseconds([lambda: b.copy_(a)] * 4)


def timing(m, k, rank, storage, copy, **cut):
    """(us, fraction of the copy bandwidth) of one call; inputs and outputs rotate through more memory than L2."""
    sets = max(3, min(40, int(4e8 / (3 * m * k)) + 1))
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    _, smooth, down = random_case(1, k, rank)
    kept = []  # outputs stay alive, so that every call writes to its own memory
    us = microseconds([lambda x=x: kept.append(quantize(x, smooth, down, k, storage, **cut)) for x in xs])
    moved = xs[0].nbytes + sum(t.nbytes for t in kept[-1] if t is not None) + down.nbytes
    return us, moved / us / copy


def form(plan):
    """A plan as text: whether quantize_registers.cu loops, or quantize.cu's number of slots."""
    how = ("loop" if plan.loop else "once") if plan.warps else f"{plan.slots} slots"
    return f"{how} T{plan.tiles} C{plan.ctas}"


def test_timing():
    copy = copy_bandwidth()
    print(f"\n{torch.cuda.get_device_name()}: copies at {copy / 1e6:.2f} TB/s")
    for rank in (32, 64, 0):
        for m, k in SHAPES:
            cells = []
            for storage in CodeStorage:
                plans = plans_here(m, k, rank, storage)
                _, plan = quantize_activation.launcher(m, k, rank, k, k, storage, plans, torch.bfloat16, torch.device("cuda", 0))
                us, share = timing(m, k, rank, storage, copy)
                cells.append(f"{storage.name} {us:6.1f} us {share:4.0%} ({form(plan)})")
            print(f"rank {rank:3d} ({m:4d}, {k:5d})  " + "   ".join(cells), flush=True)


def test_timing_of_other_cuts():
    """The times of all plans for int8."""
    if targets.for_device("cuda").max_cluster == 1:
        pytest.skip("there is only one without clusters")
    copy = copy_bandwidth()
    print()
    for rank in (0, 32, 64):
        for m, k in SHAPES:
            cells = []
            xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(3, min(20, int(4e8 / (3 * m * k)) + 1)))]
            down = random_case(1, k, rank)[2]
            if rank:
                cells.append(f"x @ proj_down by cuBLAS {microseconds([lambda x=x, down=down: x @ down for x in xs]):6.1f}")
            for cut in CUTS:
                for ctas in (1, 2, 3, 4, 6, 8, 16):
                    try:
                        plan = plans_here(m, k, rank, INT8, ctas=ctas, **cut)[0]
                        us, share = timing(m, k, rank, INT8, copy, ctas=ctas, **cut)
                    except ValueError:  # no such plan
                        continue
                    cells.append(f"{form(plan)} {us:6.1f} {share:3.0%}")
            print(f"rank {rank:3d} ({m:4d}, {k:5d})  " + "   ".join(cells), flush=True)
