"""A file that can't be written: one sentence with the right remedy, and no temporary file left."""

import errno
import os
import threading
import time
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


def test_a_written_file_is_read_back(tmp_path):
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
        assert "a folder in its path is a file; choose another filename" in refusal(path)
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
    def rename(source, target):
        raise OSError(code, os.strerror(code), source, None, target) if code else OSError

    for function in ("link", "rename", "replace"):
        monkeypatch.setattr(os, function, rename)
    assert refusal(tmp_path / "x.safetensors") == refusal(tmp_path / "x.safetensors", overwrite=True)
    message = refusal(tmp_path / "x.safetensors")
    assert message.startswith("Saving x.safetensors failed: ") and says in message
    assert ("free some space" in message) == (code in (errno.ENOSPC, errno.EDQUOT)) and os.listdir(tmp_path) == []


def test_too_little_disk_space_is_reported_in_readable_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: SimpleNamespace(free=400_000))
    assert "it needs 0.0 MB and the disk has 0.4 MB free" in refusal(tmp_path / "x.safetensors")
    assert [write.size_text(count) for count in (12_000_000, 999_000_000, 1_500_000_000)] == ["12.0 MB", "999.0 MB", "1.50 GB"]


# --- several writers -----------------------------------------------------------------------------------------------


def write_meanwhile(path, overwrite, meanwhile, value=1.0):
    """Write a file whose only tensor is filled with `value`; meanwhile() is called after half of the work."""
    def tensors():
        yield "a", torch.full((1000,), value)
        meanwhile()
        yield "b", torch.full((1000,), value)

    infos = dict.fromkeys("ab", ((1000,), torch.float32))
    write.write(str(path), infos, tensors(), {}, overwrite)


def values(path):
    header = read_header(str(path))
    return {value for name in header.tensors for value in header.read_tensor(name).tolist()}


@pytest.fixture(params=[True, False], ids=["hard links", "no hard links"])
def links(request, monkeypatch):
    """Both kinds of file systems: with hard links and without."""
    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    if not request.param:
        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("links")
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="x.safetensors exists already; choose another filename, or switch overwrite on"):
        write_meanwhile(path, False, lambda: path.write_bytes(b"theirs"))
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["x.safetensors"]
    write_meanwhile(path, True, lambda: path.write_bytes(b"changed"))
    assert values(path) == {1.0}


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_writer_with_the_same_process_id_writes_a_file_of_its_own(tmp_path, overwrite):
    """Two containers can have the same process id and write to the same folder."""
    path = tmp_path / "x.safetensors"
    if overwrite:
        write_meanwhile(path, True, lambda: write_meanwhile(path, True, lambda: None, 2.0))
        assert values(path) == {1.0}, "the last writer's file"
    else:
        with pytest.raises(CheckpointError, match="exists already"):
            write_meanwhile(path, False, lambda: write_meanwhile(path, False, lambda: None, 2.0))
        assert values(path) == {2.0}
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.usefixtures("links")
def test_of_many_writers_of_one_name_one_succeeds(tmp_path):
    path, barrier, outcomes = tmp_path / "x.safetensors", threading.Barrier(8), []

    def run(value):
        try:
            write_meanwhile(path, False, barrier.wait, value)
            outcomes.append(value)
        except CheckpointError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(float(value),)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, float)]
    assert len(outcomes) == 8 and len(winners) == 1 and values(path) == set(winners) and os.listdir(tmp_path) == ["x.safetensors"]


def test_no_empty_file_stays_where_renaming_fails(tmp_path, monkeypatch):
    for function in ("link", "rename", "replace"):
        monkeypatch.setattr(os, function, lambda source, target: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
    refusal(tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "link", "rename", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, function=function: events.append(name) or function(*args))
    for overwrite in (False, True):
        written(tmp_path / "x.safetensors", overwrite)
        assert events[0] == "fsync" and events[1] in ("link", "rename", "replace") and events[2:] == ["fsync"] * (os.name != "nt")
        events.clear()


def test_only_temporary_files_of_killed_saves_are_removed(tmp_path):
    """After a day, when no process can be writing it. A download's file stays, since a download resumes at any age."""
    old = time.time() - write.STALE_SECONDS - 60
    stale = ["x.safetensors.0123456789abcd.saving", "other.SFT.aaaaaaaaaaaaaa.saving"]
    kept = ["x.safetensors.0123456789abcdef.part", "notes.saving", "x.safetensors.0123456789abcd.saving.bak", "x.0123456789abcd.saving",
            "x.safetensors.0123456789ABCX.saving", "y.safetensors"]
    for name in (*stale, *kept):
        (tmp_path / name).write_bytes(b"?")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "x.safetensors.bbbbbbbbbbbbbb.saving").write_bytes(b"being written")
    written(tmp_path / "x.safetensors")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "x.safetensors.bbbbbbbbbbbbbb.saving", "x.safetensors"])


def test_the_name_of_a_temporary_file_is_one_that_is_swept(tmp_path):
    seen = []
    write_meanwhile(tmp_path / "x.safetensors", False, lambda: seen.extend(os.listdir(tmp_path)))
    name, = seen
    assert write.TEMPORARY.fullmatch(name) and len(name) - len("x.safetensors") <= 22, "model_folder.TEMPORARY_BYTES"
