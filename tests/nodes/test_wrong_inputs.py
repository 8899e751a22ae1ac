"""Values that no page gives, as workflows of other versions, the API and other nodes do: one sentence that names the input."""

import os
import shutil

import folder_paths
import pytest
import torch
from comfy_api.internal import lock_class
from comfyui_svdquant.nodes import load_model
from comfyui_svdquant.nodes.checked import choose
from comfyui_svdquant.nodes.compare import SVDQuantCompare
from comfyui_svdquant.nodes.compare_models import SVDQuantCompareModels
from comfyui_svdquant.nodes.download_model import OWN_CHOICE, SVDQuantDownloadModel
from comfyui_svdquant.nodes.inspect_model import SVDQuantInspect
from comfyui_svdquant.nodes.load_model import SVDQuantLoadModel
from comfyui_svdquant.nodes.progress import NodeProgress
from comfyui_svdquant.nodes.quantize_model import SVDQuantQuantizeModel
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.quant.host import written
from comfyui_svdquant.quant.host.loader import load_model as load_file
from hypothesis import given, settings
from hypothesis import strategies as st
from server import PromptServer

from host.server import ROOT, TINY

pytestmark = pytest.mark.usefixtures("inference_mode")
NAME = "wrong_inputs.safetensors"
SURROGATE = "flux\udfff.safetensors"
IMAGE = torch.zeros(1, 32, 32, 3)
LONG = 300_000


@pytest.fixture(scope="module")
def model():
    folder = folder_paths.get_folder_paths("diffusion_models")[-1]
    path = shutil.copy2(ROOT / "demo" / "tiny_flux" / TINY["diffusion_models"], f"{folder}/{NAME}")
    with torch.inference_mode():
        yield load_file(path)
    os.remove(path)


class Server:
    """Encodes a node's text as ComfyUI's server does."""

    def __init__(self):
        self.texts = []

    def send_progress_text(self, text, node_id):
        self.texts.append(text.encode("utf-8").decode())


@pytest.fixture(autouse=True)
def server(monkeypatch):
    found = Server()
    monkeypatch.setattr(PromptServer, "instance", found, raising=False)
    monkeypatch.setattr(NodeProgress, "of", classmethod(lambda cls, node: cls("7")))
    return found


def said(run, *args, **kwargs):
    """The sentence in which a node refuses its inputs."""
    with pytest.raises(ValueError) as caught:
        run(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) <= 1000, message
    message.encode("utf-8")
    return message


def quantize(given, **inputs):
    return SVDQuantQuantizeModel.execute(**({"model": given, "preset": "data-free", "rank": 16, "steps": 1, "seed": 0} | inputs))


NO_NAMES = [SURROGATE, "a\0b", "x" * LONG, 3, 1.5, True, {"a": 1}, ["x"], "", "..", "../" * 50 + "etc/passwd", None]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: repr(name)[:30])
@pytest.mark.parametrize("node", [SVDQuantLoadModel, SVDQuantInspect])
def test_a_model_name_that_is_none(server, node, name):
    inputs = {"compute_dtype": "auto"} if node is SVDQuantLoadModel else {}
    assert said(node.execute, model_name=name, **inputs).startswith("There is no ")
    assert len(server.texts) == 1 and server.texts[0].startswith("There is no ")
    if name is not None:  # the input comes from another node
        refused = node.validate_inputs(model_name=name)
        assert refused.startswith("There is no ") and refused.encode("utf-8") and len(refused) < 1000
    node.fingerprint_inputs(model_name=name, **inputs)


@pytest.mark.parametrize("value", ["abc", "x" * LONG, SURROGATE, 3, None, ["auto"], {"a": "auto"}, True],
                         ids=lambda value: repr(value)[:20])
def test_a_choice_that_no_version_offers(model, monkeypatch, value):
    monkeypatch.setattr(load_model.loader, "load_described", lambda *_: pytest.fail("it was loaded"))
    assert "The input x is " in said(choose, "x", value, {"a": 1, "auto": 2})
    assert "compute_dtype" in said(SVDQuantLoadModel.execute, NAME, value)
    assert "activations" in said(SVDQuantLoadModel.execute, NAME, "auto", value)
    assert "model" in said(SVDQuantDownloadModel.execute, value, "a/b", "c.sft", "main", "")
    assert isinstance(SVDQuantDownloadModel.validate_inputs("abc" if value is None else value, "a/b", "c.sft", "main", ""), str)
    assert "preset" in said(quantize, model, preset=value)
    assert "progress" in said(quantize, model, progress=value)
    assert "branch_bits" in said(quantize, model, branch_bits=value)
    assert "layout" in said(SVDQuantSaveModel.execute, model, "wrong_inputs_new", False, value)
    assert "layout" in said(SVDQuantSaveModel.check_lazy_status, "wrong_inputs_new", False, value)


@pytest.mark.parametrize(("name", "value"), [
    ("model", "abc"), ("model", 3), ("model", object()), ("rank", "abc"), ("rank", 1.5), ("rank", True), ("steps", "x"), ("seed", []),
    ("positive", "prompt"), ("positive", [["prompt", {}]]), ("positive", [3]), ("latent", "x"), ("latent", {"samples": "x"}),
    ("latent", {}), ("exceptions", 3), ("exceptions", ["*"]), ("tokens", "many"),
])
def test_an_input_of_another_type_is_named(model, name, value):
    assert said(quantize, model, **{name: value}).startswith(f"The input {name} is ")


def test_a_missing_model_is_named():
    assert said(quantize, None) == "The input model is None, and not of type MODEL; connect a node that loads or changes a MODEL."


@pytest.mark.parametrize("model", ["abc", None, 3])
def test_save_takes_a_quantized_model(model):
    assert "saves quantized models" in said(SVDQuantSaveModel.execute, model, "wrong_inputs_new", False)


@pytest.mark.parametrize(("name", "value"), [
    ("image_1", "x"), ("image_2", torch.zeros(3)), ("image_2", 5), ("factor", "x"), ("label_1", 3), ("seconds_2", "1 s")])
def test_compare_names_its_input(name, value):
    inputs = {"image_1": IMAGE, "image_2": IMAGE, "factor": 8.0} | {name: value}
    assert said(SVDQuantCompare.execute, **inputs).startswith(f"The input {name} is ")


@pytest.mark.parametrize(("name", "value"), [
    ("model_1", "x"), ("model_2", None), ("positive", 3), ("negative", "x"), ("latent_image", {}), ("vae", "x"), ("steps", 1.5),
    ("cfg", "x"), ("sampler_name", "no_sampler"), ("sampler_name", ["euler"]), ("scheduler", "x" * LONG), ("denoise", "x"), ("label_2", 4)])
def test_compare_models_names_its_input(model, name, value):
    """ComfyUI would draw with another scheduler than one that it does not know, and say so in the log only."""
    class Vae:
        def decode(self, samples):
            return pytest.fail("it was drawn")

    inputs = {"model_1": model, "model_2": model, "positive": [[IMAGE, {}]], "latent_image": {"samples": IMAGE}, "vae": Vae(), "seed": 0,
              "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "factor": 8.0} | {name: value}
    assert said(SVDQuantCompareModels.execute, **inputs).startswith(f"The input {name} is ")


@pytest.mark.parametrize(("node", "inputs"), [
    (SVDQuantCompare, (3, IMAGE, 8.0)), (SVDQuantCompareModels, ("x", *[None] * 11)),
    (SVDQuantDownloadModel, (OWN_CHOICE, 3, "x", "main", "")), (SVDQuantQuantizeModel, (3, "naive", 16, 1, 0)),
    (SVDQuantSaveModel, (None, 3, False))])
def test_a_node_runs_on_comfyuis_locked_copy_of_its_class(node, inputs):
    """A copy that refuses to be changed, as in a server's run."""
    assert said(lock_class(node.PREPARE_CLASS_CLONE(None)).execute, *inputs).startswith("The input ")


@pytest.mark.parametrize("name", ["repository", "file", "revision", "filename"])
def test_download_names_its_input(name):
    inputs = {"model": OWN_CHOICE, "repository": "a/b", "file": "c.sft", "revision": "main", "filename": ""}
    assert said(SVDQuantDownloadModel.execute, **inputs | {name: 3}).startswith(f"The input {name} is 3")
    assert said(SVDQuantDownloadModel.execute, **inputs | {name: "/" * LONG + SURROGATE})


@pytest.mark.parametrize("exceptions", ["* = " + "9" * 5000, "* = " + "1" * 10, "*=0x10", "x" * LONG + " = y", "\udfff = 16.0"],
                         ids=lambda text: text[:12])
def test_exceptions_that_can_not_be_read_are_quoted_in_short(model, exceptions):
    assert "can't be read" in said(quantize, model, exceptions=exceptions)
    assert "can't be read" in SVDQuantQuantizeModel.validate_inputs("data-free", exceptions)


def test_a_pattern_without_a_layer_is_quoted_in_short(model):
    assert said(quantize, model, exceptions="x" * LONG).startswith("No layer is called 'xxx")


def test_the_state_of_no_name_is_none():
    assert [written.state(name) for name in NO_NAMES if not isinstance(name, str)] == [None] * 6


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.text("/\\.:~%\0\udfff", max_size=9),
                   st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))


@given(values=st.lists(VALUES, min_size=5, max_size=5))
@settings(deadline=None, max_examples=150)
def test_any_values_are_refused_in_a_sentence(values):
    """Nothing is asked of the network, since no such value names a repository and a file, and no file has such a name."""
    for run, inputs in ((SVDQuantLoadModel.execute, values[:3]), (SVDQuantInspect.execute, values[:1]),
                        (SVDQuantDownloadModel.execute, values), (SVDQuantSaveModel.execute, [None, *values[:3]]),
                        (SVDQuantSaveModel.check_lazy_status, [*values[:2], "unknown"]), (SVDQuantQuantizeModel.execute, values),
                        (SVDQuantCompare.execute, values[:3]), (SVDQuantCompareModels.execute, (values * 3)[:12])):
        said(run, *inputs)
