"""A quantization's progress on disk, so that an interrupted run of the same inputs resumes where it stopped.

Each run has a folder, named by a digest of everything that decides its result. The folder holds one safetensors file for each finished
block, with the packed tensors, and with the records of its layers and a checksum in its metadata. One more file holds the model's
outputs during calibration, from which the sampling is played back without running the model.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint.write import write
from ..quantizer.pipeline import LayerRecord

SPARE_BYTES = 1 << 30  # This much of the disk stays free.
ABANDONED_SECONDS = 30 * 24 * 3600  # a run that was last written to this long ago is not resumed any more
RUN = re.compile("[0-9a-f]{32}")  # the name of a run's folder
TRAJECTORY = "trajectory"
CHECKSUM_WORDS = 1 << 24  # 32-bit words that are summed at a time; each needs 24 bytes of memory
PACK = Path(__file__).resolve().parents[2]
SOURCES = ("quant/**/*.py", "cuda/**/*.py", "cuda/kernels/*.cu*")  # The pack's sources that decide how a layer is quantized.

log = logging.getLogger(__name__)


class Unknown(Exception):
    """Raised for a value that can't be hashed reliably."""


def checksum(tensor):
    """A 64-bit checksum of a tensor's bytes, computed on its device. All devices give the same number."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    total = 0
    for start in range(0, words.numel(), CHECKSUM_WORDS):
        chunk = words[start:start + CHECKSUM_WORDS].long()
        index = torch.arange(start, start + chunk.numel(), device=chunk.device)
        # Every index has its own odd factor, so that a changed or a moved word changes the sum. int64 wraps around.
        total += int(((chunk + 0x9E3779B9) * (2 * index * 0x5851F42D4C957F2D + 1)).sum())
    return total % 2**64


def digest(value):
    """A text that differs for different values. Takes tensors, modules, numbers, strings, and lists, tuples and dicts of them. Raises
    Unknown for any other type."""
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)} {checksum(value)}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(digest, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{digest(key)}: {digest(item)}' for key, item in value.items())}}}"
    if isinstance(value, torch.nn.Module):
        plain = {key: item for key, item in vars(value).items() if isinstance(item, (bool, int, float, str))}
        return f"{type(value).__qualname__} {digest(plain)} {digest(dict(value.named_buffers()) | dict(value.named_parameters()))}"
    raise Unknown(type(value).__name__)


def run_digest(patcher, weights, *inputs):
    """A hex digest of a run on a MODEL. weights: the digest of its weights; inputs: all other inputs of the run. Raises Unknown if the
    MODEL or the inputs hold a value that can't be hashed reliably, such as a hook of another node."""
    parts = [weights, *map(digest, inputs), digest(patcher.get_model_object("model_sampling")), digest(patcher.model_options),
             digest(patcher.object_patches)]
    if patcher.forced_hooks or any(any(attached.values()) for attached in (patcher.wrappers, patcher.callbacks, patcher.hook_patches,
                                                                           patcher.additional_models)):
        raise Unknown("hook or wrapper")
    parts += [torch.__version__, str(patcher.load_device)]
    parts += [path.read_text(encoding="utf-8") for pattern in SOURCES for path in sorted(PACK.glob(pattern))]
    if torch.device(patcher.load_device).type == "cuda":
        parts.append(torch.cuda.get_device_name(patcher.load_device))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Checkpoint:
    """The files of one run.

    folder: the folder of all runs; key: the run's run_digest; nbytes: the size of all packed tensors. Nothing is kept if the disk has too
    little room. A background thread writes the files; the end of the context waits for it.
    """

    def __init__(self, folder, key, nbytes):
        self.folder, self.key = Path(folder) / key[:32], key
        self.keeps, self.writer = True, ThreadPoolExecutor(1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)  # the present by the folder's own clock
            remove_abandoned(self.folder.parent, self.folder.stat().st_mtime)
            used = sum(path.stat().st_size for path in self.folder.iterdir())
            if shutil.disk_usage(self.folder).free + used < nbytes + SPARE_BYTES:
                self._stop("the disk has too little room")
        except OSError as error:
            self._stop(error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.writer.shutdown()

    def _stop(self, why):
        self.keeps = False
        log.warning("The progress of this quantization is not kept in %s: %s. If it is interrupted, it starts from the beginning.",
                    self.folder, why)

    def load(self, name):
        """(tensors, metadata) as saved under `name`; None if there is no file, or if it is damaged or belongs to another run."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads((file.metadata() or {})["progress"])
                # These are copies, since the file is removed at the end of the run.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            if progress["key"] == self.key and progress["crc32"] == _crc32(tensors):
                return tensors, progress["metadata"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            pass
        log.warning("The progress in %s is damaged or belongs to another run; it is not used.", path)
        return None

    def save(self, name, tensors, metadata):
        """Write a complete file in the background. If that fails, the run goes on and keeps no further progress.

        tensors: {name: tensor}, which must not change afterwards; metadata: anything that JSON can hold.
        """
        # With ComfyUI's --highvram the offload device is the GPU, so the tensors may be there.
        self.writer.submit(self._write, name, {key: tensor.cpu() for key, tensor in tensors.items()}, metadata)

    def _write(self, name, tensors, metadata):
        if not self.keeps:
            return
        path = self.folder / f"{name}.safetensors"
        try:
            progress = json.dumps({"key": self.key, "crc32": _crc32(tensors), "metadata": metadata})
            infos = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
            write(str(path), infos, tensors.items(), {"progress": progress}, overwrite=True)
        except Exception as error:  # Nobody reads this thread's result, so any error is logged here.
            self._stop(error)

    def holds_anything(self):
        """Whether a file of the run is on the disk."""
        return any(self.folder.glob("*.safetensors"))

    def load_block(self, name):
        """(tensors, [LayerRecord]) of a finished block, or None."""
        found = self.load(name)
        return found and (found[0], [LayerRecord(**record) for record in found[1]])

    def remove(self):
        """Remove the run's files, and the folder of all runs if it is empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()


def remove_abandoned(folder, now):
    """Remove the runs in `folder` that were last written to ABANDONED_SECONDS before `now`: their inputs have changed, or the user has
    given up, and each takes gigabytes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not RUN.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError):  # another process removes it
                written = [entry.stat(follow_symlinks=False).st_mtime, *(path.lstat().st_mtime for path in Path(entry.path).iterdir())]
                if now - max(written) > ABANDONED_SECONDS:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    log.info("Removed the progress of a quantization that was interrupted more than %d days ago: %s",
                             ABANDONED_SECONDS // 86400, entry.path)


def _crc32(tensors):
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return value
