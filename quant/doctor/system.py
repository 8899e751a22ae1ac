"""The doctor's checks of programs and GPUs."""

import os
import platform
import re
from pathlib import Path

import torch

from ...cuda import autotune, driver, self_test, targets
from ...cuda.errors import KernelsUnavailable
from .part import SLOW, Part

PACK = Path(__file__).resolve().parents[2]


def system(host):
    """Versions of the programs."""
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for ROCm" if torch.version.hip else "built for the CPU"
    switches = [f"{name}={value}" for name in (autotune.VARIABLE, self_test.VARIABLE) if (value := os.environ.get(name))]
    return Part((f"SVDQuant nodes {_own_version()}",
                 f"ComfyUI {host.version}" if host.version else "ComfyUI: not found",
                 f"Python {platform.python_version()} on {platform.system()} ({platform.machine()})",
                 f"PyTorch {torch.__version__}, {cuda}",
                 *switches))


def version_beside(pack):
    """The version of the ComfyUI in whose custom_nodes folder the folder `pack` lies; None if it lies elsewhere."""
    try:
        text = (pack.parents[1] / "comfyui_version.py").read_text(encoding="utf-8")
    except (OSError, IndexError):
        return None
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found and found[1]


def _own_version():
    try:
        found = re.search(r'^version = "([^"]+)"', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return "of unknown version"
    return found[1] if found else "of unknown version"


def gpus(host):
    """The GPUs, and the reason if none is used."""
    if torch.version.hip:
        return Part((f"an AMD GPU. The kernels are for NVIDIA's, and here {SLOW}",))
    if not torch.cuda.is_available():
        return _no_gpu()
    found = [_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    lines, problems = ([text for part in found for text in part[field]] for field in range(2))
    if host.device is not None and host.device.type != "cuda":
        problems.append(f"ComfyUI computes on the {host.device.type.upper()} although there is a GPU, and {SLOW}; start it without --cpu.")
    return Part(tuple(lines), tuple(problems))


def _no_gpu():
    lines = (f"none that PyTorch can use. On the CPU {SLOW}",)
    version = driver.version()
    if version == "unknown":  # there is no driver
        return Part(lines)
    if torch.version.cuda is None:
        return Part(lines, (f"This machine has NVIDIA's driver {version}, but its PyTorch is built for the CPU; install a PyTorch for CUDA "
                            "into ComfyUI's Python, with the command that pytorch.org shows.",))
    return Part(lines, (f"PyTorch for CUDA {torch.version.cuda} finds no GPU, although there is NVIDIA's driver {version}; update the "
                        "driver, and check that nvidia-smi lists the GPU.",))


def _gpu(device):
    properties = torch.cuda.get_device_properties(device)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    name = f"{properties.name}, {total:.1f} GiB ({free:.1f} free)"
    try:
        target = targets.for_device(device)
    except KernelsUnavailable as error:
        return Part((name,), (f"{error} On this GPU {SLOW}; there is no remedy but another GPU.",))
    arch = f"compute capability {target.number // 10}.{target.number % 10} ({target.arch}), {targets.multiprocessors(device)} SMs"
    known = () if target.number in targets.TARGETS else ("unknown to this version, which treats it as the nearest older generation",)
    return Part((f"{name}, {arch}", *known))
