"""The import of CuPy, which loads the kernels' machine code. It takes a second, so it waits for the first kernel."""

import contextlib
import sys
from pathlib import Path

import torch

from . import compiler
from .errors import KernelsUnavailable


def cupy_package():
    return f"cupy-cuda{compiler.cuda_major()}x"


def load_cupy():
    """Import CuPy 13 or newer for CUDA. Raises KernelsUnavailable, which names the package to install."""
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
    except Exception as error:  # CuPy is built for one CUDA generation, and PyTorch came with the runtime of another
        raise KernelsUnavailable(f"CuPy {cupy.__version__} does not fit this PyTorch, which is built for CUDA "
                                 f"{torch.version.cuda} ({_first_line(error)}). {install}") from error
    return cupy


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
