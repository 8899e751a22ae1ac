"""A quantized MODEL into a file."""

import os
import weakref

from ..checkpoint import formats
from ..checkpoint.header import CheckpointError, read_header
from ..checkpoint.write import check_target
from . import build, model_folder, written
from .attachments import CARD
from .patcher import SVDQuantModelPatcher, unpatched


def save_model(model, filename, layout, overwrite=False):
    """Write a MODEL to a file in the model folder, unless it is there already, as saved before. Returns the file's name in the folder.

    filename: the user's (model_folder.target_path); layout: one of formats.WRITERS; overwrite: whether a quantized model of that name
    may be replaced; other files never are. Raises ValueError on a MODEL that its file would not hold as it is, and on a filename that
    can't be one or that ComfyUI finds elsewhere; CheckpointError, before anything is written, where the file can't be (write.write).
    """
    check_model(model)
    path, name = model_folder.target_path(filename)
    model_folder.check_found_again(path, name)
    content = weakref.ref(model.model), layout
    if not written.holds(name, content):  # ComfyUI runs a node again for reasons of its own, too
        check_overwritten(path)
        check_target(path, overwrite)
        specs = {layer: module.spec for layer, module in model.packed_layers().items()}
        formats.WRITERS[layout].save(path, stored_tensors(model), specs, build.stored_config(model.model), model.recipe, model.source,
                                     overwrite, model.get_attachment(CARD))
        written.note(name, content)
    return name


def check_model(model):
    """Raise ValueError unless the MODEL is quantized and has no patches."""
    if not isinstance(model, SVDQuantModelPatcher):
        raise ValueError("SVDQuant Save Model saves quantized models; put SVDQuant Quantize Model before it, or save "
                         "a 16-bit model with ComfyUI's own nodes.")
    if model.patches or model.injections:  # bypass LoRAs
        raise ValueError("There are LoRAs or other weight patches on this 4-bit MODEL, which its file can't hold; save it "
                         "without them, or put them before SVDQuant Quantize Model, which bakes them in.")


def stored_tensors(model):
    """{name in the file: tensor} of a quantized model, in the types that its layers were stored in. What other nodes have hung into the
    model isn't part of it. Raises ValueError where they have taken something away."""
    specs = {layer: module.spec for layer, module in model.packed_layers().items()}
    own = build.empty_like(model.model, specs, model.model.get_dtype()).diffusion_model.state_dict()
    found = unpatched(model.model, model.backup)
    if missing := own.keys() - found.keys():
        raise ValueError(f"Another node has replaced the part of this MODEL that has {min(missing)}; load the MODEL again, and save it "
                         "before that node runs.")
    tensors = {name: found[name] for name in own}
    for layer, module in model.packed_layers().items():
        for part, (_, dtype) in module.spec.tensors().items():
            tensor = tensors[name := f"{layer}.{part}"]
            if tensor.dtype != dtype:  # preparation.compute_in's
                tensors[name] = tensor.to("cpu", dtype)
    return {build.stored_name(model.model, name): tensor for name, tensor in tensors.items()}


def check_overwritten(path):
    """Raise CheckpointError where there is a file and it is no quantized model, whatever `overwrite` says: it may be what the model
    was made from. Only its header is read."""
    if not os.path.isfile(path):
        return
    try:
        header = read_header(path)
        if found := formats.identify(header):
            found.reader.open_file(header)
            return
    except (CheckpointError, OSError):
        pass
    raise CheckpointError(f"{os.path.basename(path)} exists already and is no quantized model that this pack reads, and overwrite "
                          "replaces nothing else; choose another filename, or move that file away.")
