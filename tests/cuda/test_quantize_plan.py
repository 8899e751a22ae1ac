"""How quantize.py cuts up x, without a GPU: every shape has a plan that fits, and FLUX's have those that were measured to be fast."""

from types import SimpleNamespace

import pytest
import torch
from comfyui_svdquant.cuda import images, quantize
from comfyui_svdquant.cuda.quantize import BYTES, INT8, NIBBLES

SMS = {75: 68, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
MOST_SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of a CTA


@pytest.mark.parametrize(("arch", "sms"), [*SMS.items(), (90, 16), (90, 6), (120, 8)])  # the last: slices of one
def test_every_shape_has_a_plan_that_fits(arch, sms):
    for m in (1, 16, 77, 512, 4096, 4608, 65536):
        for k in (64, 128, 192, 1088, 3072, 12224, 12288, 15360, 15424, 30720):
            for rank in (0, 16, 32, 48, 64, 128, 160):
                for codes in (INT8, NIBBLES if arch < 90 else BYTES):
                    plan = quantize.plan_for(m, k, rank, codes, arch, sms)
                    assert plan.shared <= MOST_SHARED[arch] << 10 and plan.threads <= 1024
                    assert plan.ranks in (0, rank) and plan.grid == -(-m // (16 * plan.tiles)) * plan.ctas
                    assert plan.ctas == 1 or arch >= 90
                    if plan.warps:
                        assert plan.warps * plan.ctas * images.BLOCK >= k and codes == INT8


@pytest.mark.parametrize(("m", "k", "rank", "loop", "tiles", "ctas"), [
    (4096, 3072, 32, True, 1, 8), (4608, 3072, 32, True, 1, 8), (4608, 3072, 64, True, 1, 6), (4096, 12288, 32, True, 1, 8),
    (4608, 15360, 64, True, 1, 16), (1024, 3072, 32, False, 1, 2), (512, 3072, 32, False, 1, 6), (512, 12288, 32, False, 2, 6),
    (256, 3072, 32, False, 1, 6), (128, 12288, 32, False, 1, 8), (64, 3072, 0, False, 1, 6)])
def test_the_fastest_on_hopper(m, k, rank, loop, tiles, ctas):
    plan = quantize.plan_for(m, k, rank, INT8, 90, 132)
    assert plan.warps and plan.ranks == rank and (plan.loop, plan.tiles, plan.ctas) == (loop, tiles, ctas)


def test_what_cublas_multiplies():
    """More than 64 ranks; more than 32 in 4 bits, or where shared memory has no room for proj_down."""
    for m, k, rank, codes, arch in ((4096, 3072, 128, INT8, 90), (4096, 3072, 64, BYTES, 90), (4096, 15360, 64, INT8, 120)):
        assert quantize.plan_for(m, k, rank, codes, arch, SMS[arch]).ranks == 0


def test_what_stays_with_quantize_cu():
    """4 bits, no clusters, a block of columns, more than a cluster has registers for, and those for which ptxas spills."""
    for m, k, rank, codes, arch in ((4096, 3072, 32, BYTES, 90), (4096, 3072, 32, INT8, 89), (16, 64, 0, INT8, 90),
                                    (100, 16448, 0, INT8, 90)):
        assert not quantize.plan_for(m, k, rank, codes, arch, 132).warps
    assert quantize.plan_for(4608, 3072, 32, INT8, 120, 170).loop
    for m in (256, 512, 4096):
        plan = quantize.plan_for(m, 12288, 32, INT8, 100, 148)
        assert not plan.warps or plan.tiles == 1
    with pytest.raises(ValueError, match="no plan"):
        quantize.plan_for(16, 64, 0, INT8, 90, 132, registers=True)


@pytest.mark.parametrize(("fit", "ctas", "grid"), [
    ({16: 7, 8: 15, 6: 18, 2: 66}, 16, 112), ({16: 5, 8: 14, 6: 18, 2: 66}, 8, 112), ({}, 1, None)])
def test_clusters_that_a_gpu_has_no_room_for(fit, ctas, grid, monkeypatch):
    """As on a part of one, or one with smaller groups of multiprocessors: the next plan is taken."""
    kernel = SimpleNamespace(active_clusters=lambda size, threads: fit.get(size, 0), launcher=lambda grid, *args: grid[0])
    monkeypatch.setattr(quantize.runtime, "kernel", lambda *args: kernel)
    monkeypatch.setattr(quantize.compiler, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(quantize.compiler, "multiprocessors", lambda device: 132)
    find = quantize.launcher.__wrapped__  # without the cache
    launched, plan = find(4608, 15360, 64, 15360, 15360, INT8, torch.bfloat16, "cuda:0")
    assert (plan.ctas, plan.grid) == (ctas, launched) and grid in (None, launched)
    if not fit:
        with pytest.raises(ValueError, match="no cluster"):
            find(4608, 15360, 64, 15360, 15360, INT8, torch.bfloat16, "cuda:0", registers=True)
