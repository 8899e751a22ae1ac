"""The formats of quantized files: the one list of them. A format is a module of this folder and a line in FORMATS."""

from dataclasses import dataclass
from types import ModuleType

from . import comfy_kitchen, native
from .nunchaku import reader as nunchaku_reader
from .nunchaku import writer as nunchaku_writer


@dataclass(frozen=True)
class Format:
    """A format of quantized files.

    name: as users read it
    reader: has matches(header), whether the file is of this format, and open_file(header), its PackedFile. Both raise CheckpointError,
        open_file unless the model is whole
    writer: None, or has save(path, tensors, specs, config, recipe, source, overwrite, source_card), which writes a model from memory,
        and save_packed(path, packed, overwrite, source_card, counted), which writes a PackedFile of another format. Both raise
        CheckpointError where the model has no place in the format, and as write.write does
    layout: what users choose the writer by, in SVDQuant Save Model and convert.py; "" without a writer
    """

    name: str
    reader: ModuleType
    writer: ModuleType | None = None
    layout: str = ""


FORMATS = (
    Format("SVDQuant", native, native, "native"),
    Format("Nunchaku", nunchaku_reader, nunchaku_writer, "nunchaku"),
    Format("comfy-kitchen", comfy_kitchen),
)
WRITERS = {entry.layout: entry.writer for entry in FORMATS if entry.writer}  # {layout: writer}, the pack's own first


def identify(header):
    """The Format of a file; None if it is in none of them. Raises CheckpointError where its metadata are damaged."""
    return next((entry for entry in FORMATS if entry.reader.matches(header)), None)
