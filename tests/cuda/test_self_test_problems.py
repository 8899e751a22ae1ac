"""The self-test's problems and bounds on emulated kernels, right ones and broken ones."""


import pytest
import torch
from comfyui_svdquant.cuda import (
    awq,
    gemm_mma,
    gemm_wgmma,
    mlp,
    quantize_activation,
    reference,
    runtime,
    self_test_problems,
    targets,
)
from comfyui_svdquant.cuda.activation_layout import CodeStorage, lay_out_codes, lay_out_lora_act, read_codes, read_lora_act
from comfyui_svdquant.cuda.choose import Kind, choose
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.operands import NO_LORA
from comfyui_svdquant.cuda.self_test_problems import LORA
from comfyui_svdquant.quant.quantizer import gptq as quantizer_gptq

INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
BF16, FP16 = torch.bfloat16, torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GEMM_MMA, GEMM_WGMMA = Kind(gemm_mma.SOURCE, INT8), Kind(gemm_wgmma.SOURCE, INT8)
QUANTIZE, REGISTERS = (Kind(source, INT8) for source in (quantize_activation.SOURCE, quantize_activation.REGISTERS_SOURCE))


def gemm(q, operands, storage, m):
    """A GEMM kernel's output before it is rounded, (M, N) float64, from its operands as they lie in memory."""
    k, rank, first = 2 * operands.weight.shape[1], operands.proj_up.shape[1], operands.unsigned_from
    codes = read_codes(q.act, storage, (m, k)).double()
    if storage == INT4_NIBBLES:
        codes[:, :first] -= 16 * (codes[:, :first] > 7)
    scales = q.act_scale[:, :m].t()
    if storage == INT8:
        scales = scales[:, (torch.arange(k // 64) >= first // 64).long()]
    y = reference.scaled_codes(codes, scales.double()) @ reference.dequantize_weight(operands.weight, operands.weight_scale,
                                                                                       torch.float64).t()
    lora_act, scale, own = q.lora_act, q.lora_act_scale[:m, None].double(), -(-rank // 32)
    y += read_lora_act(lora_act[:own], (m, rank)).double() * scale @ operands.proj_up.double().t()
    ups = operands.lora_up
    for (start, stop), ranks in zip(operands.lora.rows(y.shape[1]), operands.lora.ranks):
        part, lora_act = lora_act[own:].split([-(-ranks // 32), len(lora_act) - own - -(-ranks // 32)])
        up, ups, own = ups[:(stop - start) * ranks].view(-1, ranks), ups[(stop - start) * ranks:], 0
        y[:, start:stop] += read_lora_act(part, (m, ranks)).double() * scale @ up.double().t()
    return reference.activated(y + operands.bias.double(), operands.gelu_from)


def spoiled(tensor, *at, change=lambda value: -value):
    """A copy with one changed element."""
    copy = tensor.clone()
    copy[at] = change(copy[at])
    return copy


# {fault: changes q, operands of a GEMM}
GEMM_FAULTS = {
    "none": lambda q, o: (q, o),
    "a swapped nibble": lambda q, o: (q, o._replace(weight=spoiled(o.weight, 70, 17, change=lambda byte: (byte << 4) | (byte >> 4 & 15)))),
    "a scale of 1.07": lambda q, o: (q, o._replace(weight_scale=spoiled(o.weight_scale, 3, 5, change=lambda scale: scale * 1.07))),
    "another group's scale": lambda q, o: (q, o._replace(weight_scale=o.weight_scale.roll(1, 0))),
    "another token's scale": lambda q, o: (q._replace(act_scale=q.act_scale.roll(1, 1)), o),
    "a block of columns left out": lambda q, o: (q._replace(act=spoiled(q.act, 7, 270, change=torch.zeros_like)), o),
    "no branch": lambda q, o: (q._replace(lora_act=torch.zeros_like(q.lora_act)), o),
    "another bias": lambda q, o: (q, o._replace(bias=o.bias.roll(1))),
}
LORA_FAULTS = {
    "none": GEMM_FAULTS["none"],
    "no LoRA": lambda q, o: (q, o._replace(lora=NO_LORA)),
    "another part's rows": lambda q, o: (q, o._replace(lora_up=o.lora_up.roll(40))),
    "one rank of the last part": lambda q, o: (q, o._replace(lora_up=spoiled(o.lora_up, -1))),
    "the last block of ranks": lambda q, o: (q._replace(lora_act=spoiled(q.lora_act, -1, change=torch.zeros_like)), o),
}


@pytest.mark.parametrize("fault", GEMM_FAULTS)
@pytest.mark.parametrize(("storage", "dtype", "gelu"), [(INT8, BF16, False), (INT8, FP16, True), (INT4_BYTES, BF16, True),
                                                        (INT4_NIBBLES, FP16, False)])
def test_a_gemm(monkeypatch, storage, dtype, gelu, fault):
    def launch(y, storage, tile, q, operands):
        y.copy_(gemm(*GEMM_FAULTS[fault](q, operands), storage, len(y)))

    monkeypatch.setattr(gemm_mma, "launch", launch)
    assert self_test_problems.mma_is_right(storage, gemm_mma.LARGE, dtype, CPU, gelu, NO_LORA) is (fault == "none")


@pytest.mark.parametrize("fault", LORA_FAULTS)
@pytest.mark.parametrize(("storage", "dtype", "gelu"), [(INT8, BF16, False), (INT4_NIBBLES, FP16, True)])
def test_a_gemm_with_a_lora(monkeypatch, storage, dtype, gelu, fault):
    def launch(y, storage, tile, q, operands):
        y.copy_(gemm(*LORA_FAULTS[fault](q, operands), storage, len(y)))

    monkeypatch.setattr(gemm_mma, "launch", launch)
    assert self_test_problems.mma_is_right(storage, gemm_mma.LARGE, dtype, CPU, gelu, LORA) is (fault == "none")


GATED_FAULTS = {
    "none": lambda y, residual, gate: residual + gate * y,
    "no gate": lambda y, residual, gate: residual + y,
    "no residual": lambda y, residual, gate: gate * y,
    "another column's gate": lambda y, residual, gate: residual + gate.roll(1) * y,
    "another token's residual": lambda y, residual, gate: residual.roll(1, 0) + gate * y,
    "a residual's last rows left out": lambda y, residual, gate: residual * (torch.arange(len(y)) < len(y) - 3)[:, None] + gate * y,
}


@pytest.mark.parametrize("fault", GATED_FAULTS)
@pytest.mark.parametrize(("storage", "dtype"), [(INT8, BF16), (INT8, FP16), (INT4_NIBBLES, BF16)])
def test_a_gated_gemm(monkeypatch, storage, dtype, fault):
    def added(y, q, operands, storage, residual, gate):
        y.copy_(GATED_FAULTS[fault](gemm(q, operands, storage, len(y)).to(dtype).double(), residual.double(), gate.double()))

    monkeypatch.setattr(gemm_mma, "launch", lambda y, storage, tile, q, operands, **given: added(y, q, operands, storage, **given))
    monkeypatch.setattr(gemm_wgmma, "gemm", lambda tile, q, operands, m, y, **given: added(y, q, operands, INT8, **given))
    assert self_test_problems.mma_is_right(storage, gemm_mma.LARGE, dtype, CPU, False, NO_LORA, gated=True) is (fault == "none")
    assert self_test_problems.wgmma_is_right((192, 192, 1), dtype, CPU, False, NO_LORA, gated=True) is (fault == "none")


@pytest.mark.parametrize("lora", [NO_LORA, LORA])
@pytest.mark.parametrize(("storage", "dtype"), [(INT8, BF16), (INT4_NIBBLES, FP16)])
def test_what_a_gemm_is_compared_with(storage, dtype, lora):
    """It is the reference, for an input that has these codes: x itself."""
    case = self_test_problems._product(storage, 704, dtype, lora)
    g = torch.Generator().manual_seed(704)
    x = torch.randn(self_test_problems.TOKENS, self_test_problems.INPUTS, generator=g)
    x[:, 704:].abs_()
    exact = reference.svdquant_linear(x.to(dtype).float(), case.operands)
    assert ((case.exact - exact).abs() <= 1e-6 * exact.abs().max()).all()
    assert case.sums.max() < 0.02 * exact.std() or storage == INT8


def test_the_ranks_of_the_lora():
    """One part's ranks lie in each tile's ring beside the layer's own, the other's in none."""
    own, (first, last) = -(-self_test_problems.RANK // 32), (-(-rank // 32) for rank in LORA.ranks)
    assert own + first <= min(gemm_wgmma.STAGES.values()) and own + last > max(gemm_wgmma.STAGES.values())


@pytest.mark.parametrize(("tile", "unsigned_from"), [((128, 256, 1), 640), ((192, 64, 2), self_test_problems.INPUTS)])
def test_hoppers_gemm(monkeypatch, tile, unsigned_from):
    """Between two blocks of columns lies a border only where the kernel takes one."""
    seen = []

    def launch(tile, q, operands, m, out):
        seen.append(operands.unsigned_from)
        out.copy_(gemm(q, operands, INT8, m))

    monkeypatch.setattr(gemm_wgmma, "gemm", launch)
    assert self_test_problems.wgmma_is_right(tile, BF16, CPU, True, NO_LORA) and set(seen) == {unsigned_from}
    assert gemm_wgmma.takes(self_test_problems.INPUTS, unsigned_from)
    assert gemm_wgmma.divisible(self_test_problems.INPUTS, unsigned_from) is (tile[2] == 2)


@pytest.mark.parametrize("fault", ["none", "unwritten", "race"])
def test_what_a_kernel_writes(monkeypatch, fault):
    """An output that isn't written is caught, and so is one that differs from launch to launch within the bound."""
    launches = []

    def launch(y, storage, tile, q, operands):
        launches.append(fault)
        result = gemm(q, operands, storage, len(y)).to(BF16)
        if fault == "race" and len(launches) == 2:
            result[274, 399] = result[274, 399].nextafter(torch.tensor(torch.inf, dtype=BF16))
        if fault == "unwritten":
            y[:274].copy_(result[:274])
        else:
            y.copy_(result)

    monkeypatch.setattr(gemm_mma, "launch", launch)
    assert self_test_problems.mma_is_right(INT8, gemm_mma.LARGE, BF16, CPU, False, NO_LORA) is (fault == "none")
    assert len(launches) == self_test_problems.REPEATS


QUANTIZE_FAULTS = {
    "none": {},
    "a neighbour's codes": {"codes": lambda codes: codes.roll(1, 1)},
    "one code": {"codes": lambda codes: spoiled(codes, 36, 100, change=lambda code: code + 1)},
    "a scale": {"scales": lambda scales: spoiled(scales, 2, 0, change=lambda scale: scale * 1.00001)},
    "padding": {"padding": 1},
    "one rank": {"product": lambda product: spoiled(product, 36, 3)},
    "half of the sum": {"product": lambda product: product / 2},
    "another rank's strength": {"strength": lambda strength: strength.roll(1)},
}


@pytest.mark.parametrize("fault", QUANTIZE_FAULTS)
@pytest.mark.parametrize(("storage", "dtype", "k", "rank", "plan_ranks", "lora"), [
    (INT8, BF16, 3072, 32, 32, NO_LORA), (INT8, FP16, 1600, 128, 0, NO_LORA), (INT4_NIBBLES, BF16, 3072, 32, 0, LORA),
    (INT4_BYTES, FP16, 640, 16, 16, NO_LORA), (INT8, FP16, 1600, 48, 0, LORA)])
def test_a_quantize_kernel(monkeypatch, storage, dtype, k, rank, plan_ranks, lora, fault):
    changes = QUANTIZE_FAULTS[fault]

    def launcher(m, k, rank, stride, unsigned_from, storage, plans, dtype, device, lora):
        (plan,) = plans

        def launch(x, smooth, down, act, act_scale, lora_act, lora_act_scale, strength=None):
            codes, scales = reference.quantize_activation(x, smooth, unsigned_from, 8 if storage == INT8 else 4)
            codes, scales = changes.get("codes", lambda c: c)(codes), changes.get("scales", lambda s: s)(scales.clone())
            act.copy_(lay_out_codes(codes, storage))
            act_scale.zero_()
            act_scale[:, :m] = (scales[:, [0, -1]] if storage == INT8 else scales).t()
            product = down.float() if plan.ranks < rank else x.float() @ down.float()
            if strength is not None and dtype == BF16:
                product[:, rank:] *= changes.get("strength", lambda s: s)(strength)
            parts = changes.get("product", lambda p: p)(product).to(dtype).split([rank, *lora.ranks], dim=1)
            lora_act.copy_(torch.cat([lay_out_lora_act(part) for part in parts]))
            lora_act_scale.zero_()
            lora_act_scale[:m] = 1
            lora_act[..., m:, :] = changes.get("padding", 0)

        return launch, plan

    monkeypatch.setattr(runtime, "address", lambda tensor: tensor)
    monkeypatch.setattr(quantize_activation, "launcher", launcher)
    plan = quantize_activation.Plan(plan_ranks, 1, 2, 0, 0, 0, 512, 128, 3, True, 512)
    changed = "strength" not in changes or lora.ranks and dtype == BF16
    assert self_test_problems.quantize_is_right(storage, plan, k, rank, lora, dtype, CPU) is not bool(changes and changed)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("fault", ["none", "scale", "zero", "nibble"])
def test_the_w4a16_kernel(monkeypatch, dtype, fault):
    def launcher(tiles, m, n, dtype, device):
        def launch(x, weight, scale, zeros, bias, y, *sizes):
            if fault == "nibble":
                weight = spoiled(weight, 5, 17, change=lambda byte: byte ^ 16)
            scale = spoiled(scale, 3, 5, change=lambda value: value * 1.05) if fault == "scale" else scale
            zeros = spoiled(zeros, 3, 5, change=lambda value: value + 0.01) if fault == "zero" else zeros
            y.copy_(reference.awq_linear(x.double(), weight, scale, zeros, bias, torch.float64))
        return launch

    monkeypatch.setattr(runtime, "address", lambda tensor: tensor)
    monkeypatch.setattr(awq, "launcher", launcher)
    assert self_test_problems.awq_is_right(1, dtype, CPU) is (fault == "none")


@pytest.mark.parametrize("fault", ["none", "codes", "sums", "unavailable"])
@pytest.mark.parametrize("ranks", [(32, 32), (16, 64)])
def test_an_mlp_in_one_pass(monkeypatch, ranks, fault):
    """It is compared with the kernels of its layers. Another order of the sums of the branch's product is no fault."""
    plans = []

    def quantize(x, smooth, down, unsigned_from, storage, given):
        (plan,), (m, k) = given, x.shape
        plans.append((plan.ranks, down.shape[1], k, plan.slots))
        codes, scales = reference.quantize_activation(x, smooth, unsigned_from, 4)
        product = x.float() @ down.float() * changes.get("sums", 1)
        act_scale = torch.nn.functional.pad(scales.t(), (0, -m % 16))
        lora_act_scale = torch.nn.functional.pad(torch.ones(m), (0, -m % 16))
        codes[0, 0] += changes.get("codes", 0)
        lora_act = lay_out_lora_act(product.to(x.dtype))
        return quantize_activation.Quantized(lay_out_codes(codes, storage), act_scale, lora_act, lora_act_scale)

    def two_layers(kernels, x, first, second):
        if fault == "unavailable":
            return None
        hidden = gemm_mma.gemm(kernels.storage, None, quantize(x, *first_operands(first), kernels.storage, kernels.plans), first, len(x))
        changes.update({"sums": 1 - 2**-9 if fault == "none" else 0.97, **({"codes": 1} if fault == "codes" else {})})
        q = quantize(hidden, *first_operands(second), kernels.storage, kernels.plans)
        changes.clear()
        return gemm_mma.gemm(kernels.storage, None, q, second, len(x))

    def first_operands(layer):
        return layer.smooth, layer.proj_down, layer.unsigned_from

    changes = {}
    monkeypatch.setattr(quantize_activation, "quantize", quantize)
    monkeypatch.setattr(gemm_mma, "gemm", lambda storage, tile, q, o, m: gemm(q, o, storage, m).to(o.smooth.dtype))
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[89])
    monkeypatch.setattr(targets, "multiprocessors", lambda device: 128)
    layers = mlp.layers(4096, 320, 12288, 3072, *ranks, 320, 0, BF16)
    kernels = choose(layers, targets.TARGETS[89], 128)
    if fault == "unavailable":
        with pytest.raises(KernelsUnavailable):
            self_test_problems.mlp_is_right(kernels, kernels.plans[0], layers, CPU, two_layers)
        return
    assert self_test_problems.mlp_is_right(kernels, kernels.plans[0], layers, CPU, two_layers) is (fault == "none")
    *_, (first_ranks, rank, _, slots), (second_ranks, second_rank, hidden, second_slots) = plans
    assert (first_ranks, rank, second_rank, slots) == (*ranks[:1], *ranks, 3)
    assert second_ranks == (second_rank if rank == second_rank else 0), "the kernel's own ranks, or cuBLAS's"
    assert second_slots == min(quantize_activation.DEPTH, hidden // 128), "as quantize.cu wants them"


@pytest.mark.parametrize("layers", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_expansion_of_a_branch(dtype, layers):
    def run(change=lambda out: out, sign=lambda codes: codes, scales=lambda scale: scale):
        def expand_by(branches, new, layers):
            outs = [new(codes[1].shape[1] * len(codes[2])).view(len(codes[2]), -1) for codes in branches]
            for (down, up, scale), out in zip(branches, outs):
                out.copy_(reference.expand_branch(sign(torch.cat((down, up))), scales(scale), dtype))
            return [*outs[:-1], change(outs[-1])]
        return expand_by

    assert self_test_problems.expand_branch_is_right(run(), layers, dtype, CPU)
    wrong = (run(lambda out: out.roll(16, 1)), run(sign=lambda codes: codes.to(torch.uint8)), run(scales=lambda scale: scale.roll(1)),
             run(lambda out: out.index_fill(0, torch.tensor([len(out) - 1]), torch.nan)))
    assert not any(self_test_problems.expand_branch_is_right(expand_by, layers, dtype, CPU) for expand_by in wrong)


def test_the_quantizers_kernels():
    def plain(groups, steps, energy):
        codes = (groups / steps.unsqueeze(-1)).round().clamp(-8, 7)
        return ((codes * steps.unsqueeze(-1) - groups).square() * energy).sum(-1)

    assert self_test_problems.group_error_is_right(plain, CPU)
    assert not self_test_problems.group_error_is_right(lambda *args: spoiled(plain(*args), 36, 2, change=lambda error: error * 1.001), CPU)
    assert not self_test_problems.group_error_is_right(lambda groups, steps, energy: plain(groups, steps, energy.roll(1, 1)), CPU)

    def block(fault):
        def run(weight, pending, steps, inverse, groups, lower, codes):
            lower = spoiled(lower, 127, 3) if fault == "factor" else lower
            lost = quantizer_gptq._round_block(weight, pending, steps, inverse, groups, lower, codes)
            if fault == "code":
                codes[36, 0] += 1
            return lost
        return run

    assert self_test_problems.round_block_is_right(block("none"), CPU)
    assert not any(self_test_problems.round_block_is_right(block(fault), CPU) for fault in ("factor", "code"))
