"""benchmarks/files.py at a small size: all its files load and convert, and its tables and its result file are complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from host import setup

ROOT = Path(__file__).resolve().parents[2]
LOADS = ["ours", "Nunchaku INT4", "Nunchaku NVFP4"]
LIBRARIES_GB = 0.05  # memory of PyTorch's threads and buffers, which is independent of the file's size


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's count of a process's memory")
def test_the_benchmark_of_files(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "files.py"), "--comfyui", str(setup.locate().comfy), "--gb", "0.01",
               "--folder", str(tmp_path), "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found["loading"]) == list(found["reading"]) == LOADS
    assert found["files"]["Nunchaku NVFP4"] > found["files"]["Nunchaku INT4"] > 0.005
    for load in found["loading"].values():
        assert load["warm_s"] > 0 and load["cold_s"] > 0
        # There is no second copy of the model: the peak is near the final memory.
        assert load["peak_gb"] - load["end_gb"] < 0.5 * found["files"]["Nunchaku INT4"] + LIBRARIES_GB
    assert all(row["s"] > 0 and row["peak_gb"] < found["files"]["ours"] + LIBRARIES_GB for row in found["converting"].values())
    assert all(f"| {name} |" in done.stdout for name in (*LOADS, *found["converting"]))
    assert os.listdir(tmp_path) == ["result.json"]
