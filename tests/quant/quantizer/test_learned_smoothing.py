"""The smoothing factor learned by gradient: it is never worse than its start, and it handles degenerate inputs."""

import pytest
import torch
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import learned_smoothing, lowrank, pipeline, presets, smoothing
from comfyui_svdquant.quant.quantizer.calibration import InputStats


def layer(n=192, k=256, seed=0, unsigned=False):
    """(weight, inputs): every channel has its own magnitude, which no power of a span fits."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * torch.exp(0.5 * torch.randn(k, generator=g))
    x = torch.randn(700, k, generator=g) * torch.exp(torch.randn(k, generator=g))
    return w, torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x


def learned(w, x, start, unsigned=False, check=lambda: None):
    return learned_smoothing.learn(w, x, start, 16, 0 if unsigned else len(start), torch.bfloat16, check)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_learning_improves_on_no_smoothing(seed, unsigned):
    w, x = layer(seed=seed, unsigned=unsigned)
    found = learned(w, x, torch.ones(256), unsigned)
    assert found.error < 0.97 * found.error_before, f"error {found.error:.4f}, before {found.error_before:.4f}"
    held_out = learned_smoothing.split(x)[1]
    assert found.error == learned_smoothing.measured_error(w, held_out, found.factor, 16, 0 if unsigned else 256, torch.bfloat16)


@pytest.mark.parametrize("unsigned", [False, True])
def test_learning_is_never_worse_than_its_start(unsigned, monkeypatch):
    """If every step is worse, the start is returned unchanged."""
    w, x = layer(unsigned=unsigned)
    start = smoothing.search(w, x, smoothing.spans(x), 16, unsigned, torch.bfloat16).factor
    found = learned(w, x, start, unsigned)
    assert found.error <= found.error_before
    monkeypatch.setattr(learned_smoothing, "RATE", 3.0)
    wild = learned(w, x, start, unsigned)
    assert torch.equal(wild.factor, start) and wild.error == wild.error_before


def test_the_expected_error_is_near_the_measured_one():
    """For round-to-nearest on independent inputs, the squares agree within a tenth."""
    w, x = layer(256, 512)
    factor = smoothing.candidate(smoothing.spans(x)["rms"], smoothing.spans(w)["rms"], 0.5)
    basis = lowrank.orthonormal(lowrank.low_rank(w * factor, 16)[1])
    expected = float(learned_smoothing.expected_error(w, x, factor.log(), basis, 512))
    measured = learned_smoothing.measured_error(w, x, factor, 16, 512, torch.bfloat16) ** 2
    exact = float((x @ w.t()).square().sum(dim=1).mean())
    assert abs(expected / exact / measured - 1) < 0.1, f"expected {expected / exact:.5f}, measured {measured:.5f}"


def test_a_factor_that_only_fits_its_learning_tokens_is_not_kept():
    """The learning tokens differ from the held-out ones, so that their factor only fits themselves."""
    w, x = layer()
    g = torch.Generator().manual_seed(5)
    for i, stretch in enumerate(x.tensor_split(learned_smoothing.STRETCHES)):
        stretch.copy_(torch.randn(stretch.shape, generator=g) * (torch.linspace(-3, 3, 256) * (1 if i % 2 else -1)).exp())
    start = smoothing.candidate(smoothing.spans(learned_smoothing.split(x)[1])["rms"], smoothing.spans(w)["rms"], 0.5)
    assert torch.equal(learned(w, x, start).factor, start)


def test_learning_is_deterministic_and_runs_in_inference_mode():
    """ComfyUI runs nodes in inference mode, where nothing is recorded for a backward pass."""
    w, x = layer()
    first = learned(w, x, torch.ones(256))
    torch.manual_seed(7)
    with torch.inference_mode():
        w, x = layer()
        second = learned(w, x, torch.ones(256))
        assert torch.equal(first.factor, second.factor) and first.error == second.error
        assert not second.factor.requires_grad


def test_a_models_own_parameter_gets_no_gradient():
    w, x = layer()
    weight = torch.nn.Parameter(w)
    found = learned(weight, x, torch.ones(256))
    assert weight.grad is None and torch.equal(found.factor, learned(w, x, torch.ones(256)).factor)


def test_learning_can_be_cancelled_at_every_step():
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(*layer(64, 64), torch.ones(64), check=check)
    assert len(calls) == 5


@pytest.mark.parametrize("case", ["dead input", "dead weight", "zero input", "zero weight", "fewer rows than the rank", "one token"])
def test_dead_channels_leave_a_usable_factor(case):
    w, x = layer(12 if case == "fewer rows than the rank" else 64, 128)
    if case == "dead input":
        x[:, 5] = 0
    elif case == "dead weight":
        w[:, 5] = 0
    elif case == "zero input":
        x[:] = 0
    elif case == "zero weight":
        w[:] = 0
    elif case == "one token":
        x = x[:1]
    found = learned(w, x, torch.ones(128))
    assert torch.isfinite(found.factor).all() and (found.factor > 0).all()
    assert (found.factor <= smoothing.LARGEST).all() and (found.factor >= 1 / smoothing.LARGEST).all()


def test_the_rows_that_are_learned_from_are_bounded(monkeypatch):
    seen = []
    expected_error = learned_smoothing.expected_error
    monkeypatch.setattr(learned_smoothing, "ROWS", 40)
    monkeypatch.setattr(learned_smoothing, "expected_error", lambda rows, *rest: seen.append(len(rows)) or expected_error(rows, *rest))
    learned(*layer(64, 64), torch.ones(64))
    assert set(seen) == {40}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unsigned_from", [0, 128, 256])
def test_the_preset_slow_learns_and_is_stored(unsigned_from, dtype):
    w, x = layer()
    x = torch.where(torch.arange(256) >= unsigned_from, torch.nn.functional.gelu(x, approximate="tanh"), x)
    stats = InputStats(1, with_gram=True)
    stats.add(x)
    errors = {}
    for preset in ("best", "slow"):
        recipe = presets.make_recipe(preset, 16)
        spec = layout.svdquant_spec(256, 192, 16, unsigned_from, True, dtype)
        tensors, record = pipeline.quantize_layer("layer", w, torch.zeros(192), stats, spec, recipe)
        assert {part: (tuple(t.shape), t.dtype) for part, t in tensors.items()} == spec.tensors()
        errors[preset] = record.error
    assert record.smoothing.endswith(", learned")
    assert errors["slow"] < 1.02 * errors["best"], f"error {errors['slow']:.4f}, of best {errors['best']:.4f}"
