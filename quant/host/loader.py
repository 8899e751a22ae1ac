"""Models from files: a quantized one into packed layers, an ordinary one through ComfyUI's own loader."""

import comfy.ldm.flux.layers
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
from comfy import quant_ops

from ..checkpoint import card, comfy_kitchen, foreign, formats, native
from ..checkpoint.header import CheckpointError, read_header
from ..checkpoint.nunchaku import names as nunchaku_names
from ..layers import layout
from ..layers.linear import set_act_bits, warm_up
from . import build, heap
from .attachments import CARD, SOURCE
from .patcher import SVDQuantModelPatcher

SCALED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")  # ComfyUI's ways of storing fp8 with a scale


def load_model(path, compute_dtype=None, act_bits=0, name=None):
    """A ModelPatcher from a file: a quantized FLUX in one of formats.FORMATS, or an ordinary one in bf16, fp16 or fp8.

    compute_dtype: torch.bfloat16, torch.float16, or None for ComfyUI's choice on this device; act_bits: of W4A4 layers' inputs
    (linear.SVDQuantLinear); name: of the file, which the MODEL keeps beside the file's card (attachments.py).
    Raises CheckpointError, one sentence, on any file that is not a whole FLUX.1.
    """
    header = read_header(path)
    found = formats.identify(header)
    patcher = _load_packed(found.reader.open_file(header), compute_dtype, act_bits) if found else _load_plain(header, compute_dtype)
    patcher.set_attachments(CARD, card.of_source(header.metadata))
    if name is not None:
        patcher.set_attachments(SOURCE, name)
    return patcher


def check_file(header):
    """Raise CheckpointError where load_model would, less for what this ComfyUI can't read and for values of weights: no weight is read."""
    if found := formats.identify(header):
        _empty_packed(found.reader.open_file(header))
    else:
        _empty_plain(header, _plain_prefix(header))


# --- files ---------------------------------------------------------------------------------------------------------


def _load_packed(packed, compute_dtype, act_bits):
    model = _empty_packed(packed, compute_dtype)
    set_act_bits(model, act_bits)
    warm_up(model, comfy.model_management.get_torch_device(), model.get_dtype())  # compiles while the file is read
    heap.give_back()  # what the model before left
    if packed.prefix is None:
        build.fill(model, packed.tensors())
    else:
        mapped = {name: packed.prefix + name for name in packed.shapes if name not in packed.computed}
        _load_weights(model, packed.header, mapped, {name: packed.read(name) for name in packed.shapes if name in packed.computed})
    patcher = build.make_patcher(model, SVDQuantModelPatcher)
    patcher.source, patcher.recipe = packed.source, packed.recipe
    return patcher


def _empty_packed(packed, compute_dtype=None):
    """The empty model of a PackedFile. Raises CheckpointError where the file's tensors are not all of the model's, and no others."""
    header = packed.header
    model_config = _detect(header, packed.shapes, packed.config)
    try:
        model = build.empty_model(model_config, packed.specs, compute_dtype)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{header.file} does not fit its own configuration ({error}); save or download it "
                              "again.") from error
    _check_complete(header, model, packed.shapes, exact=True)
    return model


def _load_plain(header, compute_dtype):
    prefix = _plain_prefix(header)
    _check_formats(header, prefix or "")
    names, shapes, model = _empty_plain(header, prefix, compute_dtype)
    if _core_knows({stored.removeprefix(prefix): header.tensors[stored].shape for stored in names.values()} or shapes):
        return _load_by_core(header, compute_dtype)
    # ComfyUI before 0.9 takes every FLUX for one of 24 heads; a FLUX of another width is loaded here.
    scaled = [name for name in header.tensors if name.endswith(SCALED)]
    if scaled:
        raise CheckpointError(f"{header.file} has scaled weights ({scaled[0]}), which this ComfyUI reads only for FLUX.1 of the "
                              "usual width; update ComfyUI, or take a bf16 version of the model.")
    if prefix is None:
        build.fill(model, comfy.model_detection.convert_diffusers_mmdit(comfy.utils.load_torch_file(header.path, safe_load=True), ""))
    else:
        _load_weights(model, header, names)
    return build.make_patcher(model, comfy.model_patcher.ModelPatcher)


def _plain_prefix(header):
    """foreign.flux_prefix; None for a FLUX.1 in diffusers' naming. Raises CheckpointError on anything else."""
    prefix = foreign.flux_prefix(header)
    if prefix is None and not foreign.is_diffusers_flux(header):
        what = foreign.kind(header) or "not a FLUX.1 model"
        raise CheckpointError(f"{header.file} is {what}; choose a FLUX.1 model in safetensors format.")
    return prefix


def _empty_plain(header, prefix, compute_dtype=None):
    """({model's name: file's}, {model's name: shape}, the empty model) of a file that is not quantized. Raises CheckpointError where the
    model has tensors that the file has not, or others."""
    if prefix is None:
        names, shapes = {}, _from_diffusers(header)
    else:
        # Under the names that every ComfyUI knows; before 0.14 it did not know the norms' newer ones.
        names = {build.stored_name(name.removeprefix(prefix)): name for name in header.tensors if name.startswith(prefix)}
        shapes = {name: header.tensors[stored].shape for name, stored in names.items()}
    model = build.empty_model(_detect(header, shapes, {}), {}, compute_dtype)
    _check_complete(header, model, shapes, exact=False)
    return names, shapes, model


def _check_formats(header, prefix):
    """Raise CheckpointError where a layer is in a format of ComfyUI's that this one does not read: it would be ignored in silence, or
    end in a KeyError."""
    inside = header.within(prefix)
    described = any(name.endswith(f".{layout.QUANT_KEY}") for name in inside.tensors)
    known = {} if described and not hasattr(comfy.utils, "convert_old_quants") else quant_ops.QUANT_ALGOS  # it came with those
    for layer, conf in comfy_kitchen.descriptions(inside).items():
        if f"{layer.removeprefix(prefix)}.weight" in inside.tensors and conf.get("format") not in known:
            raise CheckpointError(f"{header.file} has layers in the format {conf.get('format')!r} ({layer}), which this ComfyUI does not "
                                  "read; update ComfyUI, or choose a bf16, fp16 or fp8 version of the model.")


def _from_diffusers(header):
    """{ComfyUI's name: shape} of a FLUX.1 in diffusers' naming. Raises CheckpointError unless the parts of each tensor of
    ComfyUI's are there and fit: what is, is joined without a word."""
    depths = {key: nunchaku_names.depth(header.tensors, kind) for key, kind in (
        ("depth", nunchaku_names.DOUBLE), ("depth_single_blocks", nunchaku_names.SINGLE))}
    config = depths | {"hidden_size": (*header.tensors["x_embedder.weight"].shape, 0)[0]}
    targets = comfy.utils.flux_to_diffusers(config)
    parts = {stored: target for stored, target in targets.items() if not isinstance(target, str) and target[1]}
    for name in ("x_embedder.bias", *parts):
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


def _load_by_core(header, compute_dtype):
    patcher = comfy.sd.load_diffusion_model(header.path)
    if compute_dtype is not None:
        patcher.set_model_compute_dtype(compute_dtype)
    return patcher


def _load_weights(model, header, names, computed=None):
    """Put the file's tensors into an empty model, as they are: no copy, no cast. names: {model's name: file's}; computed: {name:
    tensor} of those that the file does not have as they are."""
    tensors = comfy.utils.load_torch_file(header.path, safe_load=True)
    build.fill(model, {name: tensors[stored] for name, stored in names.items()} | (computed or {}))


def _core_knows(shapes):
    """Whether this ComfyUI's own detection gets the number of heads right."""
    config = comfy.model_detection.detect_unet_config(build.shapes_as_tensors(shapes), "")
    return config is not None and config["num_heads"] * sum(config["axes_dim"]) == config["hidden_size"]


def _detect(header, shapes, stored):
    """ComfyUI's model configuration for a FLUX with tensors {name: shape}; `stored` (from the file) has the last word.

    Detection comes first because each ComfyUI version wants keys of its own in a configuration.
    """
    tensors = build.shapes_as_tensors(shapes)
    for name in ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"):
        shape = shapes.get(name, ())
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{header.file} has no matrix {name}; the file is incomplete, download or save it "
                                  "again.")
    config = comfy.model_detection.detect_unet_config(tensors, "")
    if config is None or config.get("image_model") != "flux":
        raise CheckpointError(f"{header.file} is not a FLUX.1 model; choose a FLUX.1 model in safetensors format.")
    _apply_stored(header, config, stored)
    model_config = comfy.model_detection.model_config_from_unet_config(config, tensors)
    if model_config is None:
        raise CheckpointError(f"{header.file} has a FLUX configuration that this ComfyUI does not know; update ComfyUI.")
    return model_config


def _apply_stored(header, config, stored):
    """Take from a file's own configuration what no shape tells; where a shape tells, the two must agree."""
    for key, value in stored.items():
        if key in build.UNSEEN_KEYS:
            if not _is_sound(value, config[key]):
                raise CheckpointError(f"{header.file} says {key} = {value!r} in its configuration, which can't be; save or "
                                      "download it again.")
            config[key] = value
    if config["hidden_size"] % sum(config["axes_dim"]):
        raise CheckpointError(f"{header.file} says axes_dim = {config['axes_dim']} in its configuration, which does not "
                              f"divide its hidden_size {config['hidden_size']}; save or download it again.")
    config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
    for key, value in stored.items():
        if key in build.CONFIG_KEYS and config.get(key) != value:
            raise CheckpointError(f"{header.file} says {key} = {value!r} in its configuration and its tensors say "
                                  f"{config.get(key)!r}; save or download it again.")


def _is_sound(value, usual):
    """Whether a stored number (or list of them) is of the kind that FLUX has there; `usual` is what FLUX.1 has."""
    if isinstance(usual, (list, tuple)):
        return isinstance(value, list) and len(value) == len(usual) and all(map(_is_sound, value, usual))
    kinds = (int, float) if isinstance(usual, float) else int
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1e6


def _check_complete(header, model, shapes, exact):
    """Compare the file's tensors with the model's: none missing, every shape right and, if `exact`, none left over."""
    found = model.model_config.process_unet_state_dict(build.shapes_as_tensors(shapes))
    expected = model.diffusion_model.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{header.file} lacks tensor {name}; the file is incomplete, download or save it "
                                  "again.")
        if found[name].shape != tensor.shape:
            raise CheckpointError(f"{header.file}: tensor {name} has shape {list(found[name].shape)} where "
                                  f"{list(tensor.shape)} is due; the file does not fit a FLUX.1 of its size, download "
                                  "or save it again.")
    left_over = [name for name in found if name not in expected]
    if exact and left_over:
        raise CheckpointError(f"{header.file} has tensor {left_over[0]}, which its model has no place for; download or "
                              "save it again.")
