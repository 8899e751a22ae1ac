"""Branches in 8 bits: never worse than rounding to nearest, and within a stated bound of the branch in 16 bits."""

from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import branch_codes, gptq, pipeline, presets
from comfyui_svdquant.quant.quantizer.calibration import InputStats

K, N = 256, 160


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branch(rank, seed=0):
    """(up, down, smooth): ranks with singular values over three decades, and rows of very different size, as outlier channels make them."""
    sizes = torch.logspace(0, -1.5, rank)
    smooth = torch.exp2(random(K, seed=seed + 2) * 2)
    up, down = (torch.linalg.qr(random(rows, rank, seed=seed + i))[0] * sizes for i, rows in enumerate((N, K)))
    return up, down / smooth.unsqueeze(-1), smooth


def inputs(seed=5):
    """(M, K) correlated tokens with a mean."""
    return random(2048, K, seed=seed) @ (random(K, K, seed=seed + 1) * torch.logspace(0, -1, K)) / K**0.5 + 0.3


def factor_of(x):
    return gptq.damped_cholesky(x.t() @ x / len(x), 0.01)


def product(tensors, smooth):
    """(N, K), in the metric of x / smooth"""
    down, up = (factor.double() for factor in layout.branch_of(tensors, torch.float32))
    return up @ (down * smooth.double().unsqueeze(-1)).t()


def error(wrong, exact, x):
    """Relative error of the outputs."""
    return float(((wrong - exact) @ x.double().t()).norm() / (exact @ x.double().t()).norm())


def nearest(up, down):
    """Each rank with a scale of its own, rounded to nearest."""
    steps = [matrix.abs().amax(dim=0) / 127 for matrix in (up, down)]
    return [(matrix / step).round() * step for matrix, step in zip((up, down), steps)]


@pytest.mark.parametrize("rank", [16, 32, 48, 80, 240])
def test_the_mixing_is_orthogonal_and_even(rank):
    q = branch_codes.mixing(rank)
    assert torch.allclose(q @ q.t(), torch.eye(rank), atol=1e-5) and q.abs().max() < 1.5 / rank**0.5


@pytest.mark.parametrize("rank", [16, 48, 64])
@pytest.mark.parametrize("known", [True, False])
def test_the_branch_is_much_closer_than_ranks_rounded_to_nearest(rank, known):
    up, down, smooth = branch(rank)
    x = inputs() if known else torch.eye(K)
    exact = up.double() @ (down.double() * smooth.double().unsqueeze(-1)).t()
    tensors = branch_codes.coded(up, down, smooth, factor_of(x) if known else None)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "weight_proj_down": ((K, rank), torch.int8), "weight_proj_up": ((N, rank), torch.int8),
        "weight_proj_scale": ((K + N,), torch.bfloat16)}
    plain_up, plain_down = (matrix.double() for matrix in nearest(up, down))
    plain = error(plain_up @ (plain_down * smooth.double().unsqueeze(-1)).t(), exact, x)
    coded = error(product(tensors, smooth), exact, x)
    assert coded < plain / 2 and coded < 0.005, (coded, plain)


def test_each_step_helps(monkeypatch):
    """Mixing the ranks, and rounding them one after the other."""
    up, down, smooth = branch(64)
    x, exact = inputs(), up.double() @ (down.double() * smooth.double().unsqueeze(-1)).t()

    def found():
        return error(product(branch_codes.coded(up, down, smooth, factor_of(x)), smooth), exact, x)

    whole, rounded = found(), branch_codes._rounded
    with monkeypatch.context() as patch:
        patch.setattr(branch_codes, "_rounded", lambda target, gram: rounded(target, torch.eye(len(gram))))
        assert whole < 0.7 * found()
    with monkeypatch.context() as patch:
        patch.setattr(branch_codes, "mixing", torch.eye)
        assert whole < 0.9 * found()


def test_zeros_and_missing_ranks():
    """A weight of fewer singular vectors than ranks, rows of zeros, and a branch of zeros."""
    up, down, smooth = branch(32)
    up[:, 5:], down[:, 5:], up[3], down[7] = 0, 0, 0, 0
    tensors = branch_codes.coded(up, down, smooth)
    exact = up.double() @ (down.double() * smooth.double().unsqueeze(-1)).t()
    assert error(product(tensors, smooth), exact, torch.eye(K)) < 0.005
    assert not tensors["weight_proj_up"][3].any() and tensors["weight_proj_scale"][K + 3] == 1
    tensors = branch_codes.coded(torch.zeros_like(up), torch.zeros_like(down), smooth)
    assert not tensors["weight_proj_up"].any() and not tensors["weight_proj_down"].any() and (tensors["weight_proj_scale"] == 1).all()


@pytest.mark.parametrize(("preset", "most"), [("best", 1.01), ("fast", 1.01), ("data-free", 1.03)])
def test_a_layer_loses_little(preset, most):
    """A hundredth of its error with activations of 4 bits, and three without their rounding errors, of the weight alone. With half the
    ranks in as many bytes it would lose a fifth."""
    weight = random(N, 64, seed=1) @ random(64, K, seed=2) / 24 + random(N, K, seed=3) / 2
    spec, x = layout.svdquant_spec(K, N, 64, K, False, torch.bfloat16), inputs()
    errors = {}
    for rank, bits in ((64, 16), (64, 8), (32, 16)):
        stats = None
        if preset != "data-free":
            stats = InputStats(1, with_gram=True)
            stats.add(x)
        recipe = replace(presets.make_recipe(preset, rank), branch_bits=bits)
        tensors, record = pipeline.quantize_layer("layer", weight, None, stats, replace(spec, rank=rank, branch_bits=bits), recipe)
        errors[rank, bits] = record.error
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == replace(spec, rank=rank, branch_bits=bits).tensors()
    assert errors[64, 8] < most * errors[64, 16] and errors[64, 8] < 0.85 * errors[32, 16], errors


def test_what_overflows_fp16_is_refused():
    weight = random(N, K) * 1e7
    spec = replace(layout.svdquant_spec(K, N, 16, K, False, torch.float16), branch_bits=8)
    with pytest.raises(ValueError, match="does not fit torch.float16|can't be quantized"):
        pipeline.quantize_layer("layer", weight, None, None, spec, presets.make_recipe("data-free", 16))
