"""Layers that read the same tensor: one smoothing factor, with which each of them is quantized."""

import pytest
import torch
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import calibration, pipeline, presets

K, SIZES = 128, {"q": 96, "k": 64, "v": 64}


def inputs(seed=0):
    """Tokens with a few outlier channels."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(512, K, generator=g) * torch.where(torch.rand(K, generator=g) < 0.05, 12.0, 1.0)


def stats_of(x):
    stats = calibration.InputStats(1, with_gram=True)
    stats.add(x)
    return stats


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(n, K, generator=g) / K**0.5 for name, n in SIZES.items()}


SPECS = {name: layout.svdquant_spec(K, n, 16, K, False, torch.bfloat16) for name, n in SIZES.items()}


@pytest.mark.parametrize("preset", ["fast", "slow", "data-free", "naive"])
def test_each_layer_is_quantized_with_the_shared_factor(weights, preset):
    recipe, stats = presets.make_recipe(preset, 16), stats_of(inputs())
    smoothing = pipeline.shared_smoothing(weights, stats, SPECS, recipe)
    assert smoothing[0].shape == (K,) and smoothing[1].endswith(", shared")
    for name, weight in weights.items():
        tensors, record = pipeline.quantize_layer(name, weight, None, stats, SPECS[name], recipe, smoothing=smoothing)
        assert torch.equal(tensors["weight_smooth_factor"], smoothing[0].to(torch.bfloat16)) and record.smoothing == smoothing[1]


def test_it_is_nearly_as_good_as_a_factor_for_each_layer(weights):
    recipe, stats = presets.make_recipe("best", 16), stats_of(inputs())
    smoothing = pipeline.shared_smoothing(weights, stats, SPECS, recipe)
    for name, weight in weights.items():
        shared, own, none = (pipeline.quantize_layer(name, weight, None, stats, SPECS[name], recipe, smoothing=given)[1].error
                             for given in (smoothing, None, (torch.ones(K), "1")))
        assert shared < 1.1 * own and shared < none, f"{name}: shared {shared:.3f}, own {own:.3f}, none {none:.3f}"


def test_the_size_of_a_layers_weights_does_not_matter(weights):
    """q and k are normalized after the layer, so their size says nothing about their importance."""
    recipe, stats = presets.make_recipe("fast", 16), stats_of(inputs())
    expected = pipeline.shared_smoothing(weights, stats, SPECS, recipe)
    found = pipeline.shared_smoothing(weights | {"q": weights["q"] * 1024}, stats, SPECS, recipe)
    assert torch.allclose(found[0], expected[0], rtol=1e-3) and found[1] == expected[1]


def test_a_layer_of_zeros_is_no_obstacle(weights):
    factor, _ = pipeline.shared_smoothing(weights | {"v": torch.zeros(64, K)}, stats_of(inputs()), SPECS, presets.make_recipe("fast", 16))
    assert torch.isfinite(factor).all() and (factor > 0).all()


def test_a_damaged_layer_is_named(weights):
    weights["k"][3, 5] = float("nan")
    with pytest.raises(ValueError, match="^Layer k has NaN or Inf in its weight: "):
        pipeline.shared_smoothing(weights, stats_of(inputs()), SPECS, presets.make_recipe("best", 16))
