"""The folder for diffusion models, and the paths of files in it. Some functions are for the folders of other kinds of models too."""

import os
import re
import unicodedata

import folder_paths

from ..checkpoint.header import EXTENSIONS
from ..text import shown_name
from . import checkpoints

KIND = "diffusion_models"  # ComfyUI's name for the list of folders, and the name of the usual folder
FORBIDDEN = '<>:"|?*'  # on Windows; models must be portable
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control and format characters, lone surrogates and line breaks
DEVICE = re.compile(r"(CON|PRN|AUX|NUL|(COM|LPT)[1-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE)
MAX_BYTES = 255  # the usual file systems allow for one part of a path
TEMPORARY_BYTES = 22  # length of ".0123456789abcdef.part" and ".0123456789abcd.saving", which end the name of an incomplete file
SHOWN = 60  # characters of a name in a message
# {kind of the folder: what is said of a filename that names no file in it}
OUTSIDE = {
    KIND: "The filename {} {}, so it does not name a file within models/diffusion_models; write a plain name such as my_model, or "
          "folder/my_model.",
    "text_encoders": "The filename {} {}, so it does not name a file within models/text_encoders; write a plain name such as my_encoder, "
                     "or folder/my_encoder.",
}


def target_folder(kind=KIND):
    """The folder for new models: the first in ComfyUI's list of this kind, which is the default one of extra_model_paths.yaml.

    ComfyUI lists models/unet, the older name of the folder, before models/diffusion_models; if both are in one place, the latter is used.
    """
    folders = [os.path.normpath(path) for path in folder_paths.get_folder_paths(kind)]
    beside = os.path.join(os.path.dirname(folders[0]), kind)
    return beside if beside in folders else folders[0]


def target_path(filename, kind=KIND):
    """(absolute path, name within the folder) for a filename given by the user. Raises ValueError, whose message is one sentence, if the
    file would be outside the folder, or if some operating system does not accept the name."""
    folder = target_folder(kind)
    name = filename.strip().replace("\\", "/")
    whole = name if name.lower().endswith(EXTENSIONS) else name + EXTENSIONS[0]
    if trouble := _trouble(name, whole):
        shown = filename if len(filename) <= SHOWN else filename[:SHOWN] + "..."
        raise ValueError(OUTSIDE[kind].format(repr(shown), trouble))
    path = os.path.abspath(os.path.join(folder, whole))
    return path, os.path.relpath(path, folder)


def listed():
    """The names of the list of models: all files of the folder, and the whole checkpoints that have a model of a known family."""
    return folder_paths.get_filename_list(KIND) + checkpoints.names()


def find(name):
    """The path of the file that has this name in the list of models; None if there is none. Another program may give anything as a name."""
    if not isinstance(name, str):
        return None
    found = folder_paths.get_full_path(KIND, name)
    if found is None and name.startswith(checkpoints.PREFIX):
        return checkpoints.path(name.removeprefix(checkpoints.PREFIX))
    return found


def existing_path(name):
    """find, or ValueError if there is none."""
    path = find(name)
    if path is None:
        shown = shown_name(name)
        place = shown if shown.startswith(checkpoints.PREFIX) else f"{KIND}/{shown}"
        folder, _, file = place.partition("/")
        raise ValueError(f"There is no {file} in models/{folder}; download it, or press R and choose another model_name.")
    return path


def name_in_folder(filename):
    """The name of target_path; None if the filename is still unknown (None) or invalid."""
    try:
        return None if filename is None else target_path(filename)[1]
    except ValueError:
        return None


def found_elsewhere(path, name, kind=KIND):
    """The path of the file, in another of ComfyUI's folders, that ComfyUI opens under a name of target_path; None if there is none."""
    found = folder_paths.get_full_path(kind, name)
    if found is None or os.path.abspath(found) == path or os.path.exists(path) and os.path.samefile(found, path):
        return None
    return found


def check_found_again(path, name, kind=KIND):
    """Raise ValueError if ComfyUI would open another file than the one at `path` under this name."""
    if found := found_elsewhere(path, name, kind):
        folder = os.path.normpath(found)[:-len(name) - 1]
        raise ValueError(f"There is a {name} in {folder} already, and ComfyUI opens only one file of a name; choose another filename, or "
                         "move that file away.")


def _trouble(name, whole):
    """The reason why a name is invalid, as the second half of a sentence; None if it is valid. name: as the user gave it; whole: with its
    extension."""
    if not name:
        return "is empty"
    if unprintable := next((c for c in name if unicodedata.category(c) in UNPRINTABLE), None):
        return f"has the unprintable character U+{ord(unprintable):04X}"
    if forbidden := next((c for c in name if c in FORBIDDEN), None):
        return f"has a {forbidden} in it"
    for part in name.split("/"):
        if not part:
            return "begins or ends with a slash, or has two in a row"
        if not part.strip("."):
            return f"has {part} as a folder or name"
        if part.startswith("."):
            return "begins with a dot, or has a folder that does"
        if part.endswith((".", " ")):
            return "ends in a dot or a space, or has a folder that does"
        if device := DEVICE.fullmatch(part):
            return f"has {device[1]} in it, which is a device on Windows"
    *folders, file = whole.split("/")
    if max(len(part.encode()) for part in (*folders, file + TEMPORARY_BYTES * "_")) > MAX_BYTES:
        return "is too long, or has a folder that is"
    return None
