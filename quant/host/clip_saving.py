"""Saving the packed encoders of a CLIP, one file each."""

import os
import weakref

import comfy.sd
import torch

from ..checkpoint import text_encoder, write
from . import clip_modules, filename_tokens, model_folder, written
from .clip_folder import KIND
from .clip_patcher import SVDQuantClipPatcher
from .packed_layers import unpatched


def save(clip, filename, overwrite=False):
    """Write each packed encoder of a CLIP to a file in the folder for text encoders, unless the same content was saved there before.
    Returns the names of the files in that folder, in the order of the CLIP's encoders.

    filename: as the user gave it, with tokens; a CLIP with several packed encoders adds _ and each one's name; overwrite: whether encoders
    that SVDQuant has quantized may be replaced; other files never are. Raises ValueError if the CLIP is not packed or has LoRAs, or if the
    filename is invalid; CheckpointError, before anything is written, if a file can't be written.
    """
    check_clip(clip)
    named = names(filename, clip.patcher.recipe)
    content = {encoder: (weakref.ref(clip.cond_stage_model), encoder) for encoder in named}
    held = {encoder: name for encoder in named if (name := written.holds(filename, content[encoder], KIND))}
    for encoder, name in (named | held).items():
        if encoder in held:  # ComfyUI may run a node again with the same inputs
            model_folder.check_found_again(*model_folder.target_path(name, KIND), KIND)
        else:
            check_target(name, overwrite)
    for encoder, name in named.items():
        if encoder not in held:
            _write(clip, encoder, model_folder.target_path(name, KIND)[0], overwrite)
            written.note(name, content[encoder], filename, KIND)
    return list((named | held).values())


def names(filename, encoders):
    """{encoder: name of its file in the folder}."""
    stem, extension = os.path.splitext(model_folder.target_path(filename_tokens.resolve(filename), KIND)[1])
    return {encoder: stem + (f"_{encoder}" if len(encoders) > 1 else "") + extension for encoder in encoders}


def check_name(filename, overwrite):
    """Raise the error of `save`, as far as it is known when Run is clicked, for a CLIP with one packed encoder. Both are None if they are
    still unknown. A file that SVDQuant Save Text Encoder has written, and that has not changed, may be there."""
    if filename is not None:
        [name] = names(filename, [""]).values()
        check_target(name, True if overwrite is None or written.is_intact(name, KIND) else overwrite)


def check_target(name, overwrite):
    """Raise ValueError or CheckpointError if a file can't be written under this name of the folder. It writes nothing."""
    path, name = model_folder.target_path(name, KIND)
    model_folder.check_found_again(path, name, KIND)
    # Regardless of `overwrite`: the quantized encoder may come from the file.
    write.check_replaceable(path, _opened, "{} exists already and is no text encoder that SVDQuant has quantized, and overwrite replaces "
                                           "nothing else; choose another filename, or move that file away.")
    write.check_target(path, overwrite)


def _opened(header):
    """The encoder that SVDQuant has quantized, of a header, or False. Raises CheckpointError for a damaged one."""
    return text_encoder.matches(header) and text_encoder.open_file(header)


def summary(names):
    """A line about saved files. names: as `save` returns them."""
    found = [written.state(name, KIND) for name in names]
    return "; ".join(f"{path}, {write.size_text(size)}" for path, _, size in found) + "; opens with SVDQuant Load Text Encoder"


def check_clip(clip):
    """Raise ValueError unless the CLIP has packed encoders and no patches."""
    if not isinstance(getattr(clip, "patcher", None), SVDQuantClipPatcher):
        raise ValueError("SVDQuant Save Text Encoder saves text encoders in 4 bits; put SVDQuant Quantize Text Encoder before it, or save "
                         "a 16-bit CLIP with ComfyUI's own nodes.")
    if clip.patcher.patches or clip.patcher.injections:
        raise ValueError("There are LoRAs or other weight patches on this 4-bit CLIP, which its file can't hold; save it without them, or "
                         "put them before SVDQuant Quantize Text Encoder, which bakes them in.")


def _write(clip, name, path, overwrite):
    """Write one packed encoder to `path`."""
    patcher = clip.patcher
    encoder = next(encoder for encoder in clip_modules.encoders(clip.cond_stage_model) if encoder.name == name)
    prefix = f"{encoder.path}."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in unpatched(patcher.model, patcher.backup, patcher.prefix).items()
               if key.startswith(prefix)}
    specs = {layer.removeprefix(prefix): module.spec for layer, module in patcher.packed_layers().items() if layer.startswith(prefix)}
    tokenizer = {key: data for key, data in clip.tokenizer.state_dict().items() if key in text_encoder.TOKENIZERS and torch.is_tensor(data)}
    text_encoder.save(path, tensors, specs, encoder.kind, _is_multimodal(tensors, specs), patcher.recipe[name], encoder.kind, tokenizer,
                      overwrite)


def _is_multimodal(tensors, specs):
    """Whether ComfyUI knows the encoder by the names of text_encoder.MULTIMODAL rather than by those of its transformer."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes |= {f"{layer}.weight": (spec.out_features, spec.in_features) for layer, spec in specs.items()}
    state = {text_encoder.renamed(name, text_encoder.MULTIMODAL): torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return state.keys() != shapes.keys() and comfy.sd.detect_te_model(state) is not None
