"""The kernel compiler without a GPU: the disk cache, its keys, and every message."""

import errno
import io
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from comfyui_svdquant.cuda import compiler, cupy_import
from comfyui_svdquant.cuda.errors import KernelsUnavailable

PROBE = '#include "probe.cuh"\nextern "C" __global__ void probe(int* p) { *p = VALUE + ONE; }\n'
WRITER = """
import sys, types
from pathlib import Path
sys.modules["torch"] = types.SimpleNamespace(dtype=None)  # its import takes seconds, and the cache doesn't need it
sys.modules["kernels"] = package = types.ModuleType("kernels")
package.__path__ = [str(Path(sys.argv[1]).parent)]
from kernels import compiler
path = Path(sys.argv[2])
for _ in range(200):
    compiler.write_entry(path, bytes([int(sys.argv[3])]) * 50_000)
    entry = compiler.read_entry(path)
    assert entry is not None and len(entry) == 50_000 and len(set(entry)) == 1, "a torn entry"
"""


def nvrtc_or_none():
    try:
        return compiler.nvrtc()
    except KernelsUnavailable:
        return None


needs_nvrtc = pytest.mark.skipif(nvrtc_or_none() is None, reason="NVRTC is not installed")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A temporary folder of kernels, and a temporary cache."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "probe.cu").write_text(PROBE)
    (folder / "probe.cuh").write_text("#define ONE 1\n")
    monkeypatch.setattr(compiler, "SOURCES", folder)
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    forget()
    yield folder
    monkeypatch.undo()
    forget()


def forget():
    compiler._source_text.cache_clear()
    compiler._headers.cache_clear()


class FakeNvrtc:
    """An NVRTC that counts its compilations; its machine code is the text of the request."""

    def __init__(self, version=(13, 0), architectures=(75, 80, 86, 89, 90, 100, 120)):
        self.version, self.architectures, self.calls = version, architectures, 0

    def compile(self, name, source, headers, options):
        self.calls += 1
        return compiler.Compiled(repr((source, headers, options)).encode(), "")


@pytest.fixture
def fake(monkeypatch):
    library = FakeNvrtc()
    monkeypatch.setattr(compiler, "nvrtc", lambda: library)
    return library


# --- The disk cache ---------------------------------------------------------------------------------------------------


def test_a_second_compilation_reads_the_disk_cache(sources, fake):
    first = compiler.compile_cubin("probe.cu", (("VALUE", 1),), "sm_89")
    assert compiler.compile_cubin("probe.cu", (("VALUE", 1),), "sm_89") == first
    assert fake.calls == 1
    assert [path.suffix for path in compiler.cache_folder().iterdir()] == [".cubin"]


def test_the_cache_key(sources, fake):
    """A change of source, headers, definitions, architecture or NVRTC changes the key."""
    def compiled():
        forget()
        compiler.compile_cubin("probe.cu", (("VALUE", 1),), "sm_89")
        return fake.calls

    assert compiled() == 1
    (sources / "probe.cu").write_text(PROBE + "// changed\n")
    assert compiled() == 2
    (sources / "probe.cuh").write_text("#define ONE 2\n")
    assert compiled() == 3
    fake.version = (13, 1)
    assert compiled() == 4
    compiler.compile_cubin("probe.cu", (("VALUE", 2),), "sm_89")
    assert fake.calls == 5
    compiler.compile_cubin("probe.cu", (("VALUE", 1),), "sm_86")
    assert fake.calls == 6
    assert compiled() == 6


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_corrupt_entry_is_rebuilt(sources, fake, damage):
    good = compiler.compile_cubin("probe.cu", (), "sm_89")
    entry = next(compiler.cache_folder().iterdir())
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert compiler.compile_cubin("probe.cu", (), "sm_89") == good
    assert fake.calls == 2 and entry.read_bytes() == whole


def test_a_cache_that_can_not_be_written_is_one_warning(sources, fake, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(folder))
    assert compiler.compile_cubin("probe.cu", (), "sm_89") == compiler.compile_cubin("probe.cu", (), "sm_89")
    assert fake.calls == 2
    [message] = caplog.messages
    assert f"{folder}, can't be written (" in message and "set SVDQUANT_CACHE_DIR to another folder" in message


def test_a_full_disk_leaves_no_part_of_an_entry(tmp_path, monkeypatch, caplog):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(handle, mode):
        os.close(handle)
        return Full()

    monkeypatch.setattr(os, "fdopen", full)
    compiler.write_entry(tmp_path / "entry.cubin", b"data")
    assert list(tmp_path.iterdir()) == [] and "(No space left on device)" in caplog.text


def test_an_entry_that_another_process_reads_stays(tmp_path, monkeypatch, caplog):
    """Windows then refuses to replace it; that is no reason to warn."""
    path = tmp_path / "entry.cubin"
    compiler.write_entry(path, b"first")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", refuse)
    compiler.write_entry(path, b"second")
    assert list(tmp_path.iterdir()) == [path] and compiler.read_entry(path) == b"first" and not caplog.messages


def test_several_processes(tmp_path):
    """Four processes write and read one entry. Each always reads a whole entry, and no temporary file stays."""
    path = tmp_path / "cache" / "entry.cubin"
    command = [sys.executable, "-c", WRITER, compiler.__file__, str(path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert [entry.name for entry in path.parent.iterdir()] == ["entry.cubin"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "comfyui-svdquant" / "kernels"
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    assert compiler.cache_folder() == tmp_path / "elsewhere"


# --- Architectures ----------------------------------------------------------------------------------------------------


def test_an_unknown_gpu_of_a_family_runs_the_older_code(sources, fake):
    assert b"-arch=sm_120'" in compiler.compile_cubin("probe.cu", (), "sm_121")
    assert b"-arch=sm_90a'" in compiler.compile_cubin("probe.cu", (), "sm_90a")


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_an_nvrtc_that_is_too_old(sources, fake):
    fake.architectures, fake.version = (80, 89, 90), (12, 4)
    with pytest.raises(KernelsUnavailable, match=r"NVRTC 12\.4 can't compile for this GPU \(sm_120\)"):
        compiler.compile_cubin("probe.cu", (), "sm_120")


@pytest.mark.parametrize("cuda, nvrtc, cupy", [("12.8", "nvidia-cuda-nvrtc-cu12", "cupy-cuda12x"),
                                               ("13.0", "nvidia-cuda-nvrtc", "cupy-cuda13x"),
                                               ("11.8", "nvidia-cuda-nvrtc-cu12", "cupy-cuda11x"),
                                               (None, "nvidia-cuda-nvrtc", "cupy-cuda13x")])
def test_packages_fit_this_torch(monkeypatch, cuda, nvrtc, cupy):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert (compiler.nvrtc_package(), cupy_import.cupy_package()) == (nvrtc, cupy)


def test_no_nvrtc(monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_candidates", lambda: ["libnvrtc.so.no"])
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(KernelsUnavailable, match="pip install nvidia-cuda-nvrtc-cu12$"):
        compiler.nvrtc.__wrapped__()


def test_running_out_of_memory_in_nvrtc_is_not_permanent():
    library = types.SimpleNamespace(nvrtcGetErrorString=lambda status: b"some error", nvrtcVersion=lambda *args: compiler.OUT_OF_MEMORY)
    made = object.__new__(compiler.Nvrtc)
    made.library = library
    with pytest.raises(MemoryError, match="nvrtcVersion"):
        made._call("nvrtcVersion")
    library.nvrtcVersion = lambda *args: 3
    with pytest.raises(KernelsUnavailable, match="nvrtcVersion failed: some error"):
        made._call("nvrtcVersion")


@needs_nvrtc
def test_compile_error_shows_the_line(sources):
    with pytest.raises(KernelsUnavailable, match=r'could not compile probe\.cu with -arch=sm_80(?s:.*)"VALUE" is undefined'):
        compiler.compile_cubin("probe.cu", (), "sm_80")


def test_complaints():
    messages = ("ptxas info    : Used 40 registers\n"
                "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
                "ptxas         .    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
                "ptxas info    : (C7519) warpgroup.arrive is injected in around line 1822 by compiler to allow use of registers in GMMA\n"
                "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n")
    assert [line[:20] for line in compiler.complaints(messages)] == ["ptxas         .    1", "ptxas info    : (C75"]


# --- With NVRTC -------------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_cubin(sources, arch, caplog):
    with caplog.at_level(logging.WARNING):
        cubin = compiler.compile_cubin("probe.cu", (("VALUE", 2),), arch)
    assert cubin.startswith(b"\x7fELF") and b"probe" in cubin
    assert not caplog.records
