"""What every reader of a 4-bit file hands to the builder of models."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..families.family import Family
from .header import Header


@dataclass(frozen=True)
class PackedFile:
    """A whole quantized model, checked and not yet read. Names are ComfyUI's, without prefix."""

    header: Header  # of the file that the user chose, for messages
    family: Family
    specs: dict  # {layer name: LayerSpec}
    shapes: dict  # {tensor name: shape} of all the tensors, those of packed layers included
    dtypes: dict  # {tensor name: dtype}, likewise
    config: dict  # what the file itself says of the host's configuration
    recipe: dict  # how it was quantized, as far as the file tells
    source: str  # name of the model that was quantized, or of this file
    tensors: Callable[[], Iterable]  # reads: yields (name, tensor), one tensor or layer at a time
    prefix: str | None = None  # where the file has these very tensors under prefix + name, so that it can be mapped
    read: Callable | None = None  # one tensor by its name, where that costs no more than the tensor itself
    computed: frozenset = frozenset()  # names of the tensors that the file has in another form, which `read` knows: int8 scales
