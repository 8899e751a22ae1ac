"""Worker processes on this machine, one a GPU, that a process starts for a task and that end with it."""

import datetime
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .alone import Lost
from .ranks import Ranks

START_SECONDS = 600  # that the workers may take until their models are loaded
EVER = datetime.timedelta(days=3650)  # the workers wait this long for the next task; their end is noticed by the connection
STEP_SECONDS = 600  # the longest time of a step; a worker that is stopped, or whose GPU is, never answers
READY, POLL = "ready/{}", 0.1

log = logging.getLogger(__name__)
_leaving = threading.Lock()


class Crew:
    """Worker processes 1 to size - 1; the process that makes the Crew is 0.

    command: of a worker, to which its rank, the size and the port of the rendezvous are added. Close it, or let it be collected, to end the
    workers. A process can be in the group of one Crew at a time: a second one that joins closes the first.
    """

    joined_one = staticmethod(lambda: None)  # weak reference to the Crew whose group this process is in

    def __init__(self, size, command, device):
        self.size, self.device, self.ranks, self.lost = size, torch.device(device), None, False
        self.store = dist.TCPStore("127.0.0.1", 0, size, True, timeout=EVER, wait_for_workers=False)
        self.processes = [subprocess.Popen([*command, str(rank), str(size), str(self.store.port)], stdin=subprocess.PIPE,
                                           env=os.environ | environment) for rank, environment in
                          enumerate(_environments(size, self.device), 1)]
        self.state = {"ranks": None}
        self.until = None  # when the step at hand must have ended, by time.monotonic
        self.end = weakref.finalize(self, _end, self.processes, self.state)

    def joined(self, check=lambda: None):
        """The Ranks of the crew. Waits until every worker is ready. Raises Lost if one has ended. check: called often, to cancel."""
        self.check()
        if self.ranks is None:
            until = time.monotonic() + START_SECONDS
            while not self.store.check([READY.format(rank) for rank in range(1, self.size)]):
                self.check()
                check()
                if time.monotonic() > until:
                    self.close()
                    raise Lost(f"The processes of the other GPUs were not ready after {START_SECONDS} s; see ComfyUI's log.")
                time.sleep(POLL)
            while _leaving.locked():  # a crew that has lost a worker leaves its group in another thread
                check()
                time.sleep(POLL)
            if dist.is_initialized():
                if (other := Crew.joined_one()) is None:
                    raise ValueError("Another node of this session already runs torch.distributed; remove it from the workflow and restart "
                                     "ComfyUI.")
                other.close()
            self.ranks = join(self.store, 0, self.size, self.device)
            self.state["ranks"], Crew.joined_one = self.ranks, weakref.ref(self)
            threading.Thread(target=_watch, args=(weakref.ref(self), self.processes), daemon=True).start()
        return self.ranks

    @contextmanager
    def step(self):
        """A context of a step, in which this process waits for the workers: it ends within STEP_SECONDS, by their end if need be."""
        self.until = time.monotonic() + STEP_SECONDS
        try:
            yield
        finally:
            self.until = None

    def overdue(self):
        until = self.until
        return until is not None and time.monotonic() > until

    def check(self):
        """Raise Lost if a worker has ended."""
        code = next((code for process in self.processes if (code := process.poll()) is not None), None)
        if code is not None or self.lost:
            self.close()
            raise Lost(f"A process of another GPU has ended (exit code {code}); its own lines in ComfyUI's log say why. Run again to start "
                       "new ones.")

    def has_lost_one(self, seconds=1.0):
        """Whether a worker has ended, which shows at most this many seconds after an error of the communication."""
        until = time.monotonic() + seconds
        while not (found := self.lost or any(process.poll() is not None for process in self.processes)) and time.monotonic() < until:
            time.sleep(POLL)
        return found

    def close(self):
        """End the workers, and leave their group."""
        self.end()

    @property
    def closed(self):
        return not self.end.alive


def join(store, rank, size, device):
    """Join the group of a crew: NCCL between GPUs, else gloo. Returns the Ranks."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # otherwise PyTorch ends this process when another one ends
    if torch.__version__ < (2, 8):  # otherwise a recorded step uses memory that has travelled for nothing else
        os.environ.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
    with_nccl = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if with_nccl else "gloo", store=store, rank=rank, world_size=size, timeout=EVER,
                            **({"device_id": device} if with_nccl else {}))
    return Ranks(device if with_nccl else "cpu", dist.new_group(backend="gloo", timeout=EVER) if with_nccl else None)


def _watch(crew, processes):
    """Once a worker has ended, or doesn't answer, end what still waits for it: NCCL would wait forever."""
    while (alive := crew()) is not None and not alive.closed:
        if (overdue := alive.overdue()) or any(process.poll() is not None for process in processes):
            alive.lost = True
            if overdue:
                log.error("SVDQuant Several GPUs: a step did not end within %s s, so the processes of the other GPUs are ended.",
                          STEP_SECONDS)
            alive.close()
            return
        del alive
        time.sleep(POLL)


def _end(processes, state):
    """End workers, and leave their group if this process has joined it (state["ranks"])."""
    for process in processes:
        process.kill()  # a worker that waits for another one in NCCL would not end by itself
    for process in processes:
        process.wait()
        process.stdin.close()
    if state["ranks"] is not None and dist.is_initialized():
        with _leaving:
            # A graph that runs ends once NCCL has begun to abort, and can be destroyed once it has ended; NCCL's abort ends once all graphs
            # with its messages are destroyed.
            leaving = threading.Thread(target=_leave, daemon=True)
            leaving.start()
            state.pop("ranks").release_graphs()
            leaving.join()


def _leave():
    """Leave the process group without waiting for the processes that are gone."""
    for leave in (getattr(dist.distributed_c10d, "_abort_process_group", None), dist.destroy_process_group):
        try:
            if leave and dist.is_initialized():
                leave()
        except Exception as error:  # whatever state they left the group in
            log.debug("Leaving the process group: %s", error)


def _environments(size, device):
    """The environment variables of each worker: every one sees a GPU of its own. Raises ValueError if there are too few."""
    if device.type != "cuda":
        return [{} for _ in range(1, size)]
    count = torch.cuda.device_count()
    if size > count:
        raise ValueError(f"This machine has {count} {'GPU' if count == 1 else 'GPUs'}, and the input gpus is {size}; choose at most "
                         f"{count}.")
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(count)))
    own = torch.cuda.current_device() if device.index is None else device.index
    others = [name for number, name in enumerate(named) if number != own]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in others[:size - 1]]


def end_with_parent():
    """End this process, a worker, once its standard input is closed: its parent has closed the crew, or has ended."""
    def wait():
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
