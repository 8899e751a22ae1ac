"""benchmarks/text_encoder.py: a run on small encoders, and its fp8."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("comfy", reason="there is no ComfyUI")

import text_encoder
import torch

from host import setup
from host.server import ROOT


@pytest.mark.heavy
def test_a_run(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "text_encoder.py", "--comfyui", setup.locate().comfy, "--small", "--tokens", "7", "40",
               "--out", tmp_path / "result.json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["entries"]
    assert [(entry["encoder"], entry["variant"], entry["tokens"]) for entry in entries] == [
        (name, variant, tokens) for name in text_encoder.SMALL for variant in text_encoder.VARIANTS for tokens in (7, 40)]
    for entry in entries:
        least, most = {"16-bit": (1, 1), "fp8-scaled": (0.99, 0.99999)}.get(entry["variant"], (0.97, 0.9999))
        assert least <= entry["cosine"] <= most and 0 < entry["least_ms"] <= entry["ms"]
    size = {(entry["encoder"], entry["variant"]): entry["megabytes"] for entry in entries}
    assert all(size[name, "ours"] < size[name, "fp8-scaled"] < size[name, "16-bit"] for name in text_encoder.SMALL)


def test_scaled_fp8():
    linear = torch.nn.Linear(64, 16, dtype=torch.bfloat16)
    with torch.inference_mode():
        x, linear.weight.data = torch.randn(3, 64), linear.weight.data * 1000  # beyond fp8's range
        exact = torch.nn.functional.linear(x, linear.weight.float(), linear.bias.float())
        found = text_encoder.Fp8Linear(linear)(x)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.04


def test_an_entry_replaces_that_of_the_same_variant(tmp_path):
    entries = [{"encoder": "a", "variant": "ours", "tokens": tokens, "ms": 1} for tokens in (7, 40)]
    text_encoder.add(tmp_path / "x.json", "GPU", entries)
    text_encoder.add(tmp_path / "x.json", "GPU", [entries[0] | {"ms": 2}])
    assert json.loads((tmp_path / "x.json").read_text())["entries"] == [entries[1], entries[0] | {"ms": 2}]
