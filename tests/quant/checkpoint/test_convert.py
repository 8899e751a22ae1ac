"""Conversions of checkpoints between layouts, on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import convert, formats, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import reader as nunchaku
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.families.flux1 import FAMILY
from safetensors.torch import load_file, save_file

from ..packed_flux import packed_flux

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("models"), packed_flux(rank=32)
    native.save(str(folder / "native.safetensors"), *model, {"preset": "data-free"}, "flux")
    nunchaku_writer.save(str(folder / "nunchaku.safetensors"), *model, {"preset": "data-free"}, "flux")
    return {layout: folder / f"{layout}.safetensors" for layout in formats.WRITERS}


@pytest.mark.parametrize(("source", "to"), [("native", "nunchaku"), ("nunchaku", "native")])
def test_a_converted_file_equals_the_writers(files, tmp_path, source, to):
    target, seen = tmp_path / "out.safetensors", []
    convert.convert(str(files[source]), str(target), to, progress=lambda *counts: seen.append(counts))
    expected, found = load_file(files[to]), load_file(target)
    if to == "native":  # a conversion keeps scales in 16 bits, which the writer of a whole model stores as integers
        expected, found = (dict(native.open_file(read_header(str(path))).tensors()) for path in (files[to], target))
    assert expected.keys() == found.keys()
    unequal = {name for name in expected if not torch.equal(expected[name], found[name])}
    assert to == "nunchaku" and not unequal or all("mod" in name and name.endswith(".bias") for name in unequal)
    theirs, ours = (read_header(str(path)).metadata for path in (files[to], target))
    assert all(theirs[key] == ours[key] for key in ("svdquant.recipe", "svdquant.source"))
    expected, found = (json.loads(metadata.get("svdquant.config", metadata.get("comfy_config"))) for metadata in (theirs, ours))
    assert expected == found
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))


def test_there_and_back_gives_the_same_file(files, tmp_path):
    convert.convert(str(files["nunchaku"]), str(tmp_path / "a.safetensors"), "native")
    convert.convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "nunchaku")
    before, after = load_file(files["nunchaku"]), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_files_without_metadata(files, tmp_path):
    for layout, to in (("native", "nunchaku"), ("nunchaku", "native")):
        save_file(load_file(files[layout]), tmp_path / "bare.safetensors")
        convert.convert(str(tmp_path / "bare.safetensors"), str(tmp_path / f"{to}.safetensors"), to)
    file = nunchaku.open_file(read_header(str(tmp_path / "nunchaku.safetensors")))
    assert file.config["depth"] == 1 and file.config["axes_dim"] == [16, 56, 56]
    assert native.config(read_header(str(tmp_path / "native.safetensors"))) == FAMILY.configuration.of(file.shapes)


def test_refusals_leave_nothing_behind(files, tmp_path):
    target = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match="nunchaku.safetensors is in the nunchaku layout already"):
        convert.convert(str(files["nunchaku"]), str(target), "nunchaku")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="is no quantized model"):
        convert.convert(str(tmp_path / "plain.safetensors"), str(target), "native")
    assert os.listdir(tmp_path) == ["plain.safetensors"]
    with pytest.raises(CheckpointError, match="exists already"):
        convert.convert(str(files["nunchaku"]), str(tmp_path / "plain.safetensors"), "native")


def test_a_name_that_no_list_of_models_shows_is_refused(files, tmp_path):
    for name in ("out", "out.st", "out.safetensors.bak", "out.safetensors.d/"):
        with pytest.raises(CheckpointError, match="does not end in .safetensors, and no list of models would show it; name the file"):
            convert.convert(str(files["native"]), str(tmp_path / name), "nunchaku")
    assert not os.listdir(tmp_path)
    for name in ("OUT.SafeTensors", "out.sft"):
        convert.convert(str(files["native"]), str(tmp_path / name), "nunchaku")


# --- the commands --------------------------------------------------------------------------------------------------


def command(program, *arguments, options=(), **streams):
    """(exit status, stderr)."""
    done = subprocess.run([sys.executable, *options, str(ROOT / program), *map(str, arguments)], text=True,
                          **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | streams)
    return done.returncode, done.stderr


def test_the_command(files, tmp_path):
    arguments = files["native"], tmp_path / "out.safetensors", "--to", "nunchaku"
    assert command("convert.py", *arguments) == (0, ""), "no progress without a terminal"
    status, output = command("convert.py", *arguments)
    assert status == 1 and output.startswith("convert: out.safetensors exists already")


def test_a_terminal_shows_progress(files, tmp_path):
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals that Python opens")
    ours, theirs = pty.openpty()
    try:
        assert command("convert.py", files["native"], tmp_path / "out.safetensors", "--to", "nunchaku", stderr=theirs) == (0, None)
        output = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert output.count("100 %") == 1 and output.endswith("100 %\r\n"), output


@pytest.mark.parametrize(("program", "rest"), [("convert.py", ("out.safetensors", "--to", "native")), ("inspect_model.py", ())])
def test_a_path_that_is_no_file_gets_a_sentence(tmp_path, program, rest):
    called = program.split("_")[0].removesuffix(".py")
    (tmp_path / "file").touch()
    for path in (tmp_path / "none.safetensors", tmp_path / "file" / "in.safetensors"):
        assert command(program, path, *rest) == (1, f"{called}: There is no file {path}; check its name and its folder.\n")
    assert command(program, tmp_path, *rest) == (1, f"{called}: {tmp_path} is a folder; name a .safetensors file.\n")
    if os.name != "nt":  # Windows reports such a file as missing
        too_long = f"{'n' * 300}.safetensors"
        status, output = command(program, too_long, *rest)
        assert status == 1 and output.startswith(f"{called}: {too_long} can't be read: ") and "Errno" not in output


@pytest.mark.parametrize("program", ["convert.py", "inspect_model.py"])
def test_a_python_without_pytorch_gets_a_message_that_names_the_right_one(program):
    status, output = command(program, "in.safetensors", options=["-E", "-S"])
    assert status == 1 and output.count("\n") == 1
    assert "this Python has no " in output and "run it with ComfyUI's Python" in output
