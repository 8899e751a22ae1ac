"""Models for the comparison of fused forwards with the host's."""

import pytest


@pytest.fixture(scope="module")
def activations_without_codes():
    """On the CPU. On a GPU the kernels round, and their self-test needs the true reference."""
    from comfyui_svdquant.cuda import reference

    from ..fused_path import GPU, smoothed

    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setattr(reference, "quantize_activation", smoothed)
        yield


@pytest.fixture
def model(pair_files, activations_without_codes):
    from comfyui_svdquant.quant.host import loader

    from ..fused_path import DTYPE

    return loader.load_model(pair_files[1], DTYPE)


@pytest.fixture
def path(monkeypatch, model):
    from comfyui_svdquant.quant.host import fused_blocks

    from ..fused_path import Path

    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    return Path(monkeypatch, model)
