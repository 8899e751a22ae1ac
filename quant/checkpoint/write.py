"""A safetensors file written one tensor at a time, whole or not at all.

Other processes, on other machines too, may write into the same folder. So a file is written under a random name that nobody else has,
and takes its own name in one step, which fails where another file has that name by then.
"""

import errno
import json
import os
import re
import secrets
import shutil
from contextlib import contextmanager, suppress

import torch

from .header import DTYPES, EXTENSIONS, CheckpointError

SPARE_BYTES = 1 << 20  # header and file system overhead, when asking whether the disk has room
# Names of files that are being saved. Those of downloads, which are resumed, are others.
TEMPORARY = re.compile(rf".+({'|'.join(map(re.escape, EXTENSIONS))})\.[0-9a-f]{{14}}\.saving", re.IGNORECASE)
STALE_SECONDS = 24 * 3600  # since a file was last written to, after which nobody is saving it any more
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TROUBLES = {  # {errno: what is wrong with the disk, and the remedy}
    errno.ENAMETOOLONG: "the name is too long for the disk; choose a shorter filename",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "what its path has for a folder is a file; choose another filename"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the disk is full; free some space or save to another disk"),
    # Windows says so, too, of a file whose tensors a loaded model still maps.
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM),
                    "its folder can't be written; check the permissions, and that no loaded model still uses the file"),
}


def check_target(path, overwrite):
    """Raise CheckpointError where a file or a folder is in the way."""
    if os.path.isdir(path):
        raise CheckpointError(f"{os.path.basename(path)} is a folder; choose another filename.")
    if os.path.exists(path) and not overwrite:
        raise CheckpointError(f"{os.path.basename(path)} exists already; choose another filename, or switch overwrite on.")


def size_text(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def disk_trouble(error):
    """What an OSError of writing a file means to the user, and the remedy, as the second half of a sentence. No path is in it: that
    would be the temporary file's."""
    reason = error.strerror or type(error).__name__
    return TROUBLES.get(error.errno, f"{reason}; check the disk, and that no loaded model still uses the file")


def write(path, layout, tensors, metadata, overwrite=False):
    """Write `tensors` to a temporary file beside `path`, then rename it: no half-written file is ever seen.

    layout: {name: (shape, dtype)} of all the tensors; tensors: iterable of (name, tensor), in any order, so that only
    one of them need be in memory; metadata: {str: str}. Raises CheckpointError where the file exists (and overwrite is
    False), also if it appears meanwhile, the disk is full or the folder can't be written.
    """
    check_target(path, overwrite)
    name, folder = os.path.basename(path), os.path.dirname(path)
    head, starts, size = _header(layout, metadata)
    try:
        os.makedirs(folder, exist_ok=True)
        with _temporary(path) as temporary:
            free = shutil.disk_usage(folder).free
            if size + SPARE_BYTES > free:
                raise CheckpointError(f"There is no room to save {name}: it needs {size_text(size)} and the disk has "
                                      f"{size_text(free)} free; free some space or save to another disk.")
            with open(temporary, "wb") as file:
                file.write(head)
                for key, tensor in tensors:
                    shape, dtype = layout[key]
                    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                        raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} was planned")
                    file.seek(starts.pop(key))
                    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            if starts:
                raise ValueError(f"tensor {next(iter(starts))} was planned and did not come")
            publish(temporary, path, overwrite)
    except OSError as error:
        raise CheckpointError(f"Saving {name} failed: {disk_trouble(error)}.") from error


@contextmanager
def _temporary(path):
    """The path of a new, empty file beside `path`, which is gone in the end. Those that killed processes left in the folder go, too."""
    # In the same folder, so that it can be renamed; no model list shows it, as it doesn't end in .safetensors.
    temporary = f"{path}.{secrets.token_hex(7)}.saving"
    with open(temporary, "xb"):
        pass
    try:
        _sweep(temporary)
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def _sweep(temporary):
    """Remove what killed processes left beside a new temporary file, whose time is the present in the folder's own clock."""
    now = os.stat(temporary).st_mtime
    with os.scandir(os.path.dirname(temporary)) as entries:
        for entry in entries:
            with suppress(OSError):  # another process removes it, or has it open
                if TEMPORARY.fullmatch(entry.name) and now - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    os.remove(entry.path)


def publish(temporary, path, overwrite=False):
    """Give a finished file its name `path`, durably: after a crash of the machine it is there as it was, or not at all.

    Raises CheckpointError where the name is taken and overwrite is False, and OSError. `temporary` may remain.
    """
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if overwrite:
        os.replace(temporary, path)
    else:
        try:
            _rename_to_new(temporary, path)
        except FileExistsError:
            check_target(path, overwrite)
            raise
    _sync_folder(os.path.dirname(path))


def _sync_folder(path):
    """Write a folder's entries to the disk, where that can be asked for: not on Windows, nor on some network file systems."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _rename_to_new(temporary, path):
    """Rename a file, or raise FileExistsError where `path` exists."""
    if os.name == "nt":
        return os.rename(temporary, path)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links: exFAT, and some that are mounted over a network
        with open(path, "xb"):  # of two processes, one gets past this line
            pass
        try:
            os.replace(temporary, path)
        except OSError:
            os.remove(path)
            raise
    return None


def _header(layout, metadata):
    """The bytes before the data, {name: offset in the file} and the file's size."""
    entries, offsets, position = {"__metadata__": metadata}, {}, 0
    # Wide types first: then every tensor lies at a multiple of its element's size.
    for key, (shape, dtype) in sorted(layout.items(), key=lambda item: -item[1][1].itemsize):
        stop = position + torch.Size(shape).numel() * dtype.itemsize
        entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        offsets[key], position = position, stop
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + offset for key, offset in offsets.items()}, start + position
