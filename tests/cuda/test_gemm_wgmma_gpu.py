"""Hopper's int8 GEMM against float64. Its int32 sums are exact, so that only float32 rounding and the output's rounding remain."""

import pytest
import torch
from comfyui_svdquant.cuda import compiler, gemm_wgmma, int4, row_scales, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage, read_codes
from comfyui_svdquant.cuda.int4 import GELU_SHIFT

from .gemm_cases import activated, all_numbers, int8_case, output_rounding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                                                  reason="wgmma is Hopper's alone")]

SHAPES = [  # M, N, K, R, unsigned_from
    (1, 16, 64, 0, None), (192, 192, 128, 32, None), (37, 80, 192, 16, None), (200, 400, 320, 48, 0), (513, 1040, 1024, 128, None),
    (130, 384, 640, 32, 128), (300, 208, 1536, 32, 1024), (1000, 3072, 3072, 32, None), (257, 768, 192, 112, None), (7, 576, 4096, 64, 0),
    (70, 416, 320, 48, None), (3000, 6144, 256, 48, 128)]  # for the last shape, a CTA has several tiles of any size


def gemm(case, operands=None, tile=None, out=None):
    """The kernel on a case, with the fastest tile or another one."""
    operands = operands or case.operands
    n, k = operands.weight.shape[0], 2 * operands.weight.shape[1]
    tile = tile or gemm_wgmma.fastest_tile(case.m, n, k, targets.multiprocessors(operands.weight.device), operands.unsigned_from)
    return gemm_wgmma.gemm(tile, case.q, operands, case.m, out)


def check(case, y):
    off = (y.double() - case.exact).abs()
    worst = (off / case.bound).max()
    relative = (off.norm() / case.exact.norm()).item()
    assert torch.isfinite(y).all(), f"{(~torch.isfinite(y)).sum()} outputs are not finite"
    assert worst <= 1, (f"relative error {relative:.2e}; {(off > case.bound).sum()} of {y.numel()} outputs beyond their bound, the worst "
                        f"{worst:.3g} times, rows {sorted(set((off > case.bound).nonzero()[:, 0].tolist()))[:8]}, "
                        f"columns {sorted(set((off > case.bound).nonzero()[:, 1].tolist()))[:8]}")


@pytest.mark.parametrize("tile", gemm_wgmma.STAGES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from"), SHAPES)
def test_is_float64s_product(m, n, k, rank, unsigned_from, tile):
    case = int8_case(m, n, k, rank, unsigned_from, bias=n != 80, dtype=torch.float16 if n in (400, 6144) else torch.bfloat16, seed=m)
    y = torch.full((m, n), torch.nan, dtype=case.operands.weight_scale.dtype, device="cuda")
    check(case, gemm(case, tile=tile, out=y))
    second_run = torch.full_like(y, torch.nan)
    assert torch.equal(y, gemm(case, tile=tile, out=second_run)), "two runs differ"


@pytest.mark.parametrize("tile", gemm_wgmma.STAGES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from", "gelu_from"), [
    (1, 64, 64, 0, None, 0), (37, 80, 192, 16, None, 64), (200, 400, 320, 48, 0, 0), (513, 1040, 1024, 128, None, 320),
    (300, 208, 1536, 32, 1024, 192), (130, 384, 640, 32, 128, 384), (3000, 6144, 256, 48, None, 3072)])
def test_gelu_from_a_column_on(m, n, k, rank, unsigned_from, gelu_from, tile):
    case = int8_case(m, n, k, rank, unsigned_from, bias=n != 80, dtype=torch.float16 if n == 400 else torch.bfloat16, seed=m, scale=0.25)
    plain = gemm(case, tile=tile)
    assert (case.exact.abs() < 3).float().mean() > 0.4
    case.exact, case.bound = activated(case.exact, case.bound, gelu_from, plain.dtype)
    y = gemm(case, case.gelu_from(gelu_from), tile, torch.full_like(plain, torch.nan))
    check(case, y)
    assert torch.equal(y[:, :gelu_from], plain[:, :gelu_from])
    second_run = torch.full_like(y, torch.nan)
    assert torch.equal(y, gemm(case, case.gelu_from(gelu_from), tile, second_run)), "two runs differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_of_every_number(dtype):
    """Each number is a bias, added to a product of zeros."""
    case = int8_case(1, 65536, 64, 0, dtype=dtype, scale=0.0)
    case.operands = case.operands._replace(bias=all_numbers(dtype), gelu_from=0)
    x = case.operands.bias.double()[None]
    y, bound = activated(x, 2.0**-24 + output_rounding(dtype) * x.abs(), 0, dtype)
    got = gemm(case)
    finite = x.isfinite()
    assert ((got.double() - y).abs() <= bound)[finite].all() and got[finite].min() > -GELU_SHIFT
    assert got[x.isnan()].isnan().all() and (got[x == torch.inf] == torch.inf).all()


@pytest.mark.parametrize("gelu_from", [None, 128])
def test_nan_stays_in_its_row(gelu_from):
    case = int8_case(100, 256, 256, 32)
    case.q.act_scale[0, 17] = torch.nan
    y = gemm(case, case.gelu_from(gelu_from))
    rows = torch.isnan(y).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [17]
    assert torch.isnan(y[17]).all()


def test_free_scales_are_rounded_to_integers():
    case = int8_case(64, 192, 512, 0, bias=False)
    free = torch.rand_like(case.operands.weight_scale, dtype=torch.float32).add_(0.5).mul_(2**-8).bfloat16()
    case.operands = case.operands._replace(weight_scale=free, row_scale=row_scales.row_scale(free))
    y = gemm(case)
    rounded = row_scales.rounded(free, case.operands.row_scale)
    x = read_codes(case.q.act, CodeStorage.INT8, (64, 512)).double() * case.q.act_scale[0, :64, None].double()
    w = int4.unpack_signed(case.operands.weight).double() * rounded.double().t().repeat_interleave(64, dim=1)
    error = ((y.double() - x @ w.t()).norm() / y.double().norm()).item()
    assert error < 2.5e-3, f"relative error {error:.2e} to the product with rounded scales"


def test_variants_compile():
    assert all(compiler.compile_cubin(source, defines, "sm_90a") for source, _, defines in gemm_wgmma.variants())
