"""Inspection of a file from its header, and the metadata of a saved file about itself and its source."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import card, convert, inspection, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, Header, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.families import TITLES
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import load_file, save_file

from ..nunchaku_nvfp4 import write_nvfp4
from ..packed_flux import packed_flux
from ..random_flux import flux_shapes, flux_tensors

ROOT = Path(__file__).resolve().parents[3]
ERRORS = {"double_blocks.0.img_attn.qkv": 0.08, "double_blocks.0.img_mlp.2": 0.12, "single_blocks.0.linear1": 0.07}
RECIPE = {
    "preset": "best", "rank": 16, "keep": [], "calibration": {"prompts": 8, "steps": 4, "seed": 0},
    "layers": [{"name": name, "format": "svdquant_w4a4", "error": error, "error_naive": 2 * error} for name, error in ERRORS.items()],
}
SOURCE = card.of_source({"modelspec.title": "My FLUX", "modelspec.author": "me", "modelspec.license": "CC0",
                         "modelspec.hash_sha256": "0xabc", "modelspec.unknown": "x", "modelspec.date": "2020", "other": "y"})


@pytest.fixture(scope="module")
def model():
    return packed_flux(depth_single=2)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    native.save(str(folder / "native.safetensors"), *model, RECIPE, "flux1.safetensors", source_card=SOURCE)
    nunchaku_writer.save(str(folder / "nunchaku.safetensors"), *model, RECIPE, "flux1.safetensors", source_card=SOURCE)
    return folder


def inspect(path):
    return inspection.inspect(read_header(str(path)))


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(Header, "read_tensor", lambda self, name: pytest.fail(f"{name} was read"))


@pytest.mark.parametrize("name", ["native", "nunchaku"])
def test_the_facts_about_a_quantized_file(files, model, no_weights, name):
    path = files / f"{name}.safetensors"
    facts = json.loads(json.dumps(inspect(path)))
    assert (facts["file"], facts["bytes"]) == (path.name, path.stat().st_size)
    assert facts["format"] == ("SVDQuant layout, INT4" if name == "native" else "Nunchaku layout, INT4")
    assert facts["model"] == model[2] and facts["source"] == "flux1.safetensors"
    assert sum(facts["bytes_by_kind"].values()) == sum(facts["bytes_by_dtype"].values()) == data_bytes(path)
    assert facts["bytes_by_kind"]["4-bit codes"] == sum(
        tensor.numel() for key, tensor in model[0].items() if key.endswith(".weight") and key.removesuffix(".weight") in model[1])
    assert facts["layers"]["awq_w4a16"]["count"] == 4 and facts["layers"]["svdquant_w4a4_split"] == {"count": 2, "ranks": {"16": 2}}
    assert facts["recipe"]["calibration"]["prompts"] == 8 and "layers" not in facts["recipe"]
    errors = facts["errors"]["svdquant_w4a4"]
    assert errors["layers"] == 3 and errors["median"] == 0.08 and errors["largest"] == 0.12
    assert math.isclose(errors["mean"], 0.09) and math.isclose(errors["mean_of_plain_rounding"], 0.18)
    assert list(errors["worst"]) == ["double_blocks.0.img_mlp.2", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"]


def data_bytes(path):
    return sum(info.stop - info.start for info in read_header(str(path)).tensors.values())


def test_the_text(files):
    lines = inspection.text(inspect(files / "native.safetensors")).splitlines()
    assert lines[0] == "4-bit FLUX.1, opens with SVDQuant Load Model"
    assert lines[1] == f"native.safetensors: {(files / 'native.safetensors').stat().st_size / 1e6:.2f} MB, SVDQuant layout, INT4"
    for line in ("FLUX.1: 1 double and 2 single blocks, hidden size 128, 16 channels in, with guidance", "made from: flux1.safetensors",
                 "title: My FLUX (SVDQuant)", "author: me", "licence: CC0", "source's tensor hash: 0xabc",
                 "svdquant_w4a4_split: 2 layers (rank 16: 2)", "recipe: preset best, rank 16",
                 "calibrated on: 8 prompts (steps 4, seed 0)"):
        assert line in lines
    assert lines[-1].startswith("error of svdquant_w4a4: mean 9.00%, median 8.00% (plain rounding 18.00%) of 3 layers; "
                                "largest: double_blocks.0.img_mlp.2 12.00%")


def test_other_kinds_of_files(files, tmp_path, no_weights):
    save_file(flux_tensors(), tmp_path / "plain.safetensors")
    facts = inspect(tmp_path / "plain.safetensors")
    assert facts["format"] == "a FLUX.1 that is not quantized" and list(facts["bytes_by_kind"]) == ["everything else"]
    assert inspection.text(facts).splitlines()[-1].startswith("stored as: bfloat16 ") and "sizes:" not in inspection.text(facts)
    path = tmp_path / "svdq-fp4.safetensors"
    write_nvfp4(path)
    facts = inspect(path)
    assert facts["format"] == "Nunchaku layout, NVFP4" and sum(facts["bytes_by_kind"].values()) == data_bytes(path)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(files / "native.safetensors").items()}
    save_file(tensors, tmp_path / "kitchen.safetensors")
    facts = inspect(tmp_path / "kitchen.safetensors")
    assert facts["format"] == "comfy-kitchen layout, INT4" and facts["errors"] == {} and facts["card"] == {}
    assert facts["bytes_by_kind"] == inspect(files / "native.safetensors")["bytes_by_kind"]
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"other.safetensors is not a {TITLES} model; choose"):
        inspect(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t, "a FLUX.1 that is not quantized"),
    (lambda t: {name: x.to(torch.float8_e4m3fn) if x.ndim == 2 else x for name, x in t.items()}, "a FLUX.1 in fp8, without scales"),
    (lambda t: {name: x.to(torch.float8_e4m3fn) if x.ndim == 2 else x for name, x in t.items()}
     | {"txt_in.scale_weight": torch.ones(()), "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "a FLUX.1 in fp8, with scales"),
])
def test_other_precisions_are_called_by_their_names(tmp_path, change, says):
    save_file(change(flux_tensors()), tmp_path / "model.safetensors")
    assert inspect(tmp_path / "model.safetensors")["format"] == says


def test_a_model_under_diffusers_names_is_one(tmp_path):
    config = FAMILY.configuration.of(flux_shapes())
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in FAMILY.diffusers.tensors(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    info = inspect(tmp_path / "model.safetensors")
    assert info["format"] == "a FLUX.1 that is not quantized, under diffusers' names" and info["model"] == config
    assert "under diffusers' names\nFLUX.1: 1 double and 2 single blocks, hidden size 256" in inspection.text(info)
    header = read_header(str(tmp_path / "model.safetensors"))
    for name in tensors:
        with pytest.raises(CheckpointError, match=r"^model\.safetensors (lacks|has|is not) [^;]*; "):
            inspection.inspect(replace(header, tensors={key: value for key, value in header.tensors.items() if key != name}))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_quantized_model_that_another_node_saved_is_no_16_bit_one(model, tmp_path, no_weights, prefix):
    """ComfyUI's ModelSave writes only tensors; the descriptions of packed layers are in no tensor of the MODEL."""
    assert not any(name.endswith(layout.QUANT_KEY) for name in model[0])
    save_file({prefix + name: tensor for name, tensor in model[0].items()}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"^bare.safetensors has layers in 4 bits .* SVDQuant Save Model\.$"):
        inspect(tmp_path / "bare.safetensors")


def test_the_two_files_of_an_older_nunchaku_model_are_one_model(files, tmp_path):
    tensors = load_file(files / "nunchaku.safetensors")
    blocks = {name: tensor for name, tensor in tensors.items() if "transformer_blocks." in name}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in blocks}, tmp_path / "unquantized_layers.safetensors")
    facts = inspect(tmp_path / "transformer_blocks.safetensors")
    assert facts["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert facts["bytes_by_kind"] == inspect(files / "nunchaku.safetensors")["bytes_by_kind"]


@pytest.mark.parametrize("recipe", [
    {"layers": 3}, {"layers": [3, {"name": 1}, {"name": "a", "format": "svdquant_w4a4", "error": float("nan"), "error_naive": 10**400}]},
    {"layers": [{"name": "a", "format": [], "error": 0.1, "error_naive": 0.1}]}, {"calibration": {"prompts": []}, "preset": "\x1b[2J\n"},
    {"calibration": 3, "": None},
])
def test_a_files_own_description_may_be_anything(model, tmp_path, recipe):
    path = tmp_path / "odd.safetensors"
    native.save(str(path), *model, recipe, "flux\x1b[31m", source_card={"modelspec.author": "a\nb"})
    facts = inspect(path)
    text = inspection.text(facts)
    assert facts["errors"] == {} and "\x1b" not in text and "author: a\N{REPLACEMENT CHARACTER}b" in text


LONG = {  # {what: changes of (recipe, source, card)}
    "a text": ({"preset": "x" * 5_000_000}, "", {}), "a list": ({"keep": ["x"] * 1_000_000}, "", {}),
    "many entries": ({f"key {i}": i for i in range(100_000)}, "", {}), "a key": ({"x" * 5_000_000: 1}, "", {}),
    "a layer": ({"layers": [{"name": "x" * 5_000_000, "format": "svdquant_w4a4", "error": 0.1, "error_naive": 0.2}]}, "", {}),
    "the calibration": ({"calibration": {"prompts": ["x" * 1000] * 5000}}, "", {}),
    "the source": ({}, "x" * 5_000_000, {}), "the card": ({}, "", {"modelspec.author": "x" * 5_000_000}),
}


@pytest.mark.parametrize("what", LONG)
def test_megabytes_of_description_give_a_short_report(model, tmp_path, what):
    recipe, source, source_card = LONG[what]
    path = tmp_path / "long.safetensors"
    native.save(str(path), *model, recipe, source, source_card=source_card)
    info = inspect(path)
    assert len(inspection.text(info)) < 20_000 and len(json.dumps(info)) < 200_000
    assert inspection.text(info).startswith("4-bit FLUX.1, opens with SVDQuant Load Model\nlong.safetensors: ")


def test_equal_models_give_equal_files(model, tmp_path, monkeypatch):
    """SOURCE_DATE_EPOCH is the convention of builds that can be reproduced; the date is all that differs otherwise."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    for folder in ("a", "b"):
        native.save(str(tmp_path / folder / "x.safetensors"), *model, RECIPE, "flux")
    assert (tmp_path / "a" / "x.safetensors").read_bytes() == (tmp_path / "b" / "x.safetensors").read_bytes()
    assert read_header(str(tmp_path / "a" / "x.safetensors")).metadata["modelspec.date"] == "2020-09-13T12:26:40Z"


# --- the card ------------------------------------------------------------------------------------------------------


def test_a_card_is_copied_without_the_fields_of_the_source_alone(files):
    metadata = read_header(str(files / "native.safetensors")).metadata
    assert {key: metadata[key] for key in ("modelspec.title", "modelspec.author", "modelspec.license", "modelspec.architecture")} == {
        "modelspec.title": "My FLUX (SVDQuant)", "modelspec.author": "me", "modelspec.license": "CC0",
        "modelspec.architecture": "flux-1"}
    # The hash of the source's tensors is not this file's.
    assert "modelspec.hash_sha256" not in metadata and metadata["svdquant.source_hash_sha256"] == "0xabc"
    assert "modelspec.unknown" not in metadata and not metadata["modelspec.date"].startswith("2020")


def test_a_card_outlives_saving_again(files):
    again = card.of_source(read_header(str(files / "native.safetensors")).metadata)
    assert card.modelspec("other.safetensors", "flux-1", again)["modelspec.title"] == "My FLUX (SVDQuant)"
    assert again == SOURCE | {"modelspec.architecture": "flux-1"}


def test_a_file_without_a_card_is_called_by_its_name(model, tmp_path):
    native.save(str(tmp_path / "mine.safetensors"), *model, RECIPE, "flux")
    metadata = read_header(str(tmp_path / "mine.safetensors")).metadata
    assert metadata["modelspec.title"] == "mine (SVDQuant)" and "svdquant.source_title" not in metadata
    assert card.modelspec("yours.safetensors", "flux-1", card.of_source(metadata))["modelspec.title"] == "yours (SVDQuant)"
    assert card.of_source({"modelspec.thumbnail": "x" * (1 << 21)}) == {}


@pytest.mark.parametrize(("of", "to"), [("native", "nunchaku"), ("nunchaku", "native")])
def test_both_layouts_have_the_card_and_converting_keeps_it(files, tmp_path, of, to):
    convert.convert(str(files / f"{of}.safetensors"), str(tmp_path / "converted.safetensors"), to)
    carded = [read_header(str(path)).metadata for path in (files / f"{of}.safetensors", tmp_path / "converted.safetensors")]
    first, second = ({key: value for key, value in metadata.items() if key.startswith(("modelspec.", "svdquant.source"))
                      and key != "modelspec.date"} for metadata in carded)
    assert first == second and len(first) == 8


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command(files, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "inspect_model.py"), *map(str, arguments)], capture_output=True, text=True,
                              cwd=tmp_path)

    path = files / "native.safetensors"
    whole = inspection.inspect_body(read_header(str(path)))
    assert run(path).stdout.rstrip("\n") == inspection.text(whole) and whole["intact"] == len(read_header(str(path)).tensors)
    assert json.loads(run(path, "--json", "--header").stdout) == json.loads(json.dumps(inspect(path)))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    refused = run(tmp_path / "cut.safetensors")
    assert refused.returncode == 1 and refused.stderr.startswith("inspect: cut.safetensors is cut off")
