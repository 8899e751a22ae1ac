"""A layer's output, times a gate, added to a residual: the GEMMs and the op have the bits of separate passes."""

import pytest
import torch
from comfyui_svdquant.cuda import block_ops, gated_linear, gemm_mma, gemm_wgmma, ops, quantize_activation, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage
from comfyui_svdquant.quant.layers.lora_branch import LoRABranch, LowRank

from .gemm_cases import int8_case
from .layers import check_in_graphs, on_cuda, plans_here, random_input, with_lora
from .test_ops_gpu import integer_layer, module_of

BFLOAT, HALF = torch.bfloat16, torch.float16
pytestmark = pytest.mark.gpu
HOPPER = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                            reason="wgmma is Hopper's alone")
SHAPES = [  # M, N, K, R, unsigned_from
    (1, 16, 64, 0, None), (37, 80, 192, 16, None), (200, 400, 320, 48, 0), (513, 1040, 1024, 128, None), (130, 384, 640, 32, 128),
    (300, 208, 1536, 32, 1024), (1000, 3072, 3072, 32, None), (3000, 6144, 256, 48, 128)]  # the last: several tiles a CTA


def added(m, n, dtype, batch=1, seed=0):
    """(a residual, a gate that is a part of a longer vector)"""
    g = torch.Generator("cuda").manual_seed(seed)
    residual, gates = (torch.randn(*shape, generator=g, device="cuda").to(dtype) for shape in ((batch, m, n), (batch, 1, 3 * n)))
    return residual.mul_(4), gates.chunk(3, dim=-1)[1]


@HOPPER
@pytest.mark.parametrize("tile", gemm_wgmma.STAGES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from"), SHAPES)
def test_the_gemm_has_the_bits_of_two_passes(m, n, k, rank, unsigned_from, tile):
    dtype = HALF if n in (400, 6144) else BFLOAT
    case, (residual, gate) = int8_case(m, n, k, rank, unsigned_from, n != 80, dtype, seed=m), added(m, n, dtype, seed=m)
    expected = block_ops.gated_residual(residual, gemm_wgmma.gemm(tile, case.q, case.operands, m)[None], gate)[0]
    for _ in range(3):
        z = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
        assert torch.equal(gemm_wgmma.gemm(tile, case.q, case.operands, m, z, residual, gate), expected)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("storage", filter(gemm_mma.gates, CodeStorage))
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from"), SHAPES[:5])
def test_every_gpus_gemm_has_the_bits_of_two_passes(m, n, k, rank, unsigned_from, storage):
    """Every tile of mma.sync that this GPU can run, for every storage of codes."""
    dtype, target = HALF if n == 400 else BFLOAT, targets.for_device("cuda")
    layer = integer_layer(n, k, rank, unsigned_from, n != 80, dtype, m, 8 if storage == CodeStorage.INT8 else 4)
    x, (residual, gate) = random_input(m, k, dtype, seed=n).cuda(), added(m, n, dtype, seed=m)
    q = quantize_activation.quantize(x, layer.smooth, layer.proj_down, layer.unsigned_from, storage, plans_here(m, k, rank, storage))
    for tile in gemm_mma.tiles_of(target):
        expected = block_ops.gated_residual(residual, gemm_mma.gemm(storage, tile, q, layer, m)[None], gate)[0]
        for _ in range(3):
            z = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
            gemm_mma.launch(z, storage, tile, q, layer, None, residual, gate)
            assert torch.equal(z, expected) and torch.isfinite(z).all(), tile


@HOPPER
def test_fp16_stays_in_range():
    """As modulate.cu: what is too large becomes the largest number, and NaN becomes 0."""
    case, m, n = int8_case(64, 64, 64, 0, dtype=HALF, scale=0.0), 64, 64
    case.operands.bias.fill_(60000.0)
    case.q.act_scale[0, 3] = torch.nan
    residual = torch.full((1, m, n), 60000.0, device="cuda").half()
    z = gemm_wgmma.gemm((192, 64, 1), case.q, case.operands, m, None, residual, torch.ones(1, 1, n, device="cuda").half())
    assert (z[3] == 0).all() and (z[:3] == 65504).all() and (z[4:] == 65504).all()


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("lora", [None, ((24,),), ((40, 0, 8), 768), ((264,),)], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from", "dtype"), [
    (37, 1600, 192, 16, None, BFLOAT), (200, 1600, 384, 48, 0, HALF), (130, 1600, 640, 32, 128, BFLOAT), (64, 1600, 320, 24, 192, BFLOAT)])
def test_the_op_has_the_bits_of_two(m, n, k, rank, unsigned_from, dtype, lora, act_bits):
    """Also where no kernel has both: other ranks, several gates; and for an x and a residual within wider rows."""
    layer = integer_layer(n, k, rank, unsigned_from, True, dtype, m, act_bits)
    layer = on_cuda(with_lora(layer, *lora)) if lora else layer
    wide = random_input(2 * m, k + 64, dtype, seed=n).cuda().view(2, m, k + 64)
    for batch in (1, 2):
        residual, gate = added(m, n, dtype, batch)
        x = wide[:batch, :, :k]
        for states in (residual, torch.cat((residual, residual), dim=-1)[..., :n]):
            expected = block_ops.gated_residual(states, ops.svdquant_linear(x, layer), gate)
            assert torch.equal(gated_linear.gated_linear(x, layer, states, gate), expected)
            assert torch.equal(gated_linear._gated_op(x, states, gate, *layer.flat()), expected)


def test_a_layer_of_8_bits_runs_no_pass_of_its_own(monkeypatch):
    """The op, the first call of a module, and its cached launch."""
    layer, (residual, gate) = integer_layer(384, 256, 32, act_bits=8), added(70, 384, BFLOAT)
    x, module = random_input(70, 256, BFLOAT).cuda()[None], module_of(384, 256, 32, 8)
    expected = block_ops.gated_residual(residual, module(x), gate)
    monkeypatch.setattr(block_ops, "_modulated", lambda *args: pytest.fail("a pass of its own"))
    assert torch.equal(gated_linear.gated_linear(x, layer, residual, gate), expected)
    for _ in range(3):
        assert torch.equal(module.add_gated(x, residual, gate), expected)
    assert len(module._launches) == 2
    module.set_lora_branch(LoRABranch.of([LowRank((0, 384), (0, 256), torch.randn(384, 4), torch.randn(4, 256), 0.3)], (384, 256), BFLOAT,
                                         "cuda", 32))
    assert not torch.equal(module.add_gated(x, residual, gate), expected)
    monkeypatch.undo()
    expected = block_ops.gated_residual(residual, module(x), gate)
    for _ in range(2):
        assert torch.equal(module.add_gated(x, residual, gate), expected)


class Gated(torch.nn.Module):
    def __init__(self, module, residual, gate):
        super().__init__()
        self.module, self.residual, self.gate = module, residual, gate

    def forward(self, x):
        return self.module.add_gated(x, self.residual, self.gate)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_in_graphs(act_bits):
    residual, gate = added(70, 384, BFLOAT)
    x, module = random_input(70, 256, BFLOAT).cuda()[None], module_of(384, 256, 32, act_bits)
    with torch.inference_mode():
        z = check_in_graphs(Gated(module, residual, gate), x)
        assert torch.equal(z, block_ops.gated_residual(residual, module(x), gate))
