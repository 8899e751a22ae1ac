"""The result of one of the doctor's checks, and the machine that the checks are about."""

from typing import NamedTuple, Optional

import torch

from ...cuda import targets

SLOW = "4-bit layers run through PyTorch: exact, but many times slower"


class Host(NamedTuple):
    """The program that the nodes run in."""

    version: Optional[str] = None          # ComfyUI's; None outside ComfyUI
    device: Optional[torch.device] = None  # on which it computes; None: PyTorch's current GPU
    pinned: Optional[int] = None           # bytes of memory that it may pin; None outside ComfyUI


class Part(NamedTuple):
    """The result of a check. lines: facts; problems: sentences, each with what to do; blocks: whether a problem keeps the kernels from
    running."""

    lines: tuple = ()
    problems: tuple = ()
    blocks: bool = False


class Machine(NamedTuple):
    """The GPU that the checks are about."""

    device: torch.device   # with an index
    target: targets.Target
    sms: int               # multiprocessors


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
