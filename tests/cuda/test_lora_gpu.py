"""Layers with LoRAs on a GPU against the reference in float64: every GEMM, storage of codes and tile, whole layers, and modules.

The LoRA adds about as much to the outputs as the layer's own branch, so that ranks of another part, or ranks left out, are a hundred
times as far off as the bound.
"""

import pytest
import torch
from comfyui_svdquant.cuda import gemm_mma, gemm_wgmma, ops, quantize_activation, reference, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage
from comfyui_svdquant.quant.layers.lora_branch import Dense, LoRABranch, LowRank

from .layers import check_in_graphs, on_cuda, plans_here, random_input, relative_error, with_lora
from .test_ops_gpu import BF16, integer_layer, module_of

pytestmark = pytest.mark.gpu
BFLOAT, HALF = torch.bfloat16, torch.float16
SHAPES = [  # M, N, K, R, unsigned_from, LoRASizes
    (1, 16, 64, 0, None, ((8,),)), (37, 80, 192, 16, None, ((24,),)), (200, 2000, 384, 48, 0, ((16, 40, 8), 768)),
    (513, 3072, 1024, 64, None, ((96, 0, 160, 8), 768)), (130, 2304, 640, 32, 128, ((0, 0, 40), 768)),
    (300, 208, 1536, 144, 1024, ((136,),)), (3000, 3072, 256, 32, None, ((64, 56), 1536)), (100, 1536, 256, 32, None, ((256, 104), 768))]


def adapted(n, k, rank, unsigned_from, lora, dtype, act_bits, seed):
    """A layer on the GPU with a LoRA."""
    return on_cuda(with_lora(integer_layer(n, k, rank, unsigned_from, n != 80, dtype, seed, act_bits), *lora, seed=seed))


def tokens(m, k, unsigned_from, dtype):
    x = random_input(m, k, dtype, seed=k).cuda()
    if unsigned_from is not None:
        x[:, unsigned_from:] = torch.nn.functional.gelu(x[:, unsigned_from:], approximate="tanh")
    return x


def check(y, x, layer, what):
    exact = reference.svdquant_linear(x.double(), layer, torch.float64)
    error = relative_error(y, exact)
    assert error < BF16, f"relative error {error:.2e}, {what}"
    without = reference.svdquant_linear(x.double(), layer._replace(lora_down=None, lora_up=None, lora_strength=None), torch.float64)
    assert relative_error(without, exact) > 20 * BF16, "the LoRA adds too little to be seen"


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from", "lora"), SHAPES)
def test_a_whole_layer(m, n, k, rank, unsigned_from, lora, dtype, act_bits):
    layer, x = adapted(n, k, rank, unsigned_from, lora, dtype, act_bits, seed=m), tokens(m, k, unsigned_from, dtype)
    y = ops.svdquant_linear(x, layer)
    check(y, x, layer, f"M={m} N={n} K={k} R={rank} LoRA {lora} in {dtype}, {act_bits} bits")
    assert torch.equal(y, ops.svdquant_linear(x, layer)), "two runs differ"


def poisoned_quantize(x, layer, storage):
    """quantize_activation.quantize with outputs that were NaN, or codes that were wrong, before."""
    plans = plans_here(*x.shape, layer.proj_down.shape[1], storage, fused=False)
    outputs = quantize_activation.outputs(*x.shape, layer.proj_up.shape[1], storage, x.dtype, layer.lora)
    held = [torch.full(shape, torch.nan if dtype.is_floating_point else 0x5A, dtype=dtype, device="cuda") for shape, dtype in outputs]
    del held  # PyTorch's allocator gives the same memory to the kernel's outputs
    return quantize_activation.quantize(x, layer.smooth, layer.proj_down, layer.unsigned_from, storage, plans, layer.lora_down,
                                        layer.lora_strength, layer.lora)


@pytest.mark.parametrize("tile", gemm_wgmma.STAGES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from", "lora"), SHAPES)
def test_every_tile_of_wgmma(m, n, k, rank, unsigned_from, lora, tile):
    if not targets.for_device("cuda").wgmma:
        pytest.skip("wgmma is Hopper's alone")
    layer, x = adapted(n, k, rank, unsigned_from, lora, BFLOAT, 8, seed=m), tokens(m, k, unsigned_from, BFLOAT)
    q = poisoned_quantize(x, layer, CodeStorage.INT8)
    y = gemm_wgmma.gemm(tile, q, layer, m, torch.full((m, n), torch.nan, dtype=BFLOAT, device="cuda"))
    check(y, x, layer, f"M={m} N={n} K={k} R={rank} LoRA {lora}, tile {tile}")
    gelu_from = n // 2 // 64 * 64
    activated = gemm_wgmma.gemm(tile, q, layer._replace(gelu_from=gelu_from), m)
    assert torch.equal(activated[:, :gelu_from], y[:, :gelu_from])
    assert relative_error(activated, reference.activated(y.clone(), gelu_from)) < BF16


@pytest.mark.parametrize("turing", [None, True])
@pytest.mark.parametrize("storage", CodeStorage)
@pytest.mark.parametrize("tile", [gemm_mma.LARGE, gemm_mma.MEDIUM, gemm_mma.SMALL], ids=["large", "medium", "small"])
def test_every_tile_of_mma(storage, tile, turing):
    if turing and (tile == gemm_mma.LARGE or storage == CodeStorage.INT4_BYTES):
        pytest.skip("Turing has no such kernel")
    dtype = HALF if turing else BFLOAT
    for m, n, k, rank, unsigned_from, lora in SHAPES:
        layer = adapted(n, k, rank, unsigned_from, lora, dtype, 8 if storage == CodeStorage.INT8 else 4, seed=m)
        x, y = tokens(m, k, unsigned_from, dtype), torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
        gemm_mma.launch(y, storage, tile, poisoned_quantize(x, layer, storage), layer, turing)
        check(y, x, layer, f"M={m} N={n} K={k} R={rank} LoRA {lora}, {storage.name}")


def lora_branch(seed, *windows, n=2304, k=256, other=False, **gain):
    """A LoRABranch of ranks 16 for windows of rows. gain: as in LoRABranch."""
    g = torch.Generator().manual_seed(seed)
    terms = [LowRank((start, stop), (0, k), torch.randn(stop - start, 16, generator=g), torch.randn(16, k, generator=g) / 64)
             for start, stop in windows]
    terms += [Dense((0, 64), (0, k), torch.randn(64, k, generator=g) / 64)] * other
    return LoRABranch.of(terms, (n, k), BFLOAT, "cuda", own=32, **gain)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_module_whose_loras_change(act_bits):
    """Each branch gives its own output at every call, also where another branch's memory is used again."""
    module, x = module_of(2304, 256, 32, act_bits), random_input(70, 256, BFLOAT).cuda()
    windows = {1: [(0, 2304)], 2: [(0, 768), (768, 1536), (1536, 2304)], 3: [(100, 300)], 4: [(768, 1536)]}
    plain = module(x)
    for seed in (1, 2, 1, 3, 4, 2):
        for other in (False, True):
            module.set_lora_branch(lora_branch(seed, *windows[seed], other=other))
            expected = module.lora_branch.add(plain.float(), x.float())
            assert module.weight_proj_down.data_ptr() == module.lora_branch.lora_down.data_ptr()
            for _ in range(2):
                error = relative_error(module(x), expected)
                assert error < BF16, f"relative error {error:.2e} with branch {seed}"
            module.lora_branch.cpu()
            assert relative_error(module(x), expected) < BF16, "a branch on the CPU"
            module.cpu()
            assert relative_error(module(x), expected) < BF16, "a layer on the CPU"
            module.cuda()
            assert relative_error(module(x), expected) < BF16, "a layer that came back"
    module.set_lora_branch(None)
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_lora_with_a_gain(act_bits):
    """The layer without its bias by the kernels, which read proj_down itself, times the gain; the LoRA by PyTorch."""
    module, x = module_of(2304, 256, 32, act_bits), random_input(70, 256, BFLOAT).cuda()
    bias, gain = module.bias.float(), torch.linspace(0.5, 2, 2304, device="cuda").bfloat16()
    plain = module(x)
    expected = lora_branch(1, (0, 2304)).add((plain.float() - bias) * gain + bias, x.float())
    module.set_lora_branch(lora_branch(1, (0, 2304), gain=gain, gelu_shift_correction=torch.zeros(2304, device="cuda")))
    assert relative_error(module(x), expected) < 2 * BF16
    module.set_lora_branch(None)
    assert torch.equal(module(x), plain)


def test_a_lora_in_graphs():
    module, x = module_of(2304, 256, 32, 8), random_input(70, 256, BFLOAT).cuda()
    module.gelu_from = 768
    module.set_lora_branch(lora_branch(2, (0, 768), (768, 1536)))
    module(x)
    check_in_graphs(module, x)
