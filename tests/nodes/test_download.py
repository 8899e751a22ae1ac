"""SVDQuant Download Model with a Hub on this machine: the file is saved to the folder in which the other nodes search."""

from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
from comfyui_svdquant.nodes import download_model
from comfyui_svdquant.nodes.download_model import OWN_CHOICE, PRESETS, SVDQuantDownloadModel
from comfyui_svdquant.quant.download import hub

from ..quant.hub_server import FakeHub, safetensors, use_endpoint

FOLDER = Path(next(path for path in folder_paths.get_folder_paths("diffusion_models") if path.endswith("diffusion_models")))
DATA = safetensors()


@pytest.fixture
def server(monkeypatch):
    repository, file = next(iter(PRESETS.values()))
    with FakeHub({"owner/flux/deep/model.sft": DATA, f"{repository}/{file}": DATA}) as running:
        use_endpoint(monkeypatch, running.url)
        yield running
    for path in FOLDER.rglob("*"):
        if path.is_file():
            path.unlink()


def download(model=OWN_CHOICE, repository="owner/flux", file="deep/model.sft", revision="main", filename=""):
    return SVDQuantDownloadModel.execute(model, repository, file, revision, filename).result[0]


def test_a_repository_and_file_of_the_users_choice(server):
    assert download(repository=" owner/flux ") == "model.sft"
    assert (FOLDER / "model.sft").read_bytes() == DATA
    assert "model.sft" in folder_paths.get_filename_list("diffusion_models")


def test_under_another_name(server):
    assert download(filename="mine/flux") == str(Path("mine", "flux.safetensors"))
    assert (FOLDER / "mine" / "flux.safetensors").read_bytes() == DATA


@pytest.mark.parametrize("inputs", [
    {"repository": "https://huggingface.co/owner/flux"},
    {"repository": "https://huggingface.co/owner/flux/blob/main/deep/model.sft", "file": ""},
    {"repository": "", "file": "https://huggingface.co/owner/flux/resolve/main/deep/model.sft?download=true"},
])
def test_the_address_of_a_page(server, inputs):
    assert download(**inputs) == "model.sft"
    assert (FOLDER / "model.sft").read_bytes() == DATA


def test_a_preset_needs_no_other_input(server):
    preset, (_, file) = next(iter(PRESETS.items()))
    assert download(preset, "", "", "main") == file
    assert (FOLDER / file).read_bytes() == DATA


def test_every_preset_is_a_valid_name_of_a_file():
    for label, (repository, file) in PRESETS.items():
        hub.check_names(repository, file, "main")
        assert label.endswith(" GB)")


@pytest.mark.parametrize(("change", "says"), [
    ({"file": "../../deep/model.sft"}, "is not the path of a file"), ({"file": ""}, "needs both a repository, .* and a file"),
    ({"filename": "../escape"}, "within models/diffusion_models"), ({"file": "deep/model.bin"}, "can hold code"),
    ({"repository": ""}, "needs both a repository, .* and a file"), ({"repository": "flux"}, "as owner/name"),
    ({"repository": "https://huggingface.co/owner/other/blob/main/x.sft"}, "two files"),
])
def test_paths_out_of_the_folder_are_not_requested(server, change, says):
    with pytest.raises(ValueError, match=says):
        download(**change)
    assert server.asked == []


def test_cancel_and_progress_go_through_comfyui(server, monkeypatch):
    texts = []
    monkeypatch.setattr(download_model.NodeProgress, "say", lambda self, text: texts.append(text))
    download()
    assert texts[0].startswith("model.sft: 0.2 MB from owner/flux") and any("checking the SHA-256" in text for text in texts)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        download(filename="other")
    comfy.model_management.interrupt_current_processing(False)
