"""The embedded small FLUX: its captions, its pictures, its files."""

import importlib.util
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from tiny_flux import host, outliers, scenes, words

FOLDER = pathlib.Path(words.__file__).parent

needs_comfyui = pytest.mark.skipif(importlib.util.find_spec("comfy") is None, reason="there is no ComfyUI")


def random_scenes(n, seed):
    return scenes.sample(n, torch.Generator().manual_seed(seed))


def test_a_seed_gives_the_same_scenes_and_pictures():
    first, second = (random_scenes(4, 7) for _ in range(2))
    assert first.captions() == second.captions()
    assert torch.equal(scenes.draw(first, 64), scenes.draw(second, 64))
    assert random_scenes(4, 8).captions() != first.captions()


def test_pictures_are_in_range_and_objects_inside():
    batch = random_scenes(256, 1)
    pictures = scenes.draw(random_scenes(16, 1), 48)
    assert pictures.shape == (16, 3, 48, 48) and 0 <= pictures.min() and pictures.max() <= 1
    reach = batch.radii[..., None]
    assert (batch.centers - reach).min() > 0 and (batch.centers + reach).max() < 1


def test_every_caption_is_decoded_to_itself():
    batch = random_scenes(256, 2)
    for ids, caption in zip(batch.words, batch.captions()):
        assert words.word_ids(caption) == ids.tolist()


@pytest.mark.parametrize("relation, axis, sign", [("left of", 0, 1), ("right of", 0, -1), ("above", 1, 1), ("below", 1, -1)])
def test_relations_say_where_the_objects_are(relation, axis, sign):
    batch = random_scenes(512, 3)
    for caption, centers in zip(batch.captions(), batch.centers):
        if f" {relation} " in caption:
            assert sign * (centers[1, axis] - centers[0, axis]) > 0, caption


def test_colours_hidden_by_the_ground_are_not_drawn():
    batch = random_scenes(512, 4)
    for colours, radii, ground in zip(batch.colours, batch.radii, batch.ground):
        for colour in colours[radii > 0].tolist():
            assert (words.COLOURS[colour], words.GROUNDS[ground]) not in scenes.HIDDEN


def test_word_order_changes_the_context_but_not_the_pooled_output():
    a, pooled_a = words.encode("red circle left of blue star on white")
    b, pooled_b = words.encode("blue circle left of red star on white")
    assert a.shape == (1, words.LENGTH, words.CONTEXT_DIM) and pooled_a.shape == (1, words.POOLED_DIM)
    assert not torch.equal(a, b) and torch.equal(pooled_a, pooled_b)


def test_articles_commas_and_capitals_do_not_matter():
    plain, dressed = "red circle left of blue star", "A red circle, left of the Blue star."
    assert torch.equal(words.encode(plain)[0], words.encode(dressed)[0])


def test_an_unknown_word_is_named_with_the_vocabulary():
    with pytest.raises(ValueError, match="'dog'.*circle.*on"):
        words.encode("a red dog")
    with pytest.raises(ValueError, match="17 words"):
        words.encode("red " * 17)


def random_flux(seed=0):
    """A FLUX of the small configuration with random weights, including modulations and the last layer."""
    torch.manual_seed(seed)
    flux = host.new_flux()
    for name, parameter in flux.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
        if name.endswith("norm.scale"):
            torch.nn.init.ones_(parameter)
    return flux.requires_grad_(False)


@needs_comfyui
def test_outlier_channels_do_not_change_the_function():
    flux = random_flux()
    context, pooled = words.encode("small red circle left of large blue star on white")
    inputs = (torch.randn(1, 16, 8, 8), torch.tensor([0.7]), context, pooled, torch.tensor([3.5]))
    before = flux(*inputs)
    flux.load_state_dict(outliers.add_outliers(flux.state_dict()))
    assert (flux(*inputs) - before).norm() / before.norm() < 1e-5


@needs_comfyui
def test_the_vae_reproduces_new_pictures():
    vae = host.new_vae()
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(FOLDER / "tiny_vae.safetensors").items()})
    pictures = scenes.draw(random_scenes(4, 99))
    with torch.no_grad():
        latents = vae.encode(pictures * 2 - 1)
        drawn = (vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    psnr = -10 * torch.log10((drawn - pictures).square().mean(dim=(1, 2, 3))).mean()
    seen_by_flux = (latents - host.LATENT_SHIFT) * host.LATENT_SCALE
    assert psnr > 38
    assert 0.7 < seen_by_flux.std() < 1.4
