"""Whole checkpoints, which hold text encoders and a VAE too: those of models/checkpoints that have a diffusion model of a known family."""

import os

import folder_paths

from .. import families
from ..checkpoint import formats, plain
from ..checkpoint.header import EXTENSIONS, MAX_HEADER_BYTES, CheckpointError, read_header

KIND = "checkpoints"  # ComfyUI's name for the list of folders
PREFIX = f"{KIND}/"  # the names of checkpoints in the list of models begin with it
ANCHORS = tuple(anchor.encode() for family in families.FAMILIES for anchor in family.signature.anchors)

_found = {}  # {path: ((time, size), whether the file has a model of a known family)}


def names():
    """Their names in the list of models."""
    return [PREFIX + name for name in folder_paths.get_filename_list(KIND) if name.lower().endswith(EXTENSIONS) and _has_model(path(name))]


def path(name):
    """The path of the file that ComfyUI opens under a name without PREFIX; None if there is none."""
    return folder_paths.get_full_path(KIND, name)


def _has_model(path):
    try:
        found = os.stat(path)
        state = found.st_mtime_ns, found.st_size
        if _found.get(path, (None,))[0] != state:
            _found[path] = state, _mentions_model(path) and _holds_model(path)
    except (OSError, TypeError):  # no path: ComfyUI's list is older than the folder
        return False
    return _found[path][1]


def _mentions_model(path):
    """Whether the header of a file has the name of a tensor that every model of a known family has. ComfyUI asks for the list when the page
    opens, so a folder of hundreds of other models must take no time: their headers are not parsed."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER_BYTES else b""
    return any(anchor in header for anchor in ANCHORS)


def _holds_model(path):
    try:
        header = read_header(path)
        return formats.identify(header) is not None or plain.find(header) is not None
    except CheckpointError:
        return False
