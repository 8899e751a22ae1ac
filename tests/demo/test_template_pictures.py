"""The templates' pictures that no model draws: what they say is so, and the stored files are what the scripts draw."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import layer_maps
import redux_schematic

ROOT = Path(__file__).resolve().parents[2]
# Gigabytes of the files in 16 bits that the templates offer to download.
PUBLISHED = {"SVDQuant_quantize_FLUX1": 23.80, "SVDQuant_quantize_Chroma": 17.80, "SVDQuant_quantize_FLUX2": 7.75,
             "SVDQuant_quantize_Qwen-Image": 40.86, "SVDQuant_quantize_Z-Image": 12.31}


def check_stored(path: Path, drawn: Image.Image) -> None:
    """JPEG and other versions of letters change details by some of 255 levels; another number or row of layers changes whole areas."""
    stored = Image.open(path)
    assert stored.size == drawn.size
    small, large = (np.asarray(picture.reduce(16), np.float32) for picture in (stored, drawn))
    assert np.abs(small - large).max() < 8, f"{path.name} is not what its script in demo/ draws; run that"


@pytest.mark.parametrize("template", layer_maps.MODELS)
def test_a_picture_is_drawn_from_a_published_model(template):
    shown = layer_maps.packed(layer_maps.MODELS[template])
    assert shown.bytes_before / 1e9 == pytest.approx(PUBLISHED[template], abs=0.006)
    check_stored(ROOT / "workflows" / f"{template}.jpg", layer_maps.draw(layer_maps.MODELS[template], shown))


def test_the_schematic_of_redux():
    check_stored(redux_schematic.TARGET, redux_schematic.schematic(Image.open(redux_schematic.SOURCE)))


def test_the_size_of_a_saved_file():
    """FLUX.1 dev's, which this pack has written at full size, with branches of rank 32 in 16 bits."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "files_epyc.json").read_text(encoding="utf-8"))
    flux = layer_maps.packed(layer_maps.MODELS["SVDQuant_quantize_FLUX1"], 32, 16)
    assert flux.bytes_after == pytest.approx(measured["files"]["ours"] * 1e9, rel=0.001)


def test_layers_within_and_outside_of_blocks():
    layers = {"double_blocks.0.img_attn.qkv": "W4A4", "double_blocks.1.img_attn.qkv": "W4A4", "single_blocks.0.linear1": "W4A4",
              "single_blocks.0.modulation.lin": "W4A16", "time_in.out_layer": "W4A16"}
    kinds, blocks, grid = layer_maps.cells(layer_maps.in_blocks(layers))
    assert kinds == ["img_attn.qkv", "linear1", "modulation.lin"]
    assert blocks == [("double_blocks", 0), ("double_blocks", 1), ("single_blocks", 0)]
    expected = {(0, 1): layer_maps.COLOURS["W4A4"], (2, 2): layer_maps.COLOURS["W4A16"], (1, 0): layer_maps.BACKGROUND}
    for at, colour in expected.items():
        assert tuple(grid[at]) == to_rgb(colour), at
