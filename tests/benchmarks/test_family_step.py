"""benchmarks/family_step.py: a run on small models, and the sizes of the published ones."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("comfy", reason="there is no ComfyUI")

import family_models
import family_step
from comfyui_svdquant.quant import families

from host import setup
from host.server import ROOT


@pytest.mark.heavy
def test_a_run(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "family_step.py", "--comfyui", setup.locate().comfy, "--small", "--pixels", "64",
               "--variants", "bf16-eager", "ours-eager", "ours-w4a4", "--out", tmp_path / "result.json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["entries"]
    assert [entry["variant"] for entry in entries] == [
        f"{model} {variant}" for model in family_step.SMALL for variant in ("bf16-eager", "ours-eager", "ours-w4a4")]
    assert all(0 < entry["least_ms"] <= entry["ms"] <= entry["most_ms"] and entry["comfyui"] and entry["commit"] for entry in entries)


@pytest.mark.parametrize(("model", "billions", "name"), [
    ("flux2-klein-9b", 9.08, "FLUX.2-klein-9B"), ("flux2-klein-4b", 3.88, "FLUX.2-klein-4B"), ("flux2-dev", 32.2, "FLUX.2-dev"),
    ("flux1-dev", 11.9, "FLUX.1-dev"), ("qwen-image", 20.4, "Qwen-Image"), ("z-image", 6.15, "Z-Image")])
def test_the_models_are_the_published_ones(model, billions, name):
    found = family_models.MODELS[model]
    family = families.of_image_model(found.image_model)
    config = {**family.configuration.fixed, **found.config}
    shapes = family.tensors(config)
    assert family.variant(config) == name and family.configuration.of(shapes) == config
    assert sum(family_models.torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, rel=0.02)
