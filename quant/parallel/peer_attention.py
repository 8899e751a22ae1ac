"""Attention over tokens that are divided among processes (all_to_all.py), whose exchanges are writes into the other GPUs' memory.

A GPU's kernel (cuda/kernels/put.cu) writes q, k and v of the others' heads, and later the outputs of their tokens, where attention and the
model read them. NCCL moves the same bytes through buffers of its own at a third of NVLink's speed, and the model packs and unpacks them.

No process overwrites what another one still reads, without any further message. q, k and v of a block arrive where those of the last block
lay: their sender has the last block's outputs from all processes, and a process sends an output once its attention has read q, k and v.
Outputs of a block arrive where those of the last block lay: their sender has this block's q, k and v from all processes, and a process
sends these once it has read the last block's outputs, since a stream runs in order. So the result of `attend` is valid until the next
call. This holds for calls of any sizes, since outputs never arrive where q, k and v do.
"""

import logging
import os
import time
from typing import NamedTuple

import torch

from ...cuda import peer_memory, put, targets
from ...cuda.errors import KernelsUnavailable
from . import all_to_all

TO_HEADS, TO_TOKENS = range(2)  # channels of put.cu: of q, k and v, and of the outputs
OFF = "NCCL_P2P_DISABLE"  # NCCL's variable for machines whose GPUs can't reach each other although they say so
DEVICE = "cuda"  # type of the devices that reach each other's memory
MESSAGES = 2  # groups that NCCL exchanges; smaller ones take longer than they hide
TILE = 128  # rows of q that attention functions take at once
ALIGNMENT = 256  # bytes, of what attention and the model read
ROUNDED = 2 << 20  # bytes; CUDA shares memory in pieces of this size
TRY_SECONDS = 20  # until the first exchange must have arrived

log = logging.getLogger(__name__)


class Room(NamedTuple):
    """peer_memory.PeerMemory, in which put.CONTROL bytes come first, then room for outputs, then for q, k and v, in bytes."""

    memory: peer_memory.PeerMemory
    outputs: int
    heads: int


class Plan(NamedTuple):
    """The exchange of one kind of call.

    arrivals: [(q, k, v), each (B, h, all tokens, D), of a group of heads]; returned: (B, own tokens, H * D); to_heads, to_tokens: [what a
    put writes of the group, as of put.table]; distances: of put.put, for the two; step: heads of a group; control: address of this
    process's memory; stopped: int32 in pinned memory, not 0 once nothing is waited for any more; side: the stream of what travels while
    attention runs.
    """

    arrivals: list
    returned: torch.Tensor
    to_heads: list
    to_tokens: list
    distances: tuple
    step: int
    control: int
    stopped: torch.Tensor
    side: object

    def send_heads(self, qkv, group):
        """Write q, k and v (B, H, own tokens, D) of a group of each process's heads where their attention reads them, and wait for those of
        this process's."""
        put.put(qkv, self.step, self.to_heads[group], self.distances[TO_HEADS], self.control, self.stopped.data_ptr(), TO_HEADS, 1,
                beside=group > 0)

    def send_output(self, out, group, count=0):
        """Write the output (B, all tokens, h * D) of a group of this process's heads where each process wants that of its tokens, and wait
        for `count` more groups of each process."""
        put.put([out.unsqueeze(1)], 1, self.to_tokens[group], self.distances[TO_TOKENS], self.control, self.stopped.data_ptr(), TO_TOKENS,
                count, beside=group < len(self.arrivals) - 1)


class Peers:
    """The memory of all processes of one parallel.ranks.Ranks. It belongs to the Ranks, whose processes call `plan` alike."""

    def __init__(self):
        self.rooms, self.plans, self.refused = [], {}, os.environ.get(OFF, "0") not in ("", "0")
        self.stopped = None  # int32 in pinned memory, which every wait looks at
        self.multiprocessors = None  # SMs of the GPU with the fewest

    def stop(self):
        """End every wait of this GPU for the others, from any thread. Everything that is computed from then on is without meaning."""
        if self.stopped is not None:
            with torch.inference_mode():  # it may be an inference tensor, which nothing else may write to
                self.stopped.fill_(1)

    def plan(self, every, q, division, groups):
        """The Plan of a call of `attend` with this q, or None in all processes if they can't have one."""
        if (self.refused or not q.device.type == every.device.type == DEVICE or every.size > put.RANKS
                or q.shape[3] * q.element_size() % put.PIECE):
            return None
        key = tuple(q.shape[:2]), q.shape[3], q.dtype, q.device, groups, *division.parts
        if key not in self.plans:
            room = self.room(every, *needed(q, division), q.device)
            self.plans[key] = room and planned(room, q, division, groups, self.multiprocessors, self.stopped)
        return self.plans[key]

    def room(self, every, outputs, heads, device):
        """A Room of at least these bytes, or None in all processes. The first one is tried out."""
        found = next((room for room in self.rooms if room.outputs >= outputs and room.heads >= heads), None)
        if found is None:
            memory, why = shared(every, -(-(put.CONTROL + outputs + heads) // ROUNDED) * ROUNDED, device)
            found = memory and Room(memory, outputs, heads)
            if found is not None and self.stopped is None:
                self.stopped = torch.zeros(1, dtype=torch.int32, pin_memory=True)
                self.multiprocessors = min(every.gathered(targets.multiprocessors(device)))
                if not all(every.gathered(arrives(self, every, memory, device))):
                    found, why = None, "what was written did not arrive"
            if found is None:
                self.refused = True
                log.info("The GPUs exchange attention's inputs by NCCL, since they can't write to each other's memory: %s.", why)
            else:
                self.rooms.append(found)
        return found


def attend(every, q, k, v, division, attention, groups=1):
    """all_to_all.attend, by the processes' memory where they reach it. Its result is valid until the next call. every: the run's
    parallel.ranks.Ranks."""
    plan = every.peers.plan(every, q, division, groups)
    if plan is None:
        return all_to_all.attend(q, k, v, division, attention, min(groups, MESSAGES))
    return by_plan(plan, q, k, v, division, attention)


def by_plan(plan, q, k, v, division, attention):
    """`attend` by a Plan."""
    qkv, groups = [x if put.fits(x) else x.contiguous() for x in (q, k, v)], len(plan.arrivals)
    first = division.rank * (q.shape[1] // division.size)
    main, arrived, outputs = torch.cuda.current_stream(q.device), [], []
    plan.send_heads(qkv, 0)
    if groups > 1:
        plan.side.wait_stream(main)
        with torch.cuda.stream(plan.side):
            for group in range(1, groups):
                plan.send_heads(qkv, group)
                arrived.append(plan.side.record_event())
    for group, arrival in enumerate(plan.arrivals):
        if group:
            main.wait_event(arrived[group - 1])
        begin = first + group * plan.step
        outputs.append(attention(*arrival, slice(begin, begin + plan.step)).to(q.dtype).contiguous())
        if group < groups - 1:
            plan.side.wait_stream(main)
            with torch.cuda.stream(plan.side):
                plan.send_output(outputs[group], group)  # `outputs` keeps it until this stream has waited for that one
    if groups > 1:
        main.wait_stream(plan.side)
    plan.send_output(outputs[-1], groups - 1, groups)
    return plan.returned


def fitting_groups(tiles, heads, groups, multiprocessors):
    """The number of groups, at most `groups`, that `heads` heads form evenly and whose attention takes no more waves than that of all at
    once. tiles: of a head; multiprocessors: SMs of the GPU, of which each takes a tile at a time."""
    def waves(count):
        return count * -(-tiles * heads // count // multiprocessors)

    return next(count for count in range(groups, 0, -1) if heads % count == 0 and waves(count) <= waves(1))


def needed(q, division):
    """(bytes of outputs, bytes of q, k and v) that arrive for q (B, H, own tokens, D), alike in all processes."""
    b, heads, _, d = q.shape
    row = b * heads * d * q.element_size()
    return -(-row * max(division.tokens) // ALIGNMENT) * ALIGNMENT, 3 * row // division.size * sum(division.tokens)


def planned(room, q, division, groups, multiprocessors, stopped):
    """The Plan in a Room. multiprocessors: as of fitting_groups."""
    memory, (b, heads, _, d) = room.memory, q.shape
    size, me, own, all_tokens = division.size, division.rank, division.tokens[division.rank], sum(division.tokens)
    groups = fitting_groups(b * -(-all_tokens // TILE), heads // size, groups, multiprocessors)
    step, head = heads // size // groups, d * q.element_size()
    before = [sum(division.tokens[:rank]) for rank in range(size + 1)]
    token = 3 * step * head
    group = b * all_tokens * token  # bytes of a group's q, k and v
    to_heads, to_tokens, arrivals = [], [], []
    for each in range(groups):
        begin = put.CONTROL + room.outputs + each * group
        to_heads.append(put.table([
            put.Destination(address + begin + before[me] * token, put.flag_of(address, TO_HEADS, me), all_tokens * token,
                            rank * (heads // size) + each * step, 0, own)
            for rank, address in enumerate(memory.addresses)], q.device))
        to_tokens.append(put.table([
            put.Destination(address + put.CONTROL + (me * (heads // size) + each * step) * head, put.flag_of(address, TO_TOKENS, me),
                            division.tokens[rank] * heads * head, 0, before[rank], division.tokens[rank])
            for rank, address in enumerate(memory.addresses)], q.device))
        arrived = memory.part(begin, group).view(q.dtype).view(b, all_tokens, 3, step, d)
        arrivals.append(arrived.permute(2, 0, 3, 1, 4).unbind(0))
    returned = memory.part(put.CONTROL, b * own * heads * head).view(q.dtype).view(b, own, heads * d)
    return Plan(arrivals, returned, to_heads, to_tokens, ((token, step * head), (heads * head, 0)), step, memory.address,
                stopped, torch.cuda.Stream(q.device) if groups > 1 else None)


def shared(every, size, device):
    """(PeerMemory of `size` bytes that all processes have mapped, None); or (None, why not) in all processes."""
    memory, handle, why = None, None, None
    try:
        memory = peer_memory.PeerMemory(size, device)
        handle = memory.handle()
    except (RuntimeError, AttributeError) as error:
        why = str(error)
    found = every.gathered((handle, why))
    if all(handle is not None for handle, _ in found):
        why = None
        try:
            memory.map([handle for handle, _ in found], every.rank)
        except RuntimeError as error:
            why = str(error)
        found = every.gathered((True, why))
    why = next((why for _, why in found if why is not None), None)
    return (memory, None) if why is None else (None, why)


def arrives(peers, every, memory, device):
    """Whether small exchanges give what messages give. It ends after TRY_SECONDS also where nothing arrives."""
    division = all_to_all.Division((every.size + 1, 3 * every.size), every.rank, every.size)
    heads, own = 2 * every.size, division.tokens[every.rank]
    g = torch.Generator().manual_seed(every.rank)
    q, k, v = (torch.randn(2, heads, own, 32, generator=g).half().to(device) for _ in range(3))

    def attention(q, k, v, own):
        return (q - 2 * k + v).transpose(1, 2).flatten(2)

    expected = all_to_all.attend(q, k, v, division, attention)
    found = []
    try:
        plan = planned(Room(memory, *needed(q, division)), q, division, 2, 1, peers.stopped)
        for _ in range(2):
            found.append(by_plan(plan, q, k, v, division, attention).clone())
        event = torch.cuda.Event()
        event.record()
    except (RuntimeError, KernelsUnavailable) as error:
        log.info("Writing to the other GPUs' memory: %s", error)
        peers.stop()
        return False
    until = time.monotonic() + TRY_SECONDS
    while not event.query() and time.monotonic() < until:
        time.sleep(0.001)
    if not event.query():
        peers.stop()
        return False
    return all(torch.equal(each, expected) for each in found)
