"""The quantization report: the format, error and size of each layer. As Markdown that also reads well as text, as JSON,
and as a picture of the errors before and after."""

import json
import re
from dataclasses import asdict
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..layers import layout
from .pipeline import KEPT

COLUMNS = ("layer", "format", "rank", "error", "plain rounding", "measured on", "tokens", "MB", "smoothing")
FORMATS = {layout.AWQ: "W4A16", KEPT: "16 bit"}  # Every other format is W4A4.
BLOCK = re.compile(r".*?\.\d+\.")  # the prefix of a layer's name that names its block
STANDS_OUT = 2.0  # times the median error of the layers of its kind

CELL, GAP, LABELS, HEADER, LEGEND = 22, 28, 190, 34, 46  # pixels of the picture's parts
# Error to colour: dark where there is none, yellow at 10 %, red from 30 % on.
COLOURS = ((0.0, (28, 44, 84)), (0.05, (38, 140, 140)), (0.10, (240, 214, 90)), (0.20, (226, 110, 50)), (0.30, (190, 24, 40)))


def summary(records):
    """One line that says how much smaller the layers became."""
    if all(record.format == KEPT for record in records):
        return "no layer came out in 4 bits, and the model is as large as before"
    before, after = (sum(getattr(record, field) for record in records) for field in ("bytes_before", "bytes_after"))
    return f"{len(records)} layers, {before / 1e6:.2f} MB in 16 bits -> {after / 1e6:.2f} MB ({before / after:.2f}x smaller)"


def kind(record):
    """A layer's name within its block, such as "attn.qkv" for "blocks.3.attn.qkv"; the full name if it is in no block."""
    block = BLOCK.match(record.name)
    return record.name[block.end():] if block else record.name


def warnings(records):
    """Sentences about unusual events, then about each layer whose error stands out among the layers of its kind, worst first. An error
    below the median of all layers does not stand out."""
    errors = {}
    for record in records:
        errors.setdefault(kind(record), []).append(record.error)
    unusual = [f"{record.name}: {note}" for record in records for note in record.notes]
    usual = median([record.error for record in records] or [0])
    far = [r for r in records if r.error > max(usual, STANDS_OUT * median(errors[kind(r)])) and len(errors[kind(r)]) > 2]
    return unusual + [
        f"{r.name} stands out with an error of {r.error:.1%} (median of such layers: {median(errors[kind(r)]):.1%}); "
        f"{'give it more rank or ' if r.rank else ''}keep it in 16 bits with the input exceptions."
        for r in sorted(far, key=lambda r: -r.error)]


def row(record):
    """The table's cells for one LayerRecord, as strings."""
    form = FORMATS.get(record.format, "W4A4")
    return (record.name, form, str(record.rank or "-"), f"{record.error:.2%}", f"{record.error_naive:.2%}", record.measured_on,
            str(record.tokens), f"{record.bytes_after / 1e6:.2f}", record.smoothing)


def table(rows):
    """Rows of strings as a Markdown table whose columns line up in a plain text view too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def text(records, recipe, notes=()):
    """records: [LayerRecord] in model order; recipe: Recipe; notes: sentences on the whole run. Returns the report, one line per layer."""
    lines = [f"SVDQuant, preset {recipe.preset}, rank {recipe.rank}: {summary(records)}"]
    packed = [record for record in records if record.format not in FORMATS]
    if packed:
        mean, naive = (sum(getattr(r, field) for r in packed) / len(packed) for field in ("error", "error_naive"))
        worst = max(packed, key=lambda record: record.error)
        lines.append(f"W4A4 layers: mean relative error {mean:.2%} (plain rounding {naive:.2%}), largest {worst.error:.2%} in "
                     f"{worst.name}")
    return "\n\n".join([*lines, *notes, *warnings(records), table([COLUMNS, *map(row, records)])])


def as_json(records, recipe, notes=()):
    """The same as a JSON object: the recipe, and every layer's record."""
    report = {"recipe": recipe.as_dict(), "warnings": [*notes, *warnings(records)], "layers": [asdict(r) for r in records]}
    return json.dumps(report, indent=1)


def colour(error):
    """(r, g, b), 0..255, of a relative error."""
    points, colours = zip(*COLOURS)
    return tuple(int(np.interp(error, points, channel)) for channel in zip(*colours))


def picture(records):
    """The errors as a ComfyUI IMAGE, (1, H, W, 3) float32 in [0, 1]: one row per kind of layer, one column per block; plain
    rounding at the top, this model below."""
    kinds = list(dict.fromkeys(kind(r) for r in records))
    blocks = list(dict.fromkeys(r.name.rsplit(kind(r), 1)[0] for r in records))
    width = max(LABELS + CELL * len(blocks) + GAP, 560)
    panel = HEADER + CELL * len(kinds)
    canvas = Image.new("RGB", (width, 2 * panel + LEGEND + 3 * GAP), (250, 250, 248))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for top, field, title in ((GAP, "error_naive", "Plain rounding to 4 bits"), (2 * GAP + panel, "error", "This model")):
        _draw_panel(draw, font, records, kinds, blocks, top, field, title)
    _draw_legend(draw, font, 3 * GAP + 2 * panel - 8, width)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255).unsqueeze(0)


def _draw_panel(draw, font, records, kinds, blocks, top, field, title):
    mean = sum(getattr(r, field) for r in records) / max(len(records), 1)
    draw.text((GAP, top), f"{title}: mean relative error {mean:.1%}", fill=(20, 20, 20), font=font)
    for y, name in enumerate(kinds):
        draw.text((GAP, top + HEADER + y * CELL + 3), name, fill=(70, 70, 70), font=font)
    for record in records:
        x = LABELS + blocks.index(record.name.rsplit(kind(record), 1)[0]) * CELL
        y = top + HEADER + kinds.index(kind(record)) * CELL
        draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour(getattr(record, field)))


def _draw_legend(draw, font, top, width):
    last = COLOURS[-1][0]
    span = width - LABELS - 2 * GAP
    for x in range(span):
        draw.line((LABELS + x, top, LABELS + x, top + 12), fill=colour(last * x / span))
    for error, _ in COLOURS:
        draw.text((LABELS + error / last * span - 8, top + 14), f"{error:.0%}", fill=(70, 70, 70), font=font)
    draw.text((GAP, top - 2), "relative error", fill=(70, 70, 70), font=font)
