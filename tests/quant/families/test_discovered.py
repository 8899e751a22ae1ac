"""A discovered family's description, which comes from a file."""

import copy

import pytest
from comfyui_svdquant.quant import families
from comfyui_svdquant.quant.families.discovered import discovered
from comfyui_svdquant.quant.families.family import Packing

DESCRIPTION = {
    "title": "Other", "model_class": "comfy.ldm.other.Other", "image_model": None, "host": {"heads": 2},
    "blocks": {"blocks.1": [], "blocks.10": ["blocks.1"]}, "outside": ["blocks.10"],
    "layers": {"blocks.1.up": {"w4a16": False, "unsigned": False, "bias": True, "reads": "blocks.1.up"},
               "blocks.10.down": {"w4a16": False, "unsigned": True, "bias": False, "reads": "blocks.10.down"},
               "blocks.10.gate": {"w4a16": True, "unsigned": False, "bias": False, "reads": "blocks.10.down"},
               "time.2": {"w4a16": True, "unsigned": False, "bias": True, "reads": "time.2"}},
    "tensors": {"blocks.1.up.weight": [128, 64]}, "tokens": [4096, 256, 256]}


def changed(*path, value):
    description = copy.deepcopy(DESCRIPTION)
    entry = description
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    return description


def test_it_says_what_a_declaration_does():
    family = families.of_config({"discovered": DESCRIPTION})
    assert family.title == family.variant({}) == "Other" and family.architecture == "other" and family.image_model is None
    down, gate = family.layer("blocks.10.down"), family.layer("blocks.10.gate")
    assert down.packing is Packing.W4A4 and not down.bias and down.unsigned_from(64, 128) == 0
    assert gate.packing is Packing.W4A16 and family.layer("blocks.1.up").unsigned_from(64, 128) == 64 and family.layer("x") is None
    assert [family.block_of(name) for name in ("blocks.10.down", "blocks.1.up", "x")] == ["blocks.10", "blocks.1", None]
    assert family.first_reader("blocks.10.gate") == "blocks.10.down"
    assert family.sources(None) == {"blocks.1": (), "blocks.10": ("blocks.1",), "outside": ("blocks.10",)}
    assert family.block_of("time.2") is None and list(family.outer) == ["time.2"]
    assert family.packed_names(["blocks.1.up.weight", "blocks.1.norm.weight"]) == ["blocks.1.up"]
    config = family.configuration.of({}, {"discovered": DESCRIPTION})
    assert config == {"discovered": DESCRIPTION} and family.tensors(config) == {"blocks.1.up.weight": (128, 64)}
    assert family.configuration.added_to({"heads": 1, "dim": 64}, config) == {"heads": 2, "dim": 64}


@pytest.mark.parametrize("description", [
    None, [], {}, changed("title", value=1), changed("blocks", value=[]), changed("blocks", "blocks.1", value=["elsewhere"]),
    changed("outside", value=["elsewhere"]), changed("layers", "time.2", "w4a16", value=False),
    changed("layers", "blocks.1.up", "unsigned", value=0), changed("layers", "blocks.1.up", "reads", value="blocks.2.up"),
    changed("layers", "elsewhere", value=DESCRIPTION["layers"]["blocks.1.up"]), changed("layers", "blocks.1.up", value=None),
    changed("tensors", "blocks.1.up.weight", value=["128", 64]), changed("tensors", value=7), changed("tokens", value=[1]),
    changed("tokens", value=[1, 2, -1]), changed("host", value=None), changed("image_model", value=3)])
def test_a_damaged_description_is_refused(description):
    with pytest.raises(ValueError, match="^has no valid description of its layers in its configuration$"):
        discovered(description)
