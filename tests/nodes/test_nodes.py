"""The nodes, called as ComfyUI calls them."""

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

import comfy.model_management
import execution
import folder_paths
import pytest
import torch
from comfyui_svdquant import comfy_entrypoint
from comfyui_svdquant.nodes.compare import SVDQuantCompare
from comfyui_svdquant.nodes.compare_models import SVDQuantCompareModels
from comfyui_svdquant.nodes.doctor import SVDQuantDoctor
from comfyui_svdquant.nodes.download_model import SVDQuantDownloadModel
from comfyui_svdquant.nodes.inspect_model import SVDQuantInspect
from comfyui_svdquant.nodes.load_model import SVDQuantLoadModel
from comfyui_svdquant.nodes.load_text_encoder import SVDQuantLoadTextEncoder
from comfyui_svdquant.nodes.progress import NodeProgress
from comfyui_svdquant.nodes.quantize_model import SVDQuantQuantizeModel
from comfyui_svdquant.nodes.quantize_text_encoder import SVDQuantQuantizeTextEncoder
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.nodes.save_text_encoder import SVDQuantSaveTextEncoder
from comfyui_svdquant.nodes.several_gpus import SVDQuantSeveralGPUs
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, Header, read_header
from comfyui_svdquant.quant.download.hub import HubError
from comfyui_svdquant.quant.host.loader import load_model
from comfyui_svdquant.quant.host.model_folder import target_path
from comfyui_svdquant.quant.quantizer import pipeline
from safetensors.torch import load_file, save_file

from host.server import ROOT, TINY

NODES = (SVDQuantDownloadModel, SVDQuantLoadModel, SVDQuantQuantizeModel, SVDQuantSaveModel, SVDQuantInspect, SVDQuantCompare,
         SVDQuantCompareModels, SVDQuantDoctor, SVDQuantSeveralGPUs, SVDQuantQuantizeTextEncoder, SVDQuantSaveTextEncoder,
         SVDQuantLoadTextEncoder)
FOLDER = Path(folder_paths.get_folder_paths("diffusion_models")[-1])

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module", autouse=True)
def tiny_in_models():
    """The embedded model, where ComfyUI looks for models."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "demo" / "tiny_flux" / TINY["diffusion_models"], FOLDER)
    yield
    for file in FOLDER.glob("*.safetensors"):
        file.unlink()


def quantize(**inputs):
    model = SVDQuantLoadModel.execute("tiny_flux.safetensors", "auto").result[0]
    return SVDQuantQuantizeModel.execute(**({"model": model, "steps": 2, "seed": 0, "rank": 16, "preset": "data-free"} | inputs)).result


def test_the_extension_registers_the_nodes():
    extension = asyncio.run(comfy_entrypoint())
    ids = [node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]
    assert ids == [node.GET_SCHEMA().node_id for node in NODES]


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_has_a_description(node):
    schema = node.GET_SCHEMA()
    assert schema.description and schema.display_name.startswith("SVDQuant ")
    assert all(port.tooltip and port.tooltip.endswith(".") for port in [*schema.inputs, *schema.outputs])
    for widget in schema.inputs:
        if getattr(widget, "options", None) and widget.id != "model_name":
            assert widget.default in widget.options


def test_load_quantize_save_load():
    quantized_model, report, chart, data = quantize()
    lines = report.splitlines()
    assert "preset data-free, rank 16" in lines[0] and "x smaller" in lines[0]
    layers = [line.split()[1] for line in lines if line.startswith("| ") and "." in line.split()[1]]
    assert set(layers) == set(quantized_model.packed_layers()) and "double_blocks.0.img_attn.qkv" in layers
    assert [layer["name"] for layer in json.loads(data)["layers"]] == layers
    assert chart.shape[0] == 1 and chart.shape[3] == 3 and 0 <= chart.min() < 0.3 and 0.9 < chart.max() <= 1
    name = SVDQuantSaveModel.execute(quantized_model, "out/tiny_4bit", False).result[0]
    assert name == os.path.join("out", "tiny_4bit.safetensors")
    loaded = SVDQuantLoadModel.execute(name, "auto").result[0]
    assert loaded.recipe == json.loads(json.dumps(quantized_model.recipe)) and len(loaded.recipe["layers"]) == len(layers)
    assert loaded.source == "tiny_flux.safetensors"
    state, again = quantized_model.model.state_dict(), loaded.model.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
    with pytest.raises(CheckpointError, match="exists already"):
        SVDQuantSaveModel.execute(loaded, "out/tiny_4bit", False)
    SVDQuantSaveModel.execute(loaded, "out/tiny_4bit.safetensors", True)


def test_exceptions_keep_layers_in_16_bits_or_give_them_rank():
    quantized_model, report, *_ = quantize(exceptions="single_blocks.5.*\n*.linear2 = 64, *txt_mlp.? = 48")
    specs = {name: layer.spec for name, layer in quantized_model.packed_layers().items()}
    assert not any(name.startswith("single_blocks.5.") for name in specs) and "single_blocks.5" not in report
    assert specs["single_blocks.0.linear2"].rank == 64 and specs["double_blocks.0.txt_mlp.2"].rank == 48
    assert specs["single_blocks.0.linear1"].rank == 2 * specs["double_blocks.0.img_mlp.2"].rank == 32  # linear1 combines two layers
    name = SVDQuantSaveModel.execute(quantized_model, "exceptions", True).result[0]
    again = SVDQuantLoadModel.execute(name, "auto").result[0].model.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in quantized_model.model.state_dict().items())
    for wrong in ("single_blocks.99.*", "*.linear2 = much", "*.linear2 = 7"):
        with pytest.raises(ValueError, match="No layer is called|can't be read|not possible"):
            quantize(exceptions=wrong)


def test_branches_in_8_bits():
    quantized_model, report, *_ = quantize(branch_bits="8", exceptions="*.linear2 = 64")
    bits = {layer.spec.branch_bits for layer in quantized_model.packed_layers().values() if layer.spec.rank}
    assert bits == {8} and quantized_model.recipe["branch_bits"] == 8 and "rank 16 in 8 bits" in report
    assert {layer.spec.branch_bits for layer in quantize(branch_bits="8", preset="naive")[0].packed_layers().values()} == {16}


@pytest.mark.parametrize(("progress", "folder"), [("temp", folder_paths.get_temp_directory), ("output", folder_paths.get_output_directory),
                                                  ("off", None)])
def test_a_cancelled_run_leaves_its_progress_in_the_chosen_folder(monkeypatch, progress, folder):
    kept = [Path(place()) / "svdquant_progress" for place in (folder_paths.get_temp_directory, folder_paths.get_output_directory)]
    done = []

    def cancelled(name, *args):
        done.append(name)
        if name.startswith("double_blocks.1."):
            raise comfy.model_management.InterruptProcessingException()
        return quantize_layer(name, *args)

    quantize_layer = pipeline.quantize_layer
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_layer", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            quantize(progress=progress)
    assert [path.parent for path in kept if path.exists()] == ([Path(folder())] if folder else [])
    monkeypatch.setattr(pipeline, "quantize_layer", lambda name, *args: done.append(name) or quantize_layer(name, *args))
    done.clear()
    quantize(progress=progress)
    assert any(name.startswith("double_blocks.0.") for name in done) == (folder is None)
    assert not any(path.exists() for path in kept)


def test_quantize_counts_layers_and_estimates_the_time(monkeypatch):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    quantized_model, report, *_ = quantize()
    layers = len(quantized_model.packed_layers())
    counts = [text for text in said if text.startswith("layer ")]
    assert counts[0] == f"layer 1 of {layers}" and counts[-1] == f"layer {layers} of {layers}"
    assert any(re.fullmatch(rf"layer {layers // 2} of {layers}, about \d+ s left", text) for text in counts)
    assert said[-1] in report, "the summary"


@pytest.mark.parametrize(("at", "progress", "text"), [
    ("double_blocks.0.", "temp", "stopped"), ("double_blocks.1.", "temp", "stopped; finished blocks are kept, Run goes on"),
    ("double_blocks.1.", "off", "stopped")])
def test_after_cancel_quantize_says_whether_it_can_resume(monkeypatch, at, progress, text):
    def cancelled(name, *args):
        if name.startswith(at):
            raise comfy.model_management.InterruptProcessingException()
        return quantize_layer(name, *args)

    said, quantize_layer = [], pipeline.quantize_layer
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_layer", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            quantize(seed=5, progress=progress)
    assert said[-1] == text
    quantize(seed=5, progress="temp")
    assert not (Path(folder_paths.get_temp_directory()) / "svdquant_progress").exists()


def test_save_says_where_the_file_is(monkeypatch):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    SVDQuantSaveModel.execute(quantize()[0], "out/said", True)
    path = FOLDER / "out" / "said.safetensors"
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    assert said[-1] == f"{path}, {size}; opens with SVDQuant Load Model, not with Load Diffusion Model"
    SVDQuantSaveModel.execute(quantize()[0], "out/said", True, "nunchaku")
    assert said[-1].endswith("; opens with SVDQuant Load Model and Nunchaku's nodes, not with Load Diffusion Model")


def test_a_changed_file_changes_the_fingerprint():
    path = FOLDER / "changing.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    first = SVDQuantLoadModel.fingerprint_inputs("changing.safetensors", "auto")
    save_file({"a": torch.zeros(2)}, path)
    assert SVDQuantLoadModel.fingerprint_inputs("changing.safetensors", "auto") != first
    assert SVDQuantLoadModel.fingerprint_inputs("absent.safetensors", "auto") is None


@pytest.mark.parametrize(("filename", "says"), [
    *((name, "has .. as a folder") for name in ("../escape", "a/../../escape", "..\\..\\escape", "..")), (".", "has . as a folder"),
    ("a/.../b", "has ... as a folder"), ("", "is empty"), (" ", "is empty"),
    *((name, "a slash") for name in ("/etc/x", "a/", "/", "a//b")),
    *((name, f"has a {name[1]} in it") for name in ("a:b", "a?b", "a*b", "a<b>", 'a"b', "a|b", "C:\\x", "C:/../../escape", "a>.sft")),
    ("a\nb", "U+000A"), ("a\tb", "U+0009"), ("a\u202eb", "U+202E"), ("nul\0x", "U+0000"), ("a\u2028b", "U+2028"), ("a\ud800", "U+D800"),
    *((name, "a device on Windows") for name in ("con", "NUL", "Aux.safetensors", "com1", "a/LPT9.x/b", "nul.tar.sft", "COM\u00b9")),
    *((name, "begins with a dot") for name in (".hidden", ".safetensors", ".git/x")),
    *((name, "ends in a dot or a space") for name in ("dir./x", "dir /x", "x.")),
    *((name, "is too long") for name in (222 * "x", 256 * "x" + "/a", 111 * "\u00fc", 75 * "\u4e2d", 10_000 * "x")),
])
def test_filenames_that_are_not_valid_on_every_system_are_refused(filename, says):
    with pytest.raises(ValueError) as caught:
        target_path(filename)
    message = str(caught.value)
    assert says in message and message.startswith("The filename ") and "not name a file within models/diffusion_models; " in message
    assert message.isprintable() and len(message) < 250


@pytest.mark.parametrize("name", ["flux 4bit", "fl\u00fcx", "\u6a21\u578b/\u56fe\u50cf", "flux [int4] (r32)", "mine/old/flux",
                                  "flux.v1.2", "a..b", "contra", "com10", "my.con", "-x", "~x", "\U0001f600", 221 * "x", 255 * "x" + "/a",
                                  73 * "\u4e2d"])
def test_the_usual_filenames(name):
    path, within = target_path(name)
    assert within == os.path.join(*f"{name}.safetensors".split("/")) and path == str(FOLDER / within)


def test_the_extension_is_added_if_it_is_missing():
    assert target_path("flux")[1] == "flux.safetensors" == target_path(" flux.safetensors ")[1]
    assert target_path("mine\\flux")[1] == os.path.join("mine", "flux.safetensors")
    assert [target_path(name)[1] for name in ("X.SAFETENSORS", "x.Sft", "x.bin")] == ["X.SAFETENSORS", "x.Sft", "x.bin.safetensors"]


def test_an_ordinary_model_is_not_saved():
    model = SVDQuantLoadModel.execute("tiny_flux.safetensors", "auto").result[0]
    with pytest.raises(ValueError, match="put SVDQuant Quantize Model before it"):
        SVDQuantSaveModel.execute(model, "x", False)


def test_cancel_stops_the_node():
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantize()
    comfy.model_management.interrupt_current_processing(False)


def test_the_embedded_model_has_the_documented_size():
    patcher = load_model(str(FOLDER / "tiny_flux.safetensors"))
    params = patcher.model.diffusion_model.params
    assert (params.hidden_size, params.num_heads, params.in_channels) == (256, 2, 16)
    assert 10e6 < sum(p.numel() for p in patcher.model.diffusion_model.parameters()) < 16e6


def test_saving_beside_a_clone_that_is_loaded_with_a_lora(tmp_path):
    """Clones share their weights: a LoRA that another clone has loaded onto a 16-bit layer must not be in the file."""
    quantized_model, *_ = quantize()
    own = quantized_model.model.diffusion_model.img_in.weight.clone()
    patched = quantized_model.clone()
    assert patched.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.ones_like(own, dtype=torch.float32),))}, 1.0)
    patched.patch_model(patched.load_device)
    assert not torch.equal(quantized_model.model.diffusion_model.img_in.weight, own)
    name = SVDQuantSaveModel.execute(quantized_model, "clean", True).result[0]
    patched.unpatch_model(patched.offload_device)
    loaded = SVDQuantLoadModel.execute(name, "auto").result[0]
    assert torch.equal(loaded.model.diffusion_model.img_in.weight, own)
    with pytest.raises(ValueError, match="LoRAs or other weight patches"):
        SVDQuantSaveModel.execute(patched, "patched", True)


@pytest.mark.parametrize("layout", ["native", "nunchaku"])
def test_saving_a_model_that_computes_in_another_type(layout):
    """Its file equals that of the model in the dtype in which it was quantized."""
    quantized_model, *_ = quantize()
    files = []
    for name in ("stored", "held"):
        name = SVDQuantSaveModel.execute(quantized_model, f"{layout}_{name}", True, layout).result[0]
        files.append(load_file(folder_paths.get_full_path_or_raise("diffusion_models", name)))
        for layer in quantized_model.packed_layers().values():
            for p in layer.parameters():
                p.data = p.data.half() if p.dtype == torch.bfloat16 else p.data
    assert quantized_model.model.diffusion_model.single_blocks[0].linear1.weight_scale.dtype == torch.float16
    stored, held = files
    assert stored.keys() == held.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == held[name].dtype
        assert torch.allclose(tensor.float(), held[name].float(), rtol=0, atol=2**-25), "fp16's error below 2^-17"
        assert "scale" not in name or torch.equal(tensor, held[name])


def test_saving_in_nunchakus_layout_and_back():
    """Codes, scales and branches don't change; modulation layers are rounded once."""
    quantized_model, *_ = quantize(exceptions="*.linear? = 16", branch_bits="16")  # one rank for all layers, as in Nunchaku's files
    name = SVDQuantSaveModel.execute(quantized_model, "theirs", True, "nunchaku").result[0]
    loaded = SVDQuantLoadModel.execute(name, "auto").result[0]
    assert loaded.recipe == json.loads(json.dumps(quantized_model.recipe)) and loaded.source == "tiny_flux.safetensors"
    inside = {key: layer.spec for key, layer in quantized_model.packed_layers().items() if "_blocks." in key}
    assert {key: layer.spec for key, layer in loaded.packed_layers().items()} == inside
    # Nunchaku has the layers outside the blocks in 16 bits: here as their dequantized weights.
    outside = {key: layer for key, layer in quantized_model.packed_layers().items() if key not in inside}
    assert len(outside) == 4
    for key, layer in outside.items():
        dense = loaded.model.diffusion_model.get_submodule(key)
        assert torch.equal(dense.weight, layer.dense("cpu").bfloat16()) and torch.equal(dense.bias, layer.bias)
    theirs = loaded.model.state_dict()
    state = {key: tensor for key, tensor in quantized_model.model.state_dict().items() if not any(f".{name}." in key for name in outside)}
    unequal = {key for key in state if not torch.equal(state[key], theirs[key])}
    # Only modulation layers differ: Nunchaku adds 1 to a part of their bias, and rounds their zeros, in 16 bits.
    assert all("mod" in key and key.endswith((".bias", ".weight_zeros")) for key in unequal)
    again = SVDQuantLoadModel.execute(SVDQuantSaveModel.execute(loaded, "ours", True, "native").result[0], "auto").result[0]
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in again.model.state_dict().items())
    SVDQuantSaveModel.execute(again, "theirs_again", True, "nunchaku")
    first, second = (load_file(FOLDER / f"{name}.safetensors") for name in ("theirs", "theirs_again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_nunchakus_layout_gives_all_layers_the_largest_rank():
    quantized_model, *_ = quantize(exceptions="*.linear2 = 48", branch_bits="16")
    name = SVDQuantSaveModel.execute(quantized_model, "ranks", True, "nunchaku").result[0]
    layers = SVDQuantLoadModel.execute(name, "auto").result[0].packed_layers()
    for key, layer in quantized_model.packed_layers().items():
        if "_blocks." not in key:
            continue  # Nunchaku has it in 16 bits
        spec = layers[key].spec
        assert spec.rank == 0 if layer.spec.format == "awq_w4a16" else spec.rank in (48, 16)
        assert torch.equal(layers[key].weight, layer.weight)
        if spec.rank:
            pairs = zip((layer.weight_proj_down, layer.weight_proj_up), (layers[key].weight_proj_down, layers[key].weight_proj_up))
            assert all(torch.equal(ours, theirs[:, : ours.shape[1]]) and not theirs[:, ours.shape[1]:].any() for ours, theirs in pairs)


def test_a_model_that_nunchakus_layout_cannot_hold_is_refused():
    quantized_model, *_ = quantize(exceptions="single_blocks.5.linear1")
    with pytest.raises(CheckpointError, match="Layer single_blocks.5.linear1 is not in 4 bits, which Nunchaku's layout"):
        SVDQuantSaveModel.execute(quantized_model, "refused", True, "nunchaku")
    assert not (FOLDER / "refused.safetensors").exists()


@pytest.fixture
def with_card():
    """The embedded model under another name, with a model card."""
    path = FOLDER / "carded.safetensors"
    card = {"modelspec.title": "Tiny", "modelspec.author": "somebody", "modelspec.license": "CC0", "modelspec.hash_sha256": "0x12"}
    save_file(load_file(FOLDER / "tiny_flux.safetensors"), path, metadata=card)
    return path


@pytest.mark.parametrize("layout", ["native", "nunchaku"])
def test_a_saved_model_names_its_source(with_card, layout):
    model = SVDQuantLoadModel.execute(with_card.name, "auto").result[0]
    saved = SVDQuantSaveModel.execute(quantize(model=model)[0], "from_card", True, layout).result[0]
    saved = SVDQuantSaveModel.execute(SVDQuantLoadModel.execute(saved, "auto").result[0], "from_card_again", True, layout).result[0]
    report, data = SVDQuantInspect.execute(saved).result
    facts = json.loads(data)
    assert facts["source"] == with_card.name and facts["model"]["hidden_size"] == 256
    card = facts["card"]
    assert (card["title"], card["author"], card["licence"], card["source's tensor hash"]) == ("Tiny (SVDQuant)", "somebody", "CC0", "0x12")
    assert facts["recipe"]["preset"] == "data-free" and facts["recipe"]["calibration"] == {"prompts": 0}
    assert facts["errors"]["svdquant_w4a4"]["layers"] > 0 and "error of svdquant_w4a4: mean" in report
    assert "licence: CC0" in report.splitlines()


def test_inspecting_reads_no_weight(monkeypatch):
    monkeypatch.setattr(Header, "read_tensor", lambda self, name: pytest.fail(f"{name} was read"))
    output = SVDQuantInspect.execute("tiny_flux.safetensors")
    assert "a FLUX.1 that is not quantized" in output.result[0] and output.ui.as_dict() == {"text": (output.result[0],)}
    (FOLDER / "text.safetensors").write_text("no model")
    with pytest.raises(CheckpointError, match="text.safetensors is not a safetensors file"):
        SVDQuantInspect.execute("text.safetensors")


@pytest.mark.parametrize(("change", "says"), [
    (lambda tensors: tensors.pop("single_blocks.0.norm.key_norm.scale"), "lacks tensor single_blocks.0.norm.key_norm"),
    (lambda tensors: tensors.update({"final_layer.linear.weight": torch.zeros(64, 64)}), "final_layer.linear.weight has shape"),
    (lambda tensors: tensors.update({"double_blocks.7.img_mod.lin.bias": torch.zeros(1)}), "double_blocks.7"),
])
@pytest.mark.parametrize("quantized", [False, True])
def test_inspect_and_load_refuse_the_same_files(change, says, quantized):
    if quantized:
        SVDQuantSaveModel.execute(quantize()[0], "whole", True)
    path = FOLDER / ("whole.safetensors" if quantized else "tiny_flux.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, FOLDER / "unfit.safetensors", read_header(str(path)).metadata)
    messages = []
    for read in (lambda name: SVDQuantLoadModel.execute(name, "auto"), SVDQuantInspect.execute):
        with pytest.raises(CheckpointError, match=f"^unfit.safetensors.*{says}") as caught:
            read("unfit.safetensors")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("error", [CheckpointError("x"), HubError("x")])
def test_comfyui_shows_an_error_under_a_short_name(error):
    """ComfyUI's pop-up has three lines for the error's name and message."""
    assert execution.full_type_name(type(error)) == type(error).__name__


def test_overwrite_replaces_only_quantized_models():
    """The 16-bit source model and all other files are not overwritten."""
    quantized_model, *_ = quantize()
    save_file({"a": torch.zeros(1)}, FOLDER / "other.safetensors")
    save_file({"a.qweight": torch.zeros(1)}, FOLDER / "awq.safetensors")
    (FOLDER / "notes.safetensors").write_text("no model")
    for name in ("tiny_flux", "other", "awq", "notes"):
        file = FOLDER / f"{name}.safetensors"
        before = file.read_bytes()
        for overwrite in (True, False):
            with pytest.raises(CheckpointError, match=f"{name}.safetensors exists already and is no quantized model .* choose another"):
                SVDQuantSaveModel.execute(quantized_model, name, overwrite)
        assert file.read_bytes() == before
    (FOLDER / "folder.safetensors").mkdir()
    for overwrite in (True, False):
        with pytest.raises(CheckpointError, match="folder.safetensors is a folder; choose another filename"):
            SVDQuantSaveModel.execute(quantized_model, "folder", overwrite)
    (FOLDER / "folder.safetensors").rmdir()
    for layout in ("native", "nunchaku", "native"):
        SVDQuantSaveModel.execute(quantized_model, "replaced", True, layout)
    path = FOLDER / "replaced.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(path).items()}, path)  # in comfy-kitchen's naming
    SVDQuantSaveModel.execute(quantized_model, "replaced", True)
    assert "svdquant.version" in read_header(str(path)).metadata


def test_a_quantized_model_that_comfyuis_own_node_saved_is_recognized():
    """Such a file, which the patcher now refuses to write, has the layers' tensors without their descriptions."""
    tensors = quantize()[0].model.diffusion_model.state_dict()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, FOLDER / "lost.safetensors")
    for read in (lambda: SVDQuantLoadModel.execute("lost.safetensors", "auto"), lambda: SVDQuantInspect.execute("lost.safetensors")):
        with pytest.raises(CheckpointError, match="lost.safetensors has layers in 4 bits .* save the quantized model with SVDQuant Save"):
            read()


def test_inspect_does_not_show_the_text_of_the_previous_file(monkeypatch):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    report = SVDQuantInspect.execute("tiny_flux.safetensors").result[0]
    (FOLDER / "empty.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        SVDQuantInspect.execute("empty.safetensors")
    assert said[0] == report and said[1].startswith("empty.safetensors ") and len(said) == 2
    first, second = (SVDQuantInspect.fingerprint_inputs("tiny_flux.safetensors") for _ in range(2))
    assert first != second, "ComfyUI would use its cache and show the other file's text on the node"
