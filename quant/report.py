"""The quantization report: what was done to each layer and what it cost, as Markdown that also reads well as text."""

from . import layout

COLUMNS = ("layer", "format", "error", "of", "tokens", "MB", "smoothing")


def summary(records):
    """One line: how much smaller the packed layers became."""
    before, after = (sum(getattr(record, field) for record in records) for field in ("bytes_before", "bytes_after"))
    return f"{len(records)} layers, {before / 1e6:.2f} MB in 16 bits -> {after / 1e6:.2f} MB ({before / after:.2f}x smaller)"


def row(record):
    """The table's cells for one LayerRecord, as strings."""
    form = "W4A16" if record.format == layout.AWQ else "W4A4"
    return (record.name, form, f"{record.error:.2%}", record.measured_on, str(record.tokens),
            f"{record.bytes_after / 1e6:.2f}", record.smoothing)


def table(rows):
    """Rows of strings as a Markdown table whose columns line up in a plain text view too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def text(records, recipe):
    """records: [LayerRecord] in model order; recipe: Recipe. Returns the report, a line a layer."""
    packed = [record for record in records if record.format != layout.AWQ]
    mean = sum(record.error for record in packed) / len(packed)
    worst = max(packed, key=lambda record: record.error)
    return "\n\n".join((
        f"SVDQuant, preset {recipe.preset}, rank {recipe.rank}: {summary(records)}",
        f"W4A4 layers: mean relative error {mean:.2%}, largest {worst.error:.2%} in {worst.name}",
        table([COLUMNS, *map(row, records)]),
    ))
