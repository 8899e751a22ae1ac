"""What the reader of a format makes of a quantized file: a model whose tensors are known and not yet read."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..families.family import Family
from .header import Header


@dataclass(frozen=True)
class PackedFile:
    """A whole quantized model, checked. Names are ComfyUI's, without prefix, unless said otherwise.

    header: of the file that the user chose; family: of the model
    specs: {layer name: LayerSpec} of the packed layers
    shapes, dtypes: {tensor name: shape or torch.dtype} of all the model's tensors, those of packed layers included
    config: the host's configuration of the model, all of the family's keys
    recipe: how the model was quantized, a JSON-able dict, as far as the file states it
    source: name of the model that was quantized, or of this file
    tensors: () -> iterable of (name, tensor), which reads one tensor or one layer at a time
    prefix: the file has every tensor as it is under prefix + name, so that it can be mapped; None if it has not
    read: (name) -> tensor, where one tensor can be read by itself; None if it can't
    computed: names of the tensors that the file stores in another form, which `read` converts: int8 scales
    stored: {name in the file: TensorInfo} of all that is stored; None for header.tensors
    modules: names in the file of the modules whose tensors are packed; None for the names of `specs`
    paths: of the model's files; None for the header's alone
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

    def nbytes(self):
        """Bytes of the model's files, with their headers."""
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
