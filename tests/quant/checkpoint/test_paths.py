"""Folders with spaces, letters of any alphabet and long paths: a file is saved, read, converted and described there, and the pack runs from
there; and the rules of Windows' paths."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_svdquant.cuda import compiler
from comfyui_svdquant.quant.checkpoint import write
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header

ROOT = Path(compiler.__file__).parents[1]
LONG = Path(*(f"a folder with a long name, number {number}, {60 * 'x'}" for number in range(4)))  # over 260 characters
FOLDERS = {"spaces": Path("my models/a b"), "letters": Path("Modèle ü 模型 Ж 🎨"), "long": LONG}
in_each_folder = pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
TENSOR = torch.arange(6.0).reshape(2, 3)


def saved(path: Path) -> Path:
    write.write(str(path), {"a": (TENSOR.shape, TENSOR.dtype)}, [("a", TENSOR)], {})
    return path


@in_each_folder
def test_a_file_is_saved_and_read(tmp_path, folder):
    path = saved(tmp_path / folder / "ein Modell ü.safetensors")
    assert torch.equal(read_header(str(path)).read_tensor("a"), TENSOR)
    assert os.listdir(path.parent) == [path.name]


@in_each_folder
def test_the_pack_runs_from_there(tmp_path, folder):
    """ComfyUI imports a pack under its folder's path as the name; the programs import it from beside themselves."""
    place = tmp_path / folder / "ComfyUI-SVDQuant"
    place.parent.mkdir(parents=True)
    place.symlink_to(ROOT, target_is_directory=True)
    path = Path(shutil.copy(ROOT / "demo" / "tiny_flux" / "tiny_flux.safetensors", tmp_path / folder))
    code = ("import importlib.util as u, sys; s = u.spec_from_file_location(sys.argv[1], sys.argv[1] + '/__init__.py', "
            "submodule_search_locations=[sys.argv[1]]); m = u.module_from_spec(s); sys.modules[s.name] = m; s.loader.exec_module(m); "
            "from importlib import import_module; "
            "print(len(import_module(sys.argv[1] + '.quant.checkpoint.header').read_header(sys.argv[2]).tensors) > 100)")
    found = subprocess.run([sys.executable, "-c", code, str(place), str(path)], capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr
    found = subprocess.run([sys.executable, str(place / "inspect_model.py"), str(path)], capture_output=True, text=True, encoding="utf-8",
                           env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert found.returncode == 0 and path.name in found.stdout, found.stderr


class FakeNvrtc:
    version, architectures = (13, 0), (89,)

    def __init__(self):
        self.calls = 0

    def compile(self, *_):
        self.calls += 1
        return compiler.Compiled(b"cubin", "")


@in_each_folder
def test_compiled_kernels_are_kept_there(tmp_path, monkeypatch, folder):
    nvrtc = FakeNvrtc()
    monkeypatch.setattr(compiler, "nvrtc", lambda: nvrtc)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / folder))
    assert compiler.compile_cubin("awq.cu", (), "sm_89") == compiler.compile_cubin("awq.cu", (), "sm_89") == b"cubin"
    assert nvrtc.calls == 1 and len(list((tmp_path / folder).iterdir())) == 1


@pytest.mark.parametrize("failing", ["mkdir", "mkstemp"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_cache_that_is_read_only_costs_time_alone(tmp_path, monkeypatch, failing, code):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    nvrtc = FakeNvrtc()
    monkeypatch.setattr(compiler, "nvrtc", lambda: nvrtc)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(*((compiler.Path, "mkdir") if failing == "mkdir" else (compiler.tempfile, "mkstemp")), refused)
    assert compiler.compile_cubin("awq.cu", (), "sm_89") == compiler.compile_cubin("awq.cu", (), "sm_89") == b"cubin"
    assert nvrtc.calls == 2


# --- Windows ----------------------------------------------------------------------------------------------------------


def windows(module, monkeypatch, **environment):
    """Let a module believe that it runs on Windows, with these environment variables; paths stay those of this system."""
    monkeypatch.setattr(module, "os", SimpleNamespace(**vars(os) | {"name": "nt", "environ": environment}))


@pytest.mark.parametrize(("length", "code", "says"), [
    (238, errno.ENOENT, "its path has 238 characters, and Windows takes 237; choose a shorter filename, or switch on long paths in Windows "
                        "(LongPathsEnabled)"),
    (400, errno.EINVAL, "its path has 400 characters, and Windows takes 237"),
    (237, errno.ENOENT, f"{os.strerror(errno.ENOENT)}; check the disk"),
    (400, errno.ENOSPC, "the disk is full"),
])
def test_windows_limit_of_a_path(monkeypatch, length, code, says):
    path = "/" + (length - 1) * "x"
    error = OSError(code, os.strerror(code))
    assert "LongPathsEnabled" not in write.disk_trouble(error, path)
    windows(write, monkeypatch)
    assert write.disk_trouble(error, path).startswith(says)


def test_a_long_path_on_windows_is_one_sentence(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "The system cannot find the path specified")

    windows(write, monkeypatch)
    monkeypatch.setattr(write.os, "makedirs", refused)
    with pytest.raises(CheckpointError, match=r"^Saving x\.safetensors failed: its path has \d{3} characters, and Windows takes 237; "):
        saved(tmp_path / LONG / "x.safetensors")


def test_the_cache_on_windows(tmp_path, monkeypatch):
    windows(compiler, monkeypatch, LOCALAPPDATA=str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "comfyui-svdquant" / "kernels"
    windows(compiler, monkeypatch)
    assert compiler.cache_folder() == Path.home() / "AppData" / "Local" / "comfyui-svdquant" / "kernels"


def test_nvrtc_on_windows(tmp_path, monkeypatch):
    """NVRTC's libraries in a toolkit whose folder has spaces, and the system's by name; PyTorch's CUDA generation first."""
    folder = tmp_path / "NVIDIA GPU Computing Toolkit" / "CUDA" / "v13.0"
    (folder / "bin" / "x64").mkdir(parents=True)
    for name in ("nvrtc64_130_0.dll", "nvrtc-builtins64_130.dll", "nvrtc64_130_0.alt.dll"):
        (folder / "bin" / "x64" / name).touch()
    windows(compiler, monkeypatch, CUDA_PATH=str(folder))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = [path for path in compiler.nvrtc_candidates() if not isinstance(path, Path) or path.is_relative_to(folder)]
    assert found == [folder / "bin" / "x64" / "nvrtc64_130_0.dll", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
