"""The self-test without a GPU: its problems and bounds on emulated kernels, right ones and broken ones; its verdicts, their files and the
fallback."""

import logging
import threading
import types

import pytest
import torch
from comfyui_svdquant.cuda import (
    autotune,
    awq,
    compiler,
    gemm_mma,
    gemm_wgmma,
    gptq,
    group_error,
    kernel_loader,
    kernel_records,
    mlp,
    ops,
    quantize_activation,
    reference,
    runtime,
    self_test,
    targets,
)
from comfyui_svdquant.cuda.activation_layout import CodeStorage, lay_out_codes, lay_out_lora_act, read_codes, read_lora_act
from comfyui_svdquant.cuda.choose import W4A16, Kind, Layer, choose
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.operands import NO_LORA, LoRASizes
from comfyui_svdquant.cuda.self_test import LORA
from comfyui_svdquant.quant.quantizer import gptq as quantizer_gptq

INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
BF16, FP16 = torch.bfloat16, torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GEMM_MMA, GEMM_WGMMA = Kind(gemm_mma.SOURCE, INT8), Kind(gemm_wgmma.SOURCE, INT8)
QUANTIZE, REGISTERS = (Kind(source, INT8) for source in (quantize_activation.SOURCE, quantize_activation.REGISTERS_SOURCE))


# --- The problems and their bounds -----------------------------------------------------------------------------------


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
    assert self_test._mma_is_right(storage, gemm_mma.LARGE, dtype, CPU, gelu, NO_LORA) is (fault == "none")


@pytest.mark.parametrize("fault", LORA_FAULTS)
@pytest.mark.parametrize(("storage", "dtype", "gelu"), [(INT8, BF16, False), (INT4_NIBBLES, FP16, True)])
def test_a_gemm_with_a_lora(monkeypatch, storage, dtype, gelu, fault):
    def launch(y, storage, tile, q, operands):
        y.copy_(gemm(*LORA_FAULTS[fault](q, operands), storage, len(y)))

    monkeypatch.setattr(gemm_mma, "launch", launch)
    assert self_test._mma_is_right(storage, gemm_mma.LARGE, dtype, CPU, gelu, LORA) is (fault == "none")


@pytest.mark.parametrize("lora", [NO_LORA, LORA])
@pytest.mark.parametrize(("storage", "dtype"), [(INT8, BF16), (INT4_NIBBLES, FP16)])
def test_what_a_gemm_is_compared_with(storage, dtype, lora):
    """It is the reference, for an input that has these codes: x itself."""
    case = self_test._product(storage, 704, dtype, lora, CPU)
    g = torch.Generator().manual_seed(704)
    x = torch.randn(self_test.TOKENS, self_test.INPUTS, generator=g)
    x[:, 704:].abs_()
    exact = reference.svdquant_linear(x.to(dtype).float(), case.operands)
    assert ((case.exact - exact).abs() <= 1e-6 * exact.abs().max()).all()
    assert case.sums.max() < 0.02 * exact.std() or storage == INT8


def test_the_ranks_of_the_lora():
    """One part's ranks lie in each tile's ring beside the layer's own, the other's in none."""
    own, (first, last) = -(-self_test.RANK // 32), (-(-rank // 32) for rank in LORA.ranks)
    assert own + first <= min(gemm_wgmma.STAGES.values()) and own + last > max(gemm_wgmma.STAGES.values())


@pytest.mark.parametrize(("tile", "unsigned_from"), [((128, 256, 1), 640), ((192, 64, 2), self_test.INPUTS)])
def test_hoppers_gemm(monkeypatch, tile, unsigned_from):
    """Between two blocks of columns lies a border only where the kernel takes one."""
    seen = []

    def launch(tile, q, operands, m, out):
        seen.append(operands.unsigned_from)
        out.copy_(gemm(q, operands, INT8, m))

    monkeypatch.setattr(gemm_wgmma, "gemm", launch)
    assert self_test._wgmma_is_right(tile, BF16, CPU, True, NO_LORA) and set(seen) == {unsigned_from}
    assert gemm_wgmma.takes(self_test.INPUTS, unsigned_from) and gemm_wgmma.divisible(self_test.INPUTS, unsigned_from) is (tile[2] == 2)


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
    assert self_test._mma_is_right(INT8, gemm_mma.LARGE, BF16, CPU, False, NO_LORA) is (fault == "none")
    assert len(launches) == self_test.REPEATS


QUANTIZE_FAULTS = {
    "none": {},
    "a neighbour's codes": {"codes": lambda codes: codes.roll(1, 1)},
    "one code": {"codes": lambda codes: spoiled(codes, 36, 100, change=lambda code: code + 1)},
    "a scale": {"scales": lambda scales: spoiled(scales, 2, 0, change=lambda scale: scale * 1.00001)},
    "padding": {"padding": 1},
    "one rank": {"product": lambda product: spoiled(product, 36, 3)},
    "half of the sum": {"product": lambda product: product / 2},
}


@pytest.mark.parametrize("fault", QUANTIZE_FAULTS)
@pytest.mark.parametrize(("storage", "dtype", "k", "rank", "plan_ranks", "lora"), [
    (INT8, BF16, 3072, 32, 32, NO_LORA), (INT8, FP16, 1600, 128, 0, NO_LORA), (INT4_NIBBLES, BF16, 3072, 32, 0, LORA),
    (INT4_BYTES, FP16, 640, 16, 16, NO_LORA), (INT8, FP16, 1600, 48, 0, LORA)])
def test_a_quantize_kernel(monkeypatch, storage, dtype, k, rank, plan_ranks, lora, fault):
    changes = QUANTIZE_FAULTS[fault]

    def launcher(m, k, rank, stride, unsigned_from, storage, plans, dtype, device, lora):
        (plan,) = plans

        def launch(x, smooth, down, act, act_scale, lora_act, lora_act_scale):
            codes, scales = reference.quantize_activation(x, smooth, unsigned_from, 8 if storage == INT8 else 4)
            codes, scales = changes.get("codes", lambda c: c)(codes), changes.get("scales", lambda s: s)(scales.clone())
            act.copy_(lay_out_codes(codes, storage))
            act_scale.zero_()
            act_scale[:, :m] = (scales[:, [0, -1]] if storage == INT8 else scales).t()
            product = down.float() if plan.ranks < rank else x.float() @ down.float()
            parts = changes.get("product", lambda p: p)(product).to(dtype).split([rank, *lora.ranks], dim=1)
            lora_act.copy_(torch.cat([lay_out_lora_act(part) for part in parts]))
            lora_act_scale.zero_()
            lora_act_scale[:m] = 1
            lora_act[..., m:, :] = changes.get("padding", 0)

        return launch, plan

    monkeypatch.setattr(runtime, "address", lambda tensor: tensor)
    monkeypatch.setattr(quantize_activation, "launcher", launcher)
    plan = quantize_activation.Plan(plan_ranks, 1, 2, 0, 0, 0, 512, 128, 3, True, 512)
    assert self_test._quantize_is_right(storage, plan, k, rank, lora, dtype, CPU) is (fault == "none")


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
    assert self_test._awq_is_right(1, dtype, CPU) is (fault == "none")


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
            self_test._mlp_is_right(kernels, kernels.plans[0], layers, CPU, two_layers)
        return
    assert self_test._mlp_is_right(kernels, kernels.plans[0], layers, CPU, two_layers) is (fault == "none")
    *_, (first_ranks, rank, _, slots), (second_ranks, second_rank, hidden, second_slots) = plans
    assert (first_ranks, rank, second_rank, slots) == (*ranks[:1], *ranks, 3)
    assert second_ranks == (second_rank if rank == second_rank else 0), "the kernel's own ranks, or cuBLAS's"
    assert second_slots == min(quantize_activation.DEPTH, hidden // 128), "as quantize.cu wants them"


def test_the_quantizers_kernels():
    def plain(groups, steps, energy):
        codes = (groups / steps.unsqueeze(-1)).round().clamp(-8, 7)
        return ((codes * steps.unsqueeze(-1) - groups).square() * energy).sum(-1)

    assert self_test.group_error_is_right(plain, CPU)
    assert not self_test.group_error_is_right(lambda *args: spoiled(plain(*args), 36, 2, change=lambda error: error * 1.001), CPU)
    assert not self_test.group_error_is_right(lambda groups, steps, energy: plain(groups, steps, energy.roll(1, 1)), CPU)

    def block(fault):
        def run(weight, pending, steps, inverse, groups, lower, codes):
            lower = spoiled(lower, 127, 3) if fault == "factor" else lower
            lost = quantizer_gptq._round_block(weight, pending, steps, inverse, groups, lower, codes)
            if fault == "code":
                codes[36, 0] += 1
            return lost
        return run

    assert self_test.round_block_is_right(block("none"), CPU)
    assert not any(self_test.round_block_is_right(block(fault), CPU) for fault in ("factor", "code"))


# --- Verdicts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A fake Hopper whose kernels all pass: {(source, defines or None for all): whether it passes}, and the tests that ran."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "kernels"))
    for name in ("_failed", "_verdicts", "_quantizer", "_locks", "_problems"):
        monkeypatch.setattr(self_test, name, {})
    fake = types.SimpleNamespace(wrong=set(), ran=[], machine=("NVIDIA H200", "uuid", "580.1"), digest="digest")
    monkeypatch.setattr(kernel_records, "machine", lambda device: fake.machine)
    monkeypatch.setattr(compiler, "digest", lambda source, defines, arch: f"{fake.digest} {source} {defines} {arch}")
    monkeypatch.setattr(compiler, "nvrtc", lambda: types.SimpleNamespace(version=(13, 0)))
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[90])
    monkeypatch.setattr(targets, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(kernel_loader, "kernel", lambda *args: runtime.Kernel(0x77, -1, 0))
    monkeypatch.setattr(runtime.Kernel, "active_clusters", lambda kernel, ctas, threads: 500 // ctas)
    monkeypatch.setattr(runtime, "chain", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fake.verdict = verdict = self_test._verdict

    def tested(test, device):
        def run():
            fake.ran.append(test.kind)
            return test.kind not in fake.wrong
        return verdict(test._replace(run=run), device)

    fake.tested = tested
    monkeypatch.setattr(self_test, "_verdict", tested)
    monkeypatch.setattr(self_test, "skipped", threading.Event())
    caches = ops.chosen, quantize_activation.launcher
    for cache in caches:
        cache.cache_clear()
    yield fake
    for cache in caches:
        cache.cache_clear()


def layer(act_bits=8, dtype=BF16, n=3072, k=3072, gelu_from=None):
    return Layer(4096, n, k, 32, k, act_bits, dtype, gelu_from)


def new_process(gpu):
    """Forget what a process knows; its files stay."""
    for state in (self_test._failed, self_test._verdicts, self_test._quantizer, gpu.ran):
        state.clear()
    ops.chosen.cache_clear()
    quantize_activation.launcher.cache_clear()


def test_a_kernel_is_tested_once(gpu, caplog):
    for _ in range(2):
        assert ops.chosen(layer(), GPU).wgmma
    assert gpu.ran == [REGISTERS, GEMM_WGMMA]
    ops.chosen(layer(n=9216), GPU)  # perhaps another tile, the same quantize kernel
    assert gpu.ran.count(REGISTERS) == 1
    new_process(gpu)
    assert ops.chosen(layer(), GPU).wgmma and gpu.ran == [], "a later process reads the verdict"
    assert not caplog.records


def test_kernels_with_a_lora_are_kernels_of_their_own(gpu):
    """They have tests of their own, which also test a branch of many ranks. A wrong one excludes its kind."""
    ops.chosen(layer(), GPU)
    ops.chosen(layer()._replace(lora=LoRASizes((16,))), GPU)
    assert sorted(gpu.ran) == sorted(2 * [REGISTERS, GEMM_WGMMA])
    ops.chosen(layer()._replace(lora=LoRASizes((64, 8), 1536)), GPU)
    assert len(gpu.ran) == 4, "other ranks have the same kernels"
    assert ops.chosen(layer()._replace(rank=160), GPU).wgmma and gpu.ran.count(GEMM_WGMMA) == 2


@pytest.mark.parametrize("change", ["machine", "digest", "code"])
def test_what_a_verdict_belongs_to(gpu, monkeypatch, change):
    """Another GPU or driver, another kernel or compiler, other code of this folder."""
    ops.chosen(layer(), GPU)
    new_process(gpu)
    if change == "code":
        monkeypatch.setattr(kernel_records, "code_digest", lambda: "another")
    else:
        setattr(gpu, change, (*gpu.machine[:2], "581.0") if change == "machine" else "another")
    ops.chosen(layer(), GPU)
    assert gpu.ran == [REGISTERS, GEMM_WGMMA]


def test_the_launchers_code_belongs_to_a_record(monkeypatch, tmp_path):
    """A wrong result may be a launcher's fault, and its correction must not leave the kernel excluded."""
    def digest(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        return kernel_records.code_digest.__wrapped__()

    monkeypatch.setattr(kernel_records, "__file__", str(tmp_path / "kernel_records.py"))
    first = digest(kernel_records="", gemm_mma="wrong")
    assert digest() == first != digest(gemm_mma="right")


@pytest.mark.parametrize("damage", [b"", b"short", None, "3", "[true]", "{"])
def test_a_damaged_verdict_is_made_anew(gpu, damage):
    gpu.wrong = {GEMM_WGMMA}
    ops.chosen(layer(), GPU)
    entries = sorted(compiler.cache_folder().iterdir())
    whole = {entry: entry.read_bytes() for entry in entries}
    for entry, data in whole.items():
        if isinstance(damage, str):
            compiler.write_entry(entry, damage.encode())
        else:
            entry.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage is None else damage)
    new_process(gpu)
    assert not ops.chosen(layer(), GPU).wgmma and gpu.ran == [REGISTERS, GEMM_WGMMA, GEMM_MMA]
    assert {entry: entry.read_bytes() for entry in compiler.cache_folder().iterdir()} == whole


def test_a_cache_that_cannot_be_written(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file"))
    assert ops.chosen(layer(), GPU).wgmma and gpu.ran == [REGISTERS, GEMM_WGMMA]


def test_threads_test_a_kernel_once(gpu):
    gpu.wrong, gate = {GEMM_WGMMA}, threading.Barrier(8)
    results = []

    def ask():
        gate.wait()
        results.append(ops.chosen(layer(), GPU))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len(set(results)) == 1 and not results[0].wgmma
    assert sorted(gpu.ran) == sorted((REGISTERS, GEMM_WGMMA, GEMM_MMA))


@pytest.fixture
def full(gpu, monkeypatch):
    """A GPU without memory for the tests."""
    def out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(self_test, "_verdict", lambda test, device: gpu.verdict(test._replace(run=out), device))


def test_without_memory_for_the_test_the_kernel_runs_without_a_verdict(gpu, full, caplog):
    """A nearly full GPU still draws the picture. The next process tests the kernel."""
    assert ops.chosen(layer(), GPU).wgmma
    assert self_test._verdicts == {} and self_test._failed == {} and not compiler.cache_folder().exists() and not caplog.records


def test_a_skipped_test_runs_after_the_warm_up(gpu, full, monkeypatch):
    """The model before may have filled the GPU while this one's kernels were built."""
    ops.chosen(layer(), GPU)
    monkeypatch.setattr(self_test, "_verdict", gpu.tested)
    monkeypatch.setattr(autotune, "tune", lambda *args: None)
    ops._measure(GPU, ())
    for _ in range(2):
        assert ops.chosen(layer(), GPU).wgmma and gpu.ran == [REGISTERS, GEMM_WGMMA]
        ops._measure(GPU, ())


def test_no_test_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu.wrong = {GEMM_WGMMA}
    assert ops.chosen(layer(), GPU).wgmma and gpu.ran == [] and self_test._verdicts == {}


def test_a_verdict_counts_while_a_graph_is_captured(gpu, monkeypatch):
    gpu.wrong = {GEMM_WGMMA}
    kernels = ops.chosen(layer(), GPU)
    new_process(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ops.chosen(layer(), GPU) == kernels and not kernels.wgmma and gpu.ran == []


def test_it_can_be_switched_off(gpu, monkeypatch):
    """Also where a test has called a kernel wrong before."""
    gpu.wrong = {GEMM_WGMMA}
    assert not ops.chosen(layer(), GPU).wgmma
    new_process(gpu)
    monkeypatch.setenv(self_test.VARIABLE, "0")
    assert ops.chosen(layer(), GPU).wgmma and gpu.ran == []


def test_a_type_in_which_the_kernels_do_not_compute(gpu):
    """The op asks again for the type in which it computes."""
    assert not ops.chosen(layer(dtype=torch.float32), GPU).whole and gpu.ran == []


def test_the_sanitizers_cases_run_without_it(gpu, monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # as sanitize.py does; restored for the other tests
    monkeypatch.setattr(self_test, "passes", self_test.passes)
    from . import sanitize

    sanitize.switch_off_self_test()
    assert ops.chosen(layer(), GPU).wgmma and gpu.ran == []


# --- The fallback ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "wgmma", "registers"), [
    ({GEMM_WGMMA}, False, True), ({REGISTERS}, True, False), ({GEMM_WGMMA, REGISTERS}, False, False),
    ({GEMM_WGMMA, GEMM_MMA}, None, None), ({REGISTERS, QUANTIZE}, None, None), ({GEMM_MMA}, True, True)])
def test_the_next_kernel(gpu, caplog, wrong, wgmma, registers):
    """One warning for each wrong kernel that was asked for, with all that a report needs."""
    gpu.wrong = wrong
    with caplog.at_level(logging.WARNING):
        kernels = [ops.chosen(layer(n=n), GPU) for n in (3072, 9216)]
    for chosen in kernels:
        assert (chosen is None) is (wgmma is None)
        if chosen:
            assert chosen.wgmma is wgmma and bool(chosen.plans[0].warps) is registers
    asked = wrong & set(gpu.ran)
    assert asked == wrong - ({GEMM_MMA} if wgmma else set()) and len(caplog.records) == len(asked)
    for record in caplog.records:
        assert "NVIDIA H200 (driver 580.1, NVRTC 13.0)" in record.message and "please report this line" in record.message
    new_process(gpu)
    caplog.clear()
    assert [ops.chosen(layer(n=n), GPU) for n in (3072, 9216)] == kernels and gpu.ran == []
    assert len(caplog.records) == len(asked), "each process says it once"


def test_the_warning(gpu, caplog):
    gpu.wrong = {GEMM_WGMMA}
    ops.chosen(layer(), GPU)
    (record,) = caplog.records
    assert record.message.startswith("The CUDA kernel gemm_wgmma.cu (HALF 0, ROWS ")
    assert record.message.endswith(
        ") gave a wrong result in its self-test on NVIDIA H200 (driver 580.1, NVRTC 13.0), so that from now on gemm_mma.cu computes the "
        "8-bit layers, which is slower; please report this line to the authors of the SVDQuant nodes.")


def test_other_layers_keep_their_kernels(gpu):
    gpu.wrong = {Kind(gemm_mma.SOURCE, INT4_BYTES), Kind(awq.SOURCE)}
    assert ops.chosen(layer(act_bits=4), GPU) is None
    assert ops.chosen(layer(act_bits=W4A16), GPU) is None
    assert ops.chosen(layer(), GPU).wgmma


@pytest.mark.parametrize("wrong", [Kind(gemm_mma.SOURCE, INT4_BYTES, True), Kind(quantize_activation.SOURCE, INT4_BYTES)])
def test_an_mlp(gpu, wrong):
    """Without its own kernel an MLP runs as two layers; their kernels are tested before it."""
    layers = mlp.layers(4096, 3072, 12288, 3072, 32, 32, 3072, 0, BF16)
    assert ops.chosen(layers, GPU) is not None
    assert gpu.ran[-1] == Kind(gemm_mma.SOURCE, INT4_BYTES, True) and gpu.ran[0] == Kind(quantize_activation.SOURCE, INT4_BYTES)
    compiler.cache_folder().rename(compiler.cache_folder().with_name("before"))
    new_process(gpu)
    gpu.wrong = {wrong}
    assert ops.chosen(layers, GPU) is None
    assert (ops.chosen(layer(act_bits=4), GPU) is None) is (not wrong.feeds_next)


def test_an_mlp_whose_kernel_is_unavailable_costs_no_test(gpu, monkeypatch):
    """Every call of the MLP asks for it again."""
    def kernel(source, entry, defines, device, shared=0):
        if "NEXT" in dict(defines):
            raise KernelsUnavailable("NVRTC could not compile it")
        return runtime.Kernel(0x77, -1, 0)

    monkeypatch.setattr(kernel_loader, "kernel", kernel)
    with pytest.raises(KernelsUnavailable):
        ops.chosen(mlp.layers(4096, 3072, 12288, 3072, 32, 32, 3072, 0, BF16), GPU)
    assert gpu.ran == []


def test_the_layer_runs_by_the_reference(gpu, monkeypatch):
    """A layer whose kernels all failed is computed by reference.py, not refused."""
    from .layers import random_input, random_layer, with_row_scale

    gpu.wrong = {GEMM_WGMMA, GEMM_MMA}
    operands, x = with_row_scale(random_layer(192, 256, 32, dtype=BF16)), random_input(70, 256, BF16)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    ops._launches.cache_clear()
    assert torch.equal(ops.svdquant_linear(x, operands), reference.svdquant_linear(x, operands))
    ops._launches.cache_clear()


@pytest.mark.parametrize("number", targets.TARGETS)
@pytest.mark.parametrize("act_bits", [4, 8, W4A16])
def test_choose_uses_no_failed_kind(number, act_bits):
    target = targets.TARGETS[number]
    wanted, failed = layer(act_bits, target.dtypes[0]), set()
    while (kernels := choose(wanted, target, 100, frozenset(failed))) is not None:
        kinds = ({Kind(awq.SOURCE)} if act_bits == W4A16 else
                 {Kind(quantize_activation.source(plan), kernels.storage) for plan in kernels.plans[:1]}
                 | {Kind(gemm_wgmma.SOURCE if kernels.wgmma else gemm_mma.SOURCE, kernels.storage)})
        assert kinds.isdisjoint(failed)
        failed.add(sorted(kinds, key=lambda kind: (kind.source != gemm_wgmma.SOURCE, kind.source == gemm_mma.SOURCE))[0])
    assert len(failed) <= 3


@pytest.mark.parametrize("kernel", [gptq, group_error])
def test_the_quantizer_goes_on_without_a_wrong_kernel(gpu, monkeypatch, kernel):
    monkeypatch.setattr(kernel_loader, "has_kernel", lambda *args: True)
    weight = types.SimpleNamespace(device=GPU)
    assert kernel.available(weight) and kernel.available(weight) and gpu.ran == [Kind(kernel.SOURCE)]
    compiler.cache_folder().rename(compiler.cache_folder().with_name("before"))
    new_process(gpu)
    gpu.wrong = {Kind(kernel.SOURCE)}
    assert not kernel.available(weight) and not kernel.available(weight) and gpu.ran == [Kind(kernel.SOURCE)]


def test_the_quantizer_asks_again_after_a_test_that_could_not_run(gpu, full, monkeypatch):
    monkeypatch.setattr(kernel_loader, "has_kernel", lambda *args: True)
    weight = types.SimpleNamespace(device=GPU)
    assert gptq.available(weight)
    monkeypatch.setattr(self_test, "_verdict", gpu.tested)
    gpu.wrong = {Kind(gptq.SOURCE)}
    assert not gptq.available(weight)
