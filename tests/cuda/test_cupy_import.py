"""The import of CuPy: the messages if it is missing or doesn't fit, and the `cuda` package that it imports."""

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import cupy_import, kernel_loader
from comfyui_svdquant.cuda.errors import KernelsUnavailable

ROOT = Path(cupy_import.__file__).parents[1]


def test_the_pack_does_not_import_it():
    """CuPy's import takes a second, and a CPU doesn't need it."""
    code = "import sys; from cuda import ops; print('cupy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(KernelsUnavailable, match="need CuPy, which is not installed.*pip install cupy-cuda12x$"):
        cupy_import.load_cupy()


def fake_cupy(version="14.2.0", is_hip=False, runtime_version=lambda: 13000):
    """Modules with the part of CuPy that load_cupy reads."""
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
    with pytest.raises(KernelsUnavailable, match=message):
        cupy_import.load_cupy()


def test_right_cupy(monkeypatch):
    modules = fake_cupy()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert cupy_import.load_cupy() is modules["cupy"]


@pytest.fixture
def cupy():
    if not any(name.startswith("cupy-cuda") for distribution in importlib.metadata.distributions()
               if (name := distribution.metadata["Name"] or "")):
        pytest.skip("CuPy is not installed")
    return cupy_import.load_cupy()


def test_cupy_from_the_repository(cupy):
    """`python -m benchmarks...` has the repository on its path, where `import cuda` finds this pack's cuda/."""
    code = "import sys; from cuda import cupy_import; print(cupy_import.load_cupy().__version__, sys.path[0] == '')"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == [cupy.__version__, "True"]


def test_no_driver(cupy):
    """If CuPy finds no driver, the pack's own error is raised."""
    if torch.cuda.is_available():
        pytest.skip("There is a driver")
    assert isinstance(kernel_loader._build("awq.cu", "awq", (), 0, 0), KernelsUnavailable)
