"""benchmarks/quantize_full.py at a small size: it runs, and its figures are consistent."""

import json
import subprocess
import sys

import family_models
import flux_model
import pytest
import torch

from host import setup
from host.server import ROOT


def run(path, model, blocks, hidden=128):
    """The entry of a run on a small model."""
    size = f"--model {model} --hidden {hidden} --size 64 --blocks {blocks} --prompts 1 --steps 2 --text-tokens 8 --preset fast".split()
    subprocess.run([sys.executable, ROOT / "benchmarks" / "quantize_full.py", "--comfyui", setup.locate().comfy, *size, "--out", path],
                   check=True, timeout=600)
    found = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return next(entry for entry in found if entry["model"] == model)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("result") / "result.json"


@pytest.fixture(scope="module")
def result(path):
    return run(path, "flux1-dev", "1,2")


def test_every_stage_has_its_time(result):
    stages = result["stages"]
    assert {"sampling", "replay", "statistics", "smoothing", "scale search", "refit", "modulation layers", "saving"} <= stages.keys()
    assert abs(sum(stages.values()) - result["seconds_with_saving"]) < 0.5, "nothing is counted twice or left out"


def test_the_whole_models_time_is_estimated_from_a_few_blocks(result):
    whole = result["stages_of_all_blocks"]
    assert 19 * result["stages"]["refit"] < whole["refit"] * 1.01 < 19.5 * result["stages"]["refit"], "1 of 19 and 2 of 38 blocks"


def test_its_facts_about_the_model(result):
    assert result["errors"]["svdquant_w4a4"]["layers"] == 8 + 2 and result["errors"]["awq_w4a16"]["layers"] == 2 + 2 + 4
    assert result["errors"]["svdquant_w4a4"]["mean"] < 0.8 * result["errors"]["svdquant_w4a4"]["mean_of_plain_rounding"]
    assert 0.25 < result["file_gb"] / result["model_gb"] < 0.8 and result["host_gb_above_the_model"] > 0


@pytest.mark.parametrize(("model", "blocks", "hidden", "layers", "factor"), [
    pytest.param("qwen-image", "1", 128, 2 + 8 + 4 + 2, 60, id="qwen-image"),
    pytest.param("z-image", "1", 256, 5 * 5 + 3, 30, id="z-image", marks=pytest.mark.heavy),
    pytest.param("flux2-klein-9b", "1,1", 128, 8 + 2 + 5, None, id="flux2", marks=pytest.mark.heavy)])
def test_the_other_families_join_the_file(result, path, model, blocks, hidden, layers, factor):
    found = run(path, model, blocks, hidden)
    assert found["packed_layers"] == layers, "all of the blocks and those outside them"
    if factor:
        whole = found["stages_of_all_blocks"]
        assert found["stages"]["refit"] < whole["refit"] < factor * 1.01 * found["stages"]["refit"]
    assert found["file_gb"] < found["model_gb"] and all(error["mean"] < 0.3 for error in found["errors"].values())
    kept = json.loads(path.read_text(encoding="utf-8"))["entries"]
    assert result in kept, "a run replaces no other model's entry"


def test_weights_are_the_same_whatever_order_the_threads_take():
    shapes = {f"block.{i}.weight": (64, 32) for i in range(20)} | {"block.attn.norm_q.weight": (8,), "block.ffn_norm1.weight": (8,)}
    first, second = (flux_model.random_in_host_memory(shapes) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in shapes) and list(first) == list(shapes)
    assert not torch.equal(first["block.0.weight"], first["block.1.weight"])
    assert all(bool((first[name] == 1).all()) for name in shapes if "norm" in name)


def test_a_smaller_model_keeps_the_rest_of_its_configuration():
    qwen = family_models.MODELS["qwen-image"]
    smaller = family_models.resized(qwen, 256, (2,))
    assert family_models.depths(smaller) == (2,) and smaller.config["num_attention_heads"] == 2
    assert {key for key in qwen.config if smaller.config[key] != qwen.config[key]} == {"num_layers", "num_attention_heads"}
    with pytest.raises(ValueError):
        family_models.resized(qwen, blocks=(1, 2))
