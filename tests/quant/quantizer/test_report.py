"""The report: its numbers, its warnings, its chart."""

import dataclasses
import json

import torch
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
        assert report.picture(records).ndim == 4
    assert "10 layers" in report.summary([*kept[1:], RECORDS[0]])


def test_the_picture_shows_where_the_error_is():
    picture = report.picture([*RECORDS, record("single_blocks.5.linear2", 0.30)])
    assert picture.dtype == torch.float32 and picture.ndim == 4
    red = (picture - torch.tensor(report.colour(0.30)) / 255).abs().amax(-1) < 0.01
    lower = red[0, picture.shape[1] // 2 + 20 : -60].float()
    x, y = report.LABELS + 5 * report.CELL, lower.nonzero()
    assert (y[:, 1] >= x).all() and (y[:, 1] < x + report.CELL).all(), "one red cell, in the sixth block's column"
    assert len(y) > 300


def test_colours_follow_the_error():
    assert report.colour(0) == report.COLOURS[0][1] and report.colour(2.0) == report.COLOURS[-1][1]
