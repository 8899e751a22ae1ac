"""The quantization report: what was done to each layer and what it cost, as text."""

from . import layout


def text(records, recipe):
    """records: [LayerRecord] in model order; recipe: Recipe. Returns the report, one line a layer."""
    before = sum(record.bytes_before for record in records)
    after = sum(record.bytes_after for record in records)
    packed = [record for record in records if record.format != layout.AWQ]
    width = max(len(record.name) for record in records)
    lines = [
        f"SVDQuant, preset {recipe.preset}, rank {recipe.rank}: {len(records)} layers, "
        f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({before / after:.2f}x smaller)",
        f"W4A4 layers: mean relative error {sum(r.error for r in packed) / len(packed):.2%}, "
        f"largest {max(packed, key=lambda r: r.error).error:.2%} in {max(packed, key=lambda r: r.error).name}",
        f"{'layer':{width}}  {'format':12}  {'error':>7}  {'of':7}  {'tokens':>7}  {'MB':>8}  smoothing",
    ]
    lines += [f"{r.name:{width}}  {'W4A16' if r.format == layout.AWQ else 'W4A4':12}  {r.error:7.2%}  "
              f"{r.measured_on:7}  {r.tokens:7}  {r.bytes_after / 1e6:8.2f}  {r.smoothing}" for r in records]
    return "\n".join(lines)
