"""The files and the command lines of the tests of quantize.py."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from host import setup

from ..random_flux import flux_tensors

ROOT = Path(__file__).resolve().parents[3]
SHIM = Path(__file__).with_name("on_host.py")
OPTIONS = ("--rank", "16", "--steps", "2", "--size", "64")


def torchrun(folder):
    """The launcher of two processes. folder: for their logs, whose temporary folder torchrun would leave behind."""
    return sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--log-dir", str(folder)


def write_model(path):
    save_file(flux_tensors(hidden=128, depth_single=2), path)
    return str(path)


def write_conditioning(path):
    g = torch.Generator().manual_seed(1)
    save_file({f"{i}.{name}": torch.randn(shape, generator=g) for i in range(3)
               for name, shape in (("cond", (1, 6 + i, 128)), ("pooled_output", (1, 64)))}, path)
    return str(path)


def started(*arguments, launcher=(sys.executable,), **variables):
    """quantize.py's running process. variables: environment variables."""
    environment = os.environ | {"COMFYUI_PATH": str(setup.locate().comfy), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen([*launcher, str(SHIM), str(ROOT / "quantize.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment)


def quantize(*arguments, **options):
    """quantize.py's finished process. The arguments are those of started."""
    with started(*arguments, **options) as process:
        output, errors = process.communicate(timeout=250)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
