"""A checksum of each tensor in a file's metadata, and the check that tensors are as they were saved.

    svdquant.checksums   JSON {tensor's name: 16 hexadecimal digits}: the checksum of all its bytes, then that of its last PAGE bytes

The checksum: bytes are cut into pages of PAGE bytes; the 64-bit little-endian words of each page are added up modulo 2^64, the last
word filled up with zeros; the checksum is the CRC-32 of all these sums, 8 bytes each. A flipped bit changes it, as do zeroed, moved and
exchanged pages; words exchanged within a page do not. It takes a tenth of the time of a CRC-32 of all bytes, and NumPy computes it
without Python's global lock, so that several threads check one file.

SVDQuant Inspect checks all bytes. SVDQuant Load Model reads the 4-bit codes, most of the file, only when they are used: of these it checks
the last pages, which differ in files that were cut off, filled up with zeros or put together wrongly. It checks all other tensors whole. So
a flipped bit within the codes passes there, and changes one of thousands of millions of weights.

The other tensors are also checked for values that no quantizer writes: NaN, infinity, and smoothing factors that are not positive, each of
which spoils every image. Files without checksums, as those of other software, have only this check.
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
BLOCK = 256 * PAGE  # bytes that a thread reads at a time: they stay in its core's cache
THREADS, BATCH = 8, 8 << 20  # bytes that a thread checks at least before another one takes over
EMPTY = "0" * 16
CODES, VALUES, FACTORS = "codes", "values", "factors"  # kinds of tensors
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


# --- writing -------------------------------------------------------------------------------------------------------


def digits(data):
    """A tensor's entry. data: its bytes, a one-dimensional NumPy array of uint8."""
    return f"{checksum(data):08x}{checksum(data[-PAGE:]):08x}"


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

    kinds: {tensor's name: CODES, VALUES or FACTORS}; other tensors have checksums only. whole: whether all bytes of the codes are read;
    their last pages otherwise. progress(bytes done, of all): called often; it may raise to cancel.
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
        for future in [pool.submit(_check_batch, header, batch, kinds, sums, tails) for batch in batches]:
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
    return sum(_check(header, name, kinds.get(name), sums.get(name), name in tails) for name in names)


def _check(header, name, kind, expected, tail):
    """Check one tensor; returns the number of bytes that were read. expected: of `stored`, or None; tail: whether only the last page is
    read."""
    found, size, dtype = 0, _size(header, name, tail), header.tensors[name].dtype
    for block in header.blocks(name, BLOCK, tail=size if tail else None):
        found = checksum(block, found)
        if kind in (VALUES, FACTORS) and not _sound(block, dtype, kind):
            what = "NaN or infinity" if kind == VALUES else "values that are not positive and finite"
            raise CheckpointError(f"{header.file} is damaged: tensor {name} has {what}; download or save it again.")
    if expected is not None and found != expected[tail]:
        raise CheckpointError(f"{header.file} is damaged: tensor {name} is not as it was saved (its checksum is {found:08x} instead of "
                              f"{expected[tail]:08x}), by damage or by another program; download or save it again.")
    return size


def _sound(block, dtype, kind):
    """Whether all values of a block of bytes are finite; for FACTORS, whether they are also positive."""
    if dtype not in EXPONENTS:
        return True
    unsigned, infinity = EXPONENTS[dtype]
    bits = block.view(unsigned)
    # e4m3fn has no infinity: all its bits but the sign are set in a NaN.
    if bits.size and (bits & unsigned(infinity)).max() == infinity:
        return False
    return kind == VALUES or not bits.size or bool(((bits != 0) & (bits >> unsigned(8 * bits.itemsize - 1) == 0)).all())
