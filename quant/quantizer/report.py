"""The quantization report: the format, error and size of each layer. As Markdown that also reads well as text, and as JSON; chart.py has
the picture. All of them measure by one yardstick, the mean error of the W4A4 layers."""

import json
import re
from dataclasses import asdict
from statistics import fmean, median
from typing import NamedTuple

from ..layers import layout
from .pipeline import KEPT

COLUMNS = ("layer", "format", "rank", "error", "plain rounding", "measured on", "tokens", "MB", "smoothing")
FORMATS = {layout.AWQ: "W4A16", KEPT: "16 bit"}  # Every other format is W4A4, or W4A8 where the file says so.
BLOCK = re.compile(r".*?\.\d+\.")  # the prefix of a layer's name that names its block
STANDS_OUT = 2.0  # times the median error of the layers of its kind


class Yardstick(NamedTuple):
    """The mean relative error of the layers that are compared with plain rounding.

    title: of these layers; layers: [LayerRecord]; error, naive: the mean with this recipe, and with plain rounding.
    """

    title: str
    layers: list
    error: float
    naive: float


def form(record):
    """A layer's bits, for users."""
    return FORMATS.get(record.format, "W4A8" if record.act_bits == 8 else "W4A4")


def yardstick(records):
    """The Yardstick of [LayerRecord]: of the W4A4 layers, or of the W4A8 or the W4A16 layers if there is no other in 4 bits; None without
    any. Errors of different kinds are not averaged."""
    for title in ("W4A4", "W4A8", "W4A16"):
        layers = [record for record in records if form(record) == title]
        if layers:
            return Yardstick(f"{title} layers", layers, fmean(r.error for r in layers), fmean(r.error_naive for r in layers))
    return None


def headline(records):
    """How much closer than plain rounding the model is, in a few words. records: with a layer in 4 bits."""
    _, _, error, naive = yardstick(records)
    if not error:
        return "no rounding error"
    ratio = naive / error
    return "as close as plain rounding" if abs(ratio - 1) < 0.05 else f"{ratio:.2g}x closer than plain rounding"


def mean_errors(records):
    """The mean errors behind the headline, as text. records: with a layer in 4 bits."""
    title, _, error, naive = yardstick(records)
    return f"{title}: mean relative error {error:.2%} (plain rounding {naive:.2%})"


def worst(records, count):
    """The `count` layers of the yardstick with the largest errors, largest first."""
    return sorted(yardstick(records).layers, key=lambda record: -record.error)[:count]


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
    return (record.name, form(record), str(record.rank or "-"), f"{record.error:.2%}", f"{record.error_naive:.2%}", record.measured_on,
            str(record.tokens), f"{record.bytes_after / 1e6:.2f}", record.smoothing)


def table(rows):
    """Rows of strings as a Markdown table whose columns line up in a plain text view too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def text(records, recipe, notes=()):
    """records: [LayerRecord] in model order; recipe: Recipe; notes: sentences on the whole run. Returns the report, one line per layer."""
    branch = " in 8 bits" if recipe.branch_bits == 8 else ""
    lines = [f"SVDQuant, preset {recipe.preset}, rank {recipe.rank}{branch}: {summary(records)}"]
    if yardstick(records):
        (largest,) = worst(records, 1)
        lines.append(f"{mean_errors(records)}, {headline(records)}; largest {largest.error:.2%} in {largest.name}")
    return "\n\n".join([*lines, *notes, *warnings(records), table([COLUMNS, *map(row, records)])])


def as_json(records, recipe, notes=()):
    """The same as a JSON object: the recipe, and every layer's record."""
    measure = yardstick(records)
    mean = {"of": measure.title, "error": measure.error, "error_naive": measure.naive} if measure else None
    report = {"recipe": recipe.as_dict(), "mean": mean, "warnings": [*notes, *warnings(records)], "layers": [asdict(r) for r in records]}
    return json.dumps(report, indent=1)
