"""SVDQuant Several GPUs on the CPU: a real worker process, gloo between the two."""

import logging
import os
import signal
import sys
from pathlib import Path

import comfy.hooks
import pytest
import torch
from comfyui_svdquant.quant.host import loader, several_gpus
from comfyui_svdquant.quant.host.attachments import SOURCE
from comfyui_svdquant.quant.host.model_folder import target_folder
from comfyui_svdquant.quant.layers import preparation
from comfyui_svdquant.quant.parallel import crew as crew_module
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import prompts, quantized, sample, save, write_flux
from ..lora_tensors import generic, load_lora, shapes
from .test_controlnet import controlled, heads_of_any_width  # noqa: F401

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
def model(on_cpu, path, monkeypatch):
    monkeypatch.setattr(several_gpus, "PROGRAM", [sys.executable, str(SHIM), several_gpus.PROGRAM[1]])
    monkeypatch.setattr(several_gpus, "host_options", lambda: ["--cpu"])
    return loader.load_model(path, name=NAME)


@pytest.fixture
def divided(monkeypatch):
    """The number of forwards that ran on both processes."""
    forwards, run = [], several_gpus.sequence.divided
    monkeypatch.setattr(several_gpus.sequence, "divided", lambda *args: forwards.append(1) or run(*args))
    return forwards


def wrapper(patcher):
    return patcher.wrappers[several_gpus.WRAPPER][several_gpus.KEY][0]


def test_two_processes_draw_the_picture_of_one_and_end_with_the_model(model, monkeypatch, caplog):
    one = sample(model)
    two = several_gpus.several_gpus(model, 2)
    first, again = sample(two), sample(two)
    assert torch.equal(first, again), "the same bits from run to run"
    assert relative_error(first, one) < 1e-3  # the CPU's linears round differently for other numbers of tokens
    worker = wrapper(two).crew.processes[0]
    assert worker.poll() is None

    def kill_in_the_middle(_block, _args):
        worker.kill()

    hook = two.model.diffusion_model.single_blocks[1].register_forward_pre_hook(kill_in_the_middle)
    with pytest.raises(RuntimeError, match="has ended in the middle of a step"):
        sample(two)
    hook.remove()
    assert torch.equal(sample(two), first), "the next run works"
    stopped = wrapper(two).crew.processes[0]
    with monkeypatch.context() as patch:
        patch.setattr(crew_module, "STEP_SECONDS", 2)
        os.kill(stopped.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="has ended in the middle of a step"):
            sample(two)
    assert stopped.wait(10) and "did not end within 2 s" in caplog.text
    assert torch.equal(sample(two), first)
    crew = wrapper(two).crew
    processes = crew.processes
    crew.close()
    assert all(process.poll() is not None for process in processes)


def test_loras_reach_the_other_process_and_leave_it_again(model, divided):
    """LoRAs of packed layers and of one in 16 bits, whose strength changes, behind the node and before it. The linears round differently
    for other numbers of tokens, and in 4 bits a code that rounds the other way moves this model's latent by up to 4 %; in 8 bits by 0.3."""
    preparation.set_act_bits(model.model, 8)
    lora = generic(*shapes(model).items(), ("final_layer.linear", (64, 256)))
    one = {strength: sample(load_lora(model, lora, strength)) for strength in (0.5, 1.0)}
    plain = sample(model)
    several = several_gpus.several_gpus(load_lora(model, lora, 0.5), 2)
    assert relative_error(one[1.0], one[0.5]) > 0.05 and relative_error(one[0.5], plain) > 0.05
    assert relative_error(sample(several), one[0.5]) < 0.01
    stronger = load_lora(several, lora, 0.5)
    assert relative_error(sample(stronger), one[1.0]) < 0.01
    first = sample(several)
    assert relative_error(first, one[0.5]) < 0.01 and torch.equal(sample(several), first)
    wrapper(several).crew.close()
    assert torch.equal(sample(several), first), "new processes get the LoRAs, too"
    wrapper(several).crew.close()
    assert len(divided) == 10


@pytest.mark.parametrize("form", ["InstantX", "MistoLine"])
def test_a_controlnet_has_its_effect_in_both_processes(model, divided, form):
    preparation.set_act_bits(model.model, 8)  # see test_loras_reach_the_other_process_and_leave_it_again
    cond = controlled(form)
    one, plain = sample(model, cond=cond), sample(model)
    several = several_gpus.several_gpus(model, 2)
    error = relative_error(sample(several, cond=cond), one)
    assert error < 0.01 < 0.05 < relative_error(one, plain), f"relative error {error:.1e}"
    assert len(divided) == 2
    wrapper(several).crew.close()


def test_what_the_other_process_cannot_have_runs_on_one_gpu(model, divided, caplog):
    several = several_gpus.several_gpus(model, 2)
    wrapper(several).crew.close()
    hook = comfy.hooks.create_hook_lora(generic(("final_layer.linear", (64, 256))), 1.0, 0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompts(1), hook)
    replaced = several.clone()
    replaced.add_object_patch("diffusion_model.final_layer", several.model.diffusion_model.final_layer)
    coded = several.clone()
    key = "diffusion_model.final_layer.linear.weight"
    coded.add_patches({(key, None, torch.neg): ("diff", (torch.ones(64, 256),))}, 1.0)
    cases = {"hooks change the model's weights": (several, hooked), "diffusion_model.final_layer": (replaced, None),
             "brings code of its own": (coded, None)}
    for message, (patcher, cond) in cases.items():
        with caplog.at_level(logging.WARNING):
            sample(patcher, cond=cond)
        assert "this runs on one GPU, since" in caplog.text and message in caplog.text
        caplog.clear()
    assert not divided


def test_what_the_other_gpus_cannot_have_is_refused(model):
    with pytest.raises(ValueError, match="2 attention heads, which 3 GPUs"):
        several_gpus.several_gpus(model, 3)
    replaced = model.clone()
    replaced.add_object_patch("diffusion_model.img_in", model.model.diffusion_model.img_in)
    with pytest.raises(ValueError, match=r"changed a part of this MODEL \(diffusion_model.img_in\)"):
        several_gpus.several_gpus(replaced, 2)
    model.attachments.pop(SOURCE)
    with pytest.raises(ValueError, match="takes a MODEL from SVDQuant Load Model"):
        several_gpus.several_gpus(model, 2)
