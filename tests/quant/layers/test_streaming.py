"""Streamed layers: which are offloaded, whose parameters a call gets, and what reads and writes the ring in which order.

Without a GPU, a simulated one runs the two streams' work as late and in as unfortunate an order as their events allow.
"""

import contextlib
import copy
import gc
import pickle
import random
import threading
import weakref

import pytest
import torch
from comfyui_svdquant.quant.layers import kept_memory, layout, linear
from comfyui_svdquant.quant.layers.streaming import ALIGNMENT, WeightStream, block_bytes, offload_order, ring_bytes

from ..allocations import Recorder
from .test_linear import filled

SIZES = (256, 208), (128, 64), (512, 128), (128, 512), (256, 256), (128, 128), (256, 64)  # (in features, out features)
X = torch.zeros(1)


class Event:
    done = False

    def record(self, stream):
        stream.work.append(("record", self))


class Stream:
    def __init__(self, device=None):
        self.work = []
        GPU.streams.append(self)

    def wait_event(self, event):
        self.work.append(("wait", event))

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        self.wait_event(event)

    def ready(self):
        return bool(self.work) and (self.work[0][0] != "wait" or self.work[0][1].done)

    def advance(self):
        kind, what = self.work.pop(0)
        if kind == "record":
            what.done = True
        elif kind == "run":
            what()


class GPU:
    """The part of torch.cuda that a WeightStream uses."""

    Event, Stream = Event, Stream
    streams = []
    capturing = False

    def __init__(self):
        GPU.streams = []
        self.compute = Stream()

    def current_stream(self, device):
        return self.compute

    def is_current_stream_capturing(self):
        return self.capturing

    def stream(self, stream):
        return contextlib.nullcontext()

    def advance(self, dice):
        """One piece of work of a stream; False if nothing is left. A deadlock fails."""
        ready = [stream for stream in GPU.streams if stream.ready()]
        assert ready or not any(stream.work for stream in GPU.streams)
        if ready:
            dice.choice(ready).advance()
        return bool(ready)

    def synchronize(self, device=None):
        while self.advance(random):
            pass


class Simulated(WeightStream):
    """Copies run when the simulated GPU gets to them."""

    def __init__(self, layers, ring_layers=5):
        self.pinned, self.misses = [], 0
        super().__init__(self.page_lock, self.page_unlock, GPU())
        self.fit(torch.device("cpu"), ring_layers * max(map(block_bytes, layers)))

    def page_lock(self, tensor):
        self.pinned.append(tensor.data_ptr())
        return True

    def page_unlock(self, tensor):
        self.pinned.remove(tensor.data_ptr())

    def _copy(self, target, source):
        self._copies.work.append(("run", lambda: target.copy_(source)))

    def _take(self, layer):
        slot = super()._take(layer)
        self.misses += slot is None
        return slot


def packed(k, n):
    return filled(linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, k, n, 16, k), "cpu"))


@pytest.fixture
def layers():
    return [packed(*size) for size in SIZES]


def streamed(layers, ring_layers=5):
    stream = Simulated(layers, ring_layers)
    assert all(stream.pin(layer) for layer in layers)
    return stream


def launch(stream, layer, here):
    """A computation that checks the parameters when the simulated GPU gets to it, and keeps no tensor that the layer was given."""
    expected = {name: p.detach().clone() for name, p in layer._parameters.items()}
    places = {name: (tensor.data_ptr() - stream._ring.data_ptr(), tensor.nbytes) for name, tensor in here.items()}
    ring = stream._ring

    def check():
        for name, (start, nbytes) in places.items():
            found = ring[start:start + nbytes].view(expected[name].dtype).view(expected[name].shape)
            assert torch.equal(found, expected[name]), name

    stream.gpu.compute.work.append(("run", check))


def call(stream, layer):
    here = layer.streamed.at(layer._parameters, X)
    if here is not None:
        launch(stream, layer, here)
    return here


# --- the order of offloading -------------------------------------------------------------------------------------------


def flux_sizes():
    double = {"img_mod.lin": 28, "img_attn.qkv": 14, "img_attn.proj": 5, "img_mlp.0": 19, "img_mlp.2": 19}
    single = {"linear1": 34, "linear2": 24, "modulation.lin": 14}
    return ({f"model.double_blocks.{i}.{name}": size for i in range(19) for name, size in double.items()}
            | {f"model.single_blocks.{i}.{name}": size for i in range(38) for name, size in single.items()})


def test_every_number_of_offloaded_layers_is_spread_over_the_blocks():
    sizes = flux_sizes()
    order = offload_order(sizes)
    assert sorted(order) == sorted(sizes)
    offloaded = dict.fromkeys((".".join(name.split(".")[:3]) for name in sizes), 0)
    whole = {block: sum(size for name, size in sizes.items() if name.startswith(f"{block}.")) for block in offloaded}
    for place, name in enumerate(order):
        offloaded[".".join(name.split(".")[:3])] += sizes[name]
        partly = [size for block, size in offloaded.items() if size < whole[block]]
        assert not partly or max(offloaded.values()) - min(partly) <= 34
        if place == 7:  # 57 blocks in bit-reversed order: one of each eighth
            assert [i for i, size in enumerate(offloaded.values()) if size] == list(range(0, 57, 8))


def test_layers_without_a_number_are_blocks_of_their_own():
    assert offload_order({"a": 3, "b.c": 2, "b.d": 1}) == ["a", "b.d", "b.c"]
    assert offload_order({}) == []


# --- the ring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring_layers", [1, 2, 3, 5, 12])
def test_no_read_and_no_write_is_early(layers, ring_layers):
    """Whole steps, skipped layers, two layers at once and tensors that are kept, at every size of the ring."""
    for seed in range(25):
        dice = random.Random(seed)
        stream = streamed(layers, ring_layers)
        kept = []
        for _ in range(12):
            step = list(layers)
            if dice.random() < 0.3:
                step = dice.sample(layers, dice.randrange(1, len(layers) + 1))
            for layer in step:
                here = layer.streamed.at(layer._parameters, X)
                if here is not None:
                    kept.append((layer, here))
                while kept and dice.random() < 0.7:
                    launch(stream, *kept.pop(dice.randrange(len(kept))))
                if dice.random() < 0.1:
                    stream.forget()
                del here
                for _ in range(dice.randrange(8)):
                    stream.gpu.advance(dice)
        kept.clear()
        while stream.gpu.advance(dice):
            pass
        for layer in layers:
            stream.unpin(layer)
        assert stream.pinned == []


def test_the_second_step_waits_for_no_copy_of_its_own(layers):
    stream = streamed(layers, ring_layers=3)
    for step in range(4):
        for layer in layers:
            assert call(stream, layer) is not None
        if step == 0:
            assert stream.misses == len(layers)
    assert stream.misses == len(layers) + 1  # the first step does not know which layer the second one begins with
    for layer in layers[::-1]:  # another order, learned in a step
        call(stream, layer)
    known = stream.misses
    for layer in layers[::-1] * 2:
        call(stream, layer)
    assert stream.misses <= known + 1


def test_both_layers_of_an_mlp_are_there_at_once(layers):
    stream = streamed(layers, ring_layers=3)
    for _ in range(3):
        first, second = (layers[2].streamed.at(layers[2]._parameters, X), layers[3].streamed.at(layers[3]._parameters, X))
        launch(stream, layers[2], first)
        launch(stream, layers[3], second)
        del first, second
        call(stream, layers[0])
    stream.gpu.synchronize()


def test_without_room_the_layer_copies_its_parameters_itself(layers):
    stream = streamed(layers, ring_layers=1)
    kept = call(stream, layers[2])
    assert layers[3].streamed.at(layers[3]._parameters, X) is None
    del kept
    assert call(stream, layers[3]) is not None
    stream.size, stream._slots = ALIGNMENT, type(stream._slots)()
    assert call(stream, layers[2]) is None


def test_a_full_gpu_is_asked_once_for_a_ring(layers, monkeypatch):
    """Each attempt empties PyTorch's cache, and the layers of a step are hundreds. The next load tries again."""
    stream, attempts, empty = streamed(layers), [], torch.empty

    def full(*args, **kwargs):
        if args == (stream.size,):
            attempts.append(args)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        assert [call(stream, layer) for layer in layers] == [None] * len(layers) and len(attempts) == 1
    assert call(stream, layers[0]) is None
    stream.forget()
    assert call(stream, layers[0]) is not None
    stream.gpu.synchronize()


def test_a_replaced_parameter_is_used(layers):
    stream = streamed(layers)
    for _ in range(2):
        for layer in layers:
            call(stream, layer)
    layer = layers[0]
    layer.bias = torch.nn.Parameter(torch.rand_like(layer.bias), requires_grad=False)
    here = layer.streamed.at(layer._parameters, X)
    stream.gpu.synchronize()
    assert torch.equal(here["bias"], layer.bias) and torch.equal(here["weight"], layer.weight) and list(here) == list(layer._parameters)
    layer.bias = None
    assert layer.streamed.at(layer._parameters, X)["bias"] is None


def test_a_change_in_place_is_used_after_forget(layers):
    stream = streamed(layers)
    for _ in range(2):
        for layer in layers:
            call(stream, layer)
    stream.gpu.synchronize()
    assert stream._waiting and stream._waiting[0].layer() is layers[0].streamed
    layers[0].bias.data.add_(1)
    stream.forget()
    call(stream, layers[0])
    stream.gpu.synchronize()


def test_a_change_in_place_after_forget_does_not_reach_launched_calls(layers):
    """The GPU may be behind: the copies of earlier calls have still to read the parameters."""
    stream = streamed(layers)
    for _ in range(2):
        for layer in layers:
            call(stream, layer)
    stream.forget()
    for layer in layers:
        layer.bias.data.add_(1)
    stream.gpu.synchronize()


def test_the_layer_copies_its_parameters_itself_where_a_ring_is_unsafe(layers, monkeypatch):
    stream = streamed(layers)
    layer = layers[0]
    assert call(stream, layer) is not None
    stream.gpu.capturing = True
    assert call(stream, layer) is None
    stream.gpu.capturing = False
    assert layer.streamed.at(layer._parameters, torch.zeros(1, requires_grad=True)) is None
    assert layer.streamed.at(layer._parameters, torch.zeros(1, device="meta")) is None
    compute, stream.gpu.compute = stream.gpu.compute, Stream()
    assert call(stream, layer) is None
    stream.gpu.compute = compute
    found = []
    with stream._lock:
        thread = threading.Thread(target=lambda: found.append(call(stream, layer)))
        thread.start()
        thread.join()
    assert found == [None] and call(stream, layer) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.streamed.at(layer._parameters, X) is None


def test_released_memory_is_not_written_again(layers):
    stream = streamed(layers)
    for _ in range(2):
        for layer in layers:
            call(stream, layer)
    ring = weakref.ref(stream._ring.untyped_storage())
    stream.release()
    stream.gpu.synchronize()
    gc.collect()
    assert ring() is None
    stream.fit(stream.device, stream.size)
    assert call(stream, layers[0]) is not None
    stream.gpu.synchronize()
    stream.fit(stream.device, 2 * stream.size)
    assert stream._ring is None
    assert call(stream, layers[0]) is not None and stream._ring.nbytes == stream.size
    stream.gpu.synchronize()


def test_a_traced_layer_copies_its_parameters_itself(layers):
    streamed(layers)
    layer = layers[0]
    traced = torch.compile(lambda x: x + (1 if layer.streamed.at(layer._parameters, x) is None else 2), backend="eager", fullgraph=True)
    assert traced(X) == 1


# --- host memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_pinning_changes_no_parameter(inference):
    with torch.inference_mode(inference):
        layer = packed(256, 208)
        layer.act_bits = 8
        layer.prepare(X.device)
        known = layer._row_scale
    before = {name: (p, p.detach().clone()) for name, p in layer._parameters.items()}
    stream = Simulated([layer])
    with torch.inference_mode(not inference):
        assert stream.pin(layer) and stream.pin(layer) and len(stream.pinned) == 1
    addresses = {name: p.data_ptr() for name, p in layer._parameters.items()}
    assert all(layer._parameters[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    assert all(p.is_inference() is inference and torch.equal(p.t(), value.t()) for p, value in before.values() if p.ndim == 2)
    assert layer._row_scale is known and known.is_of(layer.weight_scale)
    assert layer.streamed.memory.nbytes == block_bytes(layer) and ring_bytes([layer, packed(128, 64)]) == 5 * block_bytes(layer)
    stream.unpin(layer)
    stream.unpin(layer)
    assert layer.streamed is None and stream.pinned == []
    # Pinned again, the parameters stay where they are.
    assert stream.pin(layer) and addresses == {name: p.data_ptr() for name, p in layer._parameters.items()}
    layer.weight_scale.data = layer.weight_scale.data.clone()
    stream.unpin(layer)
    assert stream.pin(layer) and layer.weight.data_ptr() != addresses["weight"]
    assert all(torch.equal(layer._parameters[name], value) for name, (p, value) in before.items())


def test_refused_memory_changes_nothing():
    layer = packed(128, 64)
    addresses = [p.data_ptr() for p in layer.parameters()]
    stream = Simulated([layer])
    stream._pin = lambda tensor: False
    assert not stream.pin(layer) and layer.streamed is None and addresses == [p.data_ptr() for p in layer.parameters()]
    assert not Simulated([layer]).pin(layer.to("meta"))


def test_a_dropped_model_unpins_its_memory():
    layer = packed(128, 64)
    stream = Simulated([layer])
    stream.pin(layer)
    call(stream, layer)
    assert stream.pinned
    del layer
    assert stream.pinned == []


def test_a_copy_of_a_layer_is_not_streamed():
    layer = packed(128, 64)
    stream = streamed([layer])
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert made.streamed is None and torch.equal(made.weight, layer.weight)
    assert layer.streamed is not None and stream.pinned
    made = copy.deepcopy(WeightStream(page_lock, page_unlock))
    assert made._ring is None and made._pin is page_lock and made.gpu is torch.cuda


# --- a GPU ---------------------------------------------------------------------------------------------------------


def page_lock(tensor):
    return int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1)) == 0


def page_unlock(tensor):
    return int(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())) == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("inference_mode")
def test_streamed_layers_compute_the_same_bits():
    """Large layers, beside computations that keep the GPU behind and others that keep it waiting, in changing orders."""
    sizes = (3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 6144)
    specs = [layout.LayerSpec(layout.SVDQUANT, k, n, 32, k) for k, n in sizes]
    layers = [filled(linear.SVDQuantLinear(spec, "cpu")) for spec in specs for _ in range(3)]
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = [torch.randn(256, layer.in_features, device=device, dtype=torch.bfloat16) for layer in layers]
    expected = [layer(x) for layer, x in zip(layers, inputs)]  # each call copies the parameters
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    stream = WeightStream(page_lock, page_unlock)
    stream.fit(device, ring_bytes(layers))
    assert all(map(stream.pin, layers))
    busy, dice = torch.randn(4096, 4096, device=device), random.Random(0)
    for _ in range(30):
        step = list(range(len(layers)))
        if dice.random() < 0.3:
            dice.shuffle(step)
        for i in step:
            if dice.random() < 0.2:
                busy @ busy
            if dice.random() < 0.02:
                torch.cuda.synchronize()
            y = layers[i](inputs[i])
            expected[i].copy_(torch.where(y == expected[i], expected[i], torch.nan))  # compared without waiting for the GPU
    assert not any(wanted.isnan().any() for wanted in expected)
    assert torch.cuda.memory_allocated() - held <= stream.size + 4 * busy.nbytes
    stream.release()
    for layer in layers:
        stream.unpin(layer)
    del busy, y
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + (64 << 20)


def test_the_ring_outlives_the_step_that_makes_it(monkeypatch):
    """ComfyUI's allocation graph must not record it."""
    recorder, stream = Recorder(), Simulated([packed(*SIZES[0])])
    monkeypatch.setattr(kept_memory, "context", recorder.pause)
    with recorder:
        assert stream._starts(stream.gpu.compute)
    assert stream._ring is not None and recorder.pauses == 1 and not recorder.rogues()
