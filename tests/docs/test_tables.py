"""The tables of README.md and RESULTS.md are those that benchmarks/tables.py makes from the result files."""

import json
import shutil
from pathlib import Path

import pytest
import tables

RUN = {"date": "2026-12-01 10:00:00", "commit": "1234567", "torch": "2.11.0+cu130", "python": "3.12.3"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the result files, to change."""
    return Path(shutil.copytree(tables.RESULTS, tmp_path / "results"))


def change(results: Path, name: str, **keys) -> None:
    path = results / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


def entry(variant: str, pixels: int = 1024, batch: int = 1, **more) -> dict:
    measured = {"ms": 100.04, "first_s": 2.0, "weights_gb": 6.789, "peak_gb": 7.44}
    return RUN | {"variant": variant, "pixels": pixels, "batch": batch} | measured | more


def with_entries(results: Path, *found: dict) -> None:
    (results / "flux_step_h200.json").write_text(json.dumps({"device": "NVIDIA H200", "entries": found}), encoding="utf-8")


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_the_documents_have_the_tables_of_the_result_files(document):
    _, changed = tables.rewritten((tables.ROOT / document).read_text(encoding="utf-8"), document)
    assert changed == [], "run python benchmarks/tables.py"


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_every_marker_belongs_to_a_table(document):
    text = (tables.ROOT / document).read_text(encoding="utf-8")
    found = len(tables.REGION.findall(text))
    assert found == text.count("<!-- table ") == text.count("<!-- end ") > 0


def test_a_changed_result_changes_its_table(results):
    change(results, "lora_cost_h200", none=1.0)
    text, _ = tables.rewritten((tables.ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
    new, changed = tables.rewritten(text, "README.md", results)
    assert changed == ["lora h200"] and "| none | **1.0** |" in new
    assert tables.rewritten(new, "README.md", results) == (new, [])


def test_a_variant_that_was_not_measured_has_no_row(results):
    with_entries(results, entry("bf16-eager"), entry("ours-eager"), entry("nf4-eager"))
    assert "NF4" in tables.made("step h200", "results", results)
    with_entries(results, entry("bf16-eager"), entry("ours-eager"))
    made = tables.made("step h200", "results", results)
    assert "NF4" not in made and "W4A8" in made and "bf16" in made


def test_sizes_variants_and_kinds_of_kernels(results):
    with_entries(results, entry("ours-eager"), entry("ours-fused-compiled", first_warm_s=0.5),
                 entry("bf16-eager", 256, kernel_ms={"gemm": 5.0}),
                 RUN | {"variant": "nf4-eager", "pixels": 1024, "batch": 1, "not_measured": "bitsandbytes is not installed"})
    small, nf4, ours, fused = [line for line in tables.made("steps h200", "results", results).split("\n") if line.startswith("| ")][2:]
    size, speed, memory = "1024 x 1024, batch 1", "100.0 | 2.0 s", "6.79 GB | 7.44 GB"
    assert small == f"| 256 x 256, batch 1 | bf16 | {speed} |  | {memory} | 5.0 |"
    assert nf4 == f"| {size} | NF4 (bitsandbytes) | bitsandbytes is not installed |  |  |  |  |  |"
    assert ours == f"| {size} | **4 bits, W4A8** | {speed} |  | {memory} |  |"
    assert fused == f"| {size} | **4 bits, W4A8, fused blocks**, torch.compile | {speed} | 0.5 s | {memory} |  |"
    readme = tables.made("step h200", "results", results)
    assert "256" not in readme and "matrix products" not in readme and "2026-12-01;" in readme


def test_the_summary_prefers_the_fused_blocks_and_has_comfyuis_fp8_once_it_is_measured(results):
    with_entries(results, entry("bf16-eager"), entry("ours-eager", ms=132.0), entry("ours-fused-eager", ms=91.0),
                 entry("comfyui-fp8-eager", ms=150.0))
    made = tables.made("summary h200", "results", results)
    assert "91 ms" in made and "132 ms" not in made and "| 8 bits (ComfyUI's fp8) | H200 | 6.8 GB | 7.4 GB | 150 ms |  |" in made


def test_an_unknown_variant_and_an_unknown_lora_keep_their_names(results):
    with_entries(results, entry("new-way"))
    assert "| new, way |" in tables.made("step h200", "results", results)
    costs = {key: {"7 of rank 8": 1.0} for key in ("change_s", "memory_gb", "factors_gb")}
    change(results, "lora_cost_h200", **costs, **{"7 of rank 8": 140.0})
    assert "| 7 of rank 8 | **140.0** |" in tables.made("lora h200", "results", results)


def test_results_of_two_gpus_are_not_mixed(results):
    change(results, "demo_cpu", device="NVIDIA H100 80GB HBM3")
    with pytest.raises(ValueError, match="The table summary h200 would have results of NVIDIA H100 80GB HBM3 and NVIDIA H200"):
        tables.made("summary h200", "results", results)


def test_check_writes_nothing(tmp_path, monkeypatch, capsys):
    text = "<!-- table demo -->\nold\n<!-- end demo -->\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", ("README.md",))
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert capsys.readouterr().out == "README.md: demo\n" and (tmp_path / "README.md").read_text(encoding="utf-8") == text
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 0
    assert "small black cross" in (tmp_path / "README.md").read_text(encoding="utf-8")
