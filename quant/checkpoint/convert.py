"""Quantized checkpoints from one layout into another, on disk: a layer in memory at a time, nothing computed anew."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from . import card, comfy_kitchen, native
from .header import EXTENSIONS, CheckpointError, read_header
from .nunchaku import reader as nunchaku
from .nunchaku import writer as nunchaku_writer

LAYOUTS = ("native", "nunchaku")
READERS = {"native": native, "nunchaku": nunchaku, "kitchen": comfy_kitchen}


class StoredTensors(Mapping):
    """The tensors of a file that has them as they are, {name: tensor}, each read when it is asked for."""

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


def convert(source, target, to, overwrite=False, progress=lambda done, total: None):
    """Write the quantized model of file `source` into file `target`, in layout `to`, one of LAYOUTS.

    progress: called with the count of tensors written, and of all. Raises CheckpointError, before
    anything is written, on a file that is not a whole quantized model or is in that layout already, and where no list of models
    would show the target.
    """
    name = Path(target).name
    if not name.lower().endswith(EXTENSIONS):
        raise CheckpointError(f"{name} does not end in {EXTENSIONS[0]}, and no list of models would show it; name the file "
                              f"{name}{EXTENSIONS[0]}.")
    header = read_header(source)
    found = next((name for name, reader in READERS.items() if reader.matches(header)), None)
    if found is None or found == to:
        why = "is no quantized model that this pack reads" if found is None else f"is in the {to} layout already"
        raise CheckpointError(f"{header.file} {why}; choose another file.")
    packed = READERS[found].open_file(header)
    config = _config(packed)
    source_card = card.of_source(header.metadata)
    counted = partial(_counted, progress=progress)
    if to == "native":
        infos = {name: (shape, packed.dtypes[name]) for name, shape in packed.shapes.items()}
        native.save_stream(target, infos, counted(packed.tensors(), len(infos)), packed.specs, config, packed.recipe, packed.source,
                           overwrite, source_card)
    else:
        nunchaku_writer.save(target, StoredTensors(packed), packed.specs, config, packed.recipe, packed.source, overwrite,
                            source_card, counted)


def _config(packed):
    """The configuration to write: the shapes', and from the file's own what no shape tells."""
    try:
        return packed.family.configuration.of(packed.shapes, packed.config)
    except ValueError as error:
        raise CheckpointError(f"{packed.header.file} {error}; save or download it again.") from None


def _counted(tensors, total, progress):
    for done, item in enumerate(tensors, 1):
        yield item
        progress(done, total)
