"""Models from files: a quantized one into packed layers, an ordinary one through ComfyUI's own loader."""

from concurrent.futures import ThreadPoolExecutor

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy import quant_ops

from ...cuda import ops
from .. import families
from ..checkpoint import card, comfy_kitchen, completeness, foreign, formats, native, plain
from ..checkpoint.header import CheckpointError, read_header
from ..checkpoint.write import size_text
from ..families.discovered import DiscoveredFamily
from ..layers import layout
from ..layers.linear import NVFP4Linear
from ..layers.preparation import of_other_sizes, set_act_bits, warm_up
from . import allocation_log, build, heap, mapping, model_folder
from .attachments import CARD, SOURCE
from .fused_blocks import preparations
from .model_family import family_of
from .patcher import SVDQuantModelPatcher

SCALED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")  # ComfyUI's ways of storing fp8 with a scale


def load_model(path, compute_dtype=None, act_bits=0, name=None):
    """A ModelPatcher from a file: a quantized model in one of formats.FORMATS, or an ordinary one in bf16, fp16 or fp8.

    compute_dtype: torch.bfloat16, torch.float16, or None for ComfyUI's choice on this device; act_bits: bits of W4A4 layers' activations
    (linear.SVDQuantLinear); name: the file's name, which the MODEL keeps beside the file's card (attachments.py).
    Raises CheckpointError, whose message is one sentence, if the file is not a complete model of a known family.
    """
    return load_described(path, compute_dtype, act_bits, name)[0]


def load_described(path, compute_dtype=None, act_bits=0, name=None):
    """load_model, and one line for users: format, precision, the code that the layers run on this device, memory."""
    header = read_header(path)
    header.check_extension()
    found = formats.identify(header)
    patcher = _load_packed(found.reader.open_file(header), compute_dtype, act_bits) if found else _load_plain(header, compute_dtype)
    patcher.set_attachments(CARD, card.of_source(header.metadata))
    if name is not None:
        patcher.set_attachments(SOURCE, name)
    newer = native.newer(header)
    return patcher, _summary(patcher, found, act_bits) + (newer and f". {newer}")


def _summary(patcher, found, act_bits):
    """The line of load_described. found: the file's formats.Format, or None."""
    model, size = patcher.model, size_text(patcher.model_size())
    variant = family_of(model).variant(build.stored_config(model))
    if found is None:
        return f"{variant}, not quantized, {str(model.get_dtype()).removeprefix('torch.')}, {size}"
    codes, path = "INT4", ops.kernel_path(comfy.model_management.get_torch_device(), act_bits)
    if any(isinstance(layer, NVFP4Linear) for layer in model.modules()):
        codes, path = "NVFP4", "PyTorch, slow, since there are no kernels for NVFP4"
        if act_bits:
            path += f"; its activations are always NVFP4, so activations = int{act_bits} has no effect"
    return f"4-bit {variant}, {found.name} layout, {codes}, {size}; {path}"


def check_kind(name):
    """Raise an error if the file that ComfyUI opens under this name is missing, or is no model of a known family: ValueError or
    CheckpointError. It reads the header only, and checks less than check_file. name: None if it is still unknown."""
    if name is not None:
        header = read_header(model_folder.existing_path(name))
        if formats.identify(header) is None:
            plain.find(header)


def check_file(header):
    """Raise CheckpointError if load_model would. It reads no weights, and it does not check whether this ComfyUI reads the format."""
    header.check_extension()
    if found := formats.identify(header):
        _empty_packed(found.reader.open_file(header))
    else:
        _empty_plain(header, *plain.find(header))


# --- files ---------------------------------------------------------------------------------------------------------


def _load_packed(packed, compute_dtype, act_bits):
    with ThreadPoolExecutor(1) as beside:  # its threads read and compute while this one builds the model
        sound = beside.submit(packed.check, whole=False)
        patcher = _filled(packed, compute_dtype, act_bits)
        sound.result()
    return patcher


def _filled(packed, compute_dtype, act_bits):
    """The patcher of a PackedFile."""
    model = _empty_packed(packed, compute_dtype)
    set_act_bits(model, act_bits)
    device, dtype = comfy.model_management.get_torch_device(), model.get_dtype()
    if not allocation_log.forbids_threads():
        warm_up(model, device, dtype, of_other_sizes(packed.family.tokens),  # compiles while the file is read
                preparations(model.diffusion_model, dtype, device, packed.family.tokens))
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
    """The empty model of a PackedFile."""
    if not isinstance(packed.family, DiscoveredFamily):
        return build.empty_model(_detect(packed.header, packed.family, packed.shapes, packed.config), packed.specs, compute_dtype)
    # The host finds the whole configuration in the shapes, and so needs those of the packed layers' linears.
    model_config = _detect(packed.header, packed.family, packed.family.tensors(packed.config), packed.config)
    model = build.empty_model(model_config, packed.specs, compute_dtype, packed.family)
    own = {name: tensor.shape for name, tensor in model.diffusion_model.state_dict().items()}
    if own != packed.shapes:
        odd = min(name for name in own.keys() | packed.shapes.keys() if own.get(name) != packed.shapes.get(name))
        raise CheckpointError(f"{packed.header.file} is a {packed.family.title} whose {odd} is not as in this ComfyUI's; update ComfyUI, "
                              "or quantize the model again.")
    return model


def _load_plain(header, compute_dtype):
    """A patcher for a file in 16 or 8 bits. ComfyUI's own loader reads it if its detection of the model is right; otherwise ours does."""
    family, prefix = plain.find(header)
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
        tensors = _mapped(header)
        tensors |= {name: tensors[name].to(dtype) for name, dtype in widened.items()}
        build.fill(model, comfy.model_detection.convert_diffusers_mmdit(tensors, ""))
    else:
        _load_weights(model, header, names)
    return build.make_patcher(model, comfy.model_patcher.ModelPatcher)


def _empty_plain(header, family, prefix, compute_dtype=None):
    """({model's name: file's}, {model's name: shape}, the empty model) of a file that is not quantized. Raises CheckpointError unless the
    file has exactly the model's tensors."""
    if prefix is None:
        config = plain.open_diffusers(header, family)
        names, shapes = {}, _from_diffusers(header, family)
        completeness.check(header, family, config, shapes)
    else:
        file = plain.open_file(header, family, prefix)
        names, shapes, config = file.names, file.shapes, file.config
    return names, shapes, build.empty_model(_detect(header, family, shapes, config), {}, compute_dtype)


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
    """{ComfyUI's name: shape} of a model in diffusers' naming, after ComfyUI's conversion."""
    tensors = build.shapes_as_tensors({name: info.shape for name, info in header.tensors.items()})
    joined = comfy.model_detection.convert_diffusers_mmdit(tensors, "")
    return {family.stored_name(name): tensor.shape for name, tensor in joined.items()}


def _diffusers_targets(header, family):
    """ComfyUI's conversion table for a file's numbers of blocks. It maps diffusers' names to ComfyUI's names, or to tuples (ComfyUI's name,
    (dimension, start, length) within that tensor or None, ...)."""
    return getattr(comfy.utils, family.diffusers.names)(completeness.check_diffusers(header, family))


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
    with header.reading():
        patcher = comfy.sd.load_diffusion_model(header.path)
    if compute_dtype is not None:
        patcher.set_model_compute_dtype(compute_dtype)
    return patcher


def _mapped(header):
    """{name in the file: tensor} of a file, as ComfyUI opens it: mapped, or copied with --disable-mmap."""
    with header.opened(buffering=0), header.reading():  # the file that is mapped is the one whose header was checked
        return comfy.utils.load_torch_file(header.path, safe_load=True)


def _load_weights(model, header, names, computed=None):
    """Put the file's tensors into an empty model, without a copy or a cast. names: {model's name: file's}; computed: {name: tensor} of the
    tensors that are computed from others of the file."""
    tensors = _mapped(header)
    build.fill(model, {name: tensors[stored] for name, stored in names.items()} | (computed or {}))
    model.svdquant_mapping = mapping.Mapping(header, tensors.values())


def _core_agrees(family, shapes):
    """Whether this ComfyUI's own detection finds the right configuration: before 0.9 it assumes 24 heads for every FLUX model."""
    detected = comfy.model_detection.detect_unet_config(build.shapes_as_tensors(shapes), "")
    if detected is None:
        return False
    config = family.configuration.of({family.stored_name(name): shape for name, shape in shapes.items()})
    assumed = family.configuration.assumed
    return all(detected.get(key, assumed.get(key, value)) == value for key, value in config.items())


def _detect(header, family, shapes, config):
    """ComfyUI's model configuration for a family's model with tensors {name: shape} and the family's configuration.

    It starts from ComfyUI's detection, because each version of ComfyUI needs some keys of its own.
    """
    tensors, prefixes = build.shapes_as_tensors(shapes), family.signature.prefixes(header.tensors.keys())
    for name in family.configuration.values(config):
        stored = next((prefix + name for prefix in prefixes if prefix + name in header.tensors), None)
        tensors |= {name: header.read_tensor(stored)} if stored else {}
    detected = comfy.model_detection.detect_unet_config(tensors, "")
    if detected is None or detected.get("image_model") != family.image_model:
        raise CheckpointError(f"{header.file} is not a {family.title} model; choose a {families.TITLES} model in safetensors format.")
    if unknown := family.configuration.unknown_to(detected, config):
        raise CheckpointError(f"{header.file} is a {family.variant(config)}, whose {unknown} this ComfyUI does not know; update ComfyUI.")
    model_config = comfy.model_detection.model_config_from_unet_config(family.configuration.added_to(detected, config), tensors)
    if model_config is None:
        raise CheckpointError(f"{header.file} has a {family.title} configuration that this ComfyUI does not know; update ComfyUI.")
    return model_config
