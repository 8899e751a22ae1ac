"""The processes that torchrun has started for one run, through torch.distributed: NCCL for tensors on GPUs, gloo for everything else."""

import datetime
import io
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from .alone import Alone, Lost
from .peer_attention import Peers

TIMEOUT = datetime.timedelta(hours=2)  # a process waits this long for one that is busy; one that has ended is noticed at once
GRACE = 3  # seconds that a process has to end on its own once torchrun tells it to
TOLD = "This process stops, since torchrun ends the run: another process has ended, whose message says why, or it was interrupted."
ALIGNMENT = 16  # bytes: a tensor may be viewed in its dtype only at a multiple of its element's size


class _Pickler(pickle.Pickler):
    """Pickles a value without its tensors, which it collects: a tensor that occurs twice is sent once."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors, self.places = [], {}

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data, tensors):
        super().__init__(io.BytesIO(data))
        self.tensors = tensors

    def persistent_load(self, place):
        return self.tensors[place]


def parted(value):
    """(bytes of the value without its tensors, [its tensors])."""
    pickler = _Pickler(file := io.BytesIO())
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def joined(data, tensors):
    """The value of `parted`."""
    return _Unpickler(data, tensors).load()


def padded_bytes(shape, dtype):
    """The bytes that a tensor takes in a message."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def empty_message(infos, device):
    """(a uint8 tensor on `device` for the bytes of tensors, each padded to ALIGNMENT; [the tensors in it]). infos: [(shape, dtype)]."""
    message = torch.empty(sum(padded_bytes(*info) for info in infos), dtype=torch.uint8, device=device)
    return message, views_of(message, infos)


def views_of(message, infos):
    """The tensors in a message, which lie in its memory. infos: [(shape, dtype)]."""
    parts = message.split([padded_bytes(*info) for info in infos])
    return [part[:math.prod(shape) * dtype.itemsize].view(dtype).view(shape) for part, (shape, dtype) in zip(parts, infos)]


def message_of(tensors, device):
    """One uint8 tensor on `device` with the bytes of the tensors."""
    message, views = empty_message([(tensor.shape, tensor.dtype) for tensor in tensors], device)
    for view, tensor in zip(views, tensors):
        view.copy_(tensor.detach())
    return message


def tensors_of(message, infos):
    """The tensors of message_of. infos: [(shape, dtype)]."""
    return [view.clone() for view in views_of(message, infos)]  # a small tensor that is kept would keep the whole message


class Ranks(Alone):
    """The processes of torch.distributed's default group.

    device: where tensors are when they travel: the GPU with NCCL, else the CPU. graphs: CUDA graphs with messages in them. peers: the other
    processes' memory.
    """

    def __init__(self, device, objects):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.objects, self.graphs = torch.device(device), objects, weakref.WeakSet()
        self.peers = Peers()

    def gathered(self, value):
        found = [None] * self.size
        # PyTorch 2.5 fills this call's own tensors in a thread of its own, where inference tensors can't be written to.
        with self._alive(), torch.inference_mode(False):
            dist.all_gather_object(found, value, group=self.objects)
        return found

    def from_first(self, value):
        found = [value if self.rank == 0 else None]
        with self._alive():
            dist.broadcast_object_list(found, src=0, group=self.objects)
        return found[0]

    def numbers(self, *numbers):
        """The whole numbers of process 0; the others pass as many. It takes a tenth of from_first's time."""
        found = torch.tensor(numbers)
        with self._alive():
            dist.broadcast(found, 0, group=self.objects)
        return found.tolist()

    def send_from_first(self, message):
        """Fill a tensor on `device` with process 0's. A CUDA graph can record it."""
        dist.broadcast(message, 0)

    def release_graphs(self):
        """Destroy the graphs once they have ended; they wait for no other process's memory any more. NCCL waits for that before it leaves a
        group."""
        self.peers.stop()
        if self.device.type == "cuda" and self.graphs:
            with suppress(RuntimeError):  # the work fails where another process has ended in it
                torch.cuda.synchronize(self.device)
        for graph in list(self.graphs):
            graph.reset()

    def exchanged(self, outgoing):
        sent = {rank: parted(value) for rank, value in outgoing.items() if rank != self.rank}
        headers = self.gathered({rank: (data, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
                                 for rank, (data, tensors) in sent.items()})
        mine = {rank: header[self.rank] for rank, header in enumerate(headers) if self.rank in header}
        arriving = {rank: torch.empty(sum(padded_bytes(*info) for info in infos), dtype=torch.uint8, device=self.device)
                    for rank, (_, infos) in mine.items()}
        leaving = {rank: message_of(tensors, self.device) for rank, (_, tensors) in sent.items()}
        # Every process lists its messages by rank, so that NCCL pairs them without waiting in a circle.
        messages = [dist.P2POp(operation, message, rank) for rank in range(self.size)
                    for operation, found in ((dist.isend, leaving), (dist.irecv, arriving))
                    if (message := found.get(rank)) is not None and message.numel()]
        with self._alive():
            for work in dist.batch_isend_irecv(messages) if messages else ():
                work.wait()
        found = [None] * self.size
        for rank, (data, infos) in mine.items():
            found[rank] = joined(data, tensors_of(arriving[rank], infos))
        found[self.rank] = outgoing.get(self.rank)
        return found

    @contextmanager
    def _alive(self):
        """A context in which an error of the communication becomes Lost."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Lost(f"Process {self.rank} of {self.size} stops, since another process of this run has ended; its own message, or "
                       "torchrun's, says why.") from error


def started_by_torchrun():
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def own_gpu():
    """Leave this process the GPU of its number on this machine as the only visible one, before CUDA starts."""
    number = int(os.environ["LOCAL_RANK"])
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif number < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number]
    else:
        raise ValueError(f"CUDA_VISIBLE_DEVICES names {len(visible)} GPUs, and torchrun starts more processes than that; give "
                         f"--nproc-per-node {len(visible)}.")


def end_when_told():
    """End this process soon after torchrun's SIGTERM, also where it waits for one that is gone: Python's own handler waits as long as
    NCCL does."""
    def stop(*_):
        raise Lost(TOLD)

    def watch():
        while receiver.recv(1) != bytes([signal.SIGTERM]):
            pass
        time.sleep(GRACE)
        print(TOLD, file=sys.stderr, flush=True)
        os._exit(1)

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    end_when_told.kept = sender  # the socket closes when it is collected
    signal.signal(signal.SIGTERM, stop)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def joined_run():
    """Yields the Ranks of the processes that torchrun has started, and leaves their group afterwards."""
    on_gpu = torch.cuda.is_available()
    with_nccl = on_gpu and dist.is_nccl_available()
    dist.init_process_group("nccl" if with_nccl else "gloo", timeout=TIMEOUT,
                            **({"device_id": torch.device("cuda", torch.cuda.current_device())} if with_nccl else {}))
    found = Ranks("cuda" if with_nccl else "cpu", dist.new_group(backend="gloo", timeout=TIMEOUT) if with_nccl else None)
    try:
        yield found
    finally:
        found.release_graphs()
        dist.destroy_process_group()
