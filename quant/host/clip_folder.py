"""The folder for text encoders, and the files that users choose of it."""

import folder_paths

from ..checkpoint import text_encoder
from ..checkpoint.header import read_header
from ..text import shown_name
from .written import state_of

KIND = "text_encoders"  # ComfyUI's name for the list of folders, and the name of the usual folder
NONE = "none"  # chosen in place of a file


def listed():
    """The names of all files of the folder."""
    return folder_paths.get_filename_list(KIND)


def chosen(names):
    """The names that stand for a file. names: as the node has them, with None and NONE for none."""
    return [name for name in names if name not in (None, NONE)]


def paths(names):
    """The paths of the chosen files. Raises ValueError if one is missing, or if none is chosen."""
    found = []
    for name in chosen(names):
        path = folder_paths.get_full_path(KIND, name) if isinstance(name, str) else None
        if path is None:
            raise ValueError(f"There is no {shown_name(name)} in models/text_encoders; download it, or press R and choose another text "
                             "encoder.")
        found.append(path)
    if not found:
        raise ValueError("No text encoder is chosen; choose a file in clip_name1.")
    return found


def states(names):
    """What tells whether the chosen files have changed."""
    return [state_of(folder_paths.get_full_path(KIND, name)) for name in chosen(names) if isinstance(name, str)]


def check(names):
    """Raise ValueError or CheckpointError, as far as headers show it, if clip_loader.load would. names: None for one that is still
    unknown."""
    for path in paths(names) if chosen(names) else ():
        header = read_header(path)
        if text_encoder.matches(header):
            text_encoder.open_file(header)
