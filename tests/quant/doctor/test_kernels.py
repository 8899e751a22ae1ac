"""The doctor's checks of the kernels, for GPUs of several generations."""

import pytest
import torch
from comfyui_svdquant.cuda import autotune, kernel_records, linear_speed, self_test
from comfyui_svdquant.cuda.choose import Kind, choose
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.quant.doctor import kernels

QKV = "double_blocks.0.img_attn.qkv (4096, 3072, 9216)"


def test_the_layers_are_those_of_a_model(machine):
    found = kernels.layers(machine((8, 9)).target)
    qkv, down, linear1, linear2 = found.values()
    assert list(found)[0] == QKV and (qkv.rank, linear1.rank, linear2.rank) == (32, 64, 64) and qkv.act_bits == 4
    assert (qkv.unsigned_from, down.unsigned_from, linear2.unsigned_from, linear1.gelu_from) == (3072, 0, 3072, 9216)
    assert kernels.layers(machine((7, 5)).target).popitem()[1].dtype == torch.float16


@pytest.mark.parametrize(("capability", "says"), [
    ((7, 5), "W4A4: quantize.cu, gemm_mma.cu "), ((8, 0), "W4A8: quantize.cu, gemm_mma.cu "), ((8, 9), "W4A4: quantize.cu, gemm_mma.cu "),
    ((9, 0), "W4A8: quantize_registers.cu, gemm_wgmma.cu "), ((12, 0), "W4A8: quantize"), ((14, 0), "W4A8: quantize")])
def test_the_chosen_kernels(machine, capability, says):
    lines, problems, _ = kernels.kernels(machine(capability))
    assert lines[1].startswith(f"{QKV} {says}") and len(lines) == 5 and not problems
    assert kernels.kernels(machine(capability), blocked=True).lines[0].startswith("not in use until the problems above are solved; ")


def test_kernels_that_failed(machine, monkeypatch):
    gpu = machine((9, 0))
    storage = choose(next(iter(kernels.layers(gpu.target).values())), gpu.target, gpu.sms).storage
    monkeypatch.setattr(self_test, "_failed", {0: frozenset({Kind("gemm_wgmma.cu", storage)})})
    assert "gemm_mma.cu" in kernels.kernels(gpu).lines[1]
    _, (problem,), _ = kernels.verdicts(gpu)
    assert problem.startswith("gemm_wgmma.cu gave a wrong result in its self-test on this GPU") and "report this page" in problem
    monkeypatch.setattr(self_test, "_failed", {0: frozenset({Kind("quantize.cu", storage)})})
    assert kernels.kernels(gpu).lines[1].endswith("W4A8: PyTorch")


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 0), (12, 0)])
def test_the_verdicts_on_record(machine, capability):
    gpu = machine(capability)
    untested, problems, _ = kernels.verdicts(gpu)
    assert untested and all("not tested yet" in line and "passed" not in line for line in untested) and not problems
    layer = next(iter(kernels.layers(gpu.target).values()))
    for test in _tests(gpu, layer):
        kernel_records.write(self_test._record(test.kind, test.compiled, gpu.device), True)
    assert all(line.split(": ")[1][1:].startswith(" passed") for line in kernels.verdicts(gpu).lines)
    for test in _tests(gpu, layer):
        kernel_records.write(self_test._record(test.kind, test.compiled, gpu.device), False)
    lines, problems, _ = kernels.verdicts(gpu)
    assert all("WRONG" in line for line in lines) and len(problems) == 2


def _tests(gpu, layer):
    """The Tests of a layer's kernels if the first plan fits."""
    chosen = choose(layer, gpu.target, gpu.sms)
    source, _, defines = self_test.quantize_activation.variant(layer.dtype, chosen.storage, chosen.plans[0])
    yield self_test.Test(Kind(source, chosen.storage), (source, defines), None, "")
    yield self_test._gemm_test(chosen, layer, self_test.NO_LORA, gpu.device)


def test_the_self_test_switched_off(machine, monkeypatch):
    gpu = machine()
    monkeypatch.setenv(self_test.VARIABLE, "0")
    assert kernels.verdicts(gpu) == (("switched off by SVDQUANT_SELF_TEST=0",), (), False)


def test_the_autotune(machine, monkeypatch):
    assert kernels.autotuned(machine((9, 0))).lines == ("not needed, since the choices were measured on this generation",)
    gpu = machine((8, 9))
    assert kernels.autotuned(gpu).lines[0].startswith("on: 0 of these 4 layers are measured")
    layer = next(iter(kernels.layers(gpu.target).values()))
    chosen = choose(layer, gpu.target, gpu.sms)
    values = autotune.alternatives(chosen, layer, gpu.target)
    kernel_records.write(autotune._record(chosen, layer, values, gpu.target, gpu.device), dict.fromkeys(values, 0))
    assert kernels.autotuned(gpu).lines[0].startswith("on: 1 of these 4 layers are measured")
    assert not autotune._pending[gpu.device], "asking measures nothing"
    monkeypatch.setenv(autotune.VARIABLE, "0")
    assert kernels.autotuned(gpu).lines == ("switched off by SVDQUANT_AUTOTUNE=0",)


# --- Speed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """{way: seconds, or the error that it raises} of linear_speed's ways."""
    found = {"sixteen_bits": 1e-3, "fp8": 5e-4, "by_kernels": 4e-4}

    def making(way):
        def make(layer, device):
            if isinstance(found[way], Exception):
                raise found[way]
            return way
        return make

    for way in found:
        monkeypatch.setattr(linear_speed, way, making(way))
    monkeypatch.setattr(linear_speed, "seconds", lambda run, device: found[run])
    return found


def test_the_benchmark(machine, timed):
    lines, problems, _ = kernels.benchmark(machine((9, 0)))
    assert len(lines) == 5 and lines[1] == f"{QKV}: bf16 232, fp8 464 (2.00x), W4A8 580 (2.50x)" and not problems


def test_a_way_that_the_gpu_lacks(machine, timed):
    timed |= {"fp8": RuntimeError("torch._scaled_mm is only supported on newer GPUs\nmore"),
              "by_kernels": KernelsUnavailable("The CUDA kernels need CuPy, which is not installed.")}
    lines = kernels.benchmark(machine((7, 5))).lines
    assert lines[1] == (f"{QKV}: fp16 232, fp8 not possible (torch._scaled_mm is only supported on newer GPUs), "
                        "W4A4 not possible (The CUDA kernels need CuPy, which is not installed.)")
    timed["sixteen_bits"] = torch.OutOfMemoryError("CUDA out of memory")
    timed["by_kernels"] = 4e-4
    line = kernels.benchmark(machine((8, 9))).lines[1]
    assert "bf16 not enough GPU memory, " in line and line.endswith("W4A4 580")


def test_the_benchmark_ends_in_time(machine, timed):
    clock = iter(range(0, 1000, 15))
    lines = kernels.benchmark(machine(), now=lambda: next(clock)).lines
    assert lines[1].startswith(f"{QKV}: bf16 232, fp8 464 (2.00x), W4A4") and lines[2:] == ("stopped, since the time is over",)
