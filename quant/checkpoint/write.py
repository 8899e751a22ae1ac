"""A safetensors file written one tensor at a time, whole or not at all."""

import json
import os
import shutil

import torch

from .header import DTYPES, CheckpointError

SPARE_BYTES = 1 << 20  # header and file system overhead, when asking whether the disk has room
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_target(path, overwrite):
    """Raise CheckpointError where a file is in the way."""
    if os.path.exists(path) and not overwrite:
        raise CheckpointError(f"{os.path.basename(path)} exists already; choose another filename, or switch overwrite on.")


def write(path, layout, tensors, metadata, overwrite=False):
    """Write `tensors` to a temporary file beside `path`, then rename it: no half-written file is ever seen.

    layout: {name: (shape, dtype)} of all the tensors; tensors: iterable of (name, tensor), in any order, so that only
    one of them need be in memory; metadata: {str: str}. Raises CheckpointError where the file exists (and overwrite is
    False), the disk is full or the folder can't be written.
    """
    check_target(path, overwrite)
    name, folder = os.path.basename(path), os.path.dirname(path)
    head, starts, size = _header(layout, metadata)
    # The real file's folder, with a name that no model list shows: it does not end in .safetensors.
    temporary = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size + SPARE_BYTES > free:
            raise CheckpointError(f"There is no room to save {name}: it needs {size / 1e9:.2f} GB and the disk has "
                                  f"{free / 1e9:.2f} GB free; free some space or save to another disk.")
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
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"Saving {name} failed ({error}); free some space on the disk, or check that its folder "
                              "can be written and that no loaded model still uses the file.") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


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
