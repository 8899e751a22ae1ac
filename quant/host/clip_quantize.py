"""Quantizing the text encoders of a CLIP in the graph, from their weights alone."""

from fnmatch import fnmatchcase
from typing import NamedTuple

import comfy.model_management
import comfy.sd
import torch

from ..layers import layout
from ..quantizer import presets
from ..quantizer.text_encoder import pack
from ..text import quoted
from .clip_modules import LARGE, Encoder, dense, encoders, has_plain_forward, is_embedding, is_linear, packed, skeleton, swap
from .clip_patcher import SVDQuantClipPatcher, packed_clip
from .weights import effective_tensor

HALVES = torch.bfloat16, torch.float16, torch.float32
WORK_BYTES = 24  # bytes of GPU memory that quantizing a layer takes for each of its weights
SHOWN = 6  # names of layers in a sentence of the report


class Packed(NamedTuple):
    """An encoder, and its layers that are packed: names {within the transformer: spec}; kept: {name: why it stays in 16 bits}."""

    encoder: Encoder
    specs: dict
    kept: dict


def quantize(clip, every, exceptions, progress):
    """(QuantizedCLIP, report, a line on its size) of a CLIP, which does not change. LoRAs on it are baked in.

    every: whether encoders of less than LARGE parameters are packed too; exceptions: presets.entries of layers' names and patterns, as
    t5xxl.encoder.block.0.*, whose layers stay in 16 bits; progress: as in quantize.quantize. Raises ValueError, whose message is one
    sentence, if nothing is left to be packed or if a weight isn't finite.
    """
    check(clip)
    chosen, small = choose(encoders(clip.cond_stage_model), every, presets.entries(exceptions))
    count = sum(len(found.specs) for found in chosen)
    progress.total(count)
    _make_room(clip.patcher, chosen)
    model, records = skeleton(clip.cond_stage_model), {found.encoder.name: [] for found in chosen}
    with torch.inference_mode():
        todo = [(found, name, spec) for found in chosen for name, spec in found.specs.items()]
        for number, (found, name, spec) in enumerate(todo, 1):
            progress.step(f"layer {number} of {count}")
            records[found.encoder.name].append(_pack_layer(model, clip.patcher, found, name, spec))
        _fill(model, clip.patcher, progress)
    recipe = {found.encoder.name: {"preset": "data-free", "kept": found.kept, "layers": records[found.encoder.name]} for found in chosen}
    quantized = packed_clip(clip, model, recipe, ", ".join(found.encoder.kind.rpartition(".")[2] for found in chosen))
    before = 2 * sum(p.numel() for p in clip.cond_stage_model.parameters())
    after = quantized.patcher.model_size()
    size = f"{count} layers, {before / 1e6:.2f} MB in 16 bits -> {after / 1e6:.2f} MB ({before / after:.2f}x smaller)"
    lines = [_line(found, records[found.encoder.name]) for found in chosen]
    lines += [f"{encoder.name} stays in 16 bits: it is small ({encoder.parameters / 1e9:.2g} billion parameters)." for encoder in small]
    return quantized, "\n".join([*lines, f"{size}."]), size


def _make_room(patcher, chosen):
    """Have ComfyUI offload other models, so that the GPU has room for the largest layer's quantization."""
    largest = max(spec.in_features * spec.out_features for found in chosen for spec in found.specs.values()
                  if spec.format == layout.AWQ)
    comfy.model_management.free_memory(WORK_BYTES * largest, patcher.load_device)


def check(clip):
    """Raise ValueError unless this is a CLIP of ComfyUI's own that is not packed yet."""
    patcher, model = getattr(clip, "patcher", None), getattr(clip, "cond_stage_model", None)
    if not isinstance(clip, comfy.sd.CLIP) or not isinstance(model, torch.nn.Module):
        raise ValueError("SVDQuant quantizes the text encoders of ComfyUI's own CLIP loaders, and this CLIP is another pack's; load it "
                         "with Load CLIP, DualCLIPLoader or a checkpoint loader.")
    if isinstance(patcher, SVDQuantClipPatcher):
        raise ValueError("This CLIP is in 4 bits already; connect the one that the CLIP loader gives.")
    odd = next((name for name, p in model.named_parameters() if not p.dtype.is_floating_point), None)
    if odd is not None:
        raise ValueError(f"The CLIP's {odd} is in a packed format, as of GGUF files; load a bf16, fp16 or fp8 version of the encoder in "
                         "safetensors format.")


def choose(found, every, patterns):
    """([Packed], [Encoder] that stay in 16 bits because they are small). Raises ValueError if a pattern matches no layer, or if nothing is
    left."""
    names = [f"{encoder.name}.{name}" for encoder in found for name in (*encoder.specs, *encoder.misfits)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"No layer is called {quoted(pattern)}; layers are called like {next(iter(names), 'nothing')}, and * stands "
                             "for any text.")
    large = [encoder for encoder in found if encoder.specs and (every or encoder.parameters >= LARGE)]
    small = [encoder for encoder in found if encoder not in large]
    if not large:
        raise ValueError("The encoders of this CLIP have less than a billion parameters each, so 4 bits would save little; use the CLIP as "
                         "it is, or set encoders to all.")
    chosen = [_without(encoder, patterns) for encoder in large]
    if not any(entry.specs for entry in chosen):
        raise ValueError("These exceptions leave no layer to quantize; remove a pattern, or use the CLIP as it is.")
    return [entry for entry in chosen if entry.specs], small


def _without(encoder, patterns):
    kept = {name for name in encoder.specs if any(fnmatchcase(f"{encoder.name}.{name}", pattern) for pattern in patterns)}
    return Packed(encoder, {name: spec for name, spec in encoder.specs.items() if name not in kept},
                  dict.fromkeys(sorted(kept), "is an exception") | encoder.misfits)


def _pack_layer(model, patcher, found, name, spec):
    """Pack one layer into the copied model. Returns its record, a JSON-able dict."""
    path = f"{found.encoder.path}.{name}"
    source = patcher.model.get_submodule(path)
    weight = effective_tensor(patcher, f"{path}.weight", patcher.load_device)
    bias = None if getattr(source, "bias", None) is None else effective_tensor(patcher, f"{path}.bias", patcher.load_device)
    try:
        tensors, error = pack(weight, bias, spec)
    except ValueError as trouble:
        raise ValueError(f"The CLIP's {path} {trouble}: its file is damaged or was merged incorrectly; load an intact copy.") from None
    layer = packed(spec, source)
    layer.load_state_dict({part: tensor.to(patcher.offload_device) for part, tensor in tensors.items()}, assign=True)
    swap(model, path, layer)
    return {"name": name, "format": spec.format, "error": error}


def _fill(model, patcher, progress):
    """Give the copied model all parameters that are not packed, as they are in the CLIP with its patches, in 16 bits if they have 8.
    Linears and embeddings that are stored with scales become ordinary ones."""
    packed_already = {path for path, module in model.named_modules() if not any(p.is_meta for p in module.parameters())}
    for path, module in list(model.named_modules()):
        if path in packed_already:
            continue
        source = patcher.model.get_submodule(path)
        scaled = not type(source).__qualname__.startswith(("manual_cast.", "disable_weight_init.", "Operations."))
        if scaled and (is_linear(source) or is_embedding(source)) and has_plain_forward(source):
            module = dense(source, _half(source.weight.dtype))
            swap(model, path, module)
        for name, parameter in list(module._parameters.items()):
            progress.check()
            if parameter is None:
                continue
            if not parameter.numel():  # ComfyUI's mark of scaled fp8, whose scales are in the weights now
                del module._parameters[name]
                continue
            key = f"{path}.{name}" if path else name
            own = effective_tensor(patcher, key, patcher.offload_device)
            value = own.to(_half(patcher.model.get_parameter(key).dtype)).detach()
            value = value.clone() if value.data_ptr() == own.data_ptr() else value
            module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


def _half(dtype):
    return dtype if dtype in HALVES else torch.bfloat16


def _line(found, layers):
    """The report's lines on an encoder."""
    linears = [record["error"] for record in layers if record["format"] == layout.AWQ]
    tables = [record["error"] for record in layers if record["format"] != layout.AWQ]
    parts = [f"{len(linears)} linears in 4 bits (error of the weights {sum(linears) / len(linears):.1%})"] if linears else []
    parts += [f"the embedding in 8 bits ({tables[0]:.1%})"] if tables else []
    text = f"{found.encoder.name} ({found.encoder.kind.rpartition('.')[2]}): {', '.join(parts)}."
    reasons = {}
    for name, why in found.kept.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        text += f"\n  In 16 bits: {', '.join(names[:SHOWN])}{more}, since each {why}."
    return text
