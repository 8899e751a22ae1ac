"""A quantized model is loaded, drawn with and unloaded again and again: nothing of it stays."""

import gc
import shutil
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfyui_svdquant.quant.host import loader

from ..comfy_models import sample
from ..lora_tensors import generic, load_lora, shapes

CYCLES, WARM = 20, 5
KEPT = 16  # MB that the C library keeps for the next use; models of 2 MB that stayed at each cycle would take 28

pytestmark = pytest.mark.usefixtures("inference_mode")


def live(kind):
    gc.collect()
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


def memory(path):
    """(private MB, mappings, those of a file) of this process, as Linux gives them; zeros elsewhere."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0, 0, 0
    private = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    maps = Path("/proc/self/maps").read_text()
    return int(private.split()[1]) / 1024, maps.count("\n"), maps.count(path)


def cycle(path, lora):
    """The picture of a model that is loaded for it, with a LoRA or None, and unloaded."""
    patcher = loader.load_model(path)
    picture = sample(load_lora(patcher, generic(*shapes(patcher).items(), rank=lora)) if lora else patcher, steps=1)
    comfy.model_management.unload_all_models()
    return picture


def test_twenty_cycles_leave_nothing(pair_files, tmp_path):
    path, pictures, states = str(tmp_path / "flux_4bit.safetensors"), {}, []
    shutil.copy(pair_files[1], path)  # models of other tests may have the original mapped
    for number in range(CYCLES):
        lora = (None, 4, 20)[number % 3]
        picture = cycle(path, lora)
        assert torch.equal(picture, pictures.setdefault(lora, picture))
        states.append((live(torch.nn.Module), live(torch.Tensor), *memory(path)))
    (modules, tensors, private, maps, _), (*last, last_private, last_maps, of_file) = states[WARM], states[-1]
    assert last == [modules, tensors] and of_file == 0, states
    assert last_private - private <= KEPT and last_maps <= maps + 5, states
