"""Write a safetensors file one tensor at a time, completely or not at all.

Other processes, even on other machines, may write into the same folder. So a file is written under a random temporary name and then
renamed in one step, which fails if another file has the name by then.
"""

import errno
import json
import os
import re
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch

from . import checksums
from .header import DTYPES, EXTENSIONS, CheckpointError, read_header

SPARE_BYTES = 1 << 20  # header and file system overhead in the check for free disk space
# Temporary names of files that are being saved. Downloads, which can be resumed, have other names.
TEMPORARY = re.compile(rf".+({'|'.join(map(re.escape, EXTENSIONS))})\.[0-9a-f]{{14}}\.saving", re.IGNORECASE)
TEMPORARY_LENGTH = len(".0123456789abcd.saving")  # by which a temporary name is longer than the file's; a download's is as long
WINDOWS_PATH = 259  # characters of a path on Windows, unless its setting LongPathsEnabled is on
STALE_SECONDS = 24 * 3600  # a temporary file that was last written to this long ago is abandoned
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TROUBLES = {  # {errno: what is wrong with the disk, and the remedy}
    errno.ENAMETOOLONG: "the name is too long for the disk; choose a shorter filename",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a folder in its path is a file; choose another filename"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the disk is full; free some space or save to another disk"),
    # Windows reports these also for a file that a loaded model still maps.
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM),
                    "its folder can't be written; check the permissions, and that no loaded model still uses the file"),
}


def check_target(path, overwrite):
    """Raise CheckpointError if a folder has this path, or if a file has it and overwrite is False."""
    if os.path.isdir(path):
        raise CheckpointError(f"{os.path.basename(path)} is a folder; choose another filename.")
    if os.path.exists(path) and not overwrite:
        raise CheckpointError(f"{os.path.basename(path)} exists already; choose another filename, or switch overwrite on.")


def check_replaceable(path, opened, message):
    """Raise CheckpointError with `message`, in which {} stands for the file's name, if the file exists and is not of the kind that is
    saved: what is saved may have been made from it. Only the header is read.

    opened: a function of the Header, which finds nothing in a file of another kind, or raises CheckpointError.
    """
    if not os.path.isfile(path):
        return
    try:
        if opened(read_header(path)):
            return
    except (CheckpointError, OSError):
        pass
    raise CheckpointError(message.format(os.path.basename(path)))


def size_text(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def disk_trouble(error, path):
    """The cause of an OSError while the file `path` was written, and the remedy, as the second half of a sentence. It does not contain the
    path, which would be the temporary file's."""
    length = len(os.path.abspath(path))
    if os.name == "nt" and error.errno in (errno.ENOENT, errno.EINVAL) and length + TEMPORARY_LENGTH > WINDOWS_PATH:
        return (f"its path has {length} characters, and Windows takes {WINDOWS_PATH - TEMPORARY_LENGTH}; choose a shorter filename, or "
                "switch on long paths in Windows (LongPathsEnabled)")
    reason = error.strerror or type(error).__name__
    return TROUBLES.get(error.errno, f"{reason}; check the disk, and that no loaded model still uses the file")


def write(path, layout, tensors, metadata, overwrite=False):
    """Write `tensors` to a temporary file beside `path`, then rename it, so that `path` never is an incomplete file.

    layout: {name: (shape, dtype)} of all tensors; tensors: iterable of (name, tensor), in any order, so that only one tensor at a time
    need be in memory; metadata: {str: str}, to which the tensors' checksums are added. Raises CheckpointError if the file exists, or
    appears meanwhile, and overwrite is False, if the disk is full, if the folder can't be written, or if a tensor has values that spoil
    every image (checksums.py).
    """
    check_target(path, overwrite)
    name, folder = os.path.basename(path), os.path.dirname(path)
    # The digits of the checksums are known at the end; until then others take their place.
    found = {}
    head, starts, size = _header(layout, metadata | {checksums.KEY: checksums.text(dict.fromkeys(layout, checksums.EMPTY))})
    try:
        os.makedirs(folder, exist_ok=True)
        with _temporary(path) as temporary:
            free = shutil.disk_usage(folder).free
            if size + SPARE_BYTES > free:
                raise CheckpointError(f"There is no room to save {name}: it needs {size_text(size)} and the disk has "
                                      f"{size_text(free)} free; free some space or save to another disk.")
            with open(temporary, "wb") as file, ThreadPoolExecutor(1) as beside:
                file.write(head)
                for key, tensor in tensors:
                    shape, dtype = layout[key]
                    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                        raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} was planned")
                    file.seek(starts.pop(key))
                    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                    digits = beside.submit(checksums.digits, data, key, dtype)
                    file.write(data.data)
                    found[key] = digits.result()
                if starts:
                    raise ValueError(f"tensor {next(iter(starts))} was planned and did not come")
                file.seek(0)
                file.write(_header(layout, metadata | {checksums.KEY: checksums.text({key: found[key] for key in layout})})[0])
            publish(temporary, path, overwrite)
    except OSError as error:
        raise CheckpointError(f"Saving {name} failed: {disk_trouble(error, path)}.") from error


@contextmanager
def _temporary(path):
    """Yields the path of a new, empty file beside `path` and removes the file afterwards. Also removes abandoned temporary files of killed
    processes in the same folder."""
    # It is in the same folder, so that it can be renamed. Model lists do not show it, since its name does not end in .safetensors.
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
    """Remove temporary files of killed processes beside a new temporary file, whose time stamp is the present by the folder's clock."""
    now = os.stat(temporary).st_mtime
    with os.scandir(os.path.dirname(temporary)) as entries:
        for entry in entries:
            with suppress(OSError):  # another process removes it, or has it open
                if TEMPORARY.fullmatch(entry.name) and now - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    os.remove(entry.path)


def publish(temporary, path, overwrite=False):
    """Rename a finished file to `path`, durably: after a crash of the machine `path` is the complete file or does not exist.

    Raises CheckpointError if the name is taken and overwrite is False, and OSError. The temporary file may remain.
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
    """Write a folder's entries to the disk, where supported: Windows and some network file systems do not support it."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _rename_to_new(temporary, path):
    """Rename a file, or raise FileExistsError if `path` exists."""
    if os.name == "nt":
        return os.rename(temporary, path)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links, like exFAT and some network file systems
        with open(path, "xb"):  # only one of two processes gets past this line
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
    # Wide types come first, so that every tensor begins at a multiple of its element's size.
    for key, (shape, dtype) in sorted(layout.items(), key=lambda item: -item[1][1].itemsize):
        stop = position + torch.Size(shape).numel() * dtype.itemsize
        entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        offsets[key], position = position, stop
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {key: start + offset for key, offset in offsets.items()}, start + position
