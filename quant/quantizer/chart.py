"""The chart of a quantization: how much closer than plain rounding it is, where its errors are, and the five worst layers."""

import re
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import report

WIDTH, CELL, DPI = 1000, 24, 100  # pixels of the picture's width and of a row's height; pixels per inch
HEAD, PANEL, BAR, BARS, FOOT = 116, 72, 32, 70, 12  # pixels of the title, around a panel, of a bar, around the bars, and at the bottom
LABELS, RIGHT, LETTER = 256, 100, 7  # pixels left and right of the panels, and of a letter
BACKGROUND, TEXT, DIM, GRID = "#202024", "#f2f2f2", "#b4b4bc", "#2e2e34"  # legible on ComfyUI's dark page and on a light one
# Relative error and its colour, one scale for all charts: blue where there is none, yellow at 10 %, red from 30 % on.
COLOURS = ((0.0, "#24447c"), (0.05, "#26a08c"), (0.10, "#f0d65a"), (0.20, "#ee7b3a"), (0.30, "#e0243c"))
WORST = 5
INDEX = re.compile(r"(.*?)\.(\d+)\.")  # of a layer's block
NO_MATPLOTLIB = "The chart needs matplotlib: pip install matplotlib"


def picture(records):
    """[LayerRecord] as a ComfyUI IMAGE, (1, H, WIDTH, 3) float32 in [0, 1]. Without matplotlib, or without a layer in 4 bits, it is a line
    of text: a run of minutes must not fail because of its chart."""
    if report.yardstick(records) is None:
        return _notice(report.summary(records))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        return _notice(NO_MATPLOTLIB)
    canvas = FigureCanvasAgg(_figure(records))
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255).unsqueeze(0)


def _notice(text):
    canvas = Image.new("RGB", (WIDTH, HEAD), BACKGROUND)
    ImageDraw.Draw(canvas).text((WIDTH // 2, HEAD // 2), text, fill=TEXT, font=ImageFont.load_default(24), anchor="mm")
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255).unsqueeze(0)


def _figure(records):
    """The chart as a matplotlib Figure: the title, bars of the worst layers, a panel of plain rounding, a panel of the model."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(map(report.kind, records)))
    worst = report.worst(records, WORST)
    panel, bars = CELL * len(rows) + PANEL, BAR * len(worst) + BARS
    height = HEAD + 2 * panel + bars + FOOT
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    scale = Normalize(0, COLOURS[-1][0]), LinearSegmentedColormap.from_list("error", [(e / COLOURS[-1][0], c) for e, c in COLOURS])

    def axes(top, tall, left=LABELS, right=RIGHT):
        found = figure.add_axes((left / WIDTH, 1 - (top + tall) / height, 1 - (left + right) / WIDTH, tall / height), facecolor=BACKGROUND)
        found.tick_params(colors=DIM, labelsize=10, length=0)
        for side in found.spines.values():
            side.set_visible(False)
        return found

    _draw_title(figure, records, height)
    _draw_worst(axes(HEAD + 36, BAR * len(worst), LABELS, 260), worst, scale)
    for top, field, title in ((HEAD + bars, "error_naive", "Plain rounding"), (HEAD + bars + panel, "error", "This model")):
        _draw_panel(axes(top + 28, CELL * len(rows)), records, rows, field, title, scale)
    _draw_legend(axes(HEAD + bars + 28, 2 * panel - PANEL, WIDTH - RIGHT + 24, RIGHT - 40), scale)
    return figure


def _draw_title(figure, records, height):
    figure.text(28 / WIDTH, 1 - 58 / height, report.headline(records), color=TEXT, fontsize=25, fontweight="bold")
    figure.text(28 / WIDTH, 1 - 92 / height, report.mean_errors(records), color=DIM, fontsize=12)


def _columns(records):
    """[(list of blocks, number in it)], in the model's order. Layers outside the blocks are in a column ("outside", None), the last."""
    found = list(dict.fromkeys(_column(record) for record in records))
    return sorted(found, key=lambda column: column[1] is None)


def _column(record):
    block = INDEX.match(record.name)
    return (block[1], int(block[2])) if block else ("outside", None)


def _draw_panel(axes, records, rows, field, title, scale):
    """A cell for each layer: a row for each kind of layer, a column for each block."""
    columns = _columns(records)
    cells = np.full((len(rows), len(columns)), np.nan)
    for record in records:
        cells[rows.index(report.kind(record)), columns.index(_column(record))] = getattr(record, field)
    axes.pcolormesh(cells, norm=scale[0], cmap=scale[1], edgecolors=BACKGROUND, linewidth=1)
    axes.invert_yaxis()
    axes.set_title(title, color=TEXT, fontsize=14, loc="left", pad=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    step = 1 if len(columns) <= 32 else 5  # numbers of blocks that don't touch each other
    shown = [x for x, (_, number) in enumerate(columns) if number is not None and number % step == 0]
    axes.set_xticks([x + 0.5 for x in shown], [columns[x][1] for x in shown])
    start = 0
    for name, group in groupby(columns, key=lambda column: column[0]):
        count = len(list(group))
        if count / len(columns) * (WIDTH - LABELS - RIGHT) > LETTER * len(name):  # otherwise it would run into the next name
            axes.text(start + count / 2, len(rows) + 26 / CELL, name, color=DIM, fontsize=10, ha="center", va="top")
        if start:
            axes.axvline(start, color=DIM, linewidth=1)
        start += count


def _draw_legend(axes, scale):
    """The scale of the colours, from below upward."""
    norm, colours = scale
    axes.imshow(np.linspace(norm.vmin, norm.vmax, 256)[:, None], norm=norm, cmap=colours, aspect="auto", origin="lower",
                extent=(0, 1, norm.vmin, norm.vmax))
    axes.yaxis.tick_right()
    axes.set_yticks([error for error, _ in COLOURS], [f"{error:.0%}" for error, _ in COLOURS])
    axes.set_xticks([])
    axes.set_title("error", color=DIM, fontsize=10, pad=8)


def _draw_worst(axes, worst, scale):
    """A bar for each of the worst layers, before a grey one for plain rounding."""
    norm, colours = scale
    places = np.arange(len(worst))
    axes.barh(places, [record.error_naive for record in worst], height=0.72, color=GRID)
    axes.barh(places, [record.error for record in worst], height=0.44, color=colours(norm([record.error for record in worst])))
    axes.invert_yaxis()
    axes.set_yticks(places, [record.name for record in worst])
    axes.tick_params(axis="y", colors=TEXT, labelsize=11)
    axes.set_xticks([])
    title = f"The {len(worst)} layers with the largest errors" if len(worst) > 1 else "The layer"
    axes.set_title(title, color=TEXT, fontsize=14, loc="left", pad=10)
    for y, record in enumerate(worst):
        errors = f"  {record.error:.1%} (plain rounding {record.error_naive:.0%})"
        axes.text(max(record.error, record.error_naive), y, errors, color=TEXT, fontsize=11, va="center")
