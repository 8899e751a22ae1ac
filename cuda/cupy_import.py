"""The import of CuPy, which loads the kernels' machine code. It takes a second, and comes with the first kernel that is asked for."""

import contextlib
import sys
from pathlib import Path

import torch

from . import compiler
from .errors import KernelsUnavailable


def cupy_package():
    return f"cupy-cuda{compiler.cuda_major()}x"


def load_cupy():
    """Import CuPy, 13 or newer and for CUDA; raises KernelsUnavailable with what to install."""
    install = f"Install it into ComfyUI's Python: pip install {cupy_package()}"
    try:
        with _nvidias_cuda():
            import cupy
            import cupy.cuda.function
    except ImportError as error:
        if getattr(error, "name", None) == "cupy":
            raise KernelsUnavailable(f"The CUDA kernels need CuPy, which is not installed. {install}") from error
        raise KernelsUnavailable(f"The CUDA kernels need CuPy, and the one here can't be imported ({_first_line(error)}). "
                                 f"{install}") from error
    except Exception as error:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy, and the one here can't be imported ({_first_line(error)}). "
                                 f"{install}") from error
    if int(cupy.__version__.split(".")[0]) < 13:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy 13 or newer; this is CuPy {cupy.__version__}. "
                                 f"{install.replace('pip install', 'pip install --upgrade')}")
    if cupy.cuda.runtime.is_hip:
        raise KernelsUnavailable(f"The CUDA kernels need CuPy for CUDA; this one is for ROCm. {install}")
    try:
        cupy.cuda.runtime.runtimeGetVersion()
    except Exception as error:  # CuPy loads the runtime of its own generation, PyTorch brought that of another
        raise KernelsUnavailable(f"CuPy {cupy.__version__} does not fit this PyTorch, which is built for CUDA "
                                 f"{torch.version.cuda} ({_first_line(error)}). {install}") from error
    return cupy


@contextlib.contextmanager
def _nvidias_cuda():
    """CuPy 14 imports NVIDIA's package `cuda`, which our folder hides where the repository is on the path (`python -m` run in it)."""
    if sys.modules.get("cupy"):  # nothing to import; other threads look at the path too
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
