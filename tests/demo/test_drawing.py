"""The trained small FLUX, opened by the pack's loader and sampled by ComfyUI, draws its captions."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_flux import host, scenes, words

FOLDER = Path(words.__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("comfy") is None, reason="there is no ComfyUI")


@pytest.fixture(scope="module")
def draw():
    """caption -> picture (192, 192, 3) in [0, 1], 6 steps, seed 42."""
    import comfy.sample
    from comfyui_svdquant.quant.host import loader

    model = loader.load_model(str(FOLDER / "tiny_flux.safetensors"))
    vae = host.new_vae()
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(FOLDER / "tiny_vae.safetensors").items()})

    @torch.inference_mode()
    def picture(caption):
        context, pooled = words.encode(caption)
        prompt = [[context, {"pooled_output": pooled}]]
        empty = torch.zeros(1, 16, scenes.SIZE // 8, scenes.SIZE // 8)
        noise = comfy.sample.prepare_noise(empty, 42)
        latent = comfy.sample.sample(model, noise, 6, 1.0, "euler", "simple", prompt, prompt, empty, disable_pbar=True, seed=42)
        return (vae.decode(latent)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)

    return picture


def colour_at(picture, x, y):
    """Mean colour (3,) of 13 x 13 pixels around a position in fractions of the side."""
    row, column = round(y * scenes.SIZE), round(x * scenes.SIZE)
    return picture[row - 6:row + 7, column - 6:column + 7].mean(dim=(0, 1))


def middle_of(picture, colour):
    """Mean x of a colour's pixels, as a fraction of the side; NaN if there are none."""
    near = (picture - scenes.COLOUR_VALUES[words.COLOURS.index(colour)]).norm(dim=2) < 0.3
    return (near.nonzero()[:, 1].float().mean() / scenes.SIZE).item()


@pytest.mark.parametrize(("caption", "place", "opposite"), [
    ("medium black square top left on sky", (0.27, 0.27), (0.85, 0.85)),
    ("large green hexagon right on rose", (0.73, 0.5), (0.15, 0.5)),
    ("large yellow circle bottom on navy", (0.5, 0.73), (0.5, 0.15)),
])
def test_an_object_is_at_the_captions_position_in_its_colour(draw, caption, place, opposite):
    picture = draw(caption)
    colour, ground = words.COLOURS.index(caption.split()[1]), words.GROUNDS.index(caption.split()[-1])
    # Bevel and shade change a colour by less than 0.25 in total; an object's colour here differs from its ground's by at least 0.8.
    assert (colour_at(picture, *place) - scenes.COLOUR_VALUES[colour]).norm() < 0.25
    assert (colour_at(picture, *opposite) - scenes.GROUND_VALUES[ground]).norm() < 0.25


@pytest.mark.parametrize(("left", "right"), [("red", "blue"), ("blue", "red")])
def test_the_order_of_the_words_decides_which_object_is_left(draw, left, right):
    picture = draw(f"medium {left} circle left of medium {right} star on white")
    assert middle_of(picture, left) + 0.2 < middle_of(picture, right)
