"""The file of a text encoder in 4 bits: written, opened, and refused where it is damaged."""

import json

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import foreign, formats, plain, text_encoder
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.layers.packed_embedding import EmbeddingSpec
from comfyui_svdquant.quant.quantizer import text_encoder as quantizer
from safetensors.torch import load_file, save_file

SPECS = {"model.embed_tokens": EmbeddingSpec(64, 32), "model.layers.0.mlp": layout.LayerSpec(layout.AWQ, 64, 16, bias=True),
         "model.layers.0.out": layout.LayerSpec(layout.AWQ, 128, 16, bias=False)}
TOKENIZER = {"spiece_model": torch.arange(9, dtype=torch.uint8)}


def tensors():
    found = {"model.norm.weight": torch.ones(64, dtype=torch.float16), "visual.blocks.0.weight": torch.randn(3, 5).half(),
             "model.lm_head.weight": torch.randn(4, 4).half()}
    for layer, spec in SPECS.items():
        weight = torch.randn(spec.out_features, spec.in_features)
        packed, _ = quantizer.pack(weight, torch.zeros(16) if getattr(spec, "bias", False) else None, spec)
        found |= {f"{layer}.{part}": tensor for part, tensor in packed.items()}
    return found


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "encoder.safetensors")


def save(path, own, multimodal=False):
    text_encoder.save(path, own, SPECS, "comfy.text_encoders.llama.Qwen3_4B", multimodal, {"preset": "data-free"}, "Qwen3_4B", TOKENIZER)


@pytest.mark.parametrize("multimodal", [False, True])
def test_a_file_comes_back_to_the_bit(path, multimodal):
    own = tensors()
    save(path, own, multimodal)
    file = text_encoder.open_file(read_header(path))
    found = file.tensors()
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    assert {file.own_name(layer): spec for layer, spec in file.specs.items()} == SPECS
    assert (file.transformer, file.source, file.recipe) == ("comfy.text_encoders.llama.Qwen3_4B", "Qwen3_4B", {"preset": "data-free"})
    names = file.header.tensors.keys()
    begins = "model.language_model.layers.0.mlp.weight" if multimodal else "model.layers.0.mlp.weight"
    assert begins in names and ("lm_head.weight" if multimodal else "model.lm_head.weight") in names and "spiece_model" in names
    assert file.shape(begins) == (16, 64) and file.shape(f"{begins}_scale") is None
    file.check()


def test_other_readers_leave_it_alone(path):
    save(path, tensors())
    header = read_header(path)
    assert formats.identify(header) is None and foreign.kind(header) == "a text encoder in 4 bits"
    with pytest.raises(CheckpointError, match="is a text encoder in 4 bits; move it to models/text_encoders, and choose a FLUX"):
        plain.find(header)


def test_its_card_and_its_formats(path):
    """The formats' names are those of ComfyUI's own, so that a newer ComfyUI may read the layers."""
    save(path, tensors())
    header = read_header(path)
    assert header.metadata["modelspec.architecture"] == "Qwen3_4B" and header.metadata["modelspec.title"] == "encoder (SVDQuant)"
    described = {name: header.description(name)["format"] for name in header.tensors if name.endswith(".comfy_quant")}
    assert described == {"model.embed_tokens.comfy_quant": "int8_tensorwise", "model.layers.0.mlp.comfy_quant": "awq_w4a16",
                         "model.layers.0.out.comfy_quant": "awq_w4a16"}
    assert header.tensors["model.embed_tokens.weight_scale"].shape == (32, 1)


def rewritten(path, change, **metadata):
    """The file with other tensors or metadata, without checksums of the old ones."""
    header, found = read_header(path), load_file(path)
    change(found)
    kept = {key: value for key, value in header.metadata.items() if key != "svdquant.checksums"} | metadata
    save_file(found, path, kept)
    return read_header(path)


def _conf(layer, **changes):
    def change(found):
        conf = layout.decode_conf(found[f"{layer}.comfy_quant"].tolist()) | changes
        found[f"{layer}.comfy_quant"] = layout.encode_conf(conf)
    return change


@pytest.mark.parametrize(("change", "metadata", "match"), [
    (lambda found: None, {"svdquant.text_encoder": "2"}, "format version 2, and this pack reads up to 1; update"),
    (lambda found: None, {"svdquant.config": "{}"}, "no valid svdquant.config"),
    (lambda found: None, {"svdquant.config": json.dumps({"transformer": 3, "multimodal": False})}, "no valid svdquant.config"),
    (lambda found: found.pop("model.layers.0.mlp.weight_zeros"), {}, "lacks tensor model.layers.0.mlp.weight_zeros"),
    (lambda found: found.pop("model.embed_tokens.weight_scale"), {}, "lacks tensor model.embed_tokens.weight_scale"),
    (lambda found: found.update({"model.layers.0.mlp.weight": found["model.layers.0.mlp.weight"][:8].clone()}), {}, "shape"),
    (lambda found: found.update({"model.layers.0.mlp.weight": found["model.layers.0.mlp.weight"].half()}), {}, "instead of torch.int8"),
    (lambda found: found.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), {}, "instead of a floating point type"),
    (_conf("model.layers.0.mlp", format="nf4"), {}, "format 'nf4'"),
    (_conf("model.layers.0.mlp", format=["awq_w4a16"]), {}, "which this version can't run"),
    (_conf("model.layers.0.mlp", group_size=128), {}, "group size 128"),
    (lambda found: found.update({"model.layers.0.out.weight_scale": found["model.layers.0.out.weight_scale"].to(torch.int32)}), {},
     "scales of type torch.int32"),
])
def test_damage_is_found_before_a_weight_is_read(path, monkeypatch, change, metadata, match):
    save(path, tensors())
    header = rewritten(path, change, **metadata)
    monkeypatch.setattr(type(header), "read_tensor", None)
    with pytest.raises(CheckpointError, match=match) as error:
        text_encoder.open_file(header)
    assert str(error.value).startswith("encoder.safetensors") and str(error.value).endswith(".")


def test_a_changed_value_is_found(path):
    save(path, tensors())
    info = read_header(path).tensors["model.layers.0.mlp.weight_scale"]
    with open(path, "r+b") as file:
        file.seek(info.start)
        byte = file.read(1)
        file.seek(info.start)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="weight_scale is not as it was saved"):
        text_encoder.open_file(read_header(path)).check()
