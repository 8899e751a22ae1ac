"""The one list of formats of quantized files. A format is a module of this folder and a line in FORMATS."""

from dataclasses import dataclass
from types import ModuleType

from . import comfy_kitchen, native
from .nunchaku import reader as nunchaku_reader
from .nunchaku import writer as nunchaku_writer


@dataclass(frozen=True)
class Format:
    """A format of quantized files.

    name: its name for users
    reader: a module with matches(header), which says whether the file has this format, and open_file(header), which returns its
        PackedFile. Both raise CheckpointError: matches if the metadata are damaged, open_file unless the model is whole
    writer: None, or a module with save(path, tensors, specs, config, recipe, source, overwrite, source_card), which writes a model from
        memory, and save_packed(path, packed, overwrite, source_card, counted), which writes a PackedFile of another format. Both raise
        CheckpointError if the format can't hold the model, and as write.write does
    layout: the name by which users choose the writer in SVDQuant Save Model and convert.py; "" without a writer
    opens: the nodes that open the writer's files
    """

    name: str
    reader: ModuleType
    writer: ModuleType | None = None
    layout: str = ""
    opens: str = "SVDQuant Load Model"


FORMATS = (
    Format("SVDQuant", native, native, "native"),
    Format("Nunchaku", nunchaku_reader, nunchaku_writer, "nunchaku", "SVDQuant Load Model and Nunchaku's nodes"),
    Format("comfy-kitchen", comfy_kitchen),
)
LAYOUTS = {entry.layout: entry for entry in FORMATS if entry.writer}  # {layout: Format}, the pack's own first
WRITERS = {layout: entry.writer for layout, entry in LAYOUTS.items()}


def identify(header):
    """The Format of a file; None if no format matches. Raises CheckpointError if its metadata are damaged."""
    return next((entry for entry in FORMATS if entry.reader.matches(header)), None)
