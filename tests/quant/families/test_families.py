"""The rules for every family's declaration, and that no other code contains a family's names or sizes."""

import re
from pathlib import Path

import pytest
from comfyui_svdquant.quant import families
from comfyui_svdquant.quant.families.family import Packing

from ..random_chroma import chroma_tensors
from ..random_flux import flux_shapes

ROOT = Path(__file__).resolve().parents[3]
# Folders whose code serves any family. The tests, the demo and the benchmarks have their own models.
FAMILY_FREE = ("quant", "cuda", "nodes", "convert.py", "doctor.py", "inspect_model.py")
SHAPES = {"FLUX.1": flux_shapes(), "Chroma": {name: tuple(tensor.shape) for name, tensor in chroma_tensors().items()}}


def words():
    """A family's names of blocks, layers and other modules, and FLUX.1's sizes."""
    found = {"3072", "12288", "15360", "21504", "9216"}
    for family in families.FAMILIES:
        found |= {family.image_model} - {"flux", "chroma"}  # also words of prose
        found |= {name.rpartition(".")[0] for name in (*family.configuration.matrices, *family.configuration.vectors)}
        found |= {name for name in family.outer}
        for blocks in family.blocks:
            found |= {blocks.name, *blocks.mlps}
            found |= {part for name in blocks.layers for part in name.split(".") if len(part) > 4 or "_" in part}
    return found - {"modulation"}  # also a word of prose


def test_no_familys_names_or_sizes_are_outside_its_file():
    pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, sorted(words(), key=len, reverse=True))) + r")(?!\w)")
    assert {"double_blocks", "img_mlp", "linear1", "img_in", "distilled_guidance_layer.in_proj"} <= words()
    found = []
    for place in FAMILY_FREE:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(p for ending in ("py", "cu", "cuh") for p in path.rglob(f"*.{ending}")):
            if (ROOT / "quant" / "families") in file.parents:
                continue
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if match := pattern.search(line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {match[1]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.title)
def test_a_declaration_fits_its_models_tensors(family):
    shapes = SHAPES[family.title]
    assert families.of_tensors(shapes) is family is families.of_image_model(family.image_model)
    config = family.configuration.of(shapes)
    assert tuple(config) == family.configuration.keys and config["hidden_size"] == 256
    assert family.tensors(config) == {name: tuple(shape) for name, shape in shapes.items()}
    packed = family.packed_names(shapes)
    declared = {name for blocks in family.blocks for name in blocks.layers} | set(family.outer)
    assert {name if family.block_of(name) is None else name.removeprefix(f"{family.block_of(name)}.") for name in packed} == declared
    for name in packed:
        layer, (n, k) = family.layer(name), shapes[f"{name}.weight"]
        assert (f"{name}.bias" in shapes) is layer.bias
        assert 0 <= layer.unsigned_from(k, n) <= k and layer.unsigned_from(k, n) % 64 == 0
        if layer.joined:
            assert 0 < layer.joined.at(k, n) < (n if layer.joined.rows else k)
        if layer.gelu:
            reader = f"{family.block_of(name)}.{layer.gelu.reader}"
            following, (rows, columns) = family.layer(reader), shapes[f"{reader}.weight"]
            assert n - layer.gelu.columns_from(k, n) == columns - following.unsigned_from(columns, rows), "the GELU's columns are unsigned"
        assert layer.packing is Packing.W4A4 or layer.unsigned_from(k, n) == k


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.title)
@pytest.mark.parametrize(("stored", "says"), [
    ({"axes_dim": [16, 56, 55]}, "even"), ({"axes_dim": [16, 56, 58]}, "does not divide"), ({"axes_dim": [16, 56]}, "is not valid"),
    ({"axes_dim": [1, 63, 64]}, "even"), ({"theta": "10000"}, "is not valid"), ({"theta": True}, "is not valid"),
    ({"mlp_ratio": 0}, "is not valid"),
    ({"hidden_size": 3072}, "its tensors give 256"), ({"num_heads": 24}, "its tensors give 2"), ({"depth": 7}, "its tensors give 1"),
])
def test_an_invalid_configuration_is_refused(family, stored, says):
    with pytest.raises(ValueError, match=says):
        family.configuration.of(SHAPES[family.title], stored)


def test_a_blocks_states_pass_through_by_position_and_by_name():
    double, single = families.of_image_model("flux").blocks
    assert double.pass_through(1, 2, 3) == double.pass_through(txt=2, img=1, vec=3) == double.pass_through(1, txt=2) == (1, 2)
    assert single.pass_through(1, vec=3) == single.pass_through(x=1) == 1
