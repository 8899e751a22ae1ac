"""The self-test on a GPU: every kernel passes, and one that is broken on purpose is caught and replaced."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comfyui_svdquant.cuda import (
    awq,
    compiler,
    gemm_mma,
    gemm_wgmma,
    gptq,
    group_error,
    kernel_records,
    mlp,
    ops,
    quantize_activation,
    reference,
    self_test,
    self_test_problems,
    targets,
)
from comfyui_svdquant.cuda.activation_layout import CodeStorage
from comfyui_svdquant.cuda.choose import W4A16, Kind, Layer
from comfyui_svdquant.cuda.operands import NO_LORA, LoRASizes
from comfyui_svdquant.cuda.self_test_problems import LORA

from .broken import new_process
from .layers import on_cuda, plans_here, random_input, relative_error, with_lora
from .test_mlp_gpu import random_case
from .test_ops_gpu import BF16, integer_layer

pytestmark = pytest.mark.gpu
INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
BFLOAT, HALF = torch.bfloat16, torch.float16
DEVICE = torch.device("cuda", 0)
GEMMS = [(BFLOAT, True, NO_LORA), (HALF, False, LORA)]
# (M, N, K, unsigned_from, gelu_from): FLUX.1's linears at 1024 x 1024.
FLUX = [(4096, 9216, 3072, 3072, None), (512, 9216, 3072, 3072, None), (4096, 3072, 3072, 3072, None), (4096, 12288, 3072, 3072, 0),
        (4096, 3072, 12288, 0, None), (512, 3072, 3072, 3072, None), (512, 12288, 3072, 3072, 0), (512, 3072, 12288, 0, None),
        (4608, 21504, 3072, 3072, 9216), (4608, 3072, 15360, 3072, None)]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the GEMMs in parallel."""
    target = targets.for_device(DEVICE)
    wanted = [(gemm_mma.SOURCE, gemm_mma.defines_of(storage, tile, target, dtype, gelu=gelu, lora=bool(lora.ranks)))
              for storage in CodeStorage for tile in gemm_mma.tiles_of(target) for dtype, gelu, lora in GEMMS]
    if target.wgmma:
        wanted += [(gemm_wgmma.SOURCE, gemm_wgmma.defines_of(tile, dtype, gelu, bool(lora.ranks)))
                   for tile in gemm_wgmma.STAGES for dtype, gelu, lora in GEMMS]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda w: compiler.compile_cubin(*w, target.arch), wanted))


@pytest.mark.parametrize(("dtype", "gelu", "lora"), GEMMS)
def test_every_gemm_passes(dtype, gelu, lora):
    target = targets.for_device(DEVICE)
    for storage in CodeStorage:
        for tile in gemm_mma.tiles_of(target):
            assert self_test_problems.mma_is_right(storage, tile, dtype, DEVICE, gelu, lora), (storage, tile)
            if gemm_mma.gates(storage) and not gelu:
                assert self_test_problems.mma_is_right(storage, tile, dtype, DEVICE, gelu, lora, gated=True), (storage, tile)
    for tile in gemm_wgmma.STAGES if target.wgmma else ():
        assert self_test_problems.wgmma_is_right(tile, dtype, DEVICE, gelu, lora), tile
        assert gelu or self_test_problems.wgmma_is_right(tile, dtype, DEVICE, gelu, lora, gated=True), tile


@pytest.mark.parametrize("storage", CodeStorage)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("k", [64, 192, 3072, 12288, 15360])
def test_every_quantize_kernel_passes(storage, dtype, k):
    """The fastest plans of several shapes; a LoRA's layers have plans of their own."""
    seen = set()
    for m in (64, 512, 4608):
        for rank in (0, 32, 64, 128):
            for lora in (NO_LORA, LORA):
                plans = plans_here(m, k, rank, storage, fused=not lora.ranks)
                _, plan = quantize_activation.launcher(m, k, rank, k, k, storage, plans, dtype, DEVICE, lora=lora)
                key = quantize_activation.variant(dtype, storage, plan, bool(lora.ranks)), rank
                if key not in seen:
                    assert self_test_problems.quantize_is_right(storage, plan, k, rank, lora, dtype, DEVICE), (m, rank, plan, lora)
                    seen.add(key)


def test_the_other_kernels_pass():
    for dtype in (BFLOAT, HALF):
        assert all(self_test_problems.awq_is_right(tiles, dtype, DEVICE) for tiles in awq.TILES)
    weight = torch.empty(1, device=DEVICE)
    assert gptq.available(weight) and group_error.available(weight)
    for ranks in (16, 48):
        layers = mlp.layers(4096, 3072, 12288, 3072, ranks, ranks, 3072, 0, BFLOAT)
        assert ops.chosen(layers, DEVICE) is not None
    assert self_test.failed(DEVICE) == frozenset()


REGISTERS = Kind(quantize_activation.REGISTERS_SOURCE, INT8)
# {fault: (Kinds that fail, a layer's (M, N, K, rank, act_bits) and LoRA, changes of sources)}
WIDE = (513, 1040, 1024, 32)
FAULTS = {
    "a scale's integer, wgmma": ({Kind(gemm_wgmma.SOURCE, INT8)}, (*WIDE, 8), None,
                                 [("gemm_wgmma_multiply.cuh", "12582912.f)) - 0x4b400000", "12582912.f)) - 0x4b3fffff")]),
    "a zero point, wgmma": ({Kind(gemm_wgmma.SOURCE, INT8)}, (*WIDE, 8), None,
                            [("gemm_wgmma_multiply.cuh", "offset_j = 0x80808080u", "offset_j = 0x80808081u")]),
    "a LoRA's first rank, wgmma": ({Kind(gemm_wgmma.SOURCE, INT8)}, (*WIDE, 8), (16, 8),
                                   [("gemm_wgmma_fetch.cuh", "p.own_rank_blocks + part.first_block", "p.own_rank_blocks")]),
    "both GEMMs": ({Kind(gemm_wgmma.SOURCE, INT8), Kind(gemm_mma.SOURCE, INT8)}, (*WIDE, 8), None,
                   [("gemm_wgmma_multiply.cuh", "offset_j = 0x80808080u", "offset_j = 0x80808081u"),
                    ("gemm_mma_multiply.cuh", "ALL_128 = 0x80808080", "ALL_128 = 0x80808180")]),
    "swapped nibbles, mma": ({Kind(gemm_mma.SOURCE, INT4_BYTES)}, (*WIDE, 4), None,
                             [("gemm_mma_multiply.cuh", "v.x << 4 & 0xf0f0f0f0", "v.x & 0xf0f0f0f0")]),
    "a race, mma": ({Kind(gemm_mma.SOURCE, INT4_BYTES)}, (*WIDE, 4), None,
                    [("gemm_mma_fetch.cuh", "cp_async_wait<STAGES - 2>();\n    __syncthreads();", "")]),
    "the shift, registers": ({REGISTERS}, (*WIDE, 8), None,
                             [("quantize_registers.cu", "part ? SHIFT : 0", "part ? 0.9f * SHIFT : 0")]),
    "the shift, quantize": ({Kind(quantize_activation.SOURCE, INT4_BYTES)}, (*WIDE, 4), None,
                            [("quantize.cu", "SHIFT : 0", "0.9f * SHIFT : 0")]),
    "a barrier less, quantize": ({Kind(quantize_activation.SOURCE, INT4_BYTES)}, (*WIDE, 4), None,
                                 [("quantize.cu", "__syncthreads();", "")]),
    "a zero, W4A16": ({Kind(awq.SOURCE)}, (3, 208, 640, 0, W4A16), None, [("awq.cu", "0xc308c308u", "0xc307c308u")]),
}


def run_layer(m, n, k, rank, act_bits, lora):
    """(y, the reference's y in float64) of a layer whose input's second half comes out of a GELU."""
    x = random_input(m, k, BFLOAT, seed=n).cuda()
    if act_bits == W4A16:
        g = torch.Generator("cuda").manual_seed(0)
        weight = torch.randint(-128, 128, (n, k // 2), generator=g, device="cuda", dtype=torch.int8)
        scale, zeros = (torch.randn(k // 64, n, generator=g, device="cuda").to(BFLOAT) for _ in range(2))
        operands = weight, scale, zeros, None
        return ops.awq_linear(x, *operands), reference.awq_linear(x.double(), *operands, torch.float64)
    x[:, k // 2:] = torch.nn.functional.gelu(x[:, k // 2:], approximate="tanh")
    operands = integer_layer(n, k, rank, k // 2, act_bits=act_bits)
    if lora:
        operands = on_cuda(with_lora(operands._replace(**{name: t.cpu() for name, t in operands._asdict().items()
                                                          if isinstance(t, torch.Tensor)}), lora, 768))
    return ops.svdquant_linear(x, operands), reference.svdquant_linear(x.double(), operands, torch.float64)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught_and_replaced(fault, tmp_path, caplog):
    """The layer's result is right, one warning a kernel names it, and a later process knows it without a test. Without the self-test the
    result is wrong."""
    kinds, layer, lora, changes = FAULTS[fault]
    if not targets.for_device(DEVICE).wgmma and (Kind(gemm_wgmma.SOURCE, INT8) in kinds or INT4_BYTES in {kind.storage for kind in kinds}):
        pytest.skip("a kernel that this GPU doesn't use")
    with new_process(tmp_path, *changes), caplog.at_level(logging.WARNING):
        y, exact = run_layer(*layer, lora)
        assert relative_error(y, exact) < BF16
        assert self_test.failed(DEVICE) == kinds
        warnings = [record.message for record in caplog.records if "self-test" in record.message]
        assert len(warnings) == len(kinds) and all(any(kind.source in line for line in warnings) for kind in kinds)
        assert all(kernel_records.machine(DEVICE)[0] in line for line in warnings)
    with new_process(tmp_path, *changes), pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test_problems, "_same_results", lambda launch: pytest.fail("tested again"))
        again, _ = run_layer(*layer, lora)
        assert torch.equal(again, y) and self_test.failed(DEVICE) == kinds
    with new_process(tmp_path, *changes), pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "passes", lambda *args: True)
        wrong, _ = run_layer(*layer, lora)
        error = relative_error(wrong, exact)
        print(f"\n{fault}: relative error {error:.3g} without the self-test")
        assert not error < BF16 or "race" in fault or "barrier" in fault, "the fault changes nothing here"


@pytest.mark.parametrize("change", [("next.cuh", "is_unsigned ? SHIFT : 0", "is_unsigned ? 0.9f * SHIFT : 0"),
                                    ("partial_sums.cu", "tile < tiles; tile++", "tile < tiles - 1; tile++")], ids=["codes", "sums"])
def test_a_broken_mlp_runs_as_two_layers(change, tmp_path):
    case = random_case(77, 320, 768, 96, 16, 64, 0)
    expected = ops.svdquant_linear(ops.svdquant_linear(case.x, case.first), case.second)
    with new_process(tmp_path, change):
        assert torch.equal(mlp.svdquant_mlp(*case.args()), expected)
        assert self_test.failed(DEVICE) == {Kind(gemm_mma.SOURCE, ops.chosen(Layer(77, 96, 768, 64, 0, 4, BFLOAT), DEVICE).storage, True)}


@pytest.mark.parametrize(("kernel", "change"), [
    (gptq, ("gptq.cu", "fmaxf(nearest, -8.0f)", "fmaxf(nearest, -7.0f)")),
    (gptq, ("gptq.cu", "__shfl_sync(0xffffffffu, error[s], owner)", "__shfl_sync(0xffffffffu, error[s], owner ^ 1)")),
    (group_error, ("group_error.cu", "-8.0f), 7.0f)", "-7.0f), 7.0f)"))])
def test_a_broken_kernel_of_the_quantizer(kernel, change, tmp_path):
    weight = torch.empty(1, device=DEVICE)
    with new_process(tmp_path):
        assert kernel.available(weight)
    with new_process(tmp_path, change):
        assert not kernel.available(weight) and not kernel.available(weight)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_the_time_of_a_first_load(act_bits, tmp_path):
    """All kernels of FLUX.1-dev at 1024 x 1024: the tests take 0.3 s at most beside compilation; later processes read files."""
    layers = [Layer(m, n, k, 32, unsigned, act_bits, BFLOAT, gelu) for m, n, k, unsigned, gelu in FLUX]
    layers += [Layer(1, n, 3072, 0, 3072, W4A16, BFLOAT) for n in (9216, 18432)]

    def chosen(**patches):
        with new_process(tmp_path), pytest.MonkeyPatch.context() as patch:
            for name, value in patches.items():
                patch.setattr(self_test, name, value)
            begin = time.perf_counter()
            for layer in layers:
                ops.prepare(*layer[:8], device=DEVICE)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

    compiled = chosen(passes=lambda *args: True)  # compiles
    warm = min(chosen(passes=lambda *args: True) for _ in range(3))
    first = chosen()
    later = min(chosen() for _ in range(3))
    print(f"\nW4A{act_bits}: {compiled:.2f} s compiled, {1e3 * warm:.0f} ms without the self-test, {1e3 * first:.0f} ms with it, "
          f"{1e3 * later:.0f} ms with its records")
    assert first - warm < 0.3 and later - warm < 0.05


def test_a_capture_has_no_test(tmp_path):
    """Work beside the capture would be an error. The kernels run without a verdict."""
    layer, x = integer_layer(192, 256, 32, act_bits=8), random_input(70, 256, BFLOAT).cuda()
    expected = ops.svdquant_linear(x, layer)
    ops.choose_again()
    graph = torch.cuda.CUDAGraph()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "_verdicts", {})
        patch.setattr(kernel_records, "read", lambda path: None)
        patch.setattr(self_test_problems, "_same_results", lambda launch: pytest.fail("tested"))
        with torch.cuda.graph(graph):
            y = ops.svdquant_linear(x, layer)
    graph.replay()
    assert torch.equal(y, expected) and self_test.skipped.is_set()
    self_test.skipped.clear()
    ops.choose_again()


def test_a_lora_of_any_ranks(tmp_path):
    """A layer's LoRA uses the kernels that the self-test's LoRA tests."""
    with new_process(tmp_path):
        for lora in (LoRASizes((16,)), LoRASizes((64, 8), 768)):
            assert ops.chosen(Layer(4096, 3072, 3072, 32, 3072, 8, BFLOAT, None, lora), DEVICE) is not None
        assert self_test.failed(DEVICE) == frozenset()
