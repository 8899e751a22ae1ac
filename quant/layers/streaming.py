"""Parameters of offloaded layers, copied to the GPU before the layers need them.

An offloaded layer keeps its parameters in host memory, and each call needs them on the GPU. A WeightStream keeps the parameters of each
such layer in one pinned block. It copies the blocks on a second CUDA stream into a ring of GPU memory: while the GPU computes one layer,
the parameters of the next ones arrive. It expects the layers in the order of the previous step.
"""

import heapq
import re
import threading
import weakref
from collections import deque
from typing import NamedTuple

import torch

from .kept_memory import kept

ALIGNMENT = 512  # bytes; of each parameter in a block, as PyTorch's own allocations on the GPU
RING_LAYERS = 5  # the ring has room for so many of the largest layer: what computes, what arrives, and a reserve for uneven blocks


def aligned(nbytes):
    return nbytes + -nbytes % ALIGNMENT


def block_bytes(layer):
    """Bytes of a layer's parameters in its block."""
    return sum(aligned(p.nbytes) for p in layer._parameters.values() if p is not None)


def ring_bytes(layers):
    """Bytes of the ring for a model with these packed layers."""
    return RING_LAYERS * max((block_bytes(layer) for layer in layers if layer.streams), default=0)


def offload_order(sizes):
    """The names of the layers in the order in which to offload them. sizes: {name: bytes}, in the order of the model's modules.

    The blocks of the model take about the same time each, so a copy can only hide behind computation where every block has about as many
    bytes to wait for. Each layer in turn comes from the block with the fewest offloaded bytes, and equal blocks follow each other in
    bit-reversed order. So every number of offloaded layers is spread over the whole step.
    """
    blocks = {}
    for name, size in sizes.items():
        numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)  # up to the first number
        blocks.setdefault(numbered.group() if numbered else name, []).append((size, name))
    bits = max(1, (len(blocks) - 1).bit_length())
    queue = [(0, int(f"{index:0{bits}b}"[::-1], 2), sorted(layers)) for index, layers in enumerate(blocks.values())]
    heapq.heapify(queue)
    order = []
    while queue:
        offloaded, position, layers = heapq.heappop(queue)
        size, name = layers.pop()  # the largest first: fewer copies
        order.append(name)
        if layers:
            heapq.heappush(queue, (offloaded + size, position, layers))
    return order


class Part(NamedTuple):
    """A parameter in a block. offset: bytes from the block's start; address: in host memory."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple
    offset: int
    address: int


class StreamedLayer:
    """The parameters of an offloaded layer in one pinned block of host memory.

    memory: (bytes,) uint8, an nn.Parameter, the only type of tensor that ComfyUI pins; the layer's parameters are views of it.
    """

    def __init__(self, stream, memory, parts):
        self.stream, self.memory, self.parts = stream, memory, parts
        self.following = None  # weak reference to the StreamedLayer that came next in the last step

    def __reduce__(self):
        return type(None), ()  # a copy of the layer has parameters of its own, and is not streamed

    def at(self, parameters, x):
        """{name: parameter on x's device} of the layer's parameters {name: parameter}; None where the caller must copy them itself.

        The tensors are the stream's own. It writes to them again when the caller has dropped all of them, and after what the caller has
        launched until then.
        """
        if torch.compiler.is_compiling():
            return None
        views = self.stream.bring(self, x)
        if views is None:
            return None
        for part in self.parts:
            p = parameters[part.name]
            if p is None or p.data_ptr() != part.address:  # replaced since, as ComfyUI replaces a bias that it patches
                del views[part.name]
        return {name: None if p is None else views[name] if name in views else p.to(x.device, non_blocking=True)
                for name, p in parameters.items()}


class Slot:
    """A part of the ring that has the parameters of one layer, or waits for them."""

    def __init__(self, layer, start, stop, arrived):
        self.layer = weakref.ref(layer)
        self.start, self.stop = start, stop
        self.arrived = arrived  # event after the copy
        self.views = None       # weak references to the tensors that a call of the layer has
        self.read = None        # event after the layer's computation
        self.free = False


class WeightStream:
    """The copies of one model's offloaded layers to one GPU.

    pin, unpin: page-lock a tensor in host memory and undo it, returning whether that worked; gpu: torch.cuda, or a stand-in in tests.
    `fit` comes first. Nothing is allocated on the GPU before the first call of a streamed layer.
    """

    def __init__(self, pin, unpin, gpu=torch.cuda):
        self.device, self.size, self.gpu = None, 0, gpu
        self._pin, self._unpin = pin, unpin
        self._lock = threading.Lock()
        self._empty()

    def __reduce__(self):
        return WeightStream, (self._pin, self._unpin)  # a copy of the model has a ring of its own

    def _empty(self):
        self._ring = self._compute = self._copies = self._last = None
        self._refused = False     # there was no memory for the ring
        self._typed = {}          # {dtype: the ring as a tensor of it}
        self._slots = deque()     # in the order of their places in the ring, which is that of the copies
        self._waiting = deque()   # of _slots: no call has taken them yet
        self._taken = []          # of _slots: a call may still read them

    # --- host memory -----------------------------------------------------------------------------------------------

    def pin(self, layer):
        """Put the parameters of a layer into one pinned block; returns whether it is pinned now. All of them lie in host memory."""
        if layer.streamed is not None:
            return True
        named = {name: p for name, p in layer._parameters.items() if p is not None}
        if any(p.device.type != "cpu" or not p.is_contiguous() for p in named.values()):
            return False
        with torch.inference_mode(False), torch.no_grad():
            memory = _block_of(named.values())
            known = memory is not None
            if not known:
                memory = torch.empty(block_bytes(layer), dtype=torch.uint8)
            memory = torch.nn.Parameter(memory, requires_grad=False)
            if not self._pin(memory):
                return False
            parts, offset = [], 0
            for name, p in named.items():
                view = memory.data[offset:offset + p.nbytes].view(p.dtype).view(p.shape)
                if not known:
                    _move(p, view.copy_(p))
                parts.append(Part(name, p.dtype, p.shape, p.stride(), offset, view.data_ptr()))
                offset += aligned(p.nbytes)
        layer.streamed = StreamedLayer(self, memory, parts)
        # A model that is dropped while it is loaded still unpins its memory.
        finalizer = weakref.finalize(layer.streamed, _unpin, self.gpu, self.device, self._unpin, memory)
        finalizer.atexit = False
        layer.streamed.unpin = finalizer
        return True

    def unpin(self, layer):
        """Undo `pin`. The parameters stay where they are."""
        streamed, layer.streamed = layer.streamed, None
        if streamed is not None:
            streamed.unpin()

    # --- the ring --------------------------------------------------------------------------------------------------

    def fit(self, device, size):
        """Serve layers on `device`, with a ring of `size` bytes."""
        if (device, size) != (self.device, self.size):
            self.release()
            self.device, self.size = device, size

    def forget(self):
        """Drop the copies that no call has taken yet, and wait for all others, which may still read the parameters. For a change of
        parameters in place, which comes next. Every load begins so; a GPU that had no memory for the ring is asked again."""
        with self._lock:
            self._drop(len(self._waiting))
            self._refused = False
        if self.size:
            self.gpu.synchronize(self.device)

    def release(self):
        """Give the ring's memory back."""
        with self._lock:
            if self._ring is not None:
                self._compute.wait_stream(self._copies)  # PyTorch gives the memory to later work of that stream
            self._empty()

    def bring(self, layer, x):
        """{name: tensor on the GPU} of all parameters of a StreamedLayer, for a computation with x on the current stream. None where the
        ring can't serve it: in a graph capture, on a second stream or thread, for training, or without room."""
        if x.device != self.device or x.requires_grad or not self._lock.acquire(blocking=False):
            return None
        try:
            if self.gpu.is_current_stream_capturing() or not self._starts(self.gpu.current_stream(self.device)):
                return None
            self._note_reads()
            slot = self._take(layer) or self._fetch(layer)
            if slot is None:
                return None
            self._compute.wait_event(slot.arrived)
            views = {part.name: self._typed_ring(part.dtype).as_strided(
                part.shape, part.stride, (slot.start + part.offset) // part.dtype.itemsize) for part in layer.parts}
            slot.views = [weakref.ref(view) for view in views.values()]
            self._taken.append(slot)
            self._fetch_ahead(layer)
            return views
        finally:
            self._lock.release()

    def _starts(self, stream):
        """Whether the ring serves computations on `stream`: the first one that asks, until the ring is released."""
        if self._ring is None:
            if self._refused:
                return False
            try:
                with torch.inference_mode(False), kept():
                    self._ring = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            except torch.cuda.OutOfMemoryError:  # PyTorch has emptied its cache for it, which must not happen in every call
                self._refused = True
                return False
            self._compute, self._copies = stream, self.gpu.Stream(self.device)
            self._copies.wait_stream(stream)  # whatever used the memory before
        return stream == self._compute

    def _typed_ring(self, dtype):
        if dtype not in self._typed:
            self._typed[dtype] = self._ring.view(dtype)
        return self._typed[dtype]

    def _note_reads(self):
        """Mark the slots whose tensors the callers have dropped: all that reads them is launched."""
        finished = [slot for slot in self._taken if all(view() is None for view in slot.views)]
        if finished:
            read = self.gpu.Event()
            read.record(self._compute)
            for slot in finished:
                slot.read, slot.free = read, True
            self._taken = [slot for slot in self._taken if not slot.free]

    def _drop(self, count):
        for _ in range(count):
            self._waiting.popleft().free = True

    def _take(self, layer):
        """The waiting slot of a layer, or None. Those before it are not for this step, and are dropped."""
        position = next((i for i, slot in enumerate(self._waiting) if slot.layer() is layer), None)
        self._drop(len(self._waiting) if position is None else position)
        return None if position is None else self._waiting.popleft()

    def _fetch_ahead(self, layer):
        """Note that `layer` came after the last one, and copy the layers that came after it in the last step, as far as there is room."""
        last = self._last and self._last()
        if last is not None and (last.following is None or last.following() is not layer):
            last.following = weakref.ref(layer)
        self._last = weakref.ref(layer)
        newest = self._waiting[-1].layer() if self._waiting else layer
        while newest is not None and newest.following is not None and (following := newest.following()) is not None:
            slot = self._fetch(following)
            if slot is None:
                return
            self._waiting.append(slot)
            newest = following

    def _fetch(self, layer):
        """A new slot into which the layer's parameters are being copied; None without room."""
        start = self._room(layer.memory.nbytes)
        if start is None:
            return None
        stop = start + layer.memory.nbytes
        self._copy(self._ring[start:stop], layer.memory.data)
        arrived = self.gpu.Event()
        arrived.record(self._copies)
        self._slots.append(Slot(layer, start, stop, arrived))
        return self._slots[-1]

    def _copy(self, target, source):
        with self.gpu.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def _room(self, nbytes):
        """The start of `nbytes` free bytes after the newest slot, or None. The oldest slots make room if their tensors are read."""
        while self._slots and self._slots[-1].free and self._slots[-1].read is None:  # dropped: the next copy comes after its own
            self._slots.pop()
        while (start := self._free_start(nbytes)) is None:
            if not self._slots or not self._slots[0].free:
                return None
            oldest = self._slots.popleft()
            if oldest.read is not None:
                self._copies.wait_event(oldest.read)
        return start

    def _free_start(self, nbytes):
        if not self._slots:
            return 0 if nbytes <= self.size else None
        tail, head = self._slots[0].start, self._slots[-1].stop
        if tail < head:
            if nbytes <= self.size - head:
                return head
            head = 0
        return head if nbytes <= tail - head else None


def _move(p, view):
    """Let the parameter `p` lie in the memory of `view`, an ordinary tensor of its type and shape."""
    if p.is_inference():  # with an ordinary tensor as its data PyTorch would take it for one, and then miss the count of its writes
        with torch.inference_mode():
            p.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())
    else:
        p.data = view


def _block_of(parameters):
    """The memory of parameters that lie in one block already, since they were pinned before; else None."""
    storages = [p.untyped_storage() for p in parameters]
    offset, base = 0, storages[0].data_ptr()
    for p, storage in zip(parameters, storages):
        if storage.data_ptr() != base or p.data_ptr() != base + offset:
            return None
        offset += aligned(p.nbytes)
    return torch.empty(0, dtype=torch.uint8).set_(storages[0]) if storages[0].nbytes() == offset else None


def _unpin(gpu, device, unpin, memory):
    gpu.synchronize(device)  # copies may still read the memory
    unpin(memory)
