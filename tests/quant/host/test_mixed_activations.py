"""Layers whose activations have 8 bits while those of the others have 4: chosen by an exception, kept in the file, shown to the user."""

import json

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import loader, quantize
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.layers.linear import SVDQuantLinear
from comfyui_svdquant.quant.quantizer import presets, report
from safetensors.torch import load_file, save_file

from ..comfy_models import Progress, sample, saved_and_loaded

pytestmark = pytest.mark.usefixtures("inference_mode")

CHOSEN = "single_blocks.*.linear1"


def naive(flux_file, exceptions):
    """(quantized model, records) by plain rounding."""
    recipe = presets.make_recipe("naive", 16, exceptions)
    return quantize.quantize(loader.load_model(flux_file), recipe, None, None, 1, 0, Progress())


@pytest.fixture(scope="module")
def models(flux_file):
    with torch.inference_mode():
        return {exceptions: naive(flux_file, exceptions) for exceptions in ("", f"{CHOSEN} = int8")}


def test_the_chosen_layers_take_8_bits_and_the_user_can_choose_others(models):
    model, records = models[f"{CHOSEN} = int8"]
    layers = {name: layer for name, layer in model.packed_layers().items() if isinstance(layer, SVDQuantLinear)}
    chosen = {name for name in layers if name.endswith("linear1")}
    assert len(chosen) == 2 and {name for name, layer in layers.items() if layer.bits(torch.device("cpu")) == 8} == chosen
    layer = layers[min(chosen)]
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for bits in (0, 8, 4):
        layer.act_bits = bits
        outputs[bits] = layer(x)
    layer.act_bits = 0
    assert torch.equal(outputs[0], outputs[8]) and not torch.equal(outputs[0], outputs[4])
    assert {record.name for record in records if report.form(record) == "W4A8"} == chosen
    assert "W4A8" in report.text(records, presets.make_recipe("naive", 16))
    assert not any(record.act_bits for record in models[""][1])


def test_the_file_keeps_the_choice_and_says_so(models, tmp_path):
    model, _ = models[f"{CHOSEN} = int8"]
    path, loaded = saved_and_loaded(model, tmp_path / "mixed.safetensors")
    assert {name: layer.spec for name, layer in loaded.packed_layers().items()} == {
        name: layer.spec for name, layer in model.packed_layers().items()}
    assert torch.equal(sample(loaded), sample(model))
    text = inspection.text(inspection.inspect(read_header(path)))
    assert "activations: 8 bits in 2 layers" in text and CHOSEN in text


def test_other_files_are_described_as_before(models, tmp_path):
    path, _ = saved_and_loaded(models[""][0], tmp_path / "plain.safetensors")
    confs = [bytes(tensor).decode() for name, tensor in load_file(path).items() if name.endswith(layout.QUANT_KEY)]
    assert len(confs) == 20 and "act_bits" not in " ".join(confs)
    assert "activations: 8" not in inspection.text(inspection.inspect(read_header(path)))


@pytest.mark.parametrize("bits", [16, -8, True, "8", None])
def test_a_file_with_other_bits_is_refused(models, tmp_path, bits):
    path, _ = saved_and_loaded(models[f"{CHOSEN} = int8"][0], tmp_path / "mixed.safetensors")
    key, header = "single_blocks.0.linear1.comfy_quant", read_header(path)
    conf = header.description(key) | {"act_bits": bits}
    damaged = tmp_path / "damaged.safetensors"
    save_file(load_file(path) | {key: torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)}, damaged, header.metadata)
    with pytest.raises(CheckpointError, match="says act_bits = .*, which this version can't run"):
        loader.load_model(str(damaged))


def test_an_exception_that_matches_no_layer_is_refused(flux_file):
    with pytest.raises(ValueError, match="No layer is called 'nothing'"):
        naive(flux_file, "nothing = int8")
