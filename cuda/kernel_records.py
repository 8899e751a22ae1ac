"""Facts about the kernels on this machine's GPUs, found once and kept beside the compiled kernels: the self-test's verdicts
(self_test.py) and the fastest choices (autotune.py).

A record is one small file. It belongs to a GPU, its driver, the code of this folder and everything else in its key; with another key there
is another record, so that a new driver or a changed kernel begins anew. A damaged file counts as missing and is replaced.
"""

import functools
import hashlib
import json
from pathlib import Path

import torch

from . import compiler, driver


@functools.cache
def machine(device):
    """(the GPU's name, its UUID or "", the driver's version) of a CUDA device with an index."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, str(getattr(properties, "uuid", "")), driver.version()


@functools.cache
def code_digest():
    """A digest of the code of this folder, as a hexadecimal number. A wrong result may also be the fault of a launcher, of a test, or of a
    kernel that runs beside the tested one; once it is corrected, the fact is found anew."""
    folder = Path(__file__).parent
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".cu", ".cuh")]
    return hashlib.sha256(repr([(str(path.relative_to(folder)), path.read_bytes()) for path in files]).encode()).hexdigest()


def path(name, device, *key):
    """The file of a record. name: its beginning; key: all that the fact depends on besides the GPU, its driver and this folder's code, by
    repr."""
    digest = hashlib.sha256(repr((machine(device), code_digest(), key)).encode()).hexdigest()
    return compiler.cache_folder() / f"{name}-{digest[:32]}.json"


def read(path):
    """The value of a record: what write() was given. None if it is missing or damaged."""
    data = compiler.read_entry(path)
    try:
        return None if data is None else json.loads(data)
    except ValueError:
        return None


def write(path, value):
    """Keep a record's value, of JSON's types. Where the cache can't be written, the fact is found anew in the next process."""
    compiler.write_entry(path, json.dumps(value).encode())
