"""The header of a safetensors file, checked before anything is allocated.

Every reader starts here, so that a truncated, malicious or foreign file ends in one sentence (CheckpointError) and changes nothing.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON, data).
"""

import gc
import json
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from safetensors import SafetensorError

from ..families import TITLES
from ..layers import layout
from ..text import bounded

EXTENSIONS = (".safetensors", ".sft")
# Models have headers of less than 1 MB and at most some thousand tensors. The safetensors library accepts headers of 100 MB, which take up
# to 9 seconds and 2.5 GB to parse; these limits keep that below 2 seconds and 400 MB.
MAX_HEADER_BYTES, MAX_TENSORS, LIBRARY_HEADER_BYTES = 16_000_000, 100_000, 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
} | {name: getattr(torch, dtype) for name, dtype in (  # older versions of PyTorch lack these
    ("F8_E8M0", "float8_e8m0fnu"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"), ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    ("U64", "uint64"), ("U32", "uint32"), ("U16", "uint16"),
) if hasattr(torch, dtype)}
# Two elements per byte: the file's shape counts elements, PyTorch's counts bytes.
PAIRS = {"F4": torch.float4_e2m1fn_x2} if hasattr(torch, "float4_e2m1fn_x2") else {}
ALL_DTYPES = DTYPES | PAIRS
# Types of weights that are not packed. The other types are those of scales, codes and data.
WEIGHT_DTYPES = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))
MAX_DESCRIPTION_BYTES = 1 << 16  # one X.comfy_quant
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GGUF = b"GGUF"
WEB_PAGE, WEB_PAGE_BYTES = (b"<!doctype html", b"<html"), 512  # its possible beginnings, and how many bytes are read to find one
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class CheckpointError(ValueError):
    """A file that can't be used. The message is one sentence: file, tensor, remedy."""

    # ComfyUI's pop-up shows "module.Class: message" in three lines, and the module's name begins with this pack's whole path.
    __module__ = "builtins"

    def __init__(self, message):
        super().__init__(bounded(message))  # a tensor's name may have any characters, and millions of them


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header. shape and dtype: as a torch.Tensor has them; start, stop: byte offsets in the file."""

    shape: tuple
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file, read and checked by read_header.

    path: the file's path; tensors: {name: TensorInfo}; metadata: {str: str}; described: the cache of `description`, {(start, stop): dict,
    or a text that says why there is none}, shared with the headers that `within` returns; state: file_state when it was read.
    """

    path: str
    tensors: dict
    metadata: dict
    described: dict = field(default_factory=dict, repr=False, compare=False)
    state: tuple = field(default=(), repr=False, compare=False)

    @property
    def file(self):
        """The file's name, for messages."""
        return os.path.basename(self.path)

    def check_extension(self):
        """Raise CheckpointError for a safetensors file under another extension, which ComfyUI would open as a pickle."""
        if not self.file.lower().endswith(EXTENSIONS):
            raise CheckpointError(f"{self.file} is a safetensors file under the name of another kind; rename it so that it ends in "
                                  f"{EXTENSIONS[0]}.")

    @contextmanager
    def opened(self, buffering=-1):
        """The file, opened to read its bytes. Raises CheckpointError if it is no longer the file that read_header has read, or if it can't
        be read."""
        with self.reading(), open(self.path, "rb", buffering) as file:
            if self.state and file_state(os.fstat(file.fileno())) != self.state:
                raise self._changed()
            yield file

    @contextmanager
    def reading(self):
        """A context in which something reads the file. Raises CheckpointError if the file has changed since read_header has read it, or if
        it can't be read."""
        try:
            yield
            self._check_unchanged()
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            self._check_unchanged(error)
            if isinstance(error, OSError):
                raise unreadable(self.path, error) from error
            if isinstance(error, SafetensorError):
                what = f"{self.file} is not read by the safetensors library ({error}); save or download it again."
                raise CheckpointError(what) from error
            raise

    def _check_unchanged(self, error=None):
        if self.state and current_state(self.path) != self.state:
            raise self._changed() from error

    def _changed(self):
        return CheckpointError(f"{self.file} was changed, cut off or removed while it was read; wait until it is complete, or download it "
                               "again, and run again.")

    def written_to(self):
        """Whether the file has been written to since read_header has read it. One that was deleted or replaced has not."""
        now = current_state(self.path)
        return bool(self.state) and now is not None and now[:2] == self.state[:2] and now != self.state

    def within(self, prefix):
        """The header of the tensors whose names begin with `prefix`, under their names without it."""
        if not prefix:
            return self
        inside = {name.removeprefix(prefix): info for name, info in self.tensors.items() if name.startswith(prefix)}
        return replace(self, tensors=inside)

    def description(self, name):
        """The JSON object in a tensor X.comfy_quant, as a dict. Raises CheckpointError if the tensor does not hold one."""
        info = self.tensors[name]
        if (info.start, info.stop) not in self.described:
            self._read_descriptions()
        found = self.described[info.start, info.stop]
        if isinstance(found, str):
            raise CheckpointError(f"{self.file}: {name} {found}; save or download the file again.")
        return found

    def _read_descriptions(self):
        """Read every X.comfy_quant that is not in the cache, in the order of the file."""
        places = {(info.start, info.stop) for name, info in self.tensors.items() if name.endswith(f".{layout.QUANT_KEY}")}
        with self.opened() as file:
            for start, stop in sorted(places - self.described.keys()):
                self.described[start, stop] = _description(file, start, stop)

    def read_bytes(self, name):
        """The raw bytes of one tensor."""
        info = self.tensors[name]
        with self.opened() as file:
            file.seek(info.start)
            return file.read(info.stop - info.start)

    def read_tensor(self, name):
        """One tensor, read into its own memory. The file does not stay mapped."""
        info = self.tensors[name]
        data = np.empty(info.stop - info.start, np.uint8)
        for _ in self.read_into(name, [data]):
            pass
        if not data.size:  # PyTorch can't view an empty array as another type
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.from_numpy(data).view(info.dtype).view(info.shape)

    def read_into(self, name, parts, skip=0):
        """Read consecutive parts of a tensor into one-dimensional NumPy arrays, after its first `skip` bytes. Yields each array once it is
        filled."""
        with self.opened(buffering=0) as file:
            file.seek(self.tensors[name].start + skip)
            for part in parts:
                missing = part.view(np.uint8)
                while missing.size and (count := file.readinto(missing)):
                    missing = missing[count:]
                if missing.size:
                    raise self._changed()
                yield part

    def blocks(self, name, memory, tail=None):
        """Yield the bytes of a tensor, each time as many as a NumPy array of uint8 holds, as views of that array. tail: how many of the
        last bytes to read; None for all."""
        info = self.tensors[name]
        size = info.stop - info.start if tail is None else tail
        counts = [min(memory.size, size - start) for start in range(0, size, memory.size)]
        yield from self.read_into(name, (memory[:length] for length in counts), info.stop - info.start - size)

    def announce(self, names):
        """Prefetch tensors (posix_fadvise), where supported."""
        if hasattr(os, "posix_fadvise"):  # not on Windows
            with self.opened(buffering=0) as file, suppress(OSError):
                for info in (self.tensors[name] for name in names):
                    os.posix_fadvise(file.fileno(), info.start, info.stop - info.start, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read one block at a time.

    header: the file's; name: the tensor's name in the file. Like a torch.Tensor, it has a `shape`.
    """

    header: Header
    name: str

    @property
    def shape(self):
        return self.header.tensors[self.name].shape

    def words(self, counts, memory):
        """Yield the tensor as arrays of 32-bit words, each a view of `memory`, which the next one overwrites.

        counts: the number of words in each block; memory: a one-dimensional NumPy array that holds the largest block.
        """
        yield from self.header.read_into(self.name, (memory[:count] for count in counts))


def file_state(found):
    """(device, number, size, time of the last write in ns) of an os.stat_result: they tell whether a file is the same as before."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def current_state(path):
    """The file_state of the file at `path`; None if there is none."""
    try:
        return file_state(os.stat(path))
    except OSError:
        return None


def unreadable(path, error):
    """The CheckpointError of an OSError while a file was read, which it has as `os_error`: the commands name the whole path."""
    found = CheckpointError(f"{os.path.basename(path)} can't be read ({error.strerror or type(error).__name__}); check that it is there, "
                            "its permissions and the disk.")
    found.os_error = error
    return found


def _description(file, start, stop):
    """The dict of an X.comfy_quant; if it is invalid, the second half of a sentence that says why."""
    if stop - start > MAX_DESCRIPTION_BYTES:
        return f"has {stop - start} bytes instead of a few hundred"
    file.seek(start)
    try:
        return layout.decode_conf(file.read(stop - start))
    except (ValueError, RecursionError) as error:
        return str(error)


def read_header(path):
    """The Header of a safetensors file. Raises CheckpointError if the file is not a complete and consistent one."""
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            state = file_state(os.fstat(file.fileno()))
            raw = _raw_header(file, name, state[2])
    except OSError as error:
        raise unreadable(path, error) from error
    return _parsed(path, name, raw, state)


def _raw_header(file, name, size):
    """The JSON text of a file's header, as bytes. size: the file's."""
    prefix = file.read(8)
    if prefix.startswith(PICKLE_MAGIC):
        raise CheckpointError(f"{name} is a pickle, which can run code when it is opened; convert it to "
                              "safetensors, or download the safetensors version of the model.")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= LIBRARY_HEADER_BYTES:
        raise CheckpointError(f"{name} is {_what_else(name, prefix + file.read(WEB_PAGE_BYTES))}.")
    if 8 + length > size:
        raise CheckpointError(f"{name} is cut off: its header needs {8 + length} bytes and the file has {size}; "
                              "download it again.")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{name} has a header of {length / 1e6:.0f} MB, where models have less than 1 MB and this pack reads up to "
                              f"{MAX_HEADER_BYTES // 10**6} MB; download it again, or save it without the large entries of its metadata.")
    return file.read(length)


def _parsed(path, name, raw, state):
    """The Header of the JSON text `raw`."""
    length, size = len(raw), state[2]
    if raw.count(b'"dtype"') > MAX_TENSORS:
        raise CheckpointError(f"{name} has more than {MAX_TENSORS} tensors, where models have a few thousand; download it again.")
    try:
        with _without_collection():
            entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise CheckpointError(f"{name} is not a safetensors file, or its header is damaged; download it again.") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{name} has a damaged header; download it again.")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name} has damaged metadata in its header; download it again.")
    tensors = {key: _tensor_info(name, key, entry, 8 + length, size) for key, entry in entries.items()}
    _check_layout(name, tensors, 8 + length, size)
    return Header(path, tensors, metadata, state=state)


def _what_else(name, start):
    """What a file in another format is, and the remedy, as the rest of a sentence. start: its first bytes."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(GGUF):
        return "a GGUF file, which SVDQuant does not read; download the bf16, fp16 or fp8 version of the model in safetensors format"
    if not start:
        return "empty, so its download went wrong; download it again"
    if text.startswith(LFS_POINTER):
        return ("a Git LFS pointer, a few lines that stand for the model, so its download went wrong; run `git lfs pull` where it was "
                "cloned, or download the file itself")
    if text.startswith(WEB_PAGE):
        return ("a web page, so its download went wrong; download the file itself again, logged in if its page asks for a login or "
                "for a licence to be accepted")
    if name.lower().endswith(EXTENSIONS):
        return "not a safetensors file, despite its name; download it again, or choose another model"
    return f"not a safetensors file; choose a {TITLES} model in safetensors format"


@contextmanager
def _without_collection():
    """A context without garbage collection, whose repeated walks over all the objects of a large text take most of the time to parse it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_duplicates(pairs):
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_info(name, key, entry, data_start, size):
    """The TensorInfo of one header entry, checked without regard to the other entries."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{name} has a damaged header entry for tensor {key}; download it again.")
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    well_formed = (isinstance(shape, list) and all(map(_is_count, shape)) and isinstance(offsets, list)
                   and len(offsets) == 2 and all(map(_is_count, offsets)))
    if not well_formed:
        raise CheckpointError(f"{name} has a damaged header entry for tensor {key}; download it again.")
    if not isinstance(dtype, str) or dtype not in ALL_DTYPES:
        raise CheckpointError(f"{name} stores tensor {key} as {dtype!r}, a type that is not supported; choose a "
                              "bf16, fp16 or fp8 version of the model.")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    pairs = dtype in PAIRS
    bits = 4 if pairs else 8 * DTYPES[dtype].itemsize
    if 8 * (stop - start) != math.prod(shape) * bits or pairs and (not shape or shape[-1] % 2):
        raise CheckpointError(f"{name} declares tensor {key} as {dtype} {shape} but gives it {stop - start} bytes; the "
                              "file is damaged, download it again.")
    if stop > size:
        raise CheckpointError(f"{name} is cut off: tensor {key} ends at byte {stop} and the file has {size}; download "
                              "it again.")
    if pairs:
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorInfo(tuple(shape), ALL_DTYPES[dtype], start, stop)


def _check_layout(name, tensors, data_start, size):
    """Raise CheckpointError unless the tensors cover the data exactly, without overlaps or gaps."""
    position = data_start
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            raise CheckpointError(f"{name} is damaged: tensor {key} starts at byte {info.start} instead of "
                                  f"{position}; download it again.")
        position = info.stop
    if position != size:
        raise CheckpointError(f"{name} is damaged: its tensors end at byte {position} and the file has {size}; "
                              "download it again.")
