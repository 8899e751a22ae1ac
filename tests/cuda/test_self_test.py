"""The self-test's verdicts without a GPU: their files, the warnings, and the fallback to other kernels."""

import logging
import threading
import types

import pytest
import torch
from comfyui_svdquant.cuda import (
    autotune,
    awq,
    compiler,
    dispatch,
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
from comfyui_svdquant.cuda.activation_layout import CodeStorage
from comfyui_svdquant.cuda.choose import W4A16, Kind, Layer, choose
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.operands import LoRASizes

INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
BF16, FP16 = torch.bfloat16, torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GEMM_MMA, GEMM_WGMMA = Kind(gemm_mma.SOURCE, INT8), Kind(gemm_wgmma.SOURCE, INT8)
QUANTIZE, REGISTERS = (Kind(source, INT8) for source in (quantize_activation.SOURCE, quantize_activation.REGISTERS_SOURCE))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A fake Hopper whose kernels all pass: {(source, defines or None for all): whether it passes}, and the tests that ran."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "kernels"))
    for name in ("_failed", "_verdicts", "_others", "_locks"):
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
    for state in (self_test._failed, self_test._verdicts, self_test._others, gpu.ran):
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


@pytest.mark.parametrize(("number", "act_bits", "gemm"), [
    (90, 8, GEMM_WGMMA), (89, 8, GEMM_MMA), (89, 4, Kind(gemm_mma.SOURCE, INT4_NIBBLES))])
def test_a_gated_layer_has_a_gemm_of_its_own(gpu, monkeypatch, caplog, number, act_bits, gemm):
    """A wrong one leaves the layer to the GEMM without a gate, and to a pass of its own."""
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
    monkeypatch.setattr(autotune, "wanted", lambda target: False)
    gated, alone = gemm._replace(gated=True), layer(act_bits)
    kernels = ops.chosen(alone, GPU)
    assert ops.chosen(alone._replace(gated=True), GPU) == kernels and gpu.ran[1:] == [gemm, gated]
    compiler.cache_folder().rename(compiler.cache_folder().with_name("before"))
    new_process(gpu)
    gpu.wrong = {gated}
    assert ops.chosen(alone._replace(gated=True), GPU) == kernels._replace(whole=False) and ops.chosen(alone, GPU) == kernels
    assert gpu.ran[1:] == [gated, gemm]
    assert "so that from now on residuals are added in a pass of their own, which is slower" in caplog.text


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
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
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
