"""The nodes for text encoders: from a CLIP to a file and back, what they refuse, and what they show."""

from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import torch
from comfyui_svdquant.nodes.load_text_encoder import SVDQuantLoadTextEncoder
from comfyui_svdquant.nodes.progress import NodeProgress
from comfyui_svdquant.nodes.quantize_text_encoder import SVDQuantQuantizeTextEncoder
from comfyui_svdquant.nodes.save_text_encoder import SVDQuantSaveTextEncoder
from comfyui_svdquant.quant.checkpoint import text_encoder
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import clip_loader, clip_modules, written
from safetensors.torch import save_file

from ..quant.text_encoders import KINDS, encode, load, small, write

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """ComfyUI's folder for text encoders, and encoders in small sizes."""
    own = tmp_path / "text_encoders"
    own.mkdir()
    _, extensions = folder_paths.folder_names_and_paths["text_encoders"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(own)], extensions))
    monkeypatch.setattr(written, "_files", {})
    monkeypatch.setattr(written, "_names", {})
    with small(monkeypatch):
        yield own


@pytest.fixture
def clip(folder):
    return load([write(folder, "clip_l"), write(folder, "t5xxl")], "FLUX")


def quantized(clip, encoders="all", exceptions=""):
    return SVDQuantQuantizeTextEncoder.execute(clip, encoders, exceptions).result


def test_from_a_clip_to_a_file_and_back(clip, folder, monkeypatch):
    texts = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: texts.append(text))
    packed, report = quantized(clip, exceptions="clip_l.*")
    assert texts[0] == "layer 1 of 15" and texts[-2] == "layer 15 of 15" and "15 layers, " in texts[-1] and " MB (" in texts[-1]
    assert "t5xxl (T5): 14 linears in 4 bits" in report and "the embedding in 8 bits" in report and "smaller)." in report
    name = SVDQuantSaveTextEncoder.execute(packed, "4bit/t5", False).result[0]
    assert Path(name) == Path("4bit/t5.safetensors") and (folder / name).is_file() and "opens with SVDQuant Load" in texts[-1]
    assert SVDQuantLoadTextEncoder.validate_inputs(name, "none", None) is True
    loaded = SVDQuantLoadTextEncoder.execute(name, "flux", "clip_l_0.safetensors").result[0]
    assert all(torch.equal(a, b) for a, b in zip(encode(packed), encode(loaded)))
    assert loaded.patcher.load_device == clip.patcher.load_device and "t5xxl in 4 bits" in texts[-1]
    recipe = text_encoder.open_file(read_header(str(folder / name))).recipe
    assert recipe["preset"] == "data-free" and len(recipe["layers"]) == 15 and all(0 < record["error"] < 0.1 for record in recipe["layers"])
    assert set(recipe["layers"][0]) == {"name", "format", "error"}


def test_a_run_again_saves_nothing_again(clip, folder):
    packed, _ = quantized(clip)
    assert sorted(packed.patcher.recipe) == ["clip_l", "t5xxl"]
    first = SVDQuantSaveTextEncoder.execute(packed, "both", False).result[0]
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("both*")}
    assert sorted(files) == ["both_clip_l.safetensors", "both_t5xxl.safetensors"] and first in files
    before = SVDQuantSaveTextEncoder.fingerprint_inputs(filename="both")
    assert SVDQuantSaveTextEncoder.execute(packed, "both", False).result[0] == first
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("both*")} == files
    assert SVDQuantSaveTextEncoder.fingerprint_inputs(filename="both") == before
    (folder / first).unlink()
    assert SVDQuantSaveTextEncoder.fingerprint_inputs(filename="both") != before
    SVDQuantSaveTextEncoder.execute(packed, "both", False)
    assert (folder / first).is_file()


def test_names_that_are_refused_when_run_is_clicked(folder):
    write(folder, "clip_l")
    assert SVDQuantSaveTextEncoder.validate_inputs("new", False) is True
    for filename, overwrite, match in (("clip_l_0", True, "is no text encoder that SVDQuant has quantized, and overwrite replaces nothing"),
                                       ("../out", False, "does not name a file within models/text_encoders"),
                                       ("", False, "is empty, so it does not name")):
        assert match in SVDQuantSaveTextEncoder.validate_inputs(filename, overwrite)
    assert "There is no gone.safetensors in models/text_encoders" in SVDQuantLoadTextEncoder.validate_inputs("gone.safetensors")
    (folder / "page.safetensors").write_text("<!DOCTYPE html>")
    assert "is a web page" in SVDQuantLoadTextEncoder.validate_inputs("clip_l_0.safetensors", "page.safetensors")


def test_a_clip_that_is_not_packed_is_not_saved(clip):
    with pytest.raises(ValueError, match="saves text encoders in 4 bits; put SVDQuant Quantize Text Encoder before it"):
        SVDQuantSaveTextEncoder.execute(clip, "x", False)
    packed, _ = quantized(clip)
    lora = {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v.lora_up.weight": torch.ones(128, 1),
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v.lora_down.weight": torch.ones(1, 128)}
    with pytest.raises(ValueError, match="There are LoRAs or other weight patches on this 4-bit CLIP"):
        SVDQuantSaveTextEncoder.execute(comfy.sd.load_lora_for_models(None, packed, lora, 1.0, 1.0)[1], "x", False)
    with pytest.raises(ValueError, match="This CLIP is in 4 bits already"):
        quantized(packed)


def test_small_encoders_are_left_alone(clip, monkeypatch):
    with pytest.raises(ValueError, match="less than a billion parameters each, so 4 bits would save little"):
        quantized(clip, "large")
    monkeypatch.setattr(clip_modules, "LARGE", 10**5 * 3)
    monkeypatch.setattr("comfyui_svdquant.quant.host.clip_quantize.LARGE", 10**5 * 3)
    packed, report = quantized(clip, "large")
    assert list(packed.patcher.recipe) == ["t5xxl"] and "clip_l stays in 16 bits: it is small" in report


def test_exceptions_stay_in_16_bits_and_are_named(clip):
    packed, report = quantized(clip, exceptions="clip_l.*, t5xxl.*.wo\nt5xxl.shared")
    names = set(packed.patcher.packed_layers())
    assert len(names) == 12 and not any(name.endswith((".wo", "shared")) for name in names)
    assert "In 16 bits: encoder.block.0.layer.1.DenseReluDense.wo, encoder.block.1.layer.1.DenseReluDense.wo, shared, since each" in report
    for text, match in (("t5xxl.nothing", "No layer is called 't5xxl.nothing'; layers are called like clip_l.text_model"),
                        ("*", "These exceptions leave no layer to quantize")):
        with pytest.raises(ValueError, match=match):
            quantized(clip, exceptions=text)


def test_cancel(clip, monkeypatch):
    def check(self):
        raise KeyboardInterrupt

    before = {name: p.clone() for name, p in clip.cond_stage_model.named_parameters()}
    monkeypatch.setattr(NodeProgress, "check", check)
    with pytest.raises(KeyboardInterrupt):
        quantized(clip)
    assert all(torch.equal(before[name], p) for name, p in clip.cond_stage_model.named_parameters())


def test_a_type_of_another_model_is_refused(clip, folder):
    """ComfyUI would build another encoder, and leave the file's tensors aside."""
    packed, _ = quantized(clip, exceptions="clip_l.*")
    name = SVDQuantSaveTextEncoder.execute(packed, "t5", False).result[0]
    write(folder, "clip_g")
    with pytest.raises(CheckpointError, match="is a T5 encoder, and for type sdxl and these files ComfyUI builds CLIPTextModel"):
        SVDQuantLoadTextEncoder.execute(name, "sdxl", "clip_l_0.safetensors")
    with pytest.raises(CheckpointError, match=r"^ComfyUI can't load t5.safetensors, clip_g_0.safetensors as text encoders of type flux "
                                              ".size mismatch for .*; choose the type of your model"):
        SVDQuantLoadTextEncoder.execute(name, "flux", "clip_g_0.safetensors")
    with pytest.raises(CheckpointError, match="t5.safetensors is a T5 encoder, and for type flux and these files ComfyUI builds"):
        SVDQuantLoadTextEncoder.execute(name, "flux", name)


def test_a_file_beside_one_in_4_bits_that_lacks_a_weight(clip, folder, monkeypatch):
    """ComfyUI would leave it without values."""
    packed, _ = quantized(clip, exceptions="clip_l.*")
    name = SVDQuantSaveTextEncoder.execute(packed, "t5", False).result[0]
    monkeypatch.setattr(clip_loader, "SMALL", 0)
    found = SVDQuantLoadTextEncoder.execute(name, "flux", "clip_l_0.safetensors").result[0]
    assert all(torch.equal(a, b) for a, b in zip(encode(packed), encode(found)))
    cut = KINDS["clip_l"].tensors()
    del cut["text_model.encoder.layers.2.mlp.fc2.weight"]
    save_file(cut, str(folder / "cut.safetensors"))
    with pytest.raises(CheckpointError, match="The files lack the weight clip_l.transformer.text_model.encoder.layers.2.mlp.fc2.weight,"):
        SVDQuantLoadTextEncoder.execute(name, "flux", "cut.safetensors")


def test_scaled_files_beside_one_in_4_bits_are_refused(clip, folder):
    packed, _ = quantized(clip, exceptions="clip_l.*")
    name = SVDQuantSaveTextEncoder.execute(packed, "t5", False).result[0]
    write(folder, "clip_l", 7, scaled_fp8=torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match="clip_l_7.safetensors has scaled weights .scaled_fp8., which can't be loaded beside"):
        SVDQuantLoadTextEncoder.execute("clip_l_7.safetensors", "flux", name)


def test_files_without_packed_layers_go_to_comfyuis_own_loader(clip):
    files = "t5xxl_0.safetensors", "flux", "clip_l_0.safetensors"
    loaded, on_cpu = (SVDQuantLoadTextEncoder.execute(*files, device=device).result[0] for device in ("default", "cpu"))
    assert type(loaded) is type(on_cpu) is comfy.sd.CLIP and torch.equal(encode(loaded)[0], encode(clip)[0])
    assert loaded.patcher.load_device == clip.patcher.load_device and on_cpu.patcher.load_device == torch.device("cpu")
    # A GPU adds the terms of a product in another order.
    torch.testing.assert_close(encode(on_cpu)[0], encode(clip)[0], rtol=1e-3, atol=1e-3)


def test_the_types_are_comfyuis():
    types = clip_loader.types()
    assert {"flux", "sd3", "qwen_image", "sdxl", "stable_diffusion", "flux2"} <= types.keys() and types["flux"] is comfy.sd.CLIPType.FLUX
    assert len(KINDS) >= 6
