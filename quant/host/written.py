"""Which files the nodes have left in the model folder, so that a node runs again when its file is gone or has become another one.

ComfyUI takes a node's result from its cache while the node's inputs and its fingerprint are the same. A file's time and size are no
fingerprint, since saving itself changes them: the same workflow, queued again, would save again, or stop because the file exists. So
the fingerprint is a number, which changes with the file but not when the node writes it.
"""

import os
from dataclasses import dataclass

import folder_paths

from .model_folder import KIND


@dataclass
class _File:
    """A file that a node has left.

    content: what the node left in it, compared with ==; state: state(name) when it was last looked at; intact: whether that is the state in
    which the node left it; changes: the fingerprint.
    """

    content: object
    state: tuple | None = None
    intact: bool = True
    changes: int = 0


_files = {}  # {name within the model folder: _File}


def state(name):
    """(path, time, size) of the file that ComfyUI opens under this name; None if there is none."""
    path = folder_paths.get_full_path(KIND, name)
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return found and (path, found.st_mtime_ns, found.st_size)


def note(name, content=None):
    """Record that a node has left the file `name` as it is now. content: what it holds, as far as a node can leave different things."""
    file = _files.setdefault(name, _File(content))
    if file.content != content:
        file.changes += 1  # for the node that had left the other content, whose result may still be in ComfyUI's cache
    file.content, file.state, file.intact = content, state(name), True


def holds(name, content):
    """Whether a node has left this very content in the file `name`, and nobody has changed the file since."""
    file = _files.get(name)
    return file is not None and file.intact and file.content == content and file.state is not None and file.state == state(name)


def fingerprint(name):
    """How often the file `name` has changed since a node left it. name: None where it is not known before the workflow runs; all files
    are looked at then."""
    if name is None:
        return sum(map(fingerprint, list(_files)))
    file = _files.get(name)
    if file is None:
        return 0
    if file.state != (now := state(name)):
        file.state, file.intact, file.changes = now, False, file.changes + 1
    return file.changes
