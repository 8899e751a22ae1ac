"""benchmarks/flux_step.py: its options, and a whole run on a small model."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("comfy", reason="there is no ComfyUI")

import flux_step
import step_variants

from host import setup
from host.server import ROOT


def run(path, *arguments):
    """The benchmark on a model of one double and one single block."""
    small = "--hidden 128 --blocks 1 1 --sizes 64 32x2".split()
    command = [sys.executable, ROOT / "benchmarks" / "flux_step.py", "--comfyui", setup.locate().comfy, *small, "--out", path, *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280)


def test_a_run(tmp_path):
    done = run(tmp_path / "result.json", "--variants", "ours-eager", "--restart")
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["entries"]
    # The entry with the second process's first step replaces the one without.
    assert [(entry["variant"], entry["pixels"], entry["batch"]) for entry in entries] == [("ours-eager", 64, 1), ("ours-eager", 32, 2)]
    assert all(0 < entry["least_ms"] <= entry["ms"] <= entry["most_ms"] and entry["first_s"] > 0 for entry in entries)
    assert ["first_warm_s" in entry for entry in entries] == [True, False]
    assert all(entry["rank"] == 64 and entry["comfyui"] and entry["commit"] for entry in entries)
    assert len({entry["date"] for entry in entries}) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA graph fails only where there is no GPU")
def test_a_variant_that_fails_does_not_stop_the_others(tmp_path):
    done = run(tmp_path / "result.json", "--variants", "bf16-graph", "bf16-eager")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("These variants failed, as their processes wrote: bf16-graph")
    entries = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["entries"]
    assert [entry["variant"] for entry in entries] == ["bf16-eager"] * 2 and not any("rank" in entry for entry in entries)


def test_a_variant_without_its_package(monkeypatch):
    monkeypatch.setattr(step_variants.importlib.util, "find_spec", lambda name: None)
    entries = list(flux_step.measured(("nf4", "eager"), argparse.Namespace(sizes=[(256, 1), (1024, 4)])))
    assert [(entry["pixels"], entry["batch"], entry["not_measured"]) for entry in entries] == [
        (256, 1, "bitsandbytes is not installed"), (1024, 4, "bitsandbytes is not installed")]
    assert step_variants.missing("bf16") is None


@pytest.mark.parametrize("text, expected", [("1024", (1024, 1)), ("512x4", (512, 4))])
def test_a_size(text, expected):
    assert flux_step.size(text) == expected


@pytest.mark.parametrize("text", ["", "large", "1000", "0", "1024x", "1024x0", "1024xx"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        flux_step.size(text)


@pytest.mark.parametrize("text, expected", [("bf16-eager", ("bf16", "eager")), ("ours-fused-compiled", ("ours-fused", "compiled"))])
def test_a_variant(text, expected):
    assert step_variants.variant(text) == expected


@pytest.mark.parametrize("text", ["bf16", "eager", "int3-eager", "ours-fused", "ours-fast"])
def test_what_is_no_variant(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no variant: write MODEL-MODE"):
        step_variants.variant(text)


def test_the_default_variants_exist():
    assert all(step_variants.variant(text) for text in step_variants.DEFAULT)


@pytest.mark.parametrize("arguments, message", [([], "--comfyui is needed"), (["--comfyui", "x", "--hidden", "128"], "--out")])
def test_options_that_do_not_fit_together(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["flux_step.py", *arguments])
    with pytest.raises(SystemExit):
        flux_step.parsed()
    assert message in capsys.readouterr().err
