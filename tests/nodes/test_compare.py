"""SVDQuant Compare and SVDQuant Compare Models, called as ComfyUI calls them."""

import time

import comfy.model_management
import pytest
import torch
from comfyui_svdquant.nodes.compare import SVDQuantCompare
from comfyui_svdquant.nodes.compare_models import SVDQuantCompareModels
from comfyui_svdquant.nodes.progress import NodeProgress
from comfyui_svdquant.quant.comparison import compare
from comfyui_svdquant.quant.host.drawing import draw
from comfyui_svdquant.quant.host.loader import load_model

from ..quant.comfy_models import LATENT, prompts, quantized, sample, write_flux
from ..quant.test_comparison import images

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_the_nodes_outputs():
    first, second = images(2), images(2, seed=1)
    picture, psnr, ssim, caption = SVDQuantCompare.execute(first, second, 8.0, "16 bits", "4 bits", 10.0, 8.0).result
    assert picture.shape[0] == 2 and picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
    assert type(psnr) is type(ssim) is float and 0 < psnr < 20 and ssim < 0.5
    assert caption.splitlines()[2] == f"mean: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}; 16 bits 10.0 s, 4 bits 8.0 s: 1.25x as fast"


def test_only_the_images_and_the_factor_are_required():
    assert SVDQuantCompare.execute(images(), images(), 8.0).result[3] == "The images are identical"


def test_different_sizes_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="image_1 is 400 x 40 and image_2 is 320 x 40; draw both at the same size"):
        SVDQuantCompare.execute(images(), images(width=320), 8.0)


class Vae:
    """A VAE whose images are the latents' first channels, sixteen times as wide."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).repeat_interleave(16, 1).repeat_interleave(16, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small FLUX.1 in 16 and in 4 bits."""
    with torch.inference_mode():
        model = load_model(write_flux(tmp_path_factory.mktemp("compare") / "flux.safetensors"))
        return model, quantized(model, "data-free")[0]


def compare_models(models, **changes):
    inputs = {"positive": prompts(1), "latent_image": LATENT, "vae": Vae(), "seed": 5, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
              "scheduler": "simple", "denoise": 1.0, "factor": 8.0, "label_1": "16 bits", "label_2": "4 bits"}
    return SVDQuantCompareModels.execute(*models, **(inputs | changes)).result


def test_models_are_compared_by_the_images_that_ksampler_draws(models, monkeypatch):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    picture, psnr, ssim, caption, first, second = compare_models(models)
    for model, image in zip(models, (first, second)):
        assert torch.equal(image, Vae().decode(sample(model, cond=prompts(1))))
    expected = compare(first, second, 8.0)
    assert (psnr, ssim) == expected[1:3] and 5 < psnr < 100 and caption.startswith(expected.caption)
    assert picture.shape == expected.picture.shape and "16 bits " in caption and "x as fast" in caption
    assert said == [*(f"{label}: step {i} of 2" for label in ("16 bits", "4 bits") for i in (1, 2)), caption]


def test_the_seconds_leave_loading_and_compiling_out(models, monkeypatch):
    def slow(*args, callback, **_):
        for number, seconds in enumerate((0.5, 0.02, 0.02)):
            time.sleep(seconds)
            callback(number, torch.zeros(1), None, 3)
        return LATENT["samples"]

    monkeypatch.setattr("comfy.sample.sample", slow)
    arguments = (models[0], Vae(), [], [], LATENT, 0, 3, 1.0, "euler", "simple", 1.0, lambda number: None)
    assert 0.05 < draw(*arguments)[1] < 0.3


def test_a_comparison_of_models_can_be_cancelled(models):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compare_models(models)
    comfy.model_management.interrupt_current_processing(False)


def test_cfg_needs_a_negative_prompt(models):
    says = "With cfg 3.5 the models need a negative prompt; connect negative, or set cfg to 1."
    assert SVDQuantCompareModels.validate_inputs(cfg=3.5) == says
    assert SVDQuantCompareModels.validate_inputs(cfg=3.5, negative=None) is True is SVDQuantCompareModels.validate_inputs(cfg=1.0)
    with pytest.raises(ValueError, match="need a negative prompt"):
        compare_models(models, cfg=3.5)
    assert not torch.equal(compare_models(models, cfg=3.5, negative=prompts(2)[1:])[4], compare_models(models)[4])
