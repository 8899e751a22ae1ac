"""Describe a model file from its header: format, sizes by kind, ranks, dtypes, recipe and errors. No weight is read."""

import json
import os
from collections import Counter
from statistics import fmean, median

import torch

from .. import families
from ..layers import layout
from ..text import bounded
from . import foreign, formats, native, plain
from .card import PREFIX, SOURCE_HASH, SOURCE_TITLE

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
REST = "everything else"
# {kind of tensor: last parts of its names in packed layers, in our and comfy-kitchen's files and in Nunchaku's}.
KINDS = {
    "4-bit codes": ("weight", "qweight"),
    "scales": ("weight_scale", "weight_scale_2", "weight_zeros", "wscales", "wzeros", "wtscale", "wcscales"),
    "low-rank branches": ("weight_proj_down", "weight_proj_up", "weight_proj_scale", "lora_down", "lora_up", "proj_down", "proj_up"),
    "smoothing factors": ("weight_smooth_factor", "smooth", "smooth_orig", "smooth_factor", "smooth_factor_orig"),
    "biases": ("bias",),
    "descriptions": (layout.QUANT_KEY,),
}
KIND_OF = {leaf: kind for kind, leaves in KINDS.items() for leaf in leaves}
CARD = {f"{PREFIX}{field}": label for field, label in (
    ("title", "title"), ("author", "author"), ("license", "licence"), ("architecture", "architecture"), ("date", "saved"),
    ("hash_sha256", "tensor hash"))} | {SOURCE_TITLE: "source's title", SOURCE_HASH: "source's tensor hash"}
WORST = 3  # layers named in the summary of errors
# A file may say anything about itself, in megabytes: entries of its recipe, and characters of each text and of each line that are shown.
MAX_ENTRIES, MAX_TEXT, MAX_LINE = 64, 2000, 3000


def inspect(header):
    """A JSON-able description of a file. Raises CheckpointError, one sentence, unless it is a whole model of a supported family."""
    found = formats.identify(header)
    info = _packed(header, found) if found else _plain(header)
    return {"file": header.file, "bytes": os.path.getsize(header.path)} | info | {"card": _card(header)}


def inspect_body(header, progress=lambda done, total: None):
    """inspect, and "intact": the number of tensors that have their checksums, of a quantized file. It reads the whole file.
    progress(bytes done, of all): called often; it may raise to cancel. Raises CheckpointError also if a tensor is damaged."""
    found = formats.identify(header)
    info = inspect(header)
    return info | {"intact": found.reader.open_file(header).check(True, progress)} if found else info


def text(info):
    """The description of `inspect` as text, one fact per line."""
    lines = [_headline(info), f"{info['file']}: {_size(info['bytes'])}, {info['format']}", *_model_lines(info)]
    lines += [f"{label}: {value}" for label, value in info["card"].items()]
    if "layers" in info:
        total = sum(info["bytes_by_kind"].values())
        lines += ["sizes:", *(f"  {kind}: {_size(count)} ({count / total:.1%})" for kind, count in info["bytes_by_kind"].items())]
    lines.append("stored as: " + ", ".join(f"{dtype} {_size(count)}" for dtype, count in info["bytes_by_dtype"].items()))
    for kind, layers in info.get("layers", {}).items():
        ranks = ", ".join(f"rank {rank}: {count}" for rank, count in layers["ranks"].items())
        lines.append(f"{kind}: {layers['count']} layers" + (f" ({ranks})" if kind != layout.AWQ else ""))
    if info.get("int8_scales"):
        lines.append(f"scales: 8-bit integers times one number per row, in {info['int8_scales']} layers")
    if info.get("int8_branches"):
        lines.append(f"low-rank branches: 8 bits in {info['int8_branches']} layers, expanded to 16 when a layer runs")
    if info.get("int8_activations"):
        lines.append(f"activations: 8 bits in {info['int8_activations']} layers; in the others as the card is fastest")
    if "intact" in info:
        lines.append(f"checked: {info['intact']} tensors have the checksums with which they were saved" if info["intact"] else
                     "checked: no scale, factor or 16-bit value is NaN or infinite; there are no checksums, which only SVDQuant writes")
    if info.get("newer"):
        lines.append(info["newer"])
    # Text from a file may contain any character, even control codes for the terminal.
    return "\n".join(bounded(line, MAX_LINE) for line in [*lines, *_recipe_lines(info)])


# --- reading -------------------------------------------------------------------------------------------------------


def _packed(header, found):
    packed = found.reader.open_file(header)
    codes = "NVFP4" if any(spec.format == layout.NVFP4 for spec in packed.specs.values()) else "INT4"
    recipe = _shortened({key: value for key, value in packed.recipe.items() if key != "layers"})
    return {"bytes": packed.nbytes(), "format": f"{found.name} layout, {codes}", "family": packed.family.title,
            "model": packed.config, "source": bounded(packed.source, MAX_TEXT), "recipe": recipe,
            "errors": _errors(packed.recipe.get("layers")), "layers": _layers(packed.specs),
            "int8_scales": len(packed.computed),
            "int8_branches": sum(spec.branch_bits == 8 for spec in packed.specs.values()),
            "int8_activations": sum(spec.act_bits == 8 for spec in packed.specs.values()),
            "newer": native.newer(header), **_sizes(packed.stored, packed.modules)}


def _plain(header):
    family, prefix = plain.find(header)
    if prefix is None:
        what, config = f"{_plain_format(family, header, [])}, under diffusers' names", plain.open_diffusers(header, family)
    else:
        file = plain.open_file(header, family, prefix)
        what, config = _plain_format(family, header.within(prefix), sorted(set(map(str, file.formats.values())))), file.config
    return {"format": what, "family": family.title, "model": config, **_sizes(header.tensors, ())}


def _plain_format(family, header, formats):
    """The format of a model that is not packed, for users. formats: names of the formats of ComfyUI in which its layers are stored."""
    if formats:
        return f"a {family.title} with layers in ComfyUI's format {', '.join(formats)}"
    if any(info.dtype in EIGHT_BITS for info in header.tensors.values()):
        scaled = any(name.rpartition(".")[2] in foreign.SCALES for name in header.tensors)
        return f"a {family.title} in fp8, {'with scales' if scaled else 'without scales'}"
    return f"a {family.title} that is not quantized"


def _sizes(infos, modules):
    """Bytes by kind and by dtype. infos: {name: TensorInfo}; modules: names of the modules whose tensors are packed."""
    kinds, dtypes = Counter(), Counter()
    for name, info in infos.items():
        module, _, leaf = name.rpartition(".")
        count = info.stop - info.start
        kinds[KIND_OF.get(leaf, REST) if module in modules else REST] += count
        dtypes[str(info.dtype).removeprefix("torch.")] += count
    return {"bytes_by_kind": {kind: kinds[kind] for kind in (*KINDS, REST) if kinds[kind]},
            "bytes_by_dtype": dict(dtypes.most_common())}


def _layers(specs):
    """{format: {"count", "ranks": {rank: layers}}}."""
    found = {}
    for spec in specs.values():
        entry = found.setdefault(spec.format, {"count": 0, "ranks": Counter()})
        entry["count"] += 1
        entry["ranks"][spec.rank] += 1
    return {kind: {"count": entry["count"], "ranks": dict(sorted(entry["ranks"].items()))} for kind, entry in found.items()}


def _errors(records):
    """{format: mean, median and largest error of its layers, the mean error of plain rounding, the worst layers}; {} without records.

    records: the recipe's "layers", which may hold any JSON, since any program may have written it.
    """
    found = {}
    for record in records if isinstance(records, list) else ():
        sound = isinstance(record, dict) and isinstance(record.get("name"), str) and record.get("format") in native.MODULE_FORMATS
        if sound and all(_is_error(record.get(key)) for key in ("error", "error_naive")):
            found.setdefault(record["format"], []).append(record)
    return {kind: _summary(layers) for kind, layers in found.items()}


def _is_error(value):
    return isinstance(value, (int, float)) and 0 <= value < 1e6  # NaN satisfies neither comparison


def _summary(records):
    errors = [record["error"] for record in records]
    worst = sorted(records, key=lambda record: -record["error"])[:WORST]
    return {"layers": len(records), "mean": fmean(errors), "median": median(errors), "largest": max(errors),
            "mean_of_plain_rounding": fmean(record["error_naive"] for record in records),
            "worst": {bounded(record["name"], MAX_TEXT): record["error"] for record in worst}}


def _shortened(recipe):
    """The first entries of a recipe; a value whose JSON is too long becomes the beginning and the end of that text."""
    found = {}
    for key, value in list(recipe.items())[:MAX_ENTRIES]:
        text = value if isinstance(value, str) else json.dumps(value)
        found[bounded(key, MAX_TEXT)] = value if len(text) <= MAX_TEXT else bounded(text, MAX_TEXT)
    return found


def _card(header):
    """{label: text} of the model card in the metadata."""
    return {label: bounded(header.metadata[key], MAX_TEXT) for key, label in CARD.items() if header.metadata.get(key)}


# --- text ----------------------------------------------------------------------------------------------------------


def _headline(info):
    variant = families.of_config(info["model"]).variant(info["model"])
    stored = getattr(torch, next(iter(info["bytes_by_dtype"])))
    # The integers of ComfyUI's own formats hold codes of 4 or 8 bits.
    bits = "4-bit" if "layers" in info else f"{8 * stored.itemsize}-bit" if stored.is_floating_point else "quantized"
    return f"{bits} {variant}, opens with SVDQuant Load Model"


def _model_lines(info):
    model = info["model"]
    figures = families.of_config(model).figures(model)
    lines = [f"{info['family']}: {figures}"]
    return lines + ([f"made from: {info['source']}"] if info.get("source") not in (None, "", info["file"]) else [])


def _recipe_lines(info):
    lines, recipe = [], info.get("recipe", {})
    calibration = recipe.get("calibration")
    plain = {key: value for key, value in recipe.items() if key != "calibration" and value not in (None, [], "")}
    if plain:
        lines.append("recipe: " + ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}"
                                            for key, value in plain.items()))
    if isinstance(calibration, dict):
        extra = ", ".join(f"{key} {json.dumps(value)}" for key, value in calibration.items() if key != "prompts")
        lines.append(f"calibrated on: {calibration.get('prompts')} prompts" + (f" ({extra})" if extra else ""))
    for kind, errors in info.get("errors", {}).items():
        worst = ", ".join(f"{name} {error:.2%}" for name, error in errors["worst"].items())
        lines.append(f"error of {kind}: mean {errors['mean']:.2%}, median {errors['median']:.2%} (plain rounding "
                     f"{errors['mean_of_plain_rounding']:.2%}) of {errors['layers']} layers; largest: {worst}")
    return lines


def _size(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
