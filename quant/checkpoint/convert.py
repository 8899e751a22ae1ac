"""Convert quantized checkpoints between layouts on disk, one layer in memory at a time. Nothing is quantized again."""

from functools import partial
from pathlib import Path

from . import card, formats
from .header import EXTENSIONS, CheckpointError, read_header


def convert(source, target, to, overwrite=False, progress=lambda done, total: None):
    """Write the quantized model of file `source` into file `target`, in layout `to`, one of formats.WRITERS.

    progress: called with the number of tensors written so far and the total number. Raises CheckpointError, before anything is written,
    if the source is not a whole quantized model or is in that layout already, or if the target's extension is not one that model lists
    show.
    """
    name = Path(target).name
    if not name.lower().endswith(EXTENSIONS):
        raise CheckpointError(f"{name} does not end in {EXTENSIONS[0]}, and no list of models would show it; name the file "
                              f"{name}{EXTENSIONS[0]}.")
    header = read_header(source)
    found = formats.identify(header)
    if found is None or found.layout == to:
        why = "is no quantized model that this pack reads" if found is None else f"is in the {to} layout already"
        raise CheckpointError(f"{header.file} {why}; choose another file.")
    packed = found.reader.open_file(header)
    formats.WRITERS[to].save_packed(target, packed, overwrite, card.of_source(header.metadata),
                                    partial(_counted, progress=progress))


def _counted(tensors, total, progress):
    for done, item in enumerate(tensors, 1):
        yield item
        progress(done, total)
