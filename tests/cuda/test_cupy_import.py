"""The import of CuPy: the messages if it is missing or doesn't fit, and the `cuda` package that it imports."""

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import cupy_import, driver, kernel_loader
from comfyui_svdquant.cuda.errors import KernelsUnavailable

ROOT = Path(cupy_import.__file__).parents[1]


def test_the_pack_does_not_import_it():
    """CuPy's import takes a second, and a CPU doesn't need it."""
    code = "import sys; from cuda import ops; print('cupy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


@pytest.fixture
def packages(monkeypatch):
    """A function that sets the installed packages of CuPy, PyTorch's CUDA and the driver's CUDA."""
    def put(*names, torch_cuda="13.0", driver_cuda=13000):
        monkeypatch.setattr(cupy_import, "installed", lambda: dict.fromkeys(names, "14.2.0"))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(driver, "cuda_version", lambda: driver_cuda)
    return put


INSTALL = "Install it into ComfyUI's Python: pip install cupy-cuda12x"
AGAIN = "Install it again in ComfyUI's Python: pip install --upgrade --force-reinstall --no-deps cupy-cuda12x"


@pytest.mark.parametrize(("names", "what", "then"), [
    ((), "which is not installed", INSTALL),
    (("cupy-cuda12x",), "and the files of cupy-cuda12x are gone", AGAIN),
    (("cupy-cuda13x",), "and the files of cupy-cuda13x are gone",
     "In ComfyUI's Python: pip uninstall cupy-cuda13x, and then pip install cupy-cuda12x"),
])
def test_no_cupy(monkeypatch, packages, names, what, then):
    """Uninstalling one of two CuPys removes files of the other one, which pip then still lists."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    packages(*names, torch_cuda="12.6")
    with pytest.raises(KernelsUnavailable) as caught:
        cupy_import.load_cupy()
    assert str(caught.value) == f"The CUDA kernels need CuPy, {what}. {then}"


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
    (fake_cupy(version="12.3.0"), r"need CuPy 13 or newer; this is CuPy 12\.3\.0.*pip uninstall cupy-cuda11x, and then pip install "
                                  r"cupy-cuda13x$"),
    (fake_cupy(is_hip=True), r"CuPy for CUDA; this one is for ROCm.*pip install cupy-cuda13x$"),
    (fake_cupy(runtime_version=no_runtime), r"does not fit this PyTorch, which is built for CUDA 13\.0 \(CuPy failed to load "
                                            r"libcudart\.so\.12: OSError: no such file\)\..*pip install cupy-cuda13x$"),
])
def test_wrong_cupy(monkeypatch, packages, wrong, message):
    for name, module in wrong.items():
        monkeypatch.setitem(sys.modules, name, module)
    packages("cupy-cuda11x")
    with pytest.raises(KernelsUnavailable, match=message):
        cupy_import.load_cupy()


@pytest.mark.parametrize(("runtime", "driver_cuda", "fits"), [
    (12090, 13000, True),   # CuPy for CUDA 12 and a PyTorch for CUDA 13: a driver runs older runtimes too
    (13020, 13000, True),   # within a generation
    (13020, 12080, False),  # CuPy for CUDA 13 and a driver for CUDA 12, which is enough for a PyTorch for CUDA 12
])
def test_a_cupy_of_another_cuda_than_pytorchs(monkeypatch, packages, runtime, driver_cuda, fits):
    for name, module in fake_cupy(runtime_version=lambda: runtime).items():
        monkeypatch.setitem(sys.modules, name, module)
    packages("cupy-cuda13x", torch_cuda="12.8", driver_cuda=driver_cuda)
    if fits:
        assert cupy_import.load_cupy() is sys.modules["cupy"]
        return
    with pytest.raises(KernelsUnavailable) as caught:
        cupy_import.load_cupy()
    assert str(caught.value) == ("CuPy 14.2.0 is built for CUDA 13, and NVIDIA's driver here runs CUDA 12 at most. In ComfyUI's Python: "
                                 "pip uninstall cupy-cuda13x, and then pip install cupy-cuda12x")


def test_a_missing_driver_is_reported_by_those_who_need_it(monkeypatch, packages):
    modules = fake_cupy()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    packages("cupy-cuda13x")

    def missing():
        raise KernelsUnavailable("The CUDA kernels need NVIDIA's driver.")

    monkeypatch.setattr(driver, "cuda_version", missing)
    assert cupy_import.load_cupy() is modules["cupy"]


def test_the_names_of_cupys_packages(monkeypatch):
    names = ("numpy", "cupy-cuda12x", "CuPy-CUDA13x", "cupy", "cupy-rocm-7-0", "cupy-xarray", "cupyx", "cupy-cuda12x", None)
    found = [types.SimpleNamespace(metadata={"Name": name}, version="1") for name in names]
    monkeypatch.setattr(cupy_import.importlib.metadata, "distributions", lambda: found)
    assert list(cupy_import.installed()) == ["cupy", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-7-0"]


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
