"""Everything that is known when Run is clicked is checked then, by ComfyUI's own validate_prompt; the rest before the work begins."""

import asyncio
import inspect
import shutil
from pathlib import Path

import comfy.model_management
import execution
import folder_paths
import nodes
import pytest
import torch
from comfy_api.internal import lock_class
from comfy_api.latest import io
from comfyui_svdquant import comfy_entrypoint
from comfyui_svdquant.nodes.checked import check_types
from comfyui_svdquant.nodes.download_model import OWN_CHOICE, PRESETS
from comfyui_svdquant.nodes.load_model import SVDQuantLoadModel
from comfyui_svdquant.nodes.progress import NodeProgress
from comfyui_svdquant.nodes.quantize_model import SVDQuantQuantizeModel
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError
from comfyui_svdquant.quant.families import TITLES
from comfyui_svdquant.quant.host import loader, written
from safetensors.torch import save_file
from server import PromptServer

from host.server import ROOT, TINY

from ..quant.packed_flux import packed_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
LORA = {f"double_blocks.{i}.img_attn.qkv.lora_{part}.weight": torch.zeros(2, 2) for i in range(2) for part in ("A", "B")}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The pack's nodes in ComfyUI's list of nodes, without a server."""
    monkeypatch.setattr(PromptServer, "instance", None, raising=False)
    monkeypatch.setattr(NodeProgress, "refused", set())
    for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list()):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    for name, kind in (("Prompts", "CONDITIONING"), ("Text", io.AnyType.io_type)):  # they stand for nodes that have not run yet
        source = type(name, (), {"RETURN_TYPES": (kind,), "FUNCTION": "run", "INPUT_TYPES": classmethod(lambda cls: {"required": {}})})
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, source)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """ComfyUI's model folder, with a 16-bit model, a 4-bit model, a LoRA and a file of no model."""
    own = [str(tmp_path / name) for name in ("unet", "diffusion_models")]
    for path in own:
        Path(path).mkdir()
    _, extensions = folder_paths.folder_names_and_paths["diffusion_models"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (own, extensions))
    monkeypatch.setattr(written, "_files", {})
    monkeypatch.setattr(written, "_names", {})
    shutil.copy2(ROOT / "demo" / "tiny_flux" / TINY["diffusion_models"], own[1])
    native.save(f"{own[1]}/packed.safetensors", *packed_flux(), {"preset": "data-free"}, "flux")
    save_file(LORA, f"{own[1]}/style.safetensors")
    Path(own[1], "cut.safetensors").write_bytes(Path(own[1], "packed.safetensors").read_bytes()[:5000])
    Path(own[0], "hidden.safetensors").write_bytes(b"other")
    return Path(own[1])


def prompt(**changes):
    """A whole workflow. changes: {node id: {input: value}}; a value of None removes the input."""
    graph = {
        "load": ("SVDQuantLoadModel", {"model_name": "tiny_flux.safetensors", "compute_dtype": "auto", "activations": "auto"}),
        "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "prompts": ("Prompts", {}),
        "quantize": ("SVDQuantQuantizeModel", {"model": ["load", 0], "preset": "best", "rank": 32, "positive": ["prompts", 0],
                                               "latent": ["latent", 0], "steps": 8, "seed": 0, "exceptions": "", "tokens": 4,
                                               "progress": "temp"}),
        "save": ("SVDQuantSaveModel", {"model": ["quantize", 0], "filename": "new", "overwrite": False, "layout": "native"}),
        "again": ("SVDQuantLoadModel", {"model_name": ["save", 0], "compute_dtype": "auto", "activations": "auto"}),
        "inspect": ("SVDQuantInspect", {"model_name": ["save", 0]}),
        "download": ("SVDQuantDownloadModel", {"model": next(iter(PRESETS)), "repository": "", "file": "", "revision": "main",
                                               "filename": ""}),
    }
    found = {}
    for number, (kind, inputs) in graph.items():
        inputs = {name: value for name, value in (inputs | changes.get(number, {})).items() if value is not None}
        found[number] = {"class_type": kind, "inputs": inputs}
    return found


def refused(graph):
    """{(node id, input name): the error's text} of ComfyUI's check of a workflow, as the page gets it. ComfyUI runs the output nodes that
    do not depend on a refused node."""
    valid, error, _, errors = asyncio.run(execution.validate_prompt("id", graph, None))
    found = {(number, entry["extra_info"].get("input_name")): entry["details"]
             for number, node in errors.items() for entry in node["errors"]}
    assert valid or found, error
    return found


def test_a_sound_workflow_passes():
    assert refused(prompt()) == {}
    assert refused(prompt(quantize={"preset": "data-free", "positive": None, "latent": None})) == {}
    assert refused(prompt(save={"filename": "packed", "overwrite": True})) == {}
    assert refused(prompt(save={"filename": "packed", "numbered": True})) == {}
    assert refused(prompt(save={"filename": "%date:yyyy-MM-dd%/new"})) == {}
    assert refused(prompt(load={"model_name": "packed.safetensors"})) == {}
    assert refused(prompt(download={"model": "FLUX.1-dev, Nunchaku INT4 rank 32 (6.77 GB)"})) == {}, "of an earlier version"
    assert refused(prompt(download={"model": OWN_CHOICE, "repository": "https://huggingface.co/a/b/blob/main/c.sft"})) == {}


@pytest.mark.parametrize(("changes", "place", "says"), [
    ({"save": {"filename": "packed"}}, ("save", "filename"), "packed.safetensors exists already; choose another filename, or switch"),
    ({"save": {"filename": "../x"}}, ("save", "filename"), "The filename '../x' has .. as a folder"),
    ({"save": {"filename": "hidden"}}, ("save", "filename"), "There is a hidden.safetensors in"),
    ({"save": {"filename": "tiny_flux", "overwrite": True}}, ("save", "overwrite"), "exists already and is no quantized model"),
    ({"quantize": {"positive": None}}, ("quantize", "preset"),
     "The preset best calibrates on images that the model samples: connect positive, or choose"),
    ({"quantize": {"latent": None, "preset": "fast"}}, ("quantize", "preset"), "connect latent, or choose the preset data-free"),
    ({"quantize": {"latent": None, "positive": None, "preset": "slow"}}, ("quantize", "preset"), "connect positive and latent"),
    ({"quantize": {"exceptions": "a\n*.linear2 = much"}}, ("quantize", "exceptions"), "The exception '*.linear2 = much' can't be read"),
    ({"quantize": {"exceptions": "*.linear2 = 7"}}, ("quantize", "exceptions"), "Rank 7 is not possible"),
    ({"quantize": {"preset": "finest"}}, ("quantize", "preset"), "The input preset is 'finest', which this version of SVDQuant does not"),
    ({"load": {"model_name": "gone.safetensors"}}, ("load", "model_name"), "There is no gone.safetensors in models/diffusion_models; "),
    ({"load": {"model_name": "style.safetensors"}}, ("load", "model_name"),
     f"style.safetensors is a LoRA; move it to models/loras, and choose a {TITLES} model"),
    ({"inspect": {"model_name": "cut.safetensors"}}, ("inspect", "model_name"), "cut.safetensors"),
    ({"download": {"model": OWN_CHOICE}}, ("download", "repository"), "needs both a repository, as owner/name, and a file"),
    ({"download": {"model": OWN_CHOICE, "repository": "a/b", "file": "x.ckpt"}}, ("download", "file"), "can hold code"),
    ({"download": {"filename": "a:b"}}, ("download", "filename"), "has a : in it"),
    ({"download": {"model": "FLUX.9"}}, ("download", "model"), "The input model is 'FLUX.9', which this version of SVDQuant does"),
])
def test_what_is_wrong_is_said_when_run_is_clicked(changes, place, says):
    found = refused(prompt(**changes))
    assert found[place].startswith(f"{place[1]} - ") and says in found[place] and "\n" not in found[place]
    assert {number for number, _ in found} == {place[0]}


def test_the_sentence_stands_on_the_node_until_its_inputs_are_sound(monkeypatch):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append((self.node_id, text)))
    found = refused(prompt(save={"filename": "packed"}))
    assert [number for number, _ in said] == ["save"] and found["save", "filename"] == f"filename - {said[0][1]}"
    refused(prompt(save={"filename": "packed"}, load={"model_name": "style.safetensors"}))
    assert [number for number, _ in said[1:]] == ["load", "save"]
    refused(prompt(save={"filename": "packed"}))
    refused(prompt())
    refused(prompt())
    assert said[3:] == [("load", " "), said[0], ("save", " ")]


def test_a_linked_input_is_not_checked_before_its_node_has_run():
    string = {"class_type": "Text", "inputs": {}}
    links = {"save": {"filename": ["string", 0]}, "download": {"repository": ["string", 0], "model": OWN_CHOICE, "filename": "../x"},
             "quantize": {"exceptions": ["string", 0]}}
    assert refused(prompt(**links) | {"string": string}) == {}
    assert "can't be read" in refused(prompt(quantize={"preset": ["string", 0], "exceptions": "a = b"}) | {"string": string})[
        "quantize", "exceptions"]


def test_a_file_that_the_same_workflow_has_saved_is_no_error(folder):
    """Queued again, an unchanged workflow takes Save's result from ComfyUI's cache."""
    model = loader.load_model(str(folder / "packed.safetensors"))
    name = SVDQuantSaveModel.execute(model, "new", False).result[0]
    assert refused(prompt()) == {}
    (folder / name).write_bytes((folder / "packed.safetensors").read_bytes())
    assert "exists already" in refused(prompt())["save", "filename"]


@pytest.mark.parametrize(("inputs", "says"), [
    ({"filename": "new"}, "new.safetensors exists already"), ({"filename": "../x"}, "The filename '../x'"),
    ({"filename": "other", "layout": "theirs"}, "The input layout is 'theirs', which this version of SVDQuant does not offer; choose nat"),
])
def test_save_fails_before_its_model_is_made(folder, monkeypatch, inputs, says):
    """The file that an earlier run has saved, a linked filename, and a layout that ComfyUI 0.3.75 lets through."""
    SVDQuantSaveModel.execute(loader.load_model(str(folder / "packed.safetensors")), "new", False)
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    with pytest.raises(ValueError, match=says.split("'")[0]) as caught:
        SVDQuantSaveModel.check_lazy_status(overwrite=False, **inputs)
    assert says in str(caught.value) and said == [str(caught.value)]
    assert SVDQuantSaveModel.check_lazy_status(filename="new", overwrite=True) == ["model"]
    assert nodes_input(SVDQuantSaveModel, "model")["lazy"], "or ComfyUI makes the model first"


def nodes_input(node, name):
    """The options of an input, as the page and ComfyUI's execution get them."""
    return next(group[name] for group in node.INPUT_TYPES().values() if name in group)[1]


@pytest.mark.parametrize("inputs", [{"compute_dtype": "fp64"}, {"activations": "int2"}])
def test_a_choice_of_another_version_is_named_before_anything_is_loaded(monkeypatch, inputs):
    monkeypatch.setattr(loader, "load_described", lambda *_: pytest.fail("it was loaded"))
    (name, value), = inputs.items()
    with pytest.raises(ValueError, match=f"The input {name} is '{value}', which this version of SVDQuant does not offer; choose auto, "):
        SVDQuantLoadModel.execute(**{"model_name": "packed.safetensors", "compute_dtype": "auto"} | inputs)


def test_the_sentence_of_an_error_is_shown_on_the_node(folder, monkeypatch):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    with pytest.raises(CheckpointError) as caught:
        SVDQuantLoadModel.execute("style.safetensors", "auto")
    assert said == [str(caught.value)] and said[0].startswith("style.safetensors is a LoRA; move it to models/loras")
    with pytest.raises(ValueError, match="can't be read"):
        SVDQuantQuantizeModel.execute(loader.load_model(str(folder / "packed.safetensors")), "best", 32, 8, 0, exceptions="* = x")
    assert said[1].startswith("The exception '* = x' can't be read")
    with pytest.raises(RuntimeError), NodeProgress(None):
        raise RuntimeError("CUDA error: first line\nsecond line")
    with pytest.raises(KeyError), NodeProgress(None):
        raise KeyError()
    with pytest.raises(comfy.model_management.InterruptProcessingException), NodeProgress(None):
        raise comfy.model_management.InterruptProcessingException()
    assert said[2:] == ["CUDA error: first line", "KeyError"]


def test_the_order_of_inputs_and_what_newer_versions_know():
    ids = [entry.id for entry in SVDQuantQuantizeModel.GET_SCHEMA().inputs]
    assert ids == ["model", "preset", "rank", "positive", "latent", "steps", "seed", "exceptions", "tokens", "progress",
                   "branch_bits"]
    knows_advanced = "advanced" in inspect.signature(io.Int.Input).parameters
    for name in ids:
        assert bool(nodes_input(SVDQuantQuantizeModel, name).get("advanced")) == (
            knows_advanced and name in ("exceptions", "tokens", "progress", "branch_bits")), name
    for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list()):
        schema = node.GET_SCHEMA()
        assert schema.category == "SVDQuant"
        assert {"nunchaku", "4-bit", "low vram"} <= set(getattr(schema, "search_aliases", ["nunchaku", "4-bit", "low vram"]))


@pytest.mark.parametrize("node", [SVDQuantSaveModel, SVDQuantLoadModel, SVDQuantQuantizeModel])
def test_types_are_checked_on_the_copy_of_the_class_that_comfyui_runs(node):
    """The copy takes no attributes, so that a node can't keep anything between runs."""
    name, value = {SVDQuantSaveModel: ("overwrite", True)}.get(node, (node.define_schema().inputs[-1].id, "auto"))
    copy = lock_class(node.PREPARE_CLASS_CLONE({}))
    check_types(copy, **{name: value})
    with pytest.raises(ValueError, match=f"The input {name} is "):
        check_types(copy, **{name: []})
