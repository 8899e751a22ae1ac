"""An opened quantized file: its tensors are known and checked, but not yet read."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..families.family import Family
from . import checksums
from .header import Header, read_header


@dataclass(frozen=True)
class PackedFile:
    """A whole quantized model, checked. Names are ComfyUI's, without prefix, unless stated otherwise.

    header: the header of the file that the user chose; family: the model's Family
    specs: {layer name: LayerSpec} of the packed layers
    shapes, dtypes: {tensor name: shape or torch.dtype} of all the model's tensors, including those of packed layers
    config: the host's configuration of the model, with all of the family's keys
    recipe: how the model was quantized, a JSON-able dict, as far as the file states it
    source: name of the model that was quantized, or of this file
    tensors: () -> iterable of (name, tensor), which reads one tensor or one layer at a time
    prefix: the file stores every tensor outside `computed` unchanged under prefix + name, so that it can be mapped; None if it does not
    read: (name) -> tensor, which reads one tensor; None if the file can't be read tensor by tensor
    computed: names of the tensors that the file stores in another form, which `read` converts: int8 scales
    stored: {name in the file: TensorInfo} of all stored tensors; None for header.tensors
    modules: names in the file of the modules whose tensors are packed; None for the names of `specs`
    paths: paths of the model's files; None for the header's path alone
    """

    header: Header
    family: Family
    specs: dict
    shapes: dict
    dtypes: dict
    config: dict
    recipe: dict
    source: str
    tensors: Callable[[], Iterable]
    prefix: str | None = None
    read: Callable | None = None
    computed: frozenset = frozenset()
    stored: dict | None = None
    modules: frozenset | None = None
    paths: tuple | None = None

    def __post_init__(self):
        defaults = {"stored": self.header.tensors, "modules": frozenset(self.specs), "paths": (self.header.path,)}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def check(self, whole=True, progress=lambda done, total: None):
        """checksums.check of the model's files. Returns the number of tensors with a checksum."""
        prefix, count = self.prefix or "", 0
        for path in self.paths:
            header = self.header if path == self.header.path else read_header(path)
            kinds = {name: checksums.kind(name, info.dtype) for name, info in header.tensors.items() if name.startswith(prefix)}
            count += checksums.check(header, kinds, whole, progress)
        return count

    def nbytes(self):
        """Bytes of the model's files, including their headers."""
        return sum(map(os.path.getsize, self.paths))


class StoredTensors(Mapping):
    """The tensors of a PackedFile that has `read`, as a mapping {name: tensor}: each access reads the tensor from the file."""

    def __init__(self, packed):
        self.read, self.names = packed.read, packed.shapes

    def __getitem__(self, name):
        return self.read(name)

    def __contains__(self, name):
        return name in self.names

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)
