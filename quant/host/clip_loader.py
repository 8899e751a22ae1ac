"""A CLIP from files of text encoders, one or more of which SVDQuant has quantized.

ComfyUI itself builds the encoders: it detects them by the names and shapes of the files' tensors. It gets the shapes of a 16-bit file, as
tensors on the meta device, and operations whose large layers take no memory (_building). Then the packed layers and the files' own tensors
take the places of those.
"""

import inspect

import comfy.sd
import comfy.utils
import folder_paths
import nodes
import torch

from ..checkpoint import foreign, text_encoder
from ..checkpoint.header import CheckpointError, read_header
from ..checkpoint.write import size_text
from . import clip_modules
from .clip_patcher import packed_clip
from .operations import Operations

SMALL = 1 << 22  # elements up to which a layer is built as ComfyUI builds it, with the values that its class gives it
# The host's devices have no index, so this one is none of them: ComfyUI moves a model to its device when the two are equal, and this model
# has no weights yet.
BUILT_ON = torch.device("cpu", 0)


def types():
    """{type of ComfyUI's CLIP loaders: its comfy.sd.CLIPType}. Some types have none of their own, and stand for the first."""
    names = [name for loader in (nodes.CLIPLoader, nodes.DualCLIPLoader) for name in loader.INPUT_TYPES()["required"]["type"][0]]
    return {name: getattr(comfy.sd.CLIPType, name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION) for name in dict.fromkeys(names)}


def load(paths, kind, device="default"):
    """(CLIP, a line about it) from files in the order of ComfyUI's loaders.

    kind: one of types(); device: "default", or "cpu" to run the encoders there. If no file has packed layers, ComfyUI's own loader loads
    them. Raises CheckpointError, whose message is one sentence, if a file is no whole text encoder for this type.
    """
    headers = [read_header(path) for path in paths]
    files = [text_encoder.open_file(header) if text_encoder.matches(header) else None for header in headers]
    options = {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")} if device == "cpu" else {}
    found, folders = types()[kind], folder_paths.get_folder_paths("embeddings")
    if not any(files):
        clip = comfy.sd.load_clip(list(paths), folders, found, options)
        return clip, f"not quantized, {size_text(clip.patcher.model_size())}"
    for header, file in zip(headers, files):
        if file is None:
            _check_plain(header)
        else:
            file.check()
    placeholders, states = {}, []
    for header, file in zip(headers, files):
        states.append(comfy.utils.load_torch_file(header.path, safe_load=True) if file is None else _state(file, placeholders))
    options |= {"custom_operations": _building(placeholders), "initial_device": BUILT_ON}
    dynamic = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(comfy.sd.load_text_encoder_state_dicts).parameters else {}
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(states, folders, found, options, **dynamic)
    except RuntimeError as error:  # Module.load_state_dict raises it, with a line for each tensor
        if "size mismatch" not in str(error):
            raise
        raise CheckpointError(f"ComfyUI can't load {', '.join(header.file for header in headers)} as text encoders of type {kind} "
                              f"({str(error).splitlines()[1].strip()}); choose the type of your model and the files that belong to "
                              "it.") from error
    placeholders.clear()  # the classes of the encoders' layers keep it
    return _packed_clip(clip, list(filter(None, files)), kind)


def _check_plain(header):
    """Raise CheckpointError for a file whose weights need other operations of ComfyUI's than those of a CLIP with packed layers."""
    odd = next((name for name in header.tensors if name.rpartition(".")[2] in foreign.SCALES), None)
    if odd is not None:
        raise CheckpointError(f"{header.file} has scaled weights ({odd}), which can't be loaded beside an encoder in 4 bits; choose a bf16 "
                              "or fp16 version of it, or quantize it too.")


def _state(file, placeholders):
    """The state dict by which ComfyUI detects and builds the encoder of an EncoderFile. placeholders: gets {id of a placeholder: (file,
    name of the layer in it, placeholder)}."""
    state = {}
    for name in file.header.tensors:
        layer, _, part = name.rpartition(".")
        if layer not in file.specs:
            state[name] = file.header.read_tensor(name)
        elif part in ("weight", "bias"):
            state[name] = torch.empty(file.shape(name), dtype=file.specs[layer].dtype, device="meta")
            if part == "weight":
                placeholders[id(state[name])] = file, layer, state[name]
    return state


def _building(placeholders):
    """The operations with which ComfyUI builds the encoders. Their large linears and embeddings are on the meta device, and take tensors
    without a copy. `stored` of one that got a placeholder is (file, layer's name in it)."""
    class Layer:
        stored = None  # without a file's weight

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            found = placeholders.get(id(state_dict.get(f"{prefix}weight")))
            self.stored = found and found[:2]
            if found is None and self.weight.is_meta:  # ComfyUI would copy them into a layer of this type
                for name in (f"{prefix}weight", f"{prefix}bias"):
                    if name in state_dict:
                        state_dict[name] = state_dict[name].to(self.weight.dtype, copy=True)
            assign = found is not None or self.weight.is_meta
            super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "assign_to_params_buffers": assign}, *args)

    def place(rows, columns, device):
        return "meta" if rows * columns > SMALL else device

    class Building(Operations):
        class Linear(Layer, Operations.Linear):
            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                super().__init__(in_features, out_features, bias=bias, dtype=dtype, device=place(in_features, out_features, device))

        class Embedding(Layer, Operations.Embedding):
            def __init__(self, num_embeddings, embedding_dim, *args, device=None, **kwargs):
                super().__init__(num_embeddings, embedding_dim, *args, device=place(num_embeddings, embedding_dim, device), **kwargs)

    return Building


def _packed_clip(clip, files, kind):
    """(QuantizedCLIP, a line about it): ComfyUI's CLIP of the EncoderFiles, with their packed layers and tensors."""
    model, recipe = clip.cond_stage_model, {}
    built = {path: module for path, module in model.named_modules() if getattr(module, "stored", None)}
    for file in files:
        layers = {path: module.stored[1] for path, module in built.items() if module.stored[0] is file}
        encoder = _encoder(model, file, layers, kind)
        _fill(encoder, file, layers)
        recipe[encoder.name] = file.recipe
    lacking = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if lacking is not None:
        raise CheckpointError(f"The files lack the weight {lacking}, which ComfyUI's encoders of type {kind} have; choose the files that "
                              "belong to this type, or download them again.")
    quantized = packed_clip(clip, model, recipe, ", ".join(file.source for file in files))
    return quantized, f"{', '.join(recipe)} in 4 bits, {size_text(quantized.patcher.model_size())}"


def _encoder(model, file, layers, kind):
    """The Encoder that an EncoderFile was loaded into. layers: {path of a module that got a placeholder: the layer's name in the file}.
    Raises CheckpointError if ComfyUI has built another encoder than the file's."""
    for encoder in clip_modules.encoders(model):
        inside = {path: name for path, name in layers.items() if path.startswith(f"{encoder.path}.")}
        if inside and encoder.kind == file.transformer:
            return encoder
    found = ", ".join(encoder.kind.rpartition(".")[2] for encoder in clip_modules.encoders(model))
    raise CheckpointError(f"{file.header.file} is a {file.transformer.rpartition('.')[2]} encoder, and for type {kind} and these files "
                          f"ComfyUI builds {found or 'none'}; choose the type of your model and the files that belong to it.")


def _fill(encoder, file, layers):
    """Give an encoder its file's packed layers and tensors. Raises CheckpointError unless the file has exactly the encoder's tensors."""
    for name, spec in file.specs.items():
        own = file.own_name(name)
        if layers.get(f"{encoder.path}.{own}") != name:
            raise CheckpointError(f"{file.header.file} has tensor {name}.weight, which a {file.transformer.rpartition('.')[2]} of this "
                                  "ComfyUI has no place for; update ComfyUI, or quantize the encoder again.")
        built = encoder.transformer.get_submodule(own)
        columns, rows = (getattr(built, key) for key in (("embedding_dim", "num_embeddings") if clip_modules.is_embedding(built)
                                                         else ("in_features", "out_features")))
        if (columns, rows) != (spec.in_features, spec.out_features):
            raise CheckpointError(f"{file.header.file}: layer {name} is {spec.out_features} x {spec.in_features} instead of {rows} x "
                                  f"{columns}; the file does not fit the encoder, download or save it again.")
        clip_modules.swap(encoder.transformer, own, clip_modules.packed(spec, built))
    tensors, expected = file.tensors(), encoder.transformer.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{file.header.file} lacks tensor {name}; the file is incomplete, download or save it again.")
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(f"{file.header.file}: tensor {name} has shape {list(tensors[name].shape)} instead of "
                                  f"{list(tensor.shape)}; the file does not fit the encoder, download or save it again.")
    if left_over := tensors.keys() - expected.keys():
        raise CheckpointError(f"{file.header.file} has tensor {min(left_over)}, which a {file.transformer.rpartition('.')[2]} has no place "
                              "for; download or save it again.")
    encoder.transformer.load_state_dict(tensors, assign=True)
    for parameter in encoder.transformer.parameters():
        parameter.requires_grad = False
