"""The progress of interrupted quantizations: what equal runs leave in a file, and the folders of runs that are never resumed."""

import os
import time

import pytest
import torch
from comfyui_svdquant.quant.host import loader, quantize, resume
from comfyui_svdquant.quant.quantizer import presets

from ..comfy_models import Progress, save, write_flux

OLD, NEW, OTHER = "0" * 32, "1" * 32, "my notes"


def run_of(folder, name, days):
    """The folder of a run that was last written to so many days ago."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "double_blocks.0.safetensors").write_bytes(b"x" * 100)
    for changed in (path / "double_blocks.0.safetensors", path):
        os.utime(changed, (time.time() - days * 86400,) * 2)
    return path


def test_a_run_that_is_never_resumed_goes_when_another_one_begins(tmp_path, caplog):
    caplog.set_level("INFO")
    for name, days in ((OLD, 31), (NEW, 29), (OTHER, 1000)):
        run_of(tmp_path, name, days)
    (tmp_path / ("2" * 32)).write_bytes(b"a file")
    with resume.Checkpoint(tmp_path, "f" * 64, 0) as kept:
        kept.save("block", {"w": torch.zeros(2)}, [])
    assert sorted(os.listdir(tmp_path)) == sorted([NEW, OTHER, "2" * 32, "f" * 32])
    assert [record.getMessage() for record in caplog.records if "Removed" in record.getMessage()] == [
        f"Removed the progress of a quantization that was interrupted more than 30 days ago: {tmp_path / OLD}"]


def test_a_run_is_kept_while_one_of_its_files_is_new(tmp_path):
    path = run_of(tmp_path, OLD, 100)
    (path / "single_blocks.0.safetensors").write_bytes(b"x")
    os.utime(path, (0, 0))
    with resume.Checkpoint(tmp_path, "f" * 64, 0):
        assert path.exists()


def test_the_run_that_is_resumed_is_not_removed(tmp_path):
    path = run_of(tmp_path, OLD, 100)
    with resume.Checkpoint(tmp_path, OLD * 2, 0) as kept:
        assert kept.holds_anything() and path.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")
def test_a_link_is_not_followed(tmp_path):
    target = run_of(tmp_path / "elsewhere", OLD, 100)
    folder = tmp_path / "progress"
    folder.mkdir()
    (folder / NEW).symlink_to(target)
    with resume.Checkpoint(folder, "f" * 64, 0):
        assert (target / "double_blocks.0.safetensors").exists() and (folder / NEW).exists()


def test_equal_quantizations_give_equal_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    path = write_flux(tmp_path / "flux.safetensors", hidden=128, depth_single=1)
    with torch.inference_mode():
        for name in ("a", "b"):
            made, records = quantize.quantize(loader.load_model(path), presets.make_recipe("data-free", 16), None, None, 2, 0, Progress())
            assert all(record.seconds > 0 for record in records)
            (tmp_path / name).mkdir()
            save(made, tmp_path / name / "x.safetensors")
    assert (tmp_path / "a" / "x.safetensors").read_bytes() == (tmp_path / "b" / "x.safetensors").read_bytes()
