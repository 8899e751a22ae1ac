"""A checksum of each tensor in a file's metadata, and the check that tensors are as they were saved.

    svdquant.checksums   JSON {tensor's name: 16 hexadecimal digits}: the checksum of all its bytes, then that of its last PAGE bytes

The checksum: bytes are cut into pages of PAGE bytes; the 64-bit little-endian words of each page are added up modulo 2^64, the last
word filled up with zeros; the checksum is the CRC-32 of all these sums, 8 bytes each. A flipped bit changes it, as do zeroed, moved and
exchanged pages; words exchanged within a page do not. It takes a tenth of the time of a CRC-32 of all bytes, and NumPy computes it
without Python's global lock, so that several threads check one file.

SVDQuant Inspect checks all bytes. SVDQuant Load Model reads the 4-bit codes, most of the file, only when they are used: of these it checks
the last pages, which differ in files that were cut off, filled up with zeros or put together wrongly. It checks all other tensors whole. So
a flipped bit within the codes passes there, and changes one of thousands of millions of weights. This takes 50 ms of processor time a GB of
the file, in several threads: 4 % more time for a load from the system's page cache on two cores, and less where a disk is waited for.

No tensor may have values that spoil every image: NaN, infinity, and smoothing factors and scales of branches that are not positive. A file
with such values is not written; SVDQuant Inspect looks for them in every file, and SVDQuant Load Model in tensors without a checksum, as
other software's.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch

from .header import CheckpointError

KEY = "svdquant.checksums"
PAGE = 4096  # bytes
BLOCK = 64 * PAGE  # bytes that a thread reads at a time, into memory that stays in its core's cache
THREADS, BATCH = 8, 8 << 20  # bytes that a thread checks at least before another one takes over
EMPTY = "0" * 16
CODES, VALUES, FACTORS = "codes", "values", "factors"  # kinds of tensors
# Last parts of tensors' names in packed layers, in our and comfy-kitchen's files and in Nunchaku's.
CODE_LEAVES, FACTOR_LEAVES = ("weight", "qweight"), ("weight_smooth_factor", "smooth_factor", "smooth", "weight_proj_scale")
UNUSED_LEAVES = ("smooth_orig", "smooth_factor_orig")  # no reader uses them
# {floating point type: (NumPy's type of its bits, the bits of infinity or NaN)}
EXPONENTS = {torch.bfloat16: (np.uint16, 0x7F80), torch.float16: (np.uint16, 0x7C00), torch.float32: (np.uint32, 0x7F800000),
             torch.float64: (np.uint64, 0x7FF0000000000000), torch.float8_e4m3fn: (np.uint8, 0x7F), torch.float8_e5m2: (np.uint8, 0x7C)}


def checksum(data, before=0):
    """The checksum of bytes, a one-dimensional NumPy array of uint8. before: of the bytes before them, whole pages."""
    whole = data.size // PAGE * PAGE
    found = zlib.crc32(_sums(data[:whole].reshape(-1, PAGE)), before)
    if whole == data.size:
        return found
    rest = np.zeros(PAGE, np.uint8)
    rest[:data.size - whole] = data[whole:]
    return zlib.crc32(_sums(rest[None]), found)


def _sums(pages):
    return np.add.reduce(pages.view("<u8"), axis=1, dtype=np.uint64).astype("<u8")


def kind(name, dtype):
    """The kind of a tensor, from its name in any of the formats; None if it may have any values."""
    leaf = name.rpartition(".")[2]
    if leaf in CODE_LEAVES and not dtype.is_floating_point:
        return CODES
    if leaf in FACTOR_LEAVES:
        return FACTORS
    return VALUES if dtype.is_floating_point and leaf not in UNUSED_LEAVES else None


# --- writing -------------------------------------------------------------------------------------------------------


def digits(data, name, dtype):
    """A tensor's entry. data: its bytes, a one-dimensional NumPy array of uint8. Raises CheckpointError for values that spoil every
    image."""
    found, values = 0, kind(name, dtype)
    for start in range(0, data.size, BLOCK):
        block = data[start:start + BLOCK]
        found = checksum(block, found)
        if trouble := _trouble(block, dtype, values):
            raise CheckpointError(f"The model is not saved, because its tensor {name} has {trouble}, which would spoil every image; "
                                  "quantize it again, with that layer in 16 bits or from a bf16 model.")
    return f"{found:08x}{checksum(data[-PAGE:]):08x}"


def text(found):
    """The value of KEY. found: {name: digits of the tensor}. It has the same length for all digits."""
    return json.dumps(found, separators=(",", ":"))


# --- checking ------------------------------------------------------------------------------------------------------


def stored(header):
    """{name: (checksum of all bytes, of the last page)} in a file's metadata; {} if it has none. Raises CheckpointError if they are
    damaged."""
    if KEY not in header.metadata:
        return {}
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        found = json.loads(header.metadata[KEY])
        if all(len(digits) == len(EMPTY) for digits in found.values()):
            return {name: (int(digits[:8], 16), int(digits[8:], 16)) for name, digits in found.items()}
    raise CheckpointError(f"{header.file} has no valid {KEY} in its metadata; download or save it again.")


def check(header, kinds, whole=True, progress=lambda done, total: None):
    """Raise CheckpointError, which names a tensor, unless all tensors are as they were saved. Returns the number of tensors with a
    checksum.

    kinds: {tensor's name: CODES, VALUES or FACTORS}; other tensors have checksums only. whole: whether all bytes of the codes are read,
    and the values of tensors with a checksum are checked too; otherwise the codes' last pages are read. progress(bytes done, of all):
    called often; it may raise to cancel.
    """
    sums = stored(header)
    names = [name for name in header.tensors if name in sums or kinds.get(name) in (VALUES, FACTORS)]
    tails = {name for name in names if not whole and kinds.get(name) == CODES}
    total = sum(_size(header, name, name in tails) for name in names)
    batches, size = [], BATCH
    for name in sorted(names, key=lambda name: header.tensors[name].start):  # in the order of the file, which disks read fastest
        if size >= BATCH:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += _size(header, name, name in tails)
    done, pool = 0, ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        values = kinds if whole else {name: kind for name, kind in kinds.items() if name not in sums}
        for future in [pool.submit(_check_batch, header, batch, values, sums, tails) for batch in batches]:
            done += future.result()
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return sum(name in sums for name in names)


def _size(header, name, tail):
    size = header.tensors[name].stop - header.tensors[name].start
    return min(PAGE, size) if tail else size


def _check_batch(header, names, kinds, sums, tails):
    """_check of several tensors."""
    memory = np.empty(BLOCK, np.uint8)
    return sum(_check(header, name, kinds.get(name), sums.get(name), name in tails, memory) for name in names)


def _check(header, name, kind, expected, tail, memory):
    """Check one tensor; returns the number of bytes that were read. expected: of `stored`, or None; tail: whether only the last page is
    read; memory: a NumPy array of uint8 for a block."""
    found, size, dtype = 0, _size(header, name, tail), header.tensors[name].dtype
    for block in header.blocks(name, memory, tail=size if tail else None):
        found = checksum(block, found)
        if trouble := _trouble(block, dtype, kind):
            raise CheckpointError(f"{header.file} is damaged: tensor {name} has {trouble}; download or save it again.")
    if expected is not None and found != expected[tail]:
        raise CheckpointError(f"{header.file} is damaged: tensor {name} is not as it was saved (its checksum is {found:08x} instead of "
                              f"{expected[tail]:08x}), by damage or by another program; download or save it again.")
    return size


def _trouble(block, dtype, kind):
    """What is wrong with a block of bytes, as the object of a sentence: a value that is not finite or, for FACTORS, not positive either;
    None if nothing is."""
    if kind not in (VALUES, FACTORS) or dtype not in EXPONENTS or not block.size:
        return None
    unsigned, infinity = EXPONENTS[dtype]
    bits = block.view(unsigned)
    # e4m3fn has no infinity: all its bits but the sign are set in a NaN.
    if (bits & unsigned(infinity)).max() == infinity:
        return "NaN or infinity" if kind == VALUES else "values that are not positive and finite"
    if kind == FACTORS and ((bits == 0) | (bits >> unsigned(8 * bits.itemsize - 1) != 0)).any():
        return "values that are not positive and finite"
    return None
