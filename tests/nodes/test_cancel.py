"""Cancel at any of the points at which a node can notice it: the run ends at once, and the next one is as if nothing had been."""

import os
import random
from types import SimpleNamespace

import comfy.model_management as management
import folder_paths
import pytest
import torch
from comfyui_svdquant.nodes.compare_models import SVDQuantCompareModels
from comfyui_svdquant.nodes.quantize_model import SVDQuantQuantizeModel
from comfyui_svdquant.quant.host import loader

from ..quant.comfy_models import LATENT, prompts, sample, write_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
POINTS = 34  # at which each of the three runs is cancelled


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a model in 16 bits, the same in 4)"""
    path = write_flux(tmp_path_factory.mktemp("models") / "flux.safetensors", hidden=128, depth_single=1)
    with torch.inference_mode():
        model = loader.load_model(path)
        return model, quantized(model)


def quantized(model):
    node = SVDQuantQuantizeModel.execute(model, "fast", 16, 1, 0, prompts(1), LATENT, progress="off")
    return node.result[0]


def numbers(model):
    return torch.cat([tensor.flatten().float() for tensor in model.model.state_dict().values()])


def compared(models):
    vae = SimpleNamespace(decode=lambda samples: samples[:, :3].movedim(1, -1).repeat_interleave(2, 1).repeat_interleave(2, 2))
    node = SVDQuantCompareModels.execute(*models, prompts(1), LATENT, vae, 0, 1, 1.0, "euler", "simple", 1.0, 4.0)
    return torch.cat(node.result[-2:])  # the pictures; the chart beside them names seconds


RUNS = {
    "SVDQuant Quantize Model": lambda models: numbers(quantized(models[0])),
    "SVDQuant Compare Models": compared,
    "a sampler": lambda models: sample(models[1], steps=2),
}


def files():
    folders = (folder_paths.get_temp_directory(), folder_paths.get_output_directory(), *folder_paths.get_folder_paths("diffusion_models"))
    return sorted(os.path.join(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize("run", RUNS)
def test_cancel_at_any_point(models, monkeypatch, run):
    check, counted = management.throw_exception_if_processing_interrupted, []

    def checked(at=None):
        counted.append(at)
        if len(counted) == at:
            management.interrupt_current_processing()
        check()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", checked)
    expected, before = RUNS[run](models), files()
    points = random.Random(0).choices(range(1, len(counted) + 1), k=POINTS)
    for at in points:
        counted.clear()
        monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", lambda at=at: checked(at))
        with pytest.raises(management.InterruptProcessingException):
            RUNS[run](models)
        assert len(counted) == at and not management.interrupt_processing, "the run went on"
    monkeypatch.undo()
    assert torch.equal(RUNS[run](models), expected) and files() == before and len(set(points)) > POINTS // 2
