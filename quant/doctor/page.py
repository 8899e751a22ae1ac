"""The doctor's page.

Each check is a function that returns a Part; one that fails is a line of the page, so that examine() never raises. Nothing is compiled, and
nothing runs on the GPU, except in kernels.benchmark().
"""

import os

import torch

from ...cuda import targets
from ...cuda.errors import KernelsUnavailable
from .kernels import autotuned, benchmark, kernels, verdicts
from .needs import cache, cupy, nvidia_driver, nvrtc, pinned_memory
from .part import Host, Machine, Part, first_line
from .system import gpus, system

NO_HOST = Host()


def examine(host=NO_HOST, measure=False):
    """The whole page, as text. measure: also run benchmark(), which compiles kernels and takes up to a minute."""
    parts = [("System", _part(system, host)), ("GPU", _part(gpus, host))]
    machine = _machine(host)
    if machine is not None:
        speed = _part(benchmark, machine) if measure else Part(("not measured",))  # first, since it also tests the kernels
        needed = [(title, _part(check, machine)) for title, check in (("Driver", nvidia_driver), ("CuPy", cupy), ("NVRTC", nvrtc))]
        blocked = any(part.blocks for _, part in needed)
        parts += [*needed, ("Kernel cache", _part(cache)),
                  ("Kernels", _part(kernels, machine, blocked)), ("Self-test", _part(verdicts, machine)),
                  ("Autotune", _part(autotuned, machine)), ("Pinned memory", _part(pinned_memory, host)), ("Speed", speed)]
    return _without_home(_text(parts))


def _part(check, *arguments):
    """check(*arguments); a failure as a line."""
    try:
        return check(*arguments)
    except KernelsUnavailable as error:
        return Part((f"unknown: {first_line(error)}",))
    except Exception as error:
        return Part((f"this check failed: {type(error).__name__}: {first_line(error)}",))


def _machine(host):
    """The Machine of the host's GPU, None if the kernels don't run there."""
    try:
        if torch.version.hip or not torch.cuda.is_available():
            return None
        device = host.device or torch.device("cuda")
        if device.type != "cuda":
            return None
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        return Machine(device, targets.for_device(device), targets.multiprocessors(device))
    except Exception:  # the part on GPUs says why
        return None


def _text(parts):
    problems = [problem for _, part in parts for problem in part.problems]
    count = {0: "no problem found", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
    lines = [f"SVDQuant Doctor: {count}"]
    lines += [f"{number}. {problem}" for number, problem in enumerate(problems, 1)]
    for title, part in parts:
        if part.lines:
            lines += ["", title, *(f"  {line}" for line in part.lines)]
    return "\n".join(lines)


def _without_home(text):
    """`text` with the home folder as ~, since the page is posted in public."""
    home = os.path.expanduser("~")  # "/" for some services
    return text.replace(home, "~") if len(home) > 1 else text
