"""benchmarks/quantize_full.py at a small size: it runs, and its figures are consistent."""

import json
import subprocess
import sys

import pytest

from host import setup
from host.server import ROOT


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("result") / "result.json"
    size = "--hidden 128 --size 64 --blocks 1,2 --prompts 1 --steps 2 --text-tokens 8 --preset fast".split()
    subprocess.run([sys.executable, ROOT / "benchmarks" / "quantize_full.py", "--comfyui", setup.locate().comfy, *size, "--out", path],
                   check=True, timeout=600)
    return json.loads(path.read_text(encoding="utf-8"))


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
