"""Nodes that write files run again if their file is missing or was replaced, and only then."""

import os
import time
from pathlib import Path

import folder_paths
import pytest
from comfyui_svdquant.nodes.download_model import OWN_CHOICE, SVDQuantDownloadModel
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.download import hub
from comfyui_svdquant.quant.host import filename_tokens, loader, saving, written

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
    monkeypatch.setattr(written, "_names", {})
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


def test_numbered_takes_the_next_free_name_and_no_other(folder, quantized_models, saves):
    cache = Cache(SVDQuantSaveModel)
    first, second = ({"model": model, "filename": "x", "overwrite": False, "numbered": True} for model in quantized_models)
    (folder.parent / "unet" / "x_00001_.safetensors").write_bytes(b"other")
    cache.queue(**first)
    cache.queue(**second)
    assert list(cache.results.values()) == ["x.safetensors", "x_00002_.safetensors"], "ComfyUI would open the other folder's first"
    cache.queue(**first)  # may run, but writes nothing
    assert not cache.queue(**first) and len(saves) == 2
    assert SVDQuantSaveModel.execute(**second).result[0] == "x_00002_.safetensors"
    (folder / "x.safetensors").unlink()
    assert cache.queue(**first) and (folder / "x.safetensors").is_file() and len(saves) == 3
    assert SVDQuantSaveModel.check_lazy_status("x", False, numbered=True) == ["model"]
    with pytest.raises(CheckpointError, match="exists already"):
        SVDQuantSaveModel.check_lazy_status("x", False)
    assert SVDQuantSaveModel.execute(first["model"], "sub/y.sft", False, numbered=True).result[0] == os.path.join("sub", "y.sft")
    assert SVDQuantSaveModel.execute(second["model"], "sub/y.sft", False, numbered=True).result[0] == os.path.join("sub", "y_00001_.sft")


def test_overwrite_counts_more_than_numbered(quantized_models, saves):
    for model in quantized_models:
        assert SVDQuantSaveModel.execute(model, "x", True, numbered=True).result[0] == "x.safetensors"
    assert len(saves) == 2


def test_a_filename_with_the_time_is_saved_once(folder, quantized_models, saves, monkeypatch):
    """ComfyUI compares the inputs, in which the token is the same a second later."""
    cache = Cache(SVDQuantSaveModel)
    inputs = {"model": quantized_models[0], "filename": "%year%/x_%hour%%minute%%second%", "overwrite": False}
    now = time.localtime()
    monkeypatch.setattr(filename_tokens.time, "localtime", lambda: now)
    assert cache.queue(**inputs)
    name = os.path.join(f"{now.tm_year}", f"x_{now.tm_hour:02}{now.tm_min:02}{now.tm_sec:02}.safetensors")
    assert list(cache.results.values()) == [name] and (folder / name).is_file()
    monkeypatch.setattr(filename_tokens.time, "localtime", lambda: time.struct_time((now.tm_year + 1, *now[1:])))
    assert not cache.queue(**inputs) and SVDQuantSaveModel.execute(**inputs).result[0] == name and len(saves) == 1
    (folder / name).unlink()
    assert cache.queue(**inputs) and (folder / f"{now.tm_year + 1}").is_dir()


@pytest.mark.parametrize(("filename", "resolved"), [
    ("%date:yyyy-MM-dd%/x", "2026-03-07/x"), ("%date:yy M d h:m:s%", "26 3 7 5:9:2"), ("x%date:hhmmss%", "x050902"),
    ("%year%%month%%day%-%hour%%minute%%second%", "20260307-050902"), ("%KSampler.seed%", "%KSampler.seed%"), ("50%", "50%"), ("", ""),
])
def test_the_tokens_of_a_filename(filename, resolved):
    assert filename_tokens.resolve(filename, time.struct_time((2026, 3, 7, 5, 9, 2, 0, 0, 0))) == resolved


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
