"""SVDQuant Several GPUs on the CPU: a real worker process, gloo between the two."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.quant.host import loader, several_gpus
from comfyui_svdquant.quant.host.attachments import SOURCE
from comfyui_svdquant.quant.host.model_folder import target_folder
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import quantized, sample, save, write_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
SHIM = Path(several_gpus.__file__).resolve().parents[2] / "tests" / "quant" / "batch" / "on_host.py"
NAME = "several_gpus_test.safetensors"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A quantized model in the model folder."""
    source = write_flux(tmp_path_factory.mktemp("models") / "flux.safetensors")
    Path(target_folder()).mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        return save(quantized(loader.load_model(source), "data-free")[0], Path(target_folder()) / NAME, overwrite=True)


@pytest.fixture
def model(path, monkeypatch):
    monkeypatch.setattr(several_gpus, "PROGRAM", [sys.executable, str(SHIM), several_gpus.PROGRAM[1]])
    monkeypatch.setattr(several_gpus, "host_options", lambda: ["--cpu"])
    return loader.load_model(path, name=NAME)


def wrapper(patcher):
    return patcher.wrappers[several_gpus.WRAPPER][several_gpus.KEY][0]


def test_two_processes_draw_the_picture_of_one_and_end_with_the_model(model, caplog):
    one = sample(model)
    two = several_gpus.several_gpus(model, 2)
    first, again = sample(two), sample(two)
    assert torch.equal(first, again), "the same bits from run to run"
    assert relative_error(first, one) < 1e-3  # the CPU's linears round differently for other numbers of tokens
    worker = wrapper(two).crew.processes[0]
    with caplog.at_level(logging.WARNING):
        patched = two.clone()
        key = "diffusion_model.final_layer.linear.weight"
        patched.add_patches({key: ("diff", (torch.zeros(64, 256),))}, 1.0)
        assert relative_error(sample(patched), one) == 0
    assert "runs on one GPU, since a LoRA" in caplog.text
    assert worker.poll() is None

    def kill_in_the_middle(_block, _args):
        worker.kill()

    hook = two.model.diffusion_model.single_blocks[1].register_forward_pre_hook(kill_in_the_middle)
    with pytest.raises(RuntimeError, match="has ended in the middle of a step"):
        sample(two)
    hook.remove()
    assert torch.equal(sample(two), first), "the next run works"
    crew = wrapper(two).crew
    processes = crew.processes
    crew.close()
    assert all(process.poll() is not None for process in processes)


def test_what_the_other_gpus_cannot_have_is_refused(model):
    with pytest.raises(ValueError, match="2 attention heads, which 3 GPUs"):
        several_gpus.several_gpus(model, 3)
    patched = model.clone()
    patched.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.zeros(256, 64),))}, 1.0)
    with pytest.raises(ValueError, match="don't travel to the other GPUs"):
        several_gpus.several_gpus(patched, 2)
    model.attachments.pop(SOURCE)
    with pytest.raises(ValueError, match="takes a MODEL from SVDQuant Load Model"):
        several_gpus.several_gpus(model, 2)
