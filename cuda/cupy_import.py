"""The import of CuPy, which loads the kernels' machine code. It takes a second, so it waits for the first kernel."""

import contextlib
import importlib.metadata
import re
import sys
from pathlib import Path

import torch

from . import compiler, driver
from .errors import KernelsUnavailable


def cupy_package():
    """The package of CuPy for this PyTorch."""
    return f"cupy-cuda{compiler.cuda_major()}x"


def installed():
    """{name: version} of the installed packages of CuPy."""
    found = ((each.metadata["Name"] or "", each.version) for each in importlib.metadata.distributions())
    return dict(sorted({(name.lower(), version) for name, version in found if re.fullmatch(r"cupy(-(cuda|rocm)[\w-]*)?", name, re.I)}))


def remedy(packages):
    """How to get the right CuPy, as a sentence without a full stop. packages: as installed(). A second CuPy would overwrite files of the
    first, and pip leaves a package alone whose files another one has overwritten or removed."""
    package = cupy_package()
    if not packages:
        return f"Install it into ComfyUI's Python: pip install {package}"
    if list(packages) == [package]:
        return f"Install it again in ComfyUI's Python: pip install --upgrade --force-reinstall --no-deps {package}"
    return f"In ComfyUI's Python: pip uninstall {' '.join(packages)}, and then pip install {package}"


def load_cupy():
    """Import CuPy 13 or newer for CUDA. Raises KernelsUnavailable, which says what to install."""
    try:
        with _nvidias_cuda():
            import cupy
            import cupy.cuda.function
    except Exception as error:
        raise KernelsUnavailable(f"{_import_failure(error)} {remedy(installed())}") from error
    if int(cupy.__version__.split(".")[0]) < 13:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy 13 or newer; this is CuPy {cupy.__version__}. {remedy(installed())}")
    if cupy.cuda.runtime.is_hip:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy for CUDA; this one is for ROCm. {remedy(installed())}")
    try:
        version = cupy.cuda.runtime.runtimeGetVersion()
    except Exception as error:  # CuPy is built for one CUDA generation, and PyTorch came with the runtime of another
        raise KernelsUnavailable(f"CuPy {cupy.__version__} does not fit this PyTorch, which is built for CUDA "
                                 f"{torch.version.cuda} ({_first_line(error)}). {remedy(installed())}") from error
    _check_driver(cupy.__version__, version)
    return cupy


def _import_failure(error):
    """Why `import cupy` failed, as a sentence."""
    if not isinstance(error, ImportError) or error.name != "cupy":
        return f"The CUDA kernels need CuPy, and the one here can't be imported ({_first_line(error)})."
    if packages := installed():
        return f"The CUDA kernels need CuPy, and the files of {' and '.join(packages)} are gone."
    return "The CUDA kernels need CuPy, which is not installed."


def _check_driver(cupy, runtime):
    """Raise KernelsUnavailable if NVIDIA's driver can't run CuPy's CUDA runtime of this version, as in 13020 for 13.2. A driver runs the
    runtimes of its own CUDA generation and of older ones."""
    try:
        newest = driver.cuda_version()
    except KernelsUnavailable:  # kernel_loader asks for the driver next, and reports that
        return
    if runtime // 1000 > newest // 1000:
        raise KernelsUnavailable(f"CuPy {cupy} is built for CUDA {runtime // 1000}, and NVIDIA's driver here runs CUDA {newest // 1000} at "
                                 f"most. {remedy(installed())}")


@contextlib.contextmanager
def _nvidias_cuda():
    """Let `import cuda` find NVIDIA's package, which CuPy 14 imports. This pack's cuda/ hides it if the repository is on sys.path, as after
    `python -m` in the repository."""
    if sys.modules.get("cupy"):  # it is imported already, and other threads read sys.path too
        yield
        return
    folder, path = Path(__file__).resolve().parent, sys.path[:]
    if (file := getattr(sys.modules.get("cuda"), "__file__", None)) and Path(file).resolve().parent == folder:
        del sys.modules["cuda"]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != folder.parent]
    try:
        yield
    finally:
        sys.path[:] = path


def _first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)
