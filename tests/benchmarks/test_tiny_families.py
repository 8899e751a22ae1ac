"""The small models of the newer families: outliers that change no picture, training, and pictures of what was trained."""

import json
import sys
from argparse import Namespace

import pytest
import torch

pytest.importorskip("comfy", reason="there is no ComfyUI")

import pictures
import tiny_families
import train_families
from safetensors.torch import load_file

from host import setup

FEWER = {"flux2": {"depth": 1, "depth_single_blocks": 1}, "qwen-image": {"num_layers": 1},
         "z-image": {"n_layers": 2, "n_refiner_layers": 1}}
# {family: a layer whose inputs get outliers}.
OUTLIERS = {"flux2": "single_blocks.0.linear2", "qwen-image": "transformer_blocks.0.attn.to_k", "z-image": "layers.0.feed_forward.w2"}


@pytest.fixture(params=tuple(tiny_families.TRAINED))
def case(request):
    """(family's name, Tiny, its model with random weights of which no part is zero)."""
    tiny, g = tiny_families.TRAINED[request.param], torch.Generator().manual_seed(0)
    model, _ = tiny_families.new_model(tiny, **FEWER[request.param])
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) / parameter.shape[-1] ** 0.5 if parameter.ndim == 2
                             else 1 + 0.1 * torch.randn(parameter.shape, generator=g))
    return request.param, tiny, model


@pytest.mark.parametrize("tiny", tiny_families.TRAINED.values(), ids=tiny_families.TRAINED)
def test_latents_come_back(tiny):
    z = torch.randn(2, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiny.unpack(tiny.pack(z)), z)


def test_outliers_change_inputs_and_no_picture(case):
    """Factors are powers of two, so only float32's order of additions differs."""
    name, tiny, model = case
    g, seen = torch.Generator().manual_seed(1), []
    z, context = torch.randn(2, 16, 24, 24, generator=g), torch.randn(2, 16, 128, generator=g)
    model.get_submodule(OUTLIERS[name]).register_forward_pre_hook(lambda _layer, args: seen.append(args[0].detach().clone()))
    sigma, guidance = torch.tensor((0.3, 0.8)), torch.tensor((3.5, 3.5))
    with torch.no_grad():
        before = tiny_families.as_flux(tiny, model)(z, sigma, context, None, guidance)
        assert before.shape == z.shape
        model.load_state_dict(tiny_families.add_outliers(tiny, model.state_dict(), share=0.1))
        after = tiny_families.as_flux(tiny, model)(z, sigma, context, None, guidance)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.std()))
    ratio = seen[1].flatten(0, -2).norm(dim=0) / seen[0].flatten(0, -2).norm(dim=0)
    assert ((ratio - 1).abs() < 1e-2).float().mean() > 0.8 and ratio.max() == pytest.approx(8, rel=1e-2)


@pytest.mark.heavy
@pytest.mark.parametrize("name", tuple(tiny_families.TRAINED))
def test_a_trained_file_is_drawn_with_and_measured(name, tmp_path, monkeypatch):
    """Few steps on few pictures, which teach it nothing: the loader reads the file, and a row of each kind is made."""
    monkeypatch.setitem(tiny_families.TRAINED, name, tiny_families.TRAINED[name]._replace(
        config=tiny_families.TRAINED[name].config | FEWER[name]))
    monkeypatch.setattr(sys, "argv", ["train_families.py", "--family", name, "--comfyui", str(setup.locate().comfy), "--out", str(tmp_path),
                                      "--steps-flow", "20", "--batch-flow", "4", "--pool", "16", "--measure", "2", "--no-compile"])
    monkeypatch.setattr(pictures, "enter_comfy", lambda folder, device: None)  # the tests have entered it
    assert train_families.main() == 0
    path = tmp_path / f"tiny_{name}.safetensors"
    report = json.loads((tmp_path / f"training-{name}.json").read_text())["flow"]
    assert report["steps"] == 20 and 0 < report["validation_loss"] < 3 and load_file(path)
    args = Namespace(prompts=2, steps=2, batch=2, rank=16, calibration_prompts=1, calibration_steps=1, compute=None, model=str(path))
    with torch.inference_mode():
        studio = pictures.Studio(args)
        rows = pictures.others(studio, "naive rounding") | pictures.ours(studio, "ours: fast", "fast")
    assert studio.pictures.shape == (2, 3, 192, 192) and set(rows) == {"naive rounding", "ours: fast"}
    assert all(0 < pictures.mean(row[key]["latent_error"]) < 2 for row in rows.values() for key in pictures.BITS)
