"""The files that the nodes have written to the model folder, so that a node runs again if its file is missing or was changed.

ComfyUI takes a node's result from its cache as long as the node's inputs and its fingerprint are the same. A file's time and size can't be
the fingerprint, since saving itself changes them: the same workflow, queued again, would save again, or stop because the file exists.
Therefore the fingerprint counts the changes that the node itself did not make.
"""

import os
from dataclasses import dataclass

import folder_paths

from .model_folder import KIND


@dataclass
class _File:
    """A file that a node has written.

    content: identifies the file's content, compared with ==; state: state(name) at the last check; intact: whether the file is still as
    the node wrote it; changes: the fingerprint.
    """

    content: object
    state: tuple | None = None
    intact: bool = True
    changes: int = 0


_files = {}  # {(kind of the folder, name within it): _File}
_names = {}  # {(kind, filename as the user gave it, with its tokens and without a number): {name within the folder: None}}

# In all functions below, kind is ComfyUI's name for the list of folders.


def state(name, kind=KIND):
    """(path, time, size) of the file that ComfyUI opens under this name; None if there is none."""
    return state_of(folder_paths.get_full_path(kind, name) if isinstance(name, str) else None)


def state_of(path):
    """(path, time, size) of a file; None if there is none. path: None if it has none."""
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return found and (path, found.st_mtime_ns, found.st_size)


def note(name, content=None, filename=None, kind=KIND):
    """Record that a node has written the file `name`. content: identifies its content, for nodes that can write different contents;
    filename: as the user gave it, for nodes that can write different files under it."""
    if filename is not None:
        _names.setdefault((kind, filename), {})[name] = None
    file = _files.setdefault((kind, name), _File(content))
    if file.content != content:
        file.changes += 1  # for the node that wrote the previous content, whose result may still be in ComfyUI's cache
    file.content, file.state, file.intact = content, state(name, kind), True


def holds(filename, content, kind=KIND):
    """The name of a file that a node has written under this filename with this content, and that has not changed since; None if there is
    none."""
    names = _names.get((kind, filename), ())
    return next((name for name in names if is_intact(name, kind) and _files[kind, name].content == content), None)


def is_intact(name, kind=KIND):
    """Whether a node has written the file `name`, and the file has not changed since."""
    file = _files.get((kind, name))
    return file is not None and file.intact and file.state is not None and file.state == state(name, kind)


def fingerprint(name, kind=KIND):
    """The number of changes to the file `name` other than the node's own. name: None if it is unknown before the workflow runs; the changes
    to all files of this kind are then counted."""
    if name is None:
        return sum(fingerprint(own, kind) for own_kind, own in list(_files) if own_kind == kind)
    file = _files.get((kind, name))
    if file is None:
        return 0
    if file.state != (now := state(name, kind)):
        file.state, file.intact, file.changes = now, False, file.changes + 1
    return file.changes


def fingerprint_of_filename(filename, kind=KIND):
    """fingerprint of all files that a node has written under a filename as the user gave it; None as in fingerprint."""
    return fingerprint(None, kind) if filename is None else sum(fingerprint(name, kind) for name in _names.get((kind, filename), ()))
