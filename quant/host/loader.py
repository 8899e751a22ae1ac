"""Models from files: a quantized one into packed layers, an ordinary one through ComfyUI's own loader."""

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy import quant_ops

from .. import families
from ..checkpoint import card, comfy_kitchen, core_formats, foreign, formats, native
from ..checkpoint.header import CheckpointError, read_header
from ..checkpoint.nunchaku import names as nunchaku_names
from ..layers import layout
from ..layers.preparation import set_act_bits, warm_up
from . import build, heap
from .attachments import CARD, SOURCE
from .patcher import SVDQuantModelPatcher

SCALED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")  # ComfyUI's ways of storing fp8 with a scale


def load_model(path, compute_dtype=None, act_bits=0, name=None):
    """A ModelPatcher from a file: a quantized model in one of formats.FORMATS, or an ordinary one in bf16, fp16 or fp8.

    compute_dtype: torch.bfloat16, torch.float16, or None for ComfyUI's choice on this device; act_bits: bits of W4A4 layers' activations
    (linear.SVDQuantLinear); name: the file's name, which the MODEL keeps beside the file's card (attachments.py).
    Raises CheckpointError, whose message is one sentence, if the file is not a complete model of a known family.
    """
    header = read_header(path)
    found = formats.identify(header)
    patcher = _load_packed(found.reader.open_file(header), compute_dtype, act_bits) if found else _load_plain(header, compute_dtype)
    patcher.set_attachments(CARD, card.of_source(header.metadata))
    if name is not None:
        patcher.set_attachments(SOURCE, name)
    return patcher


def check_file(header):
    """Raise CheckpointError if load_model would. It reads no weights, and it does not check whether this ComfyUI reads the format."""
    if found := formats.identify(header):
        _empty_packed(found.reader.open_file(header))
    else:
        _empty_plain(header, *_find_plain(header))


# --- files ---------------------------------------------------------------------------------------------------------


def _load_packed(packed, compute_dtype, act_bits):
    model = _empty_packed(packed, compute_dtype)
    set_act_bits(model, act_bits)
    warm_up(model, comfy.model_management.get_torch_device(), model.get_dtype(), packed.family.tokens)  # compiles while the file is read
    heap.give_back()  # the memory of the previous model
    if packed.prefix is None:
        build.fill(model, packed.tensors())
    else:
        mapped = {name: packed.prefix + name for name in packed.shapes if name not in packed.computed}
        _load_weights(model, packed.header, mapped, {name: packed.read(name) for name in packed.shapes if name in packed.computed})
    patcher = build.make_patcher(model, SVDQuantModelPatcher)
    patcher.source, patcher.recipe = packed.source, packed.recipe
    return patcher


def _empty_packed(packed, compute_dtype=None):
    """The empty model of a PackedFile. Raises CheckpointError unless the file has exactly the model's tensors."""
    header = packed.header
    model_config = _detect(header, packed.family, packed.shapes, packed.config)
    try:
        model = build.empty_model(model_config, packed.specs, compute_dtype)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{header.file} does not fit its own configuration ({error}); save or download it "
                              "again.") from error
    _check_complete(header, packed.family, model, packed.shapes)
    return model


def _load_plain(header, compute_dtype):
    """A patcher for a file in 16 or 8 bits. ComfyUI's own loader reads it if its detection of the model is right; otherwise ours does."""
    family, prefix = _find_plain(header)
    _check_formats(header, prefix or "")
    names, shapes, model = _empty_plain(header, family, prefix, compute_dtype)
    widened = _widened(header, _diffusers_targets(header, family)) if prefix is None else {}
    as_stored = {stored.removeprefix(prefix): header.tensors[stored].shape for stored in names.values()}
    if not widened and _core_agrees(family, as_stored or shapes):
        return _load_by_core(header, compute_dtype)
    scaled = [name for name in header.tensors if name.endswith(SCALED) and name.startswith(prefix or "")
              and not name.startswith(foreign.OTHER_MODELS)]
    if scaled:
        raise CheckpointError(f"{header.file} has scaled weights ({scaled[0]}), which this ComfyUI reads only for a {family.title} of the "
                              "usual width; update ComfyUI, or use a bf16 version of the model.")
    if prefix is None:
        tensors = comfy.utils.load_torch_file(header.path, safe_load=True)
        tensors |= {name: tensors[name].to(dtype) for name, dtype in widened.items()}
        build.fill(model, comfy.model_detection.convert_diffusers_mmdit(tensors, ""))
    else:
        _load_weights(model, header, names)
    return build.make_patcher(model, comfy.model_patcher.ModelPatcher)


def _find_plain(header):
    """(Family, prefix of its tensors) of a file that is not quantized; the prefix is None for diffusers' naming. Raises CheckpointError if
    the file holds no model of a family."""
    family, prefix = foreign.find(header) or (foreign.find_diffusers(header), None)
    if family is None:
        what = foreign.kind(header) or f"not a {families.TITLES} model"
        raise CheckpointError(f"{header.file} is {what}; choose a {families.TITLES} model in safetensors format.")
    return family, prefix


def _empty_plain(header, family, prefix, compute_dtype=None):
    """({model's name: file's}, {model's name: shape}, the empty model) of a file that is not quantized. Raises CheckpointError unless the
    file has exactly the model's tensors. The first dict is empty for diffusers' naming."""
    if prefix is None:
        names, shapes = {}, _from_diffusers(header, family)
    else:
        # These are the names that every ComfyUI reads; newer versions have renamed some parameters.
        names = {family.stored_name(name.removeprefix(prefix)): name for name in header.tensors if name.startswith(prefix)}
        shapes = {name: header.tensors[stored].shape for name, stored in names.items()}
    model = build.empty_model(_detect(header, family, shapes, {}), {}, compute_dtype)
    inside = header.within(prefix or "")
    described = {f"{layer.removeprefix(prefix or '')}.weight": conf.get("format")
                 for layer, conf in comfy_kitchen.descriptions(inside).items()}
    for weight, kind in described.items():
        if weight in inside.tensors:
            core_formats.check(header, prefix or "", weight.removesuffix(".weight"), kind)
    # foreign.find has checked the tensors that belong to a layer, such as its scales.
    others = {name for name, stored in names.items() if _is_beside(stored.removeprefix(prefix), inside.tensors, prefix)}
    _check_complete(header, family, model, {name: shape for name, shape in shapes.items() if name not in others}, described)
    return names, shapes, model


def _is_beside(name, names, prefix):
    """Whether a tensor is not a weight or bias of the diffusion model: a layer's scales and the like, or another model's tensor."""
    in_layer = foreign.layer_of(name, names) and not name.endswith((".weight", ".bias"))
    return in_layer or name == foreign.MARK or not prefix and name.startswith(foreign.OTHER_MODELS)


def _check_formats(header, prefix):
    """Raise CheckpointError if a layer is in a ComfyUI format that this ComfyUI does not read: it would ignore the format in silence, or
    raise KeyError."""
    inside = header.within(prefix)
    described = any(name.endswith(f".{layout.QUANT_KEY}") for name in inside.tensors)
    # Descriptions and convert_old_quants came with the same version of ComfyUI.
    known = {} if described and not hasattr(comfy.utils, "convert_old_quants") else quant_ops.QUANT_ALGOS
    for layer, conf in comfy_kitchen.descriptions(inside).items():
        if f"{layer.removeprefix(prefix)}.weight" in inside.tensors and conf.get("format") not in known:
            others = "a bf16 version, or an fp8 one without descriptions" if described else "a bf16, fp16 or fp8 version"
            raise CheckpointError(f"{header.file} has layers in the format {conf.get('format')!r} ({layer}), which this ComfyUI does not "
                                  f"read and newer ones may; update ComfyUI, or choose {others} of the model.")


def _from_diffusers(header, family):
    """{ComfyUI's name: shape} of a model in diffusers' naming. Raises CheckpointError unless the file has all the parts of each of
    ComfyUI's tensors, in the right shapes: ComfyUI does not report a missing part."""
    theirs, targets = family.diffusers, _diffusers_targets(header, family)
    parts = {stored: target for stored, target in targets.items() if not isinstance(target, str) and target[1]}
    foreign.check_diffusers(header, family, targets)
    for name in (*theirs.needed, *parts):
        if name not in header.tensors:
            raise CheckpointError(f"{header.file} lacks tensor {name}; the file is incomplete, download or save it again.")
    tensors = build.shapes_as_tensors({name: info.shape for name, info in header.tensors.items()})
    try:
        shapes = {name: tensor.shape for name, tensor in comfy.model_detection.convert_diffusers_mmdit(tensors, "").items()}
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{header.file} has tensors that do not fit each other ({error}); download it again.") from error
    for name, (target, (_, _, rows), *_) in parts.items():
        native.check_tensor(header, name, (rows, *shapes[target][1:]))
    return shapes


def _diffusers_targets(header, family):
    """ComfyUI's conversion table for a file's numbers of blocks. It maps diffusers' names to ComfyUI's names, or to tuples (ComfyUI's name,
    (dimension, start, length) within that tensor or None, ...)."""
    theirs = family.diffusers
    config = {key: nunchaku_names.depth(header.tensors, blocks) for key, blocks in theirs.blocks.items()}
    config["hidden_size"] = (*header.tensors[theirs.width].shape, 0)[0]
    return getattr(comfy.utils, theirs.names)(config)


def _widened(header, targets):
    """{diffusers' name: dtype} of tensors to convert before ComfyUI joins them. ComfyUI stores the joined tensor in the type of one of its
    parts; if that is fp8, the values of the other parts would be clipped."""
    joined = {}
    for stored, target in targets.items():
        if not isinstance(target, str) and target[1] and stored in header.tensors:
            joined.setdefault(target[0], []).append(stored)
    widened = {}
    for parts in joined.values():
        dtypes = {header.tensors[name].dtype for name in parts}
        wide = {dtype for dtype in dtypes if dtype.itemsize > 1}
        if len(dtypes) > 1:
            common = next(iter(wide or {torch.bfloat16})) if len(wide) < 2 else torch.float32
            widened |= dict.fromkeys(parts, common)
    return widened


def _load_by_core(header, compute_dtype):
    patcher = comfy.sd.load_diffusion_model(header.path)
    if compute_dtype is not None:
        patcher.set_model_compute_dtype(compute_dtype)
    return patcher


def _load_weights(model, header, names, computed=None):
    """Put the file's tensors into an empty model, without a copy or a cast. names: {model's name: file's}; computed: {name: tensor} of the
    tensors that are computed from others of the file."""
    tensors = comfy.utils.load_torch_file(header.path, safe_load=True)
    build.fill(model, {name: tensors[stored] for name, stored in names.items()} | (computed or {}))


def _core_agrees(family, shapes):
    """Whether this ComfyUI's own detection finds the right configuration: before 0.9 it assumes 24 heads for every FLUX model."""
    detected = comfy.model_detection.detect_unet_config(build.shapes_as_tensors(shapes), "")
    if detected is None:
        return False
    config = family.configuration.of({family.stored_name(name): shape for name, shape in shapes.items()})
    return all(detected.get(key, value) == value for key, value in config.items())


def _detect(header, family, shapes, stored):
    """ComfyUI's model configuration for a family's model with tensors {name: shape}; stored: the configuration in its file.

    It starts from ComfyUI's detection, because each version of ComfyUI needs some keys of its own.
    """
    try:
        config = family.configuration.of(shapes, stored)
    except ValueError as error:
        raise CheckpointError(f"{header.file} {error}; the file is incomplete or damaged, download or save it again.") from None
    tensors = build.shapes_as_tensors(shapes)
    detected = comfy.model_detection.detect_unet_config(tensors, "")
    if detected is None or detected.get("image_model") != family.image_model:
        raise CheckpointError(f"{header.file} is not a {family.title} model; choose a {families.TITLES} model in safetensors format.")
    model_config = comfy.model_detection.model_config_from_unet_config(detected | config, tensors)
    if model_config is None:
        raise CheckpointError(f"{header.file} has a {family.title} configuration that this ComfyUI does not know; update ComfyUI.")
    return model_config


def _check_complete(header, family, model, shapes, described=None):
    """Raise CheckpointError unless the file has exactly the model's tensors, in the right shapes. described: {name of a weight: the ComfyUI
    format in which it is stored}."""
    found = model.model_config.process_unet_state_dict(build.shapes_as_tensors(shapes))
    expected = model.diffusion_model.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{header.file} lacks tensor {name}; the file is incomplete, download or save it "
                                  "again.")
        stored, described_as = tuple(tensor.shape), (described or {}).get(name)
        expected_shape = core_formats.stored_shape(described_as, stored) if described_as else stored
        if expected_shape is not None and tuple(found[name].shape) != expected_shape:
            raise CheckpointError(f"{header.file}: tensor {name} has shape {list(found[name].shape)} where "
                                  f"{list(expected_shape)} is expected; the file does not fit a {family.title} of its size, "
                                  "download or save it again.")
    left_over = next((name for name in found if name not in expected), None)
    if left_over is not None:
        raise CheckpointError(f"{header.file} has tensor {left_over}, which its model does not have; download or "
                              "save it again, or choose another version of the model.")
