"""benchmarks/dynamic_vram.py on a small model, and its table."""

import json
import subprocess
import sys

import comfy.utils
import dynamic_vram
import pytest

from host import setup
from host.server import ROOT

# Older ComfyUIs neither read the formats nor load a FLUX.1 of another width from a file.
VARIANTS = ["4 bits", *(["float8_e4m3fn"] if hasattr(comfy.utils, "convert_old_quants") else [])]


@pytest.mark.heavy
def test_a_run(tmp_path):
    path = tmp_path / "result.json"
    small = "--hidden 128 --blocks 1 1 --pixels 32 --free 1 --variants".split()
    subprocess.run([sys.executable, ROOT / "benchmarks" / "dynamic_vram.py", "--comfyui", setup.locate().comfy, *small, *VARIANTS,
                    "--out", path], check=True, timeout=280)
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    assert [entry["variant"] for entry in entries if not entry["free_gb"]] == VARIANTS
    assert all(0 < entry["least_ms"] <= entry["ms"] <= entry["most_ms"] and entry["same_bits"] for entry in entries)


def test_the_table_has_a_column_for_each_limit_and_tells_what_did_not_run():
    shared = {"variant": "4 bits", "model_gb": 2.0, "pixels": 512}
    lines = dynamic_vram.table([shared | {"free_gb": None, "ms": 10.0, "resident_gb": 2.0},
                                shared | {"free_gb": 2.5, "ms": None, "resident_gb": 0.0}]).split("\n")
    assert lines == ["| 512 x 512, free: | GB | all | 2.5 GB |", "|---|---|---|---|", "| 4 bits | 2.0 | 10.0 ms (2.0) | - |", ""]
