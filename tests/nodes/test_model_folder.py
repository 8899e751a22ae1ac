"""Under the name that a node returns, ComfyUI finds the file that the node has written."""

import os
import re
from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_svdquant.nodes.download_model import OWN_CHOICE, SVDQuantDownloadModel
from comfyui_svdquant.nodes.inspect_model import SVDQuantInspect
from comfyui_svdquant.nodes.load_model import SVDQuantLoadModel
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.download.hub import HubError
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.host.model_folder import target_folder, target_path
from utils.extra_config import load_extra_path_config

from ..quant.comfy_models import write_flux
from ..quant.hub_server import FakeHub, safetensors, use_endpoint
from ..quant.packed_flux import packed_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
DATA = safetensors()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A function that makes ComfyUI search its own two folders, below a temporary folder, and those of a yaml file with these lines."""
    own = [str(tmp_path / "models" / name) for name in ("unet", "diffusion_models")]
    for folder in own:
        os.makedirs(folder)
    _, extensions = folder_paths.folder_names_and_paths["diffusion_models"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (own, extensions))

    def configure(*lines):
        text = "".join(f"    {line}\n" for line in (f"base_path: {tmp_path / 'extra'}", *lines))
        (tmp_path / "extra_model_paths.yaml").write_text(f"extra:\n{text}")
        load_extra_path_config(str(tmp_path / "extra_model_paths.yaml"))
        for folder in folder_paths.get_folder_paths("diffusion_models"):
            os.makedirs(folder, exist_ok=True)
        return tmp_path

    return configure


@pytest.mark.parametrize(("lines", "folder"), [
    ((), "models/diffusion_models"),
    (("unet: models/unet/",), "models/diffusion_models"), (("diffusion_models: flux/",), "models/diffusion_models"),
    (("is_default: true", "unet: models/unet/"), "extra/models/unet"),
    (("is_default: true", "diffusion_models: flux/"), "extra/flux"),
    (("is_default: true", "unet: models/unet/", "diffusion_models: models/diffusion_models/"), "extra/models/diffusion_models"),
    (("is_default: true", "diffusion_models: models/diffusion_models/", "unet: models/unet/"), "extra/models/diffusion_models"),
])
def test_new_models_go_into_the_first_folder(folders, lines, folder):
    base = folders(*lines)
    assert target_folder() == str(base / folder)
    assert target_path("sub/x") == (str(base / folder / "sub" / "x.safetensors"), os.path.join("sub", "x.safetensors"))


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("quantized_model") / "quantized_model.safetensors")
    native.save(path, *packed_flux(), {"preset": "data-free"}, "flux")
    return loader.load_model(path)


@pytest.mark.parametrize(("lines", "other"), [
    ((), "models/unet"), (("is_default: true", "diffusion_models: flux/"), "models/unet"),
    (("is_default: true", "diffusion_models: flux/"), "models/diffusion_models"), (("diffusion_models: flux/",), "extra/flux"),
])
@pytest.mark.parametrize("overwrite", [False, True])
def test_save_refuses_the_name_of_a_file_in_another_folder(folders, quantized_model, lines, other, overwrite):
    base = folders(*lines)
    write_flux(base / other / "x.safetensors", depth_single=1)
    with pytest.raises(ValueError, match=f"There is a x.safetensors in {re.escape(str(base / other))} already, and ComfyUI opens only one"):
        SVDQuantSaveModel.execute(quantized_model, "x", overwrite)
    assert len(list(base.rglob("x.safetensors*"))) == 1


@pytest.mark.parametrize("lines", [(), ("is_default: true", "unet: models/unet/"), ("is_default: true", "diffusion_models: flux/")])
def test_load_and_inspect_open_a_saved_file(folders, quantized_model, lines):
    base = folders(*lines)
    (base / "models" / "unet" / "y.safetensors").mkdir()  # a folder is not found
    for name in ("x", "deep/x", "y"):
        name = SVDQuantSaveModel.execute(quantized_model, name, False).result[0]
        assert folder_paths.get_full_path("diffusion_models", name) == os.path.join(target_folder(), name)
        loaded = SVDQuantLoadModel.execute(name, "auto").result[0]
        assert all(torch.equal(tensor, loaded.model.state_dict()[key]) for key, tensor in quantized_model.model.state_dict().items())
        assert "SVDQuant layout" in SVDQuantInspect.execute(name).result[0]
    SVDQuantSaveModel.execute(quantized_model, "x", True)


@pytest.mark.skipif(os.name == "nt", reason="links need a permission there")
def test_two_names_for_one_folder_are_one(folders, quantized_model):
    base = folders()
    (base / "models" / "unet").rmdir()
    (base / "models" / "unet").symlink_to(base / "models" / "diffusion_models")
    for overwrite in (False, True):
        assert SVDQuantSaveModel.execute(quantized_model, "x", overwrite).result[0] == "x.safetensors"


@pytest.fixture
def hub(monkeypatch):
    with FakeHub({"owner/flux/x.safetensors": DATA}) as running:
        use_endpoint(monkeypatch, running.url)
        yield running


def download():
    return SVDQuantDownloadModel.execute(OWN_CHOICE, "owner/flux", "x.safetensors", "main", "").result[0]


@pytest.mark.parametrize(("lines", "other"), [((), "models/unet"), (("diffusion_models: flux/",), "extra/flux")])
def test_download_uses_a_copy_in_another_folder(folders, hub, lines, other):
    base = folders(*lines)
    copy = Path(base, other, "x.safetensors")
    copy.write_bytes(DATA)
    assert download() == "x.safetensors" and hub.gets == []
    assert [path for path in base.rglob("x.safetensors*")] == [copy]


def test_download_refuses_another_file_of_that_name_in_another_folder(folders, hub):
    base = folders()
    (base / "models" / "unet" / "x.safetensors").write_bytes(safetensors(seed=1))
    with pytest.raises(HubError, match=f"already exists in {re.escape(str(base / 'models' / 'unet'))} and differs from .*; choose another"):
        download()
    assert hub.gets == [] and os.listdir(base / "models" / "diffusion_models") == []


def test_download_goes_into_the_first_folder(folders, hub):
    base = folders("is_default: true", "diffusion_models: flux/")
    assert download() == "x.safetensors" and (base / "extra" / "flux" / "x.safetensors").read_bytes() == DATA
