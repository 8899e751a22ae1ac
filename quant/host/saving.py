"""Saving a quantized MODEL to a file."""

import os
import weakref
from itertools import chain, count

from ..checkpoint import formats, write
from . import build, filename_tokens, mapping, model_folder, written
from .attachments import CARD
from .packed_layers import unpatched
from .patcher import SVDQuantModelPatcher

NUMBERED = "{}_{:05}_"  # as ComfyUI's own nodes number their files


def save_model(model, filename, layout, overwrite=False, numbered=False):
    """Write a MODEL to a file in the model folder, unless the same content was saved there before. Returns the file's name in the folder.

    filename: as the user gave it, with tokens (filename_tokens.py, model_folder.target_path); layout: one of formats.WRITERS; overwrite:
    whether a quantized model of that name may be replaced; other files never are; numbered: whether the name gets a number if it is taken.
    Raises ValueError if the file could not hold the whole MODEL, or if the filename is invalid or ComfyUI would open another file under it;
    CheckpointError, before anything is written, if the file can't be written (write.write).
    """
    check_model(model)
    content = weakref.ref(model.model), layout
    name = written.holds(filename, content)
    if name is not None:  # ComfyUI may run a node again with the same inputs
        model_folder.check_found_again(*model_folder.target_path(name))
    else:
        path, name = free_path(filename, overwrite, numbered)
        check_target(path, name, overwrite)
        write_model(model, path, layout, overwrite)
        written.note(name, content, filename)
    return name


def write_model(model, path, layout, overwrite):
    """Write a quantized MODEL to `path` in one of formats.WRITERS. Raises CheckpointError as write.write does."""
    mapping.check(model.model)
    specs = {layer: module.spec for layer, module in model.packed_layers().items()}
    formats.WRITERS[layout].save(path, stored_tensors(model), specs, build.stored_config(model.model), model.recipe, model.source,
                                 overwrite, model.get_attachment(CARD))


def free_path(filename, overwrite, numbered):
    """model_folder.target_path of a filename with tokens, with the first free number if it is taken, `numbered` is on and `overwrite`
    off."""
    path, name = model_folder.target_path(filename_tokens.resolve(filename))
    if overwrite or not numbered:
        return path, name
    stem, extension = os.path.splitext(name)
    names = chain([name], (NUMBERED.format(stem, number) + extension for number in count(1)))
    return next(found for found in map(model_folder.target_path, names) if not _is_taken(*found))


def _is_taken(path, name):
    return os.path.exists(path) or model_folder.found_elsewhere(path, name) is not None


def check_target(path, name, overwrite):
    """Raise the error of save_model, whatever its MODEL, if the file can't be written under this name. It writes nothing."""
    model_folder.check_found_again(path, name)
    check_overwritten(path)
    write.check_target(path, overwrite)


def check_name(filename, overwrite, numbered):
    """check_target, as far as it is known when Run is clicked. All inputs are None if they are still unknown. A file that SVDQuant Save
    Model has written since ComfyUI started, and that has not changed, may be there: if the workflow is the same, the node won't run
    again."""
    if filename is not None:
        path, name = free_path(filename, overwrite, numbered)
        check_target(path, name, True if overwrite is None or numbered is None or written.is_intact(name) else overwrite)


def summary(name, layout):
    """One line about a saved file, with the nodes that open it. name: as save_model returns it."""
    path, _, size = written.state(name)
    return f"{path}, {write.size_text(size)}; opens with {formats.LAYOUTS[layout].opens}, not with Load Diffusion Model"


def check_model(model):
    """Raise ValueError unless the MODEL is quantized and has no weight patches."""
    if not isinstance(model, SVDQuantModelPatcher):
        raise ValueError("SVDQuant Save Model saves quantized models; put SVDQuant Quantize Model before it, or save "
                         "a 16-bit model with ComfyUI's own nodes.")
    if model.patches or model.injections:  # bypass LoRAs
        raise ValueError("There are LoRAs or other weight patches on this 4-bit MODEL, which its file can't hold; save it "
                         "without them, or put them before SVDQuant Quantize Model, which bakes them in.")


def stored_tensors(model):
    """{name in the file: tensor} of a quantized model, in the types in which its layers were stored. Modules that other nodes have added
    to the model are left out. Raises ValueError if another node has removed a tensor."""
    specs = {layer: module.spec for layer, module in model.packed_layers().items()}
    own = build.empty_like(model.model, specs, model.model.get_dtype()).diffusion_model.state_dict()
    found = unpatched(model.model.diffusion_model, model.backup)
    if missing := own.keys() - found.keys():
        raise ValueError(f"Another node has replaced the part of this MODEL that has {min(missing)}; load the MODEL again, and save it "
                         "before that node runs.")
    tensors = {name: found[name] for name in own}
    for layer, module in model.packed_layers().items():
        for part, (_, dtype) in module.spec.tensors().items():
            tensor = tensors[name := f"{layer}.{part}"]
            if tensor.dtype != dtype:  # preparation.compute_in has converted it
                tensors[name] = tensor.to("cpu", dtype)
    return {build.stored_name(model.model, name): tensor for name, tensor in tensors.items()}


def check_overwritten(path):
    """Raise CheckpointError if the file exists and is no quantized model, regardless of `overwrite`."""
    write.check_replaceable(path, _opened, "{} exists already and is no quantized model that this pack reads, and overwrite replaces "
                                           "nothing else; choose another filename, or move that file away.")


def _opened(header):
    """The quantized model of a header, or None. Raises CheckpointError for a damaged one."""
    found = formats.identify(header)
    return found and found.reader.open_file(header)
