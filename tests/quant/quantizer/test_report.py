"""The report: its numbers and its warnings."""

import dataclasses
import json

from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import pipeline, presets, report


def record(name, error, naive=0.3, form=layout.SVDQUANT):
    return pipeline.LayerRecord(name, form, 32, error, naive, "outputs", "1", (0.1, 0.2, 0.3, 0.5), 100, 0.1, 4000, 1000)


RECORDS = [record(f"single_blocks.{i}.{part}", 0.05 + 0.001 * i) for i in range(5) for part in ("linear1", "linear2")]


def test_a_layer_that_stands_out_is_named_with_a_remedy():
    assert report.warnings(RECORDS) == []
    bad = [*RECORDS, record("single_blocks.5.linear1", 0.2)]
    (warning,) = report.warnings(bad)
    assert "single_blocks.5.linear1 stands out with an error of 20.0%" in warning and "exceptions" in warning
    assert warning in report.text(bad, presets.make_recipe("best", 32))
    assert json.loads(report.as_json(bad, presets.make_recipe("best", 32)))["warnings"] == [warning]


def test_a_modulation_layer_stands_out_only_with_a_large_error_and_gets_no_advice_on_rank():
    def modulation(i, error):
        return dataclasses.replace(record(f"single_blocks.{i}.modulation.lin", error, form=layout.AWQ), rank=0)

    alike = [*RECORDS, *(modulation(i, 0.002) for i in range(5))]
    assert report.warnings([*alike, modulation(5, 0.006)]) == []
    (warning,) = report.warnings([*alike, modulation(5, 0.1)])
    assert "single_blocks.5.modulation.lin stands out" in warning and "rank" not in warning and "16 bits" in warning
    assert report.warnings([]) == []


def test_the_summary_adds_up():
    assert report.summary(RECORDS) == "10 layers, 0.04 MB in 16 bits -> 0.01 MB (4.00x smaller)"


def test_a_run_that_leaves_every_layer_in_16_bits_is_reported_as_such():
    kept = [dataclasses.replace(r, format=pipeline.KEPT, rank=0, error=0.0, bytes_after=r.bytes_before) for r in RECORDS]
    for records in (kept, []):
        assert report.summary(records) == "no layer came out in 4 bits, and the model is as large as before"
        assert report.summary(records) in report.text(records, presets.make_recipe("best", 32)).splitlines()[0]
        assert report.yardstick(records) is None
    assert "10 layers" in report.summary([*kept[1:], RECORDS[0]])


def test_the_headline_compares_with_plain_rounding():
    for error, naive, says in ((0.1, 0.41, "4.1x closer than plain rounding"), (0.01, 0.123, "12x closer than plain rounding"),
                               (0.3, 0.3, "as close as plain rounding"), (0.0, 0.3, "no rounding error")):
        assert report.headline([record("single_blocks.0.linear1", error, naive)]) == says


def test_one_yardstick_for_all_numbers():
    """Modulation layers are a kind of their own: they must not pull the mean down."""
    modulation = [dataclasses.replace(record(f"single_blocks.{i}.modulation.lin", 0.001, 0.002, layout.AWQ), rank=0) for i in range(5)]
    recipe, records = presets.make_recipe("best", 32), [*RECORDS, *modulation]
    assert report.mean_errors(records) == report.mean_errors(RECORDS) == "W4A4 layers: mean relative error 5.20% (plain rounding 30.00%)"
    line = f"{report.mean_errors(records)}, 5.8x closer than plain rounding; largest 5.40% in single_blocks.4.linear1"
    assert report.text(records, recipe).splitlines()[2] == line
    mean = json.loads(report.as_json(records, recipe))["mean"]
    assert (mean["of"], round(mean["error"], 6), round(mean["error_naive"], 6)) == ("W4A4 layers", 0.052, 0.3)
    assert report.yardstick(modulation).title == "W4A16 layers"
    assert [layer.name for layer in report.worst(records, 2)] == ["single_blocks.4.linear1", "single_blocks.4.linear2"]
