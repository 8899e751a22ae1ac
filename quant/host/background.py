"""Copying packed tensors off the GPU in a thread of its own, while the GPU goes on with the next blocks."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from ..quantizer.calibration import to_device
from . import allocation_log


class Background:
    """Moves values to a device, one after the other. As a context it waits for the last one at the end, also after an error. Where
    allocation_log forbids threads, it moves a value before the caller goes on.

    device: where they go; source: the device on which their tensors are made.
    """

    def __init__(self, device, source):
        self.device, self.pool, self.moving = torch.device(device), ThreadPoolExecutor(1), None
        self.beside = not allocation_log.forbids_threads()
        # Copies on a stream of their own don't wait for the work that the main stream gets meanwhile, such as the next blocks' replays.
        self.stream = torch.cuda.Stream(source) if torch.device(source).type == "cuda" else None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.pool.shutdown()
        if kind is None:
            self.wait()

    def move(self, value, then):
        """Copy the tensors inside nested lists, tuples and dicts, and call then(the copy) in the thread. Waits for the value before, so
        that the device of the tensors holds no more than one; an error of that one is raised here."""
        self.wait()
        made = torch.cuda.current_stream(self.stream.device).record_event() if self.stream else None
        self.moving = self.pool.submit(self._move, value, then, made, torch.is_inference_mode_enabled())
        if not self.beside:
            self.wait()

    def wait(self):
        """Wait for the value that is being copied, and raise its error."""
        moving, self.moving = self.moving, None
        if moving is not None:
            moving.result()

    def _move(self, value, then, made, inference):
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))  # a thread begins without it
            if self.stream:
                stack.enter_context(torch.cuda.stream(self.stream))
                self.stream.wait_event(made)
            then(to_device(value, self.device))
