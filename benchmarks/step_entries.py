"""Result files {"device": the GPU, "entries": [...]}, into which a run is merged entry by entry, and the tables of flux_step.py.

An entry of flux_step.py: {"variant", "pixels", "batch", "date" (UTC, the same for all entries of a run), "commit", "torch", "python"}, and
either "comfyui", "weights_gb" (GPU memory of the loaded model's tensors) and the keys of flux_step.measure, or "not_measured": the reason.
"""

import json
from pathlib import Path

from kernel_time import NAMES

KEY = "variant", "pixels", "batch"


def merged(old, new, key=KEY):
    """The entries `old`, with `new` in place of those with the same values of the names `key`, or after them. A measurement is not
    replaced by the reason why there is none."""
    def values(entry):
        return json.dumps([entry[name] for name in key])

    found = {values(entry): entry for entry in old}
    for entry in new:
        if "not_measured" not in entry or "not_measured" in found.get(values(entry), entry):
            found[values(entry)] = entry
    return list(found.values())


def read(path):
    """A result file's contents, or those of an empty one. Raises ValueError for a file of another form."""
    path = Path(path)
    if not path.exists():
        return {"entries": []}
    result = json.loads(path.read_text(encoding="utf-8"))
    if "entries" not in result:
        raise ValueError(f"{path} is no result file with entries: write to another with --out.")
    return result


def add(path, device, entries, key=KEY):
    """Merge entries into a result file; key: as in `merged`. Raises ValueError if the file is of another device."""
    result = read(path)
    if result.get("device", device) != device:
        raise ValueError(f"{path} has results of {result['device']}, not of {device}: write to another file with --out.")
    result = {"device": device, "entries": merged(result["entries"], entries, key)}
    text = json.dumps(result, indent=1) + "\n"  # before the file is opened, so that an error leaves it whole
    Path(path).write_text(text, encoding="utf-8")


def cells(entry):
    """An entry's row of a table."""
    if "not_measured" in entry:
        return [entry["variant"], entry["not_measured"]]
    first = f"{entry['first_s']:.1f} s" + (f" ({entry['first_warm_s']:.1f} s)" if "first_warm_s" in entry else "")
    kinds = entry.get("kernel_ms", {})
    return [entry["variant"], f"{entry['ms']:.1f}", first, f"{entry['weights_gb']:.2f} GB", f"{entry['peak_gb']:.2f} GB",
            *(f"{kinds[kind]:.1f}" if kind in kinds else "" for kind in NAMES)]


def tables(entries):
    """The entries as Markdown, a table a size."""
    head = ["variant", "ms a step", "first step (caches full)", "weights", "peak memory", *(f"{kind}, ms" for kind in NAMES)]
    lines = []
    for pixels, batch in sorted({(entry["pixels"], entry["batch"]) for entry in entries}):
        here = [entry for entry in entries if (entry["pixels"], entry["batch"]) == (pixels, batch)]
        runs = sorted({f"{entry['date']} at {entry['commit']}" for entry in here})
        lines += [f"{pixels} x {pixels}, batch {batch}; measured {', '.join(runs)}", ""]
        lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for entry in here:
            row = cells(entry)
            lines.append(f"| {' | '.join(row + [''] * (len(head) - len(row)))} |")
        lines.append("")
    return "\n".join(lines)
