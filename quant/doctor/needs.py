"""The doctor's checks of what the kernels need: the driver, CuPy, NVRTC, the cache, and pinned memory."""

import tempfile
import time

import torch

from ...cuda import compiler, cupy_import, driver, targets
from ...cuda.errors import KernelsUnavailable
from .part import SLOW, Part, first_line

PINNED_BYTES = 16 << 20  # size of the allocation that tests whether memory can be pinned


def nvidia_driver(machine):
    """NVIDIA's driver."""
    try:
        cuda = driver.cuda_version()
    except KernelsUnavailable as error:
        return Part((f"version {driver.version()}",), (f"{error} Until then {SLOW}.",), blocks=True)
    lines = (f"version {driver.version()}, for CUDA {_dotted(cuda)}",)
    if machine.target.dependent_launch and cuda < driver.OLDEST_WITH_GRAPHS:
        return Part(lines, (f"NVIDIA's driver {driver.version()} is older than CUDA 12.3, without which kernels can't overlap; update the "
                            "driver for more speed.",))
    return Part(lines)


def _dotted(cuda):
    """12030 -> 12.3."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def cupy(machine):
    """CuPy, which loads the kernels."""
    packages = cupy_import.installed()
    names = ", ".join(f"{name} {version}" for name, version in packages.items()) or "not installed"
    try:
        cupy_import.load_cupy()
    except KernelsUnavailable as error:  # with several CuPys this sentence has the same remedy as the one below
        return Part((names,), (f"{error}. Until then {SLOW}.",), blocks=True)
    if len(packages) > 1:
        return Part((names,), (f"Several CuPys are installed and overwrite each other's files. {cupy_import.remedy(packages)}.",))
    return Part((names,))


def nvrtc(machine):
    """NVRTC, which compiles the kernels."""
    try:
        found = compiler.nvrtc()
    except KernelsUnavailable as error:
        return Part(("not found",), (f"{error}. Until then {SLOW}.",), blocks=True)
    version, package = compiler.version_text(found.version), compiler.nvrtc_package()
    arch = targets.compiled_arch(machine.target.arch, found.architectures)
    if arch is None:
        return Part((f"version {version}",),
                    (f"NVRTC {version} can't compile for this GPU ({machine.target.arch}), and {SLOW}; install a newer one "
                     f"(pip install --upgrade {package}), or a PyTorch for a newer CUDA.",), blocks=True)
    line = f"version {version}, compiles for {arch}"
    if found.version[0] > driver.cuda_version() // 1000:
        return Part((line,), (f"NVRTC {version} is newer than the driver's CUDA {_dotted(driver.cuda_version())}, which may not load its "
                              f"kernels; update the driver, or pip install {package}.",))
    return Part((line,))


def cache():
    """The folder of compiled kernels."""
    folder = compiler.cache_folder()
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
    line = f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
    try:
        _try_writing(folder)
    except OSError as error:
        return Part((line,), (compiler.unwritable(folder, error.strerror or first_line(error)),))
    return Part((f"{line}, writable",))


def _try_writing(folder):
    """Write a file into `folder`, or into the nearest folder that exists and in which it would be made; the file is gone afterwards."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def _pin(size):
    torch.empty(size, dtype=torch.uint8, pin_memory=True)


def pinned_memory(host):
    """Whether host memory can be pinned, from which offloaded layers are copied while others compute."""
    lines = () if host.pinned is None else (
        f"ComfyUI may pin {host.pinned / 2**30:.1f} GiB" if host.pinned > 0 else "ComfyUI pins none, as with --disable-pinned-memory",)
    begin = time.perf_counter()
    try:
        _pin(PINNED_BYTES)
    except RuntimeError as error:
        return Part((*lines, f"not possible: {first_line(error)}"),
                    ("Host memory can't be pinned, so that a model that doesn't fit on the GPU is slower; close other programs, or raise "
                     "the limit of locked memory (ulimit -l, or memory in .wslconfig).",))
    return Part((*lines, f"{PINNED_BYTES >> 20} MiB were pinned in {1000 * (time.perf_counter() - begin):.0f} ms"))
