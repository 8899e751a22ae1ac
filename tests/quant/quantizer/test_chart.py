"""The chart: its numbers are the report's, its texts fit, and its cells have the colours of their errors."""

import dataclasses
import sys

import matplotlib.colors
import pytest
import torch
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import chart, pipeline, report

from .test_report import RECORDS, record

OUTSIDE = record("final_layer.adaLN_modulation.1", 0.01, 0.02, layout.AWQ)


def blocks(double, single):
    """The records of a FLUX.1 with these numbers of blocks."""
    kinds = [f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    return [*(record(f"double_blocks.{i}.{kind}", 0.05 + 0.001 * i) for i in range(double) for kind in kinds),
            *(record(f"single_blocks.{i}.{kind}", 0.08) for i in range(single) for kind in ("modulation.lin", "linear1", "linear2")),
            OUTSIDE]


def texts(figure):
    return [text for axes in (figure, *figure.axes) for text in axes.texts] + [
        text for axes in figure.axes for text in (axes.title, axes._left_title, *axes.get_xticklabels(), *axes.get_yticklabels())]


@pytest.mark.parametrize("records", [blocks(19, 38), blocks(2, 6), RECORDS, RECORDS[:1], [OUTSIDE]],
                         ids=["dev", "tiny", "five", "one", "modulation"])
def test_every_text_is_within_the_picture(records):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = chart._figure(records)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = figure.bbox.width, figure.bbox.height
    for text in texts(figure):
        box = text.get_window_extent(canvas.get_renderer())
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, text.get_text()


def test_the_texts_are_the_reports():
    records = blocks(19, 38)
    shown = [text.get_text() for text in texts(chart._figure(records))]
    assert report.headline(records) in shown and report.mean_errors(records) in shown
    assert {layer.name for layer in report.worst(records, 5)} <= set(shown)
    assert {"double_blocks", "single_blocks", "0", "15", "35", "img_attn.qkv", "linear2", "final_layer.adaLN_modulation.1"} <= set(shown)


def test_the_cells_have_the_colours_of_their_errors():
    picture = chart.picture([*RECORDS, record("single_blocks.5.linear2", 0.30, 0.30)])
    assert picture.dtype == torch.float32 and picture.shape[::2] == (1, chart.WIDTH) and 0 <= picture.min() < picture.max() <= 1
    colour = torch.tensor(matplotlib.colors.to_rgb(chart.COLOURS[-1][1]))
    red = (picture[0] - colour).abs().amax(-1) < 0.01
    model = red[-chart.PANEL - 2 * chart.CELL:, chart.LABELS:chart.WIDTH - chart.RIGHT].nonzero()
    column = (chart.WIDTH - chart.LABELS - chart.RIGHT) / 6
    assert len(model) > 0.8 * column * (chart.CELL - 4), "one red cell in the model's panel"
    assert model[:, 1].min() >= 5 * column - 1 and model[:, 0].max() - model[:, 0].min() < chart.CELL


def test_without_a_layer_in_4_bits_or_without_matplotlib_it_is_a_line_of_text(monkeypatch):
    kept = [dataclasses.replace(r, format=pipeline.KEPT, rank=0, error=0.0) for r in RECORDS]
    for records in (kept, []):
        assert chart.picture(records).shape == (1, chart.HEAD, chart.WIDTH, 3)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    notice = chart.picture(RECORDS)
    assert notice.shape == (1, chart.HEAD, chart.WIDTH, 3) and notice.max() > 0.9
