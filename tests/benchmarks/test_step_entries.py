"""The result file of benchmarks/flux_step.py: merging, and what is refused."""

import json

import pytest
import step_entries


def entry(variant="bf16-eager", pixels=1024, batch=1, **found):
    run = {"date": "2026-11-30 10:00:00", "commit": "abc"}
    found = found or {"ms": 1.0, "first_s": 2.0, "weights_gb": 3.0, "peak_gb": 4.0}
    return {"variant": variant, "pixels": pixels, "batch": batch} | run | found


def test_an_entry_replaces_that_of_its_variant_and_size_alone():
    old = [entry(), entry(pixels=512), entry(batch=4), entry("fp8-compiled")]
    new = [entry(ms=9.0), entry("ours-eager")]
    assert step_entries.merged(old, new) == [new[0], *old[1:], new[1]]


def test_a_measurement_is_not_lost_to_a_missing_package():
    missing = entry(not_measured="bitsandbytes is not installed")
    assert step_entries.merged([entry()], [missing]) == [entry()]
    assert step_entries.merged([], [missing]) == [missing]
    assert step_entries.merged([missing], [entry(not_measured="out of memory")]) == [entry(not_measured="out of memory")]
    assert step_entries.merged([missing], [entry()]) == [entry()]


def test_runs_add_up_in_a_file(tmp_path):
    path = tmp_path / "result.json"
    step_entries.add(path, "H200", [entry()])
    step_entries.add(path, "H200", [entry("ours-eager")])
    assert step_entries.read(path) == {"device": "H200", "entries": [entry(), entry("ours-eager")]}


def test_a_file_of_another_gpu_is_left_alone(tmp_path):
    path = tmp_path / "result.json"
    step_entries.add(path, "NVIDIA H100 80GB HBM3", [entry()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="results of NVIDIA H100 80GB HBM3, not of NVIDIA H100 PCIe"):
        step_entries.add(path, "NVIDIA H100 PCIe", [entry()])
    assert path.read_bytes() == before


def test_an_entry_that_is_no_json_leaves_the_file_whole(tmp_path):
    path = tmp_path / "result.json"
    step_entries.add(path, "H200", [entry()])
    with pytest.raises(TypeError):
        step_entries.add(path, "H200", [entry("ours-eager", ms={1})])
    assert len(step_entries.read(path)["entries"]) == 1


def test_a_file_of_another_form(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"variants": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match="no result file with entries"):
        step_entries.read(path)


def test_a_table_for_each_size():
    whole = entry("ours-eager", ms=80.04, first_s=14.0, first_warm_s=2.5, weights_gb=6.79, peak_gb=7.44,
                  kernel_ms={"gemm": 1, "attention": 2, "quantize": 3, "awq": 4, "other": 5})
    text = step_entries.tables([entry(), entry("nf4-eager", not_measured="out of memory"), whole, entry(pixels=512, batch=4)])
    assert text.count("| variant | ms a step |") == 2 and text.index("512 x 512, batch 4") < text.index("1024 x 1024, batch 1")
    assert "| ours-eager | 80.0 | 14.0 s (2.5 s) | 6.79 GB | 7.44 GB | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 |" in text
    assert "| nf4-eager | out of memory |" in text and "measured 2026-11-30 10:00:00 at abc" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ")}) == 1, "every row has all columns"
