"""SVDQuant Load Model lists the whole checkpoints that hold a FLUX.1 or Chroma, and takes the diffusion model out of them."""

import os
import time
from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_svdquant.nodes.inspect_model import SVDQuantInspect
from comfyui_svdquant.nodes.load_model import SVDQuantLoadModel
from comfyui_svdquant.quant.checkpoint.header import CheckpointError
from comfyui_svdquant.quant.host import checkpoints
from safetensors.torch import save_file

from ..quant.random_chroma import chroma_tensors
from ..quant.random_flux import flux_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")
INSIDE = "model.diffusion_model."
BESIDE = {"text_encoders.clip_l.logit_scale": torch.ones(1), "vae.decoder.conv_in.weight": torch.zeros(2, 2, 1, 1)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """ComfyUI's folder of checkpoints, empty."""
    _, extensions = folder_paths.folder_names_and_paths["checkpoints"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(checkpoints, "_found", {})
    return tmp_path


def write_checkpoint(path, tensors):
    save_file({INSIDE + name: tensor for name, tensor in tensors.items()} | BESIDE, path)


def listed(node=SVDQuantLoadModel):
    folder_paths.filename_list_cache.clear()
    return [name for name in node.GET_SCHEMA().inputs[0].options if name.startswith("checkpoints/")]


def test_only_checkpoints_with_a_model_of_a_family_are_listed(folder):
    (folder / "sub").mkdir()
    write_checkpoint(folder / "sub" / "flux.safetensors", flux_tensors())
    write_checkpoint(folder / "chroma.safetensors", chroma_tensors())
    write_checkpoint(folder / "ovis.safetensors", flux_tensors() | {"double_blocks.0.img_mlp.gate_proj.weight": torch.zeros(1)})
    save_file({f"{INSIDE}input_blocks.0.0.weight": torch.zeros(1)}, folder / "sdxl.safetensors")
    (folder / "old.ckpt").write_bytes(b"PK\x03\x04")
    (folder / "text.safetensors").write_text("no model")
    (folder / "empty.safetensors").write_bytes(b"")
    for node in (SVDQuantLoadModel, SVDQuantInspect):
        assert sorted(listed(node)) == ["checkpoints/chroma.safetensors", f"checkpoints/{os.path.join('sub', 'flux.safetensors')}"]


def test_a_file_that_changes_is_read_again(folder):
    file = folder / "flux.safetensors"
    file.write_bytes(b"not complete")
    assert listed() == []
    write_checkpoint(file, flux_tensors())
    assert listed() == ["checkpoints/flux.safetensors"]
    file.unlink()
    assert listed() == []


def test_load_and_inspect_take_the_diffusion_model_out(folder):
    tensors = flux_tensors()
    write_checkpoint(folder / "flux.safetensors", tensors)
    name = "checkpoints/flux.safetensors"
    loaded = SVDQuantLoadModel.execute(name, "auto").result[0].model.diffusion_model.state_dict()
    assert torch.equal(loaded["img_in.weight"].float(), tensors["img_in.weight"].float())
    assert SVDQuantInspect.execute(name).result[0].splitlines()[0].endswith("opens with SVDQuant Load Model")
    assert SVDQuantLoadModel.validate_inputs(name) is True
    before = SVDQuantLoadModel.fingerprint_inputs(name, "auto")
    os.utime(folder / "flux.safetensors", ns=(1, 1))
    assert SVDQuantLoadModel.fingerprint_inputs(name, "auto") != before
    assert SVDQuantLoadModel.validate_inputs("checkpoints/gone.safetensors").startswith(
        "There is no gone.safetensors in models/checkpoints; download it")


def test_a_damaged_checkpoint_is_no_error_of_the_list(folder):
    write_checkpoint(folder / "flux.safetensors", flux_tensors())
    (folder / "cut.safetensors").write_bytes((folder / "flux.safetensors").read_bytes()[:-10])
    assert listed() == ["checkpoints/flux.safetensors"]
    with pytest.raises(CheckpointError, match="cut.safetensors is cut off"):
        SVDQuantLoadModel.execute("checkpoints/cut.safetensors", "auto")


def test_a_folder_of_200_checkpoints_takes_no_time(folder):
    """The headers are as large as SDXL's, 2,500 tensors."""
    save_file({f"{INSIDE}input_blocks.{i}.1.transformer_blocks.0.attn2.to_out.0.weight": torch.zeros(1) for i in range(2500)},
              folder / "sdxl.safetensors")
    for i in range(200):
        Path(folder / f"{i}.safetensors").write_bytes((folder / "sdxl.safetensors").read_bytes())
    times = []
    for _ in range(2):
        before = time.perf_counter()
        assert listed() == []
        times.append(time.perf_counter() - before)
    assert times[0] < 2 and times[1] < 0.2, times
