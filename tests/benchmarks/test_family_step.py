"""benchmarks/family_step.py: a run on small models, and the sizes of the published ones."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("comfy", reason="there is no ComfyUI")

import family_models
import family_step
import fp8_rowwise
import torch
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


def product(codes, scale, weight, weight_scale, bias):
    """fp8_rowwise.product, which CPUs lack."""
    y = (codes.float() * scale) @ (weight.float() * weight_scale.t()).t()
    return (y if bias is None else y + bias.float()).bfloat16()


@pytest.mark.parametrize(("name", "graphs"), [
    ("qwen-image", 1), pytest.param("z-image", 3, marks=pytest.mark.heavy), pytest.param("flux2-klein-9b", 2, marks=pytest.mark.heavy)])
def test_torch_compile_compiles_a_block_of_each_kind_once(name, graphs, monkeypatch):
    """Z-Image's one kind of block sees the picture, the text, or both. The GPU's attention function is traced, since the CPU's depends on
    the free memory."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(fp8_rowwise, "product", product)
    for module in ("qwen_image.model", "lumina.model", "flux.math"):
        for function in ("optimized_attention", "optimized_attention_masked"):
            monkeypatch.setattr(f"comfy.ldm.{module}.{function}", attention.attention_pytorch, raising=False)
    model = family_models.resized(family_step.SMALL[name], blocks=[2] * len(family_models.depths(family_step.SMALL[name])))
    with torch.inference_mode():
        made, family = family_step.new_model(model)
        arguments, more = family_step.inputs(model, 64)
        exact = made(*arguments, **more)
        eager = family_step.in_fp8(made, family)(*arguments, **more)
        torch._dynamo.utils.counters.clear()
        compiled = family_step.with_compiled_blocks(made, family, "eager")(*arguments, **more)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert torch.equal(compiled, eager) and 0 < (eager - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("model", "billions", "name"), [
    ("flux2-klein-9b", 9.08, "FLUX.2-klein-9B"), ("flux2-klein-4b", 3.88, "FLUX.2-klein-4B"), ("flux2-dev", 32.2, "FLUX.2-dev"),
    ("flux1-dev", 11.9, "FLUX.1-dev"), ("qwen-image", 20.4, "Qwen-Image"), ("z-image", 6.15, "Z-Image")])
def test_the_models_are_the_published_ones(model, billions, name):
    found = family_models.MODELS[model]
    family = families.of_image_model(found.image_model)
    config = {**family.configuration.fixed, **found.config}
    shapes = family.tensors(config)
    assert family.variant(config) == name and family.configuration.of(shapes) == config
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, rel=0.02)
