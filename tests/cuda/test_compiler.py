"""The kernel compiler without a GPU: the disk cache, what its keys hold, every message, and what a launch hands to the driver."""

import contextlib
import ctypes
import importlib.metadata
import logging
import struct
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import compiler

PROBE = '#include "probe.cuh"\nextern "C" __global__ void probe(int* p) { *p = VALUE + ONE; }\n'
WRITER = """
import importlib.util, sys, types
from pathlib import Path
sys.modules["torch"] = types.SimpleNamespace(_C=None)  # its import takes seconds, and the cache has no use for it
spec = importlib.util.spec_from_file_location("compiler", sys.argv[1])
compiler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)
path = Path(sys.argv[2])
for turn in range(200):
    compiler._write(path, bytes([int(sys.argv[3])]) * 50_000)
    entry = compiler._read(path)
    assert entry is not None and len(entry) == 50_000 and len(set(entry)) == 1, "a torn entry"
"""


def nvrtc_or_none():
    try:
        return compiler.nvrtc()
    except compiler.KernelsUnavailable:
        return None


needs_nvrtc = pytest.mark.skipif(nvrtc_or_none() is None, reason="NVRTC is not installed")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A kernels folder and a cache of their own."""
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
    """Counts its compilations; the machine code is what it was asked for."""

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


def test_second_time_from_disk(sources, fake):
    first = compiler.compile_cubin("probe.cu", (("VALUE", 1),), "sm_89")
    assert compiler.compile_cubin("probe.cu", (("VALUE", 1),), "sm_89") == first
    assert fake.calls == 1
    assert [path.suffix for path in compiler.cache_folder().iterdir()] == [".cubin"]


def test_what_the_key_holds(sources, fake):
    """Source, headers, definitions, architecture, NVRTC: a change of any is another kernel."""
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


def test_cache_that_cannot_be_written(sources, fake, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file"))
    assert compiler.compile_cubin("probe.cu", (), "sm_89") == compiler.compile_cubin("probe.cu", (), "sm_89")
    assert fake.calls == 2


def test_several_processes(tmp_path):
    """Four processes write and read one entry: each reads a whole one every time, and no temporary file stays."""
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


@pytest.mark.parametrize("capability, arch", [((7, 5), "sm_75"), ((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"),
                                              ((12, 1), "sm_121")])
def test_target(capability, arch):
    assert compiler.target(capability) == arch


def test_unknown_sibling_runs_the_older_code(sources, fake):
    assert b"-arch=sm_120'" in compiler.compile_cubin("probe.cu", (), "sm_121")
    assert b"-arch=sm_90a'" in compiler.compile_cubin("probe.cu", (), "sm_90a")


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_too_old_a_gpu():
    with pytest.raises(compiler.KernelsUnavailable, match=r"compute capability 7\.5 \(RTX 20\) or newer; this one has 7\.0"):
        compiler.target((7, 0))


def test_too_old_an_nvrtc(sources, fake):
    fake.architectures, fake.version = (80, 89, 90), (12, 4)
    with pytest.raises(compiler.KernelsUnavailable, match=r"NVRTC 12\.4 can't compile for this GPU \(sm_120\)"):
        compiler.compile_cubin("probe.cu", (), "sm_120")


@pytest.mark.parametrize("cuda, nvrtc, cupy", [("12.8", "nvidia-cuda-nvrtc-cu12", "cupy-cuda12x"),
                                               ("13.0", "nvidia-cuda-nvrtc", "cupy-cuda13x"),
                                               (None, "nvidia-cuda-nvrtc", "cupy-cuda13x")])
def test_packages_fit_this_torch(monkeypatch, cuda, nvrtc, cupy):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert (compiler.nvrtc_package(), compiler.cupy_package()) == (nvrtc, cupy)


def test_no_nvrtc(monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_candidates", lambda: ["libnvrtc.so.no"])
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(compiler.KernelsUnavailable, match="pip install nvidia-cuda-nvrtc-cu12$"):
        compiler.nvrtc.__wrapped__()


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(compiler.KernelsUnavailable, match="need CuPy, which is not installed.*pip install cupy-cuda12x$"):
        compiler.load_cupy()


def fake_cupy(version="14.2.0", is_hip=False, runtime_version=lambda: 13000):
    """The part of CuPy that load_cupy reads, as modules."""
    cupy, cuda, function = (types.ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.function"))
    cupy.__version__, cupy.__path__, cuda.__path__ = version, [], []
    cupy.cuda, cuda.function = cuda, function
    cuda.runtime = types.SimpleNamespace(is_hip=is_hip, runtimeGetVersion=runtime_version)
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.function": function}


def no_runtime():
    raise RuntimeError("CuPy failed to load libcudart.so.12: OSError: no such file\n(and more)")


@pytest.mark.parametrize("wrong, message", [
    (fake_cupy(version="12.3.0"), r"need CuPy 13 or newer; this is CuPy 12\.3\.0.*pip install --upgrade cupy-cuda13x$"),
    (fake_cupy(is_hip=True), r"CuPy for CUDA; this one is for ROCm.*pip install cupy-cuda13x$"),
    (fake_cupy(runtime_version=no_runtime), r"does not fit this PyTorch, which is built for CUDA 13\.0 \(CuPy failed to load "
                                            r"libcudart\.so\.12: OSError: no such file\)\..*pip install cupy-cuda13x$"),
])
def test_wrong_cupy(monkeypatch, wrong, message):
    for name, module in wrong.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(compiler.KernelsUnavailable, match=message):
        compiler.load_cupy()


def test_right_cupy(monkeypatch):
    modules = fake_cupy()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert compiler.load_cupy() is modules["cupy"]


@needs_nvrtc
def test_compile_error_shows_the_line(sources):
    with pytest.raises(compiler.KernelsUnavailable, match=r'could not compile probe\.cu with -arch=sm_80(?s:.*)"VALUE" is undefined'):
        compiler.compile_cubin("probe.cu", (), "sm_80")


def test_failure_is_remembered(monkeypatch):
    """A linear that can't have its kernel asks for it at every call: the reason is found once."""
    builds = []

    def build(*key):
        builds.append(key)
        return compiler.KernelsUnavailable("no CuPy")

    monkeypatch.setattr(compiler, "_build", build)
    monkeypatch.setattr(compiler, "_kernels", {})

    def layer(x):
        try:
            compiler.kernel("awq.cu", "awq", (), torch.device("cuda", 0))
        except compiler.KernelsUnavailable as error:
            return str(error)

    inputs = [torch.ones(1) for _ in range(3)]
    left = [weakref.ref(x) for x in inputs]
    while inputs:
        assert layer(inputs.pop()) == "no CuPy"
    assert len(builds) == 1
    assert not any(x() is not None for x in left), "what is remembered holds no caller's tensors"


def test_complaints():
    messages = ("ptxas info    : Used 40 registers\n"
                "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
                "ptxas         .    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
                "ptxas info    : (C7519) warpgroup.arrive is injected in around line 1822 by compiler to allow use of registers in GMMA\n"
                "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n")
    assert [line[:20] for line in compiler.complaints(messages)] == ["ptxas         .    1", "ptxas info    : (C75"]


# --- What NVRTC makes of it -------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_cubin(sources, arch, caplog):
    with caplog.at_level(logging.WARNING):
        cubin = compiler.compile_cubin("probe.cu", (("VALUE", 2),), arch)
    assert cubin.startswith(b"\x7fELF") and b"probe" in cubin
    assert not caplog.records


def test_nothing_of_it_is_imported_with_the_pack():
    """CuPy's import takes a second, and it is of no use on a CPU."""
    code = ("import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('compiler', {compiler.__file__!r})\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print('cupy' in sys.modules)")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# --- Launch -----------------------------------------------------------------------------------------------------------


class FakeDriver:
    """Reads what a launch hands to the driver, as the driver would: {config's fields}, its attributes' bytes, the parameters."""

    def __init__(self, parameters, status=0):
        self.calls, self.parameters, self.status = [], parameters, status

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        *numbers, stream, attributes, count = struct.unpack("=7I4xQQI4x", ctypes.string_at(config.value, 56))
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        values = [kind.from_address(pointers[i]).value for i, kind in enumerate(self.parameters)]
        self.calls.append((numbers, stream, ctypes.string_at(attributes, 72 * count) if count else b"", function.value, values))
        assert extra is None
        return self.status

    def cuCtxGetCurrent(self, context):
        context._obj.value = 1
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"invalid argument"
        return 0


@pytest.fixture
def launches(monkeypatch):
    """A Kernel on a device that isn't there, and the driver that it calls."""
    driver = FakeDriver([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int])
    monkeypatch.setattr(compiler, "driver", lambda: driver)
    monkeypatch.setattr(compiler, "_current_device", lambda: 0)
    monkeypatch.setattr(compiler, "_raw_stream", lambda index: 0x1234)
    monkeypatch.setattr(compiler, "_threads", threading.local())
    return compiler.Kernel(0x77, 0, 1024, dependent=True), driver


def test_launch_arguments(launches):
    kernel, driver = launches
    x = torch.zeros(4)
    kernel((2, 3), (128,), x, torch.nn.Parameter(x), None, 7, -1)
    (numbers, stream, attributes, function, values), = driver.calls
    assert (numbers, stream, attributes, function) == ([2, 3, 1, 128, 1, 1, 1024], 0x1234, b"", 0x77)
    assert values == [x.data_ptr(), x.data_ptr(), None, 7, -1]


def test_dependent_launch(launches):
    """CUlaunchAttribute: id 6, padding, a union of 64 bytes that begins with 1. Only where the device knows it."""
    kernel, driver = launches
    for dependent in (True, False):
        kernel.dependent = dependent
        kernel((1,), (32,), 0, 0, 0, 0, 0, pdl=True)
    known, unknown = (call[2] for call in driver.calls)
    assert known == struct.pack("=I4xI60x", 6, 1) and unknown == b""


@pytest.mark.parametrize("version, arch, expected", [(13000, "sm_90a", True), (12030, "sm_120", True), (12020, "sm_90a", False),
                                                     (13000, "sm_89", False)])
def test_who_knows_dependent_launches(launches, monkeypatch, version, arch, expected):
    def get_version(pointer):
        pointer._obj.value = version
        return 0

    launches[1].cuDriverGetVersion = get_version
    monkeypatch.setattr(compiler, "_device_target", lambda index: arch)
    assert compiler._knows_dependent_launches.__wrapped__(0) is expected


def test_a_launch_that_fails(launches):
    kernel, driver = launches
    driver.status = 1
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: invalid argument \(1\)"):
        kernel((1,), (32,), 0, 0, 0, 0, 0)


def test_launches_from_threads(launches):
    """Threads that launch at once, each with its own arguments: none gets another's."""
    kernel, driver = launches
    run = kernel.launcher((1,), (32,), 5)
    threads = [threading.Thread(target=lambda i=i: [run(i, i, i, i, i) for _ in range(1000)]) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(call[4] for call in driver.calls) == [[i] * 5 for i in range(1, 5) for _ in range(1000)]


def test_a_thread_without_a_context(launches, monkeypatch):
    """The driver's functions need a context, which PyTorch makes in the threads that call it."""
    kernel, driver = launches
    made, clusters = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda context: 0)
    driver.cuDevicePrimaryCtxRetain = lambda context, device: made.append(("retained", device)) or 0
    driver.cuCtxSetCurrent = lambda context: made.append("current") or 0
    for _ in range(2):
        kernel((1,), (32,), 0, 0, 0, 0, 0)
    assert made == [("retained", 0), "current"]
    driver.cuOccupancyMaxActiveClusters = lambda count, function, config: clusters.append(len(made)) or 0
    kernel.active_clusters(8, 512)
    assert clusters == [4], "asked once there is a context"


def test_no_driver_or_an_old_one(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    for library, message in ((missing, "need NVIDIA's driver .*: no such file"),
                             (lambda name: types.SimpleNamespace(), "need an NVIDIA driver for CUDA 12 or newer. Update the driver")):
        monkeypatch.setattr(compiler.ctypes, "CDLL", library)
        with pytest.raises(compiler.KernelsUnavailable, match=message):
            compiler.driver.__wrapped__()


@pytest.fixture
def cupy():
    if not any(name.startswith("cupy-cuda") for distribution in importlib.metadata.distributions()
               if (name := distribution.metadata["Name"] or "")):
        pytest.skip("CuPy is not installed")
    return compiler.load_cupy()


def test_cupy_from_the_repository(cupy):
    """`python -m benchmarks...` has the repository on its path, where `import cuda` finds our package."""
    folder = Path(compiler.__file__).parents[1]
    code = ("import importlib.util, sys, cuda\n"
            "spec = importlib.util.spec_from_file_location('compiler', 'cuda/compiler.py')\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print(module.load_cupy().__version__, sys.path[0] == '')")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).split() == [cupy.__version__, "True"]


def test_no_driver(cupy, sources):
    """Where CuPy finds no driver, the message is still ours."""
    if torch.cuda.is_available():
        pytest.skip("There is a driver")
    error = compiler._build("probe.cu", "probe", (("VALUE", 1),), 0, 0)
    assert isinstance(error, compiler.KernelsUnavailable)
