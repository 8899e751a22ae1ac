"""The rules for every family's declaration, and that no other code contains a family's names or sizes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfyui_svdquant.quant import families
from comfyui_svdquant.quant.families.family import Packing

from ..random_chroma import chroma_tensors
from ..random_flux import flux_shapes
from ..random_flux2 import flux2_shapes
from ..random_qwen_image import qwen_image_shapes
from ..random_z_image import z_image_shapes

ROOT = Path(__file__).resolve().parents[3]
# Folders whose code serves any family. The tests, the demo and the benchmarks have their own models.
FAMILY_FREE = ("quant", "cuda", "nodes", "convert.py", "doctor.py", "inspect_model.py")
SHAPES = {"FLUX.1": flux_shapes(), "Chroma": {name: tuple(tensor.shape) for name, tensor in chroma_tensors().items()},
          "FLUX.2": flux2_shapes(), "Qwen-Image": qwen_image_shapes(), "Z-Image": z_image_shapes()}
PROSE = {"modulation", "attention", "layers", "transformer_blocks"}  # also words of prose, or names in other formats


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
    return found - PROSE


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
    assert tuple(config) == family.configuration.keys
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
        assert layer.bias or layer.unsigned_from(k, n) == k, "the bias corrects the GELU shift of unsigned columns"
    for blocks in family.blocks:
        assert all(blocks.layers.keys() >= set(group) and len(group) > 1 for group in blocks.shares_input)
        assert blocks.returned == () or set(blocks.returned) == set(blocks.states)
    assert {family.layer(name).packing for group in readers(family, packed).values() if len(group) > 1 for name in group} <= {Packing.W4A4}


def readers(family, names):
    """{the first of the layers that read a tensor: all of them}."""
    found = {}
    for name in names:
        found.setdefault(family.first_reader(name), []).append(name)
    return found


def test_layers_that_read_the_same_tensor():
    qwen = families.of_image_model("qwen_image")
    block = "transformer_blocks.1"
    assert readers(qwen, qwen.packed_names(SHAPES["Qwen-Image"]))[f"{block}.attn.to_q"] == [
        f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v"]
    assert qwen.first_reader("norm_out.linear") == "norm_out.linear"
    assert qwen.first_reader(f"{block}.img_mlp.net.2") == f"{block}.img_mlp.net.2"


def test_blocks_read_the_outputs_of_the_lists_before_them():
    """Z-Image's refiners run side by side, and its main blocks read the outputs of both; an empty list passes on what it reads."""
    z_image = families.of_image_model("lumina2")

    def sources(contexts, noises):
        lists = {"context_refiner": contexts, "noise_refiner": noises, "layers": 2}
        return z_image.sources(SimpleNamespace(**{name: [None] * count for name, count in lists.items()}))

    assert sources(2, 1) == {"context_refiner.0": (), "context_refiner.1": ("context_refiner.0",), "noise_refiner.0": (),
                             "layers.0": ("context_refiner.1", "noise_refiner.0"), "layers.1": ("layers.0",)}
    assert sources(0, 1)["layers.0"] == ("noise_refiner.0",)
    flux = families.of_image_model("flux").sources(SimpleNamespace(double_blocks=[None] * 2, single_blocks=[None]))
    assert flux == {"double_blocks.0": (), "double_blocks.1": ("double_blocks.0",), "single_blocks.0": ("double_blocks.1",)}


@pytest.mark.parametrize(("title", "stored", "says"), [
    ("FLUX.2", {"axes_dim": [32, 32, 32, 31]}, "even"), ("FLUX.2", {"axes_dim": [32, 32, 32]}, "is not valid"),
    ("FLUX.2", {"context_in_dim": 15360}, "its tensors give 128"), ("FLUX.2", {"ops_bias": True}, "its tensors give False"),
    ("Qwen-Image", {"axes_dims_rope": [16, 56, 54]}, "add up to a head's 128"), ("Qwen-Image", {"axes_dims_rope": [15, 57, 56]}, "even"),
    ("Qwen-Image", {"num_layers": 60}, "its tensors give 2"), ("Qwen-Image", {"joint_attention_dim": 3584}, "its tensors give 128"),
    ("Z-Image", {"axes_dims": [31, 49, 48]}, "even"), ("Z-Image", {"axes_dims": [32, 48, 50]}, "does not divide"),
    ("Z-Image", {"rope_theta": -1.0}, "is not valid"), ("Z-Image", {"n_refiner_layers": 3}, "its tensors give 2"),
    ("Z-Image", {"pad_tokens_multiple": 64}, "its tensors give 32"),
])
def test_an_invalid_configuration_of_a_newer_family_is_refused(title, stored, says):
    family = next(family for family in families.FAMILIES if family.title == title)
    with pytest.raises(ValueError, match=says):
        family.configuration.of(SHAPES[title], stored)


@pytest.mark.parametrize("family", [families.of_image_model("flux"), families.of_image_model("chroma")], ids=lambda family: family.title)
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
    [qwen] = families.of_image_model("qwen_image").blocks
    # It returns the text first.
    assert qwen.pass_through(hidden_states=1, encoder_hidden_states=2) == qwen.pass_through(1, 2, temb=3) == (2, 1)


def test_a_host_gets_only_the_values_that_it_does_not_assume():
    """Older hosts refuse keys that they don't know."""
    configuration = families.of_image_model("qwen_image").configuration
    config, host = configuration.of(SHAPES["Qwen-Image"]), {"image_model": "qwen_image", "num_layers": 2}
    assert configuration.added_to(host, config) == host | {"in_channels": 64, "num_attention_heads": 2, "joint_attention_dim": 128}
    assert configuration.unknown_to(host, config) is None
    marked = configuration.of(qwen_image_shapes(marked=True))
    assert configuration.unknown_to(host, marked) == "default_ref_method = index_timestep_zero"
    assert configuration.unknown_to(host | {"default_ref_method": "index_timestep_zero"}, marked) is None
