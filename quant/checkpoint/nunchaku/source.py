"""Locate the tensors of a Nunchaku model: in one file with metadata, or in a folder with two files and config.json."""

import json
import os
from dataclasses import dataclass

from ...families import FAMILIES
from ...families.family import Family
from ...text import alternatives
from ..header import CheckpointError, Header, StoredTensor, read_header
from . import names

BLOCKS_FILE, REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
CONFIG_FILES = {"config": "config.json", "comfy_config": "comfy_config.json"}
MAX_CONFIG_BYTES = 1 << 20
WITH_FILES = [family for family in FAMILIES if family.nunchaku]
TITLES = alternatives(family.title for family in WITH_FILES)
BY_CLASS = {name: family for family in WITH_FILES for name in family.nunchaku.model_classes}


@dataclass(frozen=True)
class Source:
    """The tensors and the metadata of a family's Nunchaku model, which is one file or two.

    header: the header of the file that the user chose; tensors: {v1 name: (Header, name in its file)}; metadata: {str: str}
    """

    header: Header
    family: Family
    tensors: dict
    metadata: dict

    def infos(self):
        """{v1 name: TensorInfo} of all tensors."""
        return {name: header.tensors[stored] for name, (header, stored) in self.tensors.items()}

    def packed_modules(self):
        """v1 names of the modules with packed weights."""
        return frozenset(name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight"))

    def paths(self):
        """Paths of the model's safetensors files."""
        return tuple({header.path: None for header, _ in self.tensors.values()})

    def label(self, name):
        """A tensor's name for messages: the one in the file or, if the file lacks the tensor, the one that the file would have."""
        if name in self.tensors:
            return self.tensors[name][1]
        return names.v2(self.family.nunchaku, name) if self._has_v2_leaves() else name

    def _has_v2_leaves(self):
        leaves = self.family.nunchaku.leaves_v2
        return any(stored.rpartition(".")[2] in leaves for _, stored in self.tensors.values())

    def info(self, name):
        """The TensorInfo of a tensor by its v1 name. Raises CheckpointError if the file lacks it."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.header.file} lacks tensor {self.label(name)}; the file is incomplete, download it again.")
        header, stored = self.tensors[name]
        return header.tensors[stored]

    def read(self, name):
        """One tensor, read into its own memory."""
        header, stored = self.tensors[name]
        return header.read_tensor(stored)

    def stored(self, name):
        """The StoredTensor of a large tensor, which is read block by block while it is unpacked."""
        return StoredTensor(*self.tensors[name])

    def announce(self, names):
        """Prefetch tensors, where supported. Names that a very old file lacks are skipped."""
        found = [self.tensors[name] for name in names if name in self.tensors]
        for header in {header.path: header for header, _ in found}.values():
            header.announce([stored for owner, stored in found if owner is header])

    def read_bytes(self, name):
        """The raw bytes of one tensor."""
        header, stored = self.tensors[name]
        return header.read_bytes(stored)

    def json(self, key):
        """A JSON object in the metadata, as a dict; {} if it is absent. Raises CheckpointError if it is damaged."""
        if key not in self.metadata:
            return {}
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.header.file} has no valid {key} in its metadata; download it again.")
        return value

    def check(self, name, shape, dtypes):
        """Raise CheckpointError unless tensor `name` has this shape and one of these dtypes. Returns its dtype."""
        info = self.info(name)
        if info.shape != tuple(shape):
            raise CheckpointError(f"{self.header.file}: tensor {self.label(name)} has shape {list(info.shape)} instead of "
                                  f"{list(shape)}; the file is damaged, download it again.")
        if info.dtype not in dtypes:
            raise CheckpointError(f"{self.header.file}: tensor {self.label(name)} is {info.dtype} instead of {dtypes[0]}; the "
                                  "file is damaged, download it again.")
        return info.dtype


def gather(header):
    """The Source of a file, or of both files of a model in two. Raises CheckpointError if the second file is missing, if a tensor is there
    twice, or if the model is of no family with Nunchaku files."""
    headers, metadata, folder = [header], dict(header.metadata), os.path.dirname(header.path)
    neighbour = {BLOCKS_FILE: REST_FILE, REST_FILE: BLOCKS_FILE}.get(header.file)
    if neighbour is not None:
        path = os.path.join(folder, neighbour)
        if not os.path.isfile(path):
            raise CheckpointError(f"{header.file} is one of the two files of a Nunchaku model, and {neighbour} is not beside "
                                  "it; put both into one folder.")
        headers.append(read_header(path))
        metadata |= {key: text for key, file in CONFIG_FILES.items() if (text := _small_text(os.path.join(folder, file)))}
    title = metadata.get("model_class", "")
    family = names.family_of({name for part in headers for name in part.tensors}) or BY_CLASS.get(title)
    if family is None:
        what = f"is a {title}" if title else f"is not a {TITLES}"
        raise CheckpointError(f"{header.file} is a Nunchaku model that {what}; choose a Nunchaku {TITLES} model.")
    tensors = {}
    for part in headers:
        for stored in part.tensors:
            name = names.v1(family.nunchaku, stored)
            if name in tensors:
                raise CheckpointError(f"{part.file} has tensor {name} twice, as {stored} and {tensors[name][1]}; download "
                                      "it again.")
            tensors[name] = (part, stored)
    return Source(header, family, tensors, metadata)


def _small_text(path):
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CONFIG_BYTES)
