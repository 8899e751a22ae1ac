"""What a user is told where a file can't be written: one sentence, with the remedy that helps, and nothing left behind."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import write
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "none": torch.zeros(0, 3, dtype=torch.bfloat16)}


def written(path, overwrite=False):
    write.write(str(path), {key: (tensor.shape, tensor.dtype) for key, tensor in TENSORS.items()}, TENSORS.items(), {}, overwrite)
    return read_header(str(path))


def refusal(path, overwrite=False):
    with pytest.raises(CheckpointError) as caught:
        written(path, overwrite)
    message = str(caught.value)
    assert path.name in message and message.endswith(".") and "\n" not in message
    assert str(path.parent) not in message and ".part" not in message and "Errno" not in message
    return message


def test_what_is_written_is_read(tmp_path):
    header = written(tmp_path / "deep" / "x.safetensors")
    found = {key: header.read_tensor(key) for key in header.tensors}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in TENSORS.items())


@pytest.mark.skipif(os.name == "nt", reason="Windows says these in other words")
def test_names_that_the_disk_does_not_take(tmp_path):
    long = tmp_path / f"{250 * 'x'}.safetensors"
    assert "is too long for the disk; choose a shorter filename" in refusal(long)
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file" / "x.safetensors", tmp_path / "file" / "deep" / "x.safetensors"):
        assert "what its path has for a folder is a file; choose another filename" in refusal(path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_is_in_the_way(tmp_path, overwrite):
    (tmp_path / "x.safetensors").mkdir()
    assert refusal(tmp_path / "x.safetensors", overwrite) == "x.safetensors is a folder; choose another filename."


@pytest.mark.parametrize(("code", "says"), [
    (errno.ENOSPC, "the disk is full; free some space or save to another disk"), (errno.EDQUOT, "the disk is full"),
    (errno.EROFS, "its folder can't be written; check the permissions"), (errno.EACCES, "no loaded model still uses the file"),
    (errno.EPERM, "its folder can't be written"), (errno.EIO, f"{os.strerror(errno.EIO)}; check the disk"),
    (None, "OSError; check the disk"),
])
def test_trouble_of_the_disk_has_a_remedy_of_its_own(tmp_path, monkeypatch, code, says):
    def replace(source, target):
        raise OSError(code, os.strerror(code), source, None, target) if code else OSError

    monkeypatch.setattr(os, "replace", replace)
    message = refusal(tmp_path / "x.safetensors")
    assert message.startswith("Saving x.safetensors failed: ") and says in message
    assert ("free some space" in message) == (code in (errno.ENOSPC, errno.EDQUOT)) and os.listdir(tmp_path) == []


def test_little_room_is_told_in_numbers_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: SimpleNamespace(free=400_000))
    assert "it needs 0.0 MB and the disk has 0.4 MB free" in refusal(tmp_path / "x.safetensors")
    assert [write.size_text(count) for count in (12_000_000, 999_000_000, 1_500_000_000)] == ["12.0 MB", "999.0 MB", "1.50 GB"]
