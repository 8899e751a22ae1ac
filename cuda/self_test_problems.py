"""The self-test's problems: for each kind of kernel a small problem, and whether the kernel's results are right (self_test.py).

The problems have a fixed seed, both kinds of columns (signed and unsigned), and tails: of tokens, outputs, columns and ranks. Each bound is
elementwise, and holds the roundings that the kernels' arithmetic allows and no more: half a unit in the last place of a 16-bit output, the
fp32 sums, and codes whose value lies within a thousandth of the border between two. A swapped nibble, a wrong scale, or a sum that lacks a
block is at least several times as far off; outputs are NaN before a launch, so that an element that isn't written fails too. Each kernel
runs REPEATS times and must return the same bits, which a race usually doesn't.

The CPU makes the problems and compares the results: on a GPU most of the time would go by until PyTorch has loaded its own kernels and
cuBLAS. Only what a kernel reads and writes is on the device.
"""

import threading
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from . import awq, gemm_mma, gemm_wgmma, int4, quantize_activation, reference, runtime, targets
from .activation_layout import BLOCK, RANK_BLOCK, ROWS, CodeStorage, lay_out_codes, lay_out_lora_act, padded, read_codes, read_lora_act
from .errors import KernelsUnavailable
from .int4 import GELU_SHIFT, GROUP_SIZE
from .operands import PART_ROWS, LayerOperands, LoRASizes
from .quantize_activation import Quantized

REPEATS = 3
SUMS = 2.0**-17     # the largest error of an fp32 sum, here or in a kernel, relative to the sum of the terms' magnitudes
BORDER = 0.501      # the largest distance of a code from its value. fp32 changes a value of up to 127 by less than 1e-4
GELU_ERROR = 1.01 * 2.0**-12  # the largest error of the kernels' GELU before rounding, relative to its input; its slope is at most 1.13
# A GEMM's problem. M exceeds the largest tile of tokens, N the widest pair of tiles, K the longest ring of blocks, which it enters twice.
TOKENS, OUTPUTS, INPUTS, RANK = 256 + 19, 2 * 192 + 16, 13 * BLOCK + 64, 48
# A LoRA of two parts of outputs. The ranks of the first part lie in every tile's ring at once, those of the second in no tile's.
LORA = LoRASizes((40, 12 * RANK_BLOCK + 8), PART_ROWS)
QUANTIZED_TOKENS = 32 + 5  # tokens of a quantize kernel's problem: two tiles of 16 or one of 32, and a part of one

_making = threading.RLock()  # a problem may be made of another one
_problems = {}


# --- Comparison ------------------------------------------------------------------------------------------------------


def rounding(dtype):
    """The largest relative error of rounding to a 16-bit type: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2 * 1.01


def _poisoned(shape, dtype, device):
    """A tensor in which every byte is 0xFF: -1, NaN in every float type."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((size,), 255, dtype=torch.uint8, device=device).view(dtype).view(shape)


def _on(device, operands):
    """The same NamedTuple with its tensors on the device."""
    return operands._replace(**{name: value.to(device) for name, value in operands._asdict().items() if isinstance(value, torch.Tensor)})


def _same_results(launch):
    """launch()'s tensors on the CPU, from poisoned memory each time; None if REPEATS launches don't return the same bits."""
    first, *others = ([tensor.contiguous().cpu() for tensor in launch() if tensor is not None] for _ in range(REPEATS))
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for other in others for a, b in zip(first, other, strict=True))
    return first if same else None


def _random(seed):
    """Functions that return random numbers on the CPU, the same for every GPU: normal(*shape), uniform(*shape) in 0..1, whole(low, high,
    *shape) below high."""
    g = torch.Generator().manual_seed(seed)
    return (lambda *shape: torch.randn(shape, generator=g, dtype=torch.float32, device="cpu"),
            lambda *shape: torch.rand(shape, generator=g, dtype=torch.float32, device="cpu"),
            lambda low, high, *shape: torch.randint(low, high, shape, generator=g, dtype=torch.int8, device="cpu"))


def _kept(make):
    """A decorator: problems stay until forget_problems(), since several kernels have the same one. Threads that need one wait for the one
    that makes it."""
    def get(*args):
        with _making:
            if (key := (make, *args)) not in _problems:
                _problems[key] = make(*args)
            return _problems[key]

    return get


def forget_problems():
    """Release the problems' memory, a few megabytes."""
    with _making:
        _problems.clear()


def _matmul(a, b):
    """a @ b in float64."""
    return a.double() @ b.double()


def _within(estimate, exact, bound):
    return bool(((estimate - exact).abs() <= bound).all())  # false for NaN


# --- The quantize kernels --------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A quantize kernel's problem."""

    x: torch.Tensor       # (M, K)
    smooth: torch.Tensor  # (K,)
    unsigned_from: int
    values: torch.Tensor  # (M, G, 64) float32: smoothed and shifted
    scales: torch.Tensor  # (M, G) float32


@_kept
def _tokens(k, act_bits, dtype):
    """Tokens with a few large columns and smoothing factors over six octaves; from half of the columns on, outputs of a GELU."""
    normal, uniform, _ = _random(k)
    unsigned_from = k // 2 // GROUP_SIZE * GROUP_SIZE
    x = normal(QUANTIZED_TOKENS, k)
    x[:, ::61] *= 20
    x = reference.activated(x, unsigned_from).to(dtype)
    smooth = torch.exp2(uniform(k) * 6 - 3).to(dtype)
    _, scales = reference.quantize_activation(x, smooth, unsigned_from, act_bits)
    values = x.float()
    values[:, unsigned_from:] += GELU_SHIFT
    return Tokens(x, smooth, unsigned_from, (values / smooth.float()).unflatten(1, (-1, GROUP_SIZE)), scales)


class Projection(NamedTuple):
    """The LoRA branch of a quantize kernel's problem."""

    down: torch.Tensor   # (K, R)
    exact: torch.Tensor  # (M, R) float64: x @ down
    bound: torch.Tensor  # (M, R) float64: of the error of the sums, before they are rounded


@_kept
def _projection(k, rank, act_bits, dtype):
    """The Projection of _tokens(k, act_bits, dtype)."""
    x, down = _tokens(k, act_bits, dtype).x, _random(rank)[0](k, rank).div_(k**0.5).to(dtype)
    # By Cauchy and Schwarz the terms' magnitudes add up to at most the product of the norms of a token and of a rank.
    return Projection(down, _matmul(x, down), torch.outer(x.double().norm(dim=1), down.double().norm(dim=0)) * SUMS)


def quantize_is_right(storage, plan, k, rank, lora, dtype, device):
    """Whether the kernel of a Plan for K columns and `rank` ranks is right, on fewer tokens. A persistent plan has one cluster, which
    loops."""
    k -= GROUP_SIZE if k % BLOCK == 0 and k > BLOCK else 0  # as many blocks, half of the last one
    act_bits, m, (normal, uniform, _) = 8 if storage == CodeStorage.INT8 else 4, QUANTIZED_TOKENS, _random(rank + 1)
    case, (down, exact, bound) = _tokens(k, act_bits, dtype), _projection(k, rank, act_bits, dtype)
    product, strength = normal(m, sum(lora.ranks)).to(dtype), uniform(sum(lora.ranks)) + 0.5
    plan = plan._replace(grid=plan.ctas * (1 if plan.loop else -(-m // (16 * plan.tiles))))
    launch, _ = quantize_activation.launcher(m, k, rank, k, case.unsigned_from, storage, (plan,), dtype, device, lora=lora)
    multiplied = plan.ranks < rank or lora.ranks  # then the kernel takes the product of x with all ranks
    inputs = case.x, case.smooth, torch.cat((exact.to(dtype), product), dim=1) if multiplied else down
    inputs = [tensor.to(device) for tensor in inputs]
    of_lora = (strength.to(device),) if lora.ranks else ()

    def run():
        q = [output and _poisoned(*output, device) for output in quantize_activation.outputs(m, k, rank, storage, dtype, lora)]
        if dtype == torch.float16 and multiplied:
            # It comes with the product, which is small.
            q[3] = pad(torch.ones(m, dtype=torch.float32, device="cpu"), (0, -m % ROWS)).to(device)
        launch(*map(runtime.address, (*inputs, *q, *of_lora)))
        return q

    q = _same_results(run)
    if q is None or not _codes_are_right(q, case, storage):
        return False
    product, error = product.double(), 0
    if dtype == torch.bfloat16:  # else the product has the strengths already
        product, error = product * strength, rounding(dtype)
    parts = exact, *product.split(lora.ranks, dim=1)
    bounds = exact.abs() * rounding(dtype) + bound + 2.0**-25, *(product.abs() * error).split(lora.ranks, dim=1)
    return not rank and not lora.ranks or _lora_act_is_right(q, parts, bounds)


def _codes_are_right(q, case, storage):
    """Whether codes, scales and their padding are right."""
    (m, k), first = case.x.shape, case.unsigned_from
    codes, scales = read_codes(q[0], storage, (padded(m, ROWS), padded(k, BLOCK))), q[1]
    if storage == CodeStorage.INT4_NIBBLES:
        codes[:, :first] = (codes[:, :first] ^ 8) - 8
    if storage == CodeStorage.INT8:
        low, high, scales = -int4.INT8_MAX, int4.INT8_MAX, scales[[0] * (first // GROUP_SIZE) + [1] * ((k - first) // GROUP_SIZE)]
    else:
        signed = (torch.arange(k, device="cpu") < first).view(-1, GROUP_SIZE)
        low, high = torch.where(signed, int4.SIGNED_MIN, 0), torch.where(signed, int4.SIGNED_MAX, int4.UNSIGNED_MAX)
    if codes[m:].any() or codes[:, k:].any() or scales[:, m:].any():
        return False
    scales, groups = scales[:, :m].t(), case.values
    # Where a group's largest and smallest value have equal magnitudes up to fp32's rounding, either may get code -8.
    tied = (groups.amax(dim=-1) + groups.amin(dim=-1)).abs() < 1e-6 * groups.abs().amax(dim=-1)
    expected = torch.where(tied & (storage != CodeStorage.INT8), case.scales.copysign(scales), case.scales)
    nearest = (groups / scales.unsqueeze(-1)).clamp(low, high)
    return (_within(scales, expected, expected.abs() * 1e-6)
            and _within(codes[:m, :k].view_as(nearest), nearest, BORDER))


def _lora_act_is_right(q, parts, bounds):
    """parts: the exact lora_act of the layer's own ranks and of a LoRA's parts, each to within its bound; each begins with a new block of
    ranks."""
    m, rows = len(parts[0]), q[2]
    scale = q[3][:m, None]
    for exact, bound in zip(parts, bounds, strict=True):
        blocks = -(-exact.shape[1] // RANK_BLOCK)
        if blocks:
            read = read_lora_act(rows[:blocks], (rows.shape[1], RANK_BLOCK * blocks))
            if read[m:].any() or read[:, exact.shape[1]:].any() or not _within(read[:m, :exact.shape[1]] * scale, exact, bound):
                return False
        rows = rows[blocks:]
    return not q[3][m:].any()


# --- The GEMMs -------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A GEMM's problem."""

    q: Quantized
    operands: LayerOperands
    exact: torch.Tensor  # (M, N) float64, without GELU
    sums: torch.Tensor   # (M, N) float64: the bound of the error before the output is rounded


@_kept
def _product(storage, unsigned_from, dtype, lora):
    """All sixteen weight codes, scales that are exact in every kernel, and a LoRA branch and a LoRA that pick columns of x, so that their
    activations are exact too."""
    normal, _, whole = _random(unsigned_from)
    m, n, k, groups = TOKENS, OUTPUTS + lora.part_rows, INPUTS, INPUTS // GROUP_SIZE
    x = normal(m, k)
    x[:, unsigned_from:].abs_()
    x = x.to(dtype)
    act_bits = 8 if storage == CodeStorage.INT8 else 4
    # The products of 4-bit row scales and integers up to 16 have eight bits.
    row_scale = whole(8, 16, n) * torch.exp2(whole(-12, -9, n).float())
    integers = whole(1, 16, groups, n) * (1 - 2 * whole(0, 2, groups, n))
    columns = torch.randperm(k, generator=torch.Generator().manual_seed(0), device="cpu")[:RANK + sum(lora.ranks)]
    picked = torch.nn.functional.one_hot(columns, k).to(dtype)  # (ranks, K)
    weight_codes = whole(-8, 8, n, k)
    operands = LayerOperands(int4.pack(weight_codes), (integers * row_scale).to(dtype), picked[:RANK].t().contiguous(),
                             normal(n, RANK).to(dtype), torch.ones(k, dtype=dtype, device="cpu"), normal(n).to(dtype), unsigned_from,
                             act_bits, row_scale if act_bits == 8 else None)
    if lora.ranks:
        size = sum((stop - start) * rank for (start, stop), rank in zip(lora.rows(n), lora.ranks))
        operands = operands._replace(lora_down=picked, lora_up=normal(size).div_(4).to(dtype), lora=lora,
                                     lora_strength=torch.ones(sum(lora.ranks), device="cpu"))

    codes, scales = reference.quantize_activation(x, operands.smooth, unsigned_from, act_bits)
    first_and_last = scales[:, [0, -1]] * torch.tensor([unsigned_from > 0, unsigned_from < k], device="cpu")
    act_scale = pad((first_and_last if act_bits == 8 else scales).t(), (0, -m % ROWS)).contiguous()
    # In fp16 every other token's lora_act is scaled down.
    lora_act, lora_scale = x[:, columns].double(), torch.ones(padded(m, ROWS), dtype=torch.float32, device="cpu")
    if dtype == torch.float16:
        lora_scale[::2] = 2
    parts = (lora_act / lora_scale[:m, None]).to(dtype).split([RANK, *lora.ranks], dim=1)
    q = Quantized(lay_out_codes(codes, storage), act_scale, torch.cat([lay_out_lora_act(part) for part in parts]), lora_scale)

    # reference.svdquant_linear of these codes, in float64
    act = reference.scaled_codes(codes.double(), scales.double())
    weight, up = reference.scaled_codes(weight_codes.double(), operands.weight_scale.t().double()), operands.proj_up.double()
    exact = _matmul(act, weight.t()) + _matmul(lora_act[:, :RANK], up.t()) + operands.bias.double()
    if lora.ranks:
        factors = (tensor.double() for tensor in (x, picked[RANK:], operands.lora_up, operands.lora_strength))
        exact += reference.lora_product(*factors, lora, n)
    # By Cauchy and Schwarz the terms' magnitudes add up to at most the product of a token's and a weight row's norms.
    up = up.norm(dim=1) + max((rank**0.5 for rank in lora.ranks), default=0)
    sums = (torch.outer(act.norm(dim=1), weight.norm(dim=1)) + torch.outer(lora_act.norm(dim=1), up) + 4) * SUMS
    if act_bits == 8 and 0 < unsigned_from < k:  # the first part's sum is rounded to units of the second part's scale
        sums += 0.51 * torch.outer(scales[:, -1], row_scale)
    return Product(q, operands, exact, sums)


def _product_is_right(case, dtype, device, gelu_from, launch):
    """Whether launch(y, q, operands) computes a Product; y comes poisoned."""
    q, operands = _on(device, case.q), _on(device, case.operands._replace(gelu_from=gelu_from))

    def run():
        y = _poisoned(case.exact.shape, dtype, device)
        launch(y, q, operands)
        return y,

    results = _same_results(run)
    if results is None:
        return False
    exact, bound = case.exact, case.sums
    if gelu_from is not None:
        x, exact = exact[:, gelu_from:], reference.activated(exact.clone(), gelu_from)
        bound = torch.cat((bound[:, :gelu_from], 1.13 * bound[:, gelu_from:] + GELU_ERROR * x.abs()), dim=1)
    return _within(results[0], exact, bound + exact.abs() * rounding(dtype) + 2.0**-25)


def _gated(case, dtype, device):
    """(the Product of a layer that is added to a residual with a gate, {"residual": and "gate": on the device})"""
    normal, uniform, _ = _random(0)
    residual, gate = normal(*case.exact.shape).to(dtype), (2 * uniform(case.exact.shape[1]) - 1).to(dtype)
    sums = gate.double().abs() * (case.sums + case.exact.abs() * rounding(dtype))  # the layer's own output is rounded too
    case = case._replace(exact=residual.double() + gate.double() * case.exact, sums=sums + residual.double().abs() * SUMS)
    return case, {"residual": residual.to(device), "gate": gate.to(device)}


def mma_is_right(storage, tile, dtype, device, gelu, lora, gated=False):
    """The border between the two parts lies within a block."""
    case = _product(storage, 5 * BLOCK + 64, dtype, lora)
    case, added = _gated(case, dtype, device) if gated else (case, {})
    return _product_is_right(case, dtype, device, 64 if gelu else None,
                             lambda y, q, operands: gemm_mma.launch(y, storage, tile, q, operands, **added))


def wgmma_is_right(tile, dtype, device, gelu, lora, gated=False):
    """A border between two blocks, or one part where two CTAs share K."""
    case = _product(CodeStorage.INT8, 5 * BLOCK if tile[2] == 1 else INPUTS, dtype, lora)
    case, added = _gated(case, dtype, device) if gated else (case, {})
    return _product_is_right(case, dtype, device, 64 if gelu else None,
                             lambda y, q, operands: gemm_wgmma.gemm(tile, q, operands, TOKENS, y, **added))


# --- The other kernels -----------------------------------------------------------------------------------------------


def awq_is_right(tiles, dtype, device):
    """Outputs and tokens end within a CTA's."""
    normal, uniform, whole = _random(tiles)
    m, n, k = 8 * tiles + 3, 2 * awq.ROWS + 16, 9 * GROUP_SIZE
    weight, scale = int4.pack(whole(0, 16, n, k)), torch.exp2(uniform(9, n) * 2 - 6)
    x, scale, zeros, bias = (tensor.to(dtype) for tensor in (normal(m, k), scale, normal(9, n) / 10, normal(n)))
    exact = _matmul(x, reference.dequantize_awq(weight, scale, zeros, torch.float64).t()) + bias.double()
    parts = (reference.dequantize_awq(weight, scale, torch.zeros_like(zeros), torch.float64).abs()
             + zeros.double().abs().t().repeat_interleave(GROUP_SIZE, dim=1))
    launch, inputs = awq.launcher(tiles, m, n, dtype, device), [tensor.to(device) for tensor in (x, weight, scale, zeros, bias)]

    def run():
        y = _poisoned((m, n), dtype, device)
        launch(*map(runtime.address, (*inputs, y)), m, n, k, k)
        return y,

    results, bound = _same_results(run), exact.abs() * rounding(dtype) + _matmul(x.abs(), parts.t()) * SUMS + 2.0**-24
    return results is not None and _within(results[0], exact, bound)


def _random_layer(n, k, rank, unsigned_from, dtype, random):
    normal, uniform, whole = random
    scale, smooth = torch.exp2(uniform(k // GROUP_SIZE, n) * 2 - 7), torch.exp2(uniform(k) * 2 - 1)
    floats = [tensor.to(dtype) for tensor in (scale, normal(k, rank).div_(k**0.5), normal(n, rank), smooth, normal(n))]
    return LayerOperands(int4.pack(whole(-8, 8, n, k)), *floats, unsigned_from)


def mlp_is_right(kernels, plan, layers, device, run):
    """Whether an MLP in one pass equals the kernels of its two layers, which have passed their own tests: the codes between the layers to
    the bit, and the second layer's x @ proj_down, whose terms are added in another order, to within its rounding."""
    (first, second), dtype, storage = layers, layers[0].dtype, kernels.storage
    m, n, hidden = gemm_mma.WIDE.tokens + 19, 2 * 64 + 16, quantize_activation.DEPTH * BLOCK * plan.ctas
    random = _random(kernels.tile.rows * kernels.tile.tokens)  # no other tile's results lie in memory
    one = _on(device, _random_layer(hidden, first.k, first.rank, first.k, dtype, random)._replace(gelu_from=0))
    two = _on(device, _random_layer(n, hidden, second.rank, 0, dtype, random))
    x = random[0](m, first.k).to(dtype).to(device)
    small = plan._replace(grid=plan.ctas * -(-m // (16 * plan.tiles)))

    def quantized(x, layer, plan):
        return quantize_activation.quantize(x, layer.smooth, layer.proj_down, layer.unsigned_from, storage, (plan,))

    def together():
        if (y := run(kernels._replace(plans=(small,)), x, one, two)) is None:
            raise KernelsUnavailable("The kernels of an MLP in one pass are unavailable.")
        return y,

    results = _same_results(together)
    if results is None:
        return False
    hidden_states = gemm_mma.gemm(storage, kernels.second_tile, quantized(x, one, small), one, m)
    _, small = quantize_activation.tile_plan(m, hidden, plan.ranks if first.rank == second.rank else 0, storage, targets.for_device(device),
                                             targets.multiprocessors(device), plan.tiles, plan.ctas)
    between = quantized(hidden_states, two, small)
    expected, between = gemm_mma.gemm(storage, kernels.second_tile, between, two, m).cpu().double(), _on("cpu", between)
    lora_act = read_lora_act(between.lora_act, (m, second.rank)).double() * between.lora_act_scale[:m, None]
    # Its sum's error is at most SUMS of the terms' magnitudes, whose sum is at most sqrt(hidden) times their root sum of squares.
    off = 2 * rounding(dtype) * lora_act.abs() + 2 * SUMS * hidden**0.5 * lora_act.abs().amax(dim=1, keepdim=True) + 2.0**-24
    return _within(results[0], expected, 2 * rounding(dtype) * expected.abs() + _matmul(off, two.proj_up.cpu().abs().t()) + 2.0**-24)


def group_error_is_right(group_error, device):
    """Whether group_error.group_error computes what it says."""
    normal, uniform, _ = _random(0)
    weight, energy = normal(37, 3, GROUP_SIZE), uniform(3, GROUP_SIZE)
    steps = weight.abs().amax(-1) / int4.SIGNED_MAX * torch.where(uniform(37, 3) < 0.5, -0.8, 1.0)
    exact_steps = steps.double().unsqueeze(-1)
    codes = (weight / exact_steps).round().clamp(int4.SIGNED_MIN, int4.SIGNED_MAX)
    exact = ((codes * exact_steps - weight).square() * energy).sum(-1)
    inputs = [tensor.to(device) for tensor in (weight, steps, energy)]
    results = _same_results(lambda: (group_error(*inputs),))
    # A weight on the border between two codes has the same error with either.
    return results is not None and _within(results[0], exact, exact * 1e-4)


def round_block_is_right(round_block, device):
    """Whether gptq.round_block's codes are the nearest ones to its targets, which follow from its codes: weight + pending / diagonal, with
    the errors of all later columns in `pending`. With this many rows, one wrong factor moves some code."""
    normal, uniform, whole = _random(0)
    n, b = 485, 2 * GROUP_SIZE
    weight, steps, pending, groups = normal(n, b), uniform(n, 2) / 8 + 0.2, normal(n, b) / 8, whole(0, 2, b).int()
    lower = torch.tril(normal(b, b) / 32, -1) + torch.diag(uniform(b) + 0.5)
    inputs = [tensor.to(device) for tensor in (weight, pending, steps, 1 / steps, groups, lower)]

    def run():
        codes = _poisoned((n, b), torch.int8, device)
        return round_block(*inputs, codes), codes

    results = _same_results(run)
    if results is None:
        return False
    lost, codes = results
    steps = steps.double()[:, groups.long()]
    exact, diagonal = weight - codes * steps, lower.double().diagonal()
    nearest = (weight + (pending + _matmul(exact, torch.tril(lower, -1))) / diagonal) / steps
    return _within(lost, exact, 1e-5) and _within(codes, nearest.clamp(int4.SIGNED_MIN, int4.SIGNED_MAX), BORDER)


def expand_branch_is_right(expand_by, layers, dtype, device):
    """Whether expand_branch.expand_by's numbers are reference.expand_branch's, with all codes and scales over 16 octaves. layers: of the
    kernel's table; if it has several, they are not all there. The rows end within a CTA."""
    _, uniform, whole = _random(0)
    branches, exact = [], []
    for k, n, rank in ((37, 141, RANK), (1, 300, 16), (64, 64, 240))[:layers]:
        factors, scale = [whole(-127, 128, rows, rank) for rows in (k, n)], torch.exp2(uniform(k + n) * 16 - 12).bfloat16()
        branches.append([tensor.to(device) for tensor in (*factors, scale)])
        exact.append(reference.expand_branch(torch.cat(factors), scale, dtype))
    results = _same_results(lambda: expand_by(branches, lambda count: _poisoned((count,), dtype, device), layers))
    return results is not None and all(map(torch.equal, results, exact))
