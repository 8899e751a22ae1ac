"""Nodes that write files run again if their file is missing or was replaced, and only then."""

import os
from pathlib import Path

import folder_paths
import pytest
from comfyui_svdquant.nodes.download_model import OWN_CHOICE, SVDQuantDownloadModel
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.download import hub
from comfyui_svdquant.quant.host import loader, saving, written

from ..quant.hub_server import FakeHub, safetensors, use_endpoint
from ..quant.packed_flux import packed_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
DATA = safetensors()


class Cache:
    """ComfyUI's cache: it runs a node unless its inputs and its fingerprint equal those of any earlier run."""

    def __init__(self, node, linked=()):
        self.node, self.linked, self.results = node, ("model" if node is SVDQuantSaveModel else None, *linked), {}

    def queue(self, **inputs):
        """Whether the node ran."""
        visible = {name: None if name in self.linked else value for name, value in inputs.items()}
        key = str(inputs), self.node.fingerprint_inputs(**visible)
        ran = key not in self.results
        if ran:
            self.results[key] = self.node.execute(**inputs).result[0]
        return ran


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """ComfyUI's model folder, empty."""
    own = [str(tmp_path / name) for name in ("unet", "diffusion_models")]
    for path in own:
        os.mkdir(path)
    _, extensions = folder_paths.folder_names_and_paths["diffusion_models"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (own, extensions))
    monkeypatch.setattr(written, "_files", {})
    return Path(own[1])


@pytest.fixture(scope="module")
def quantized_models(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("quantized_models") / "quantized_model.safetensors")
    native.save(path, *packed_flux(), {"preset": "data-free"}, "flux")
    return [loader.load_model(path) for _ in range(2)]


@pytest.fixture
def saves(monkeypatch):
    """The paths to which models are written."""
    paths, save = [], native.save
    monkeypatch.setattr(native, "save", lambda path, *args: paths.append(path) or save(path, *args))
    return paths


@pytest.mark.parametrize("linked", [(), ("filename",)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_save_runs_again_if_its_file_is_missing(folder, quantized_models, saves, linked, overwrite):
    cache, inputs = Cache(SVDQuantSaveModel, linked), {"model": quantized_models[0], "filename": "sub/x", "overwrite": overwrite}
    path = folder / "sub" / "x.safetensors"
    for times in (1, 2):
        assert cache.queue(**inputs) and path.is_file()
        assert not cache.queue(**inputs) and len(saves) == times, "its own file is no reason to run again"
        path.unlink()
    assert cache.queue(**inputs)


def test_save_runs_again_if_its_file_was_replaced(folder, quantized_models, saves):
    cache, inputs = Cache(SVDQuantSaveModel), {"model": quantized_models[0], "filename": "x", "overwrite": True}
    cache.queue(**inputs)
    native.save(str(folder / "x.safetensors"), *packed_flux(), {"preset": "other"}, "flux", True)
    assert cache.queue(**inputs) and "other" not in read_header(str(folder / "x.safetensors")).metadata["svdquant.recipe"]
    inputs["overwrite"] = False
    assert cache.queue(**inputs) and len(saves) == 3, "the inputs have changed, although the file is this model's"
    native.save(str(folder / "x.safetensors"), *packed_flux(), {"preset": "other"}, "flux", True)
    with pytest.raises(CheckpointError, match="exists already"):
        cache.queue(**inputs)


def test_two_workflows_that_save_under_one_name(folder, quantized_models, saves):
    """If the first workflow is queued again, it does not use the second workflow's file as its own."""
    cache = Cache(SVDQuantSaveModel)
    first, second = ({"model": quantized_model, "filename": "x", "overwrite": True} for quantized_model in quantized_models)
    for inputs, times in ((first, 1), (second, 2), (first, 3)):
        cache.queue(**inputs)
        cache.queue(**inputs)  # may run after another workflow, but writes nothing
        assert not cache.queue(**inputs) and len(saves) == times


def test_another_layout_is_another_file(quantized_models, saves):
    cache, inputs = Cache(SVDQuantSaveModel), {"model": quantized_models[0], "filename": "x", "overwrite": True}
    cache.queue(**inputs, layout="native")
    assert cache.queue(**inputs, layout="nunchaku") and len(saves) == 1


def test_a_file_of_the_same_name_in_an_earlier_folder_is_reported(folder, quantized_models):
    cache, inputs = Cache(SVDQuantSaveModel), {"model": quantized_models[0], "filename": "x", "overwrite": False}
    cache.queue(**inputs)
    os.link(folder / "x.safetensors", folder.parent / "x.safetensors")
    os.replace(folder.parent / "x.safetensors", folder.parent / "unet" / "x.safetensors")
    assert saving.model_folder.found_elsewhere(str(folder / "x.safetensors"), "x.safetensors") is None, "one file of two names"
    (folder.parent / "unet" / "x.safetensors").unlink()
    (folder.parent / "unet" / "x.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="There is a x.safetensors in"):
        cache.queue(**inputs)


@pytest.fixture
def remote(monkeypatch):
    with FakeHub({"owner/flux/x.safetensors": DATA}) as running:
        use_endpoint(monkeypatch, running.url)
        yield running


DOWNLOAD = {"model": OWN_CHOICE, "repository": "owner/flux", "file": "x.safetensors", "revision": "main", "filename": ""}


@pytest.mark.parametrize("linked", [(), ("filename",), ("repository", "file")])
def test_download_runs_again_if_its_file_is_missing_or_replaced(folder, remote, linked):
    cache, path = Cache(SVDQuantDownloadModel, linked), folder / "x.safetensors"
    for times in (1, 2):
        assert cache.queue(**DOWNLOAD) and path.read_bytes() == DATA
        assert not cache.queue(**DOWNLOAD) and len(remote.gets) == times
        path.unlink()
    cache.queue(**DOWNLOAD)
    path.write_bytes(b"other")
    with pytest.raises(hub.HubError, match="differs from"):
        cache.queue(**DOWNLOAD)


def test_download_runs_again_if_the_copy_that_it_used_is_missing(folder, remote):
    cache, copy = Cache(SVDQuantDownloadModel), folder.parent / "unet" / "x.safetensors"
    copy.write_bytes(DATA)
    assert cache.queue(**DOWNLOAD) and not cache.queue(**DOWNLOAD) and remote.gets == []
    copy.unlink()
    assert cache.queue(**DOWNLOAD) and (folder / "x.safetensors").read_bytes() == DATA


@pytest.mark.parametrize("name", ["", "../x", "a\0b", "\ud800", "con", 300 * "x", None])
def test_no_name_makes_a_fingerprint_fail(name):
    assert SVDQuantSaveModel.fingerprint_inputs(None, name) == 0
    for inputs in (DOWNLOAD | {"filename": name}, DOWNLOAD | {"file": name}, DOWNLOAD | {"repository": name}):
        assert SVDQuantDownloadModel.fingerprint_inputs(**inputs) in (0, None)
