"""The plans of quantize_activation.py, without a GPU: every shape has a plan that fits, and FLUX's shapes have the plans that were the
fastest in measurements."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_svdquant.cuda import quantize_activation
from comfyui_svdquant.cuda.activation_layout import BLOCK, CodeStorage
from comfyui_svdquant.cuda.targets import TARGETS

INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
# {compute capability: the number of SMs of one such GPU}
SMS = dict.fromkeys(TARGETS, 132) | {75: 68, 80: 108, 86: 82, 87: 16, 89: 128, 100: 148, 103: 148, 110: 20, 120: 170, 121: 48}


def fastest(m, k, rank, storage, number, sms, **cut):
    return quantize_activation.plans_for(m, k, rank, storage, TARGETS[number], sms, **cut)[0]


@pytest.mark.parametrize(("number", "sms"), [*SMS.items(), (90, 16), (90, 6), (120, 8)])  # the last ones are slices of a GPU
def test_every_shape_has_a_plan_that_fits(number, sms):
    target = TARGETS[number]
    for m in (1, 16, 77, 512, 4096, 4608, 65536):
        for k in (64, 128, 192, 1088, 3072, 12224, 12288, 15360, 15424, 30720):
            for rank in (0, 16, 32, 48, 64, 128, 160):
                for storage in (INT8, INT4_NIBBLES if target.native_int4 else INT4_BYTES):
                    plan = fastest(m, k, rank, storage, number, sms)
                    assert plan.shared <= target.shared_per_cta and plan.threads <= 1024
                    assert plan.ranks in (0, rank) and plan.grid == -(-m // (16 * plan.tiles)) * plan.ctas
                    assert plan.ctas <= target.max_cluster
                    if plan.warps:
                        assert plan.warps * plan.ctas * BLOCK >= k and storage == INT8


@pytest.mark.parametrize(("m", "k", "rank", "loop", "tiles", "ctas"), [
    (4096, 3072, 32, True, 1, 8), (4608, 3072, 32, True, 1, 8), (4608, 3072, 64, True, 1, 6), (4096, 12288, 32, True, 1, 8),
    (4608, 15360, 64, True, 1, 16), (1024, 3072, 32, False, 1, 2), (512, 3072, 32, False, 1, 6), (512, 12288, 32, False, 2, 6),
    (256, 3072, 32, False, 1, 6), (128, 12288, 32, False, 1, 8), (64, 3072, 0, False, 1, 6)])
def test_the_fastest_on_hopper(m, k, rank, loop, tiles, ctas):
    plan = fastest(m, k, rank, INT8, 90, 132)
    assert plan.warps and plan.ranks == rank and (plan.loop, plan.tiles, plan.ctas) == (loop, tiles, ctas)


def test_branches_that_cublas_multiplies():
    """cuBLAS multiplies branches of more than 64 ranks, or of more than 32 in 4 bits or if proj_down doesn't fit in shared memory."""
    for m, k, rank, storage, number in ((4096, 3072, 128, INT8, 90), (4096, 3072, 64, INT4_BYTES, 90), (4096, 15360, 64, INT8, 120)):
        assert fastest(m, k, rank, storage, number, SMS[number]).ranks == 0


def test_plans_of_quantize_cu():
    """quantize.cu runs for 4 bits, without clusters, for a single block of columns, for more columns than a cluster's registers hold, and
    for forms in which ptxas spills."""
    for m, k, rank, storage, number in ((4096, 3072, 32, INT4_BYTES, 90), (4096, 3072, 32, INT8, 89), (16, 64, 0, INT8, 90),
                                        (100, 16448, 0, INT8, 90)):
        assert not fastest(m, k, rank, storage, number, 132).warps
    assert fastest(4608, 3072, 32, INT8, 120, 170).loop
    for m in (256, 512, 4096):
        plan = fastest(m, 12288, 32, INT8, 100, 148)
        assert not plan.warps or plan.tiles == 1
    with pytest.raises(ValueError, match="no plan"):
        fastest(16, 64, 0, INT8, 90, 132, registers=True)


@pytest.mark.parametrize(("fit", "ctas", "grid"), [
    ({16: 7, 8: 15, 6: 18, 2: 66}, 16, 112), ({16: 5, 8: 14, 6: 18, 2: 66}, 8, 112), ({}, 1, None)])
def test_clusters_that_a_gpu_has_no_room_for(fit, ctas, grid, monkeypatch):
    """On a slice of a GPU, or a GPU with smaller GPCs, the next plan is used."""
    kernel = SimpleNamespace(active_clusters=lambda size, threads: fit.get(size, 0), launcher=lambda grid, *args: grid[0])
    monkeypatch.setattr(quantize_activation.kernel_loader, "kernel", lambda *args: kernel)

    def find(**cut):
        plans = quantize_activation.plans_for(4608, 15360, 64, INT8, TARGETS[90], 132, **cut)
        return quantize_activation.launcher.__wrapped__(4608, 15360, 64, 15360, 15360, INT8, plans, torch.bfloat16, "cuda:0")  # uncached

    launched, plan = find()
    assert (plan.ctas, plan.grid) == (ctas, launched) and grid in (None, launched)
    if not fit:
        with pytest.raises(ValueError, match="no cluster"):
            find(registers=True)


def test_faster_memory_leaves_wide_branches_to_cublas():
    """x @ proj_down by cuBLAS reads x a second time, and the kernel's second pass over 64 ranks doesn't."""
    layer, h100 = (4608, 15360, 64, INT8), TARGETS[90]
    h200 = replace(h100, bandwidth=4917.0)
    assert [quantize_activation.plans_for(*layer, target, 132)[0].ranks for target in (h100, h200)] == [64, 0]
    assert quantize_activation.plans_for(4096, 12288, 32, INT8, h200, 132)[0].ranks == 32
