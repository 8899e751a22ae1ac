"""Streaming a model's blocks: each block gets the same inputs as in an ordinary forward, and the model doesn't change."""

from contextlib import contextmanager

import pytest
import torch
from comfyui_svdquant.quant.quantizer import calibration


class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(8, 8)

    def forward(self, img, txt, vec):
        img += self.lin(img) * vec
        txt += self.lin(txt)
        return img, txt


class Single(Double):
    def forward(self, x, vec):
        x += self.lin(x) * vec
        return x


class Model(torch.nn.Module):
    """FLUX's skeleton: double blocks, a concatenation, single blocks; in-place residuals and a control added between."""

    def __init__(self):
        super().__init__()
        self.double_blocks = torch.nn.ModuleList(Double() for _ in range(3))
        self.single_blocks = torch.nn.ModuleList(Single() for _ in range(2))

    def forward(self, img, txt, options=None):
        for block in self.double_blocks:
            img, txt = block(img=img.clone(), txt=txt.clone(), vec=options["scale"])
            img[:, :2] += 0.5
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec=options["scale"])
        return x


def named_blocks(model):
    return [(f"{kind}.{i}", block) for kind in ("double_blocks", "single_blocks")
            for i, block in enumerate(getattr(model, kind))]


def pass_through(name):
    """A block's states, as from families.Family.pass_through."""
    return (lambda img, txt, *args, **kwargs: (img, txt)) if name.startswith("double") else (lambda x, *args, **kwargs: x)


@torch.no_grad()
def test_tensors_that_two_calls_share_are_kept_once():
    """All recorded steps of a prompt share its conditioning, which takes megabytes of host memory."""
    model, txt = Model(), torch.randn(1, 3, 8)
    with calibration.recorded_calls(model, []) as calls:
        for scale in (0.5, 0.5, 2.0):
            model(torch.randn(1, 5, 8), txt.clone(), options={"scale": torch.tensor(scale)})
        model(torch.randn(1, 5, 8), torch.randn(1, 4, 8), options={"scale": torch.tensor(2.0)})
    (images, texts), scales = zip(*(args for args, _ in calls)), [kwargs["options"]["scale"] for _, kwargs in calls]
    assert texts[0] is texts[1] is texts[2] and texts[3].shape == (1, 4, 8) and torch.equal(texts[0], txt)
    assert len({id(image) for image in images}) == 4
    assert [float(scale) for scale in scales] == [0.5, 0.5, 2.0, 2.0] and scales[2] is scales[3]


@torch.no_grad()
def test_every_block_gets_the_inputs_of_an_ordinary_forward():
    torch.manual_seed(0)
    model, blocks = Model(), None
    blocks = named_blocks(model)
    with calibration.recorded_calls(model, []) as calls:
        outputs = [model(torch.randn(1, 5, 8), torch.randn(1, 3, 8), options={"scale": torch.tensor(s)}) for s in (0.5, 2.0)]
    seen = {}
    hooks = [block.lin.register_forward_pre_hook(lambda _m, a, name=name: seen.setdefault(name, []).append(a[0].clone()))
             for name, block in blocks]
    for args, kwargs in calls:
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    runs = dict.fromkeys(seen, 0)
    counters = [block.lin.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1)) for name, block in blocks]
    streamed = list(calibration.stream_blocks(model, calls, calibration.Memory("cpu"), blocks,
                                              lambda name, block: {f"{name}.lin": block.lin}, pass_through))
    for counter in counters:
        counter.remove()
    assert [name for name, _ in streamed] == list(seen)
    for name, stats in streamed:
        inputs = torch.cat([x.reshape(-1, 8) for x in seen[name]])
        found = stats[f"{name}.lin"]
        assert found.tokens == len(inputs)
        assert torch.equal(found.spans()["absmax"], inputs.abs().amax(0))
        assert torch.allclose(found.spans()["rms"], inputs.square().mean(0).sqrt(), rtol=1e-5)
        assert torch.equal(found.sample().sort(0).values, inputs.sort(0).values)
    calls_to_lin = {"double_blocks": 2, "single_blocks": 1}
    assert all(runs[name] == 2 * calls_to_lin[name.split(".")[0]] for name in runs), "each block runs once per call"
    again = [model(*args, **kwargs) for args, kwargs in calls]
    assert all(map(torch.equal, again, outputs)), "the model's outputs don't change"


class SideBySide(Model):
    """Two lists of blocks on two streams, and a list that reads the last outputs of both, as Z-Image has them."""

    def forward(self, img, txt, options=None):
        for block in self.text:
            txt = block(txt.clone(), vec=1.0)
        for block in self.image:
            img = block(img.clone(), vec=options["scale"])
        x = torch.cat((txt, img), 1)
        for block in self.both:
            x = block(x, vec=options["scale"])
        return x

    def __init__(self):
        torch.nn.Module.__init__(self)
        for name in ("text", "image", "both"):
            setattr(self, name, torch.nn.ModuleList(Single() for _ in range(2)))


SOURCES = {"text.1": ("text.0",), "image.1": ("image.0",), "both.0": ("text.1", "image.1"), "both.1": ("both.0",)}


@pytest.mark.parametrize("in_4_bits", [False, True])
@torch.no_grad()
def test_lists_of_blocks_that_run_side_by_side(in_4_bits):
    """in_4_bits: each block's output comes from other weights, as that of a quantized block does."""
    torch.manual_seed(0)
    model, memory = SideBySide(), calibration.Memory("cpu")
    blocks = [(f"{kind}.{i}", block) for kind in ("text", "image", "both") for i, block in enumerate(getattr(model, kind))]
    calls = [((torch.randn(1, 5, 8), torch.randn(1, 3, 8)), {"options": {"scale": s}}) for s in (0.5, 2.0)]

    @contextmanager
    def halved(name, block):
        block.lin.weight *= 0.5
        yield
        block.lin.weight *= 2

    seen = {}
    for name, block in blocks:
        hook = block.lin.register_forward_pre_hook(lambda _m, a: seen.setdefault(name, []).append(a[0].reshape(-1, 8).clone()))
        for args, kwargs in calls:
            model(*args, **kwargs)
        hook.remove()
        block.lin.weight *= 0.5 if in_4_bits else 1
    for _, block in blocks:
        block.lin.weight *= 2 if in_4_bits else 1
    for name, stats in calibration.stream_blocks(model, list(calls), memory, blocks, lambda name, block: {name: block.lin},
                                                 lambda name: lambda x, *args, **kwargs: x, quantized=halved if in_4_bits else None,
                                                 sources=SOURCES):
        assert torch.equal(stats[name].spans()["absmax"], torch.cat(seen[name]).abs().amax(0)), name
        kept = {source for states in memory.states for source in states}
        assert kept <= {"text.0", "text.1", "image.0", "image.1", "both.0"} and len(kept) <= 3, "outputs that nothing reads are released"
    assert memory.states == [{}, {}]


def test_the_model_is_restored_when_calibration_is_cancelled():
    model = Model()
    blocks = named_blocks(model)
    calls = [((torch.randn(1, 5, 8), torch.randn(1, 3, 8)), {"options": {"scale": 1.0}})]
    stream = calibration.stream_blocks(model, calls, calibration.Memory("cpu"), blocks, lambda name, block: {name: block.lin}, pass_through)
    with torch.no_grad():
        next(stream), next(stream)
    stream.close()
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def test_an_error_inside_the_model_reaches_the_caller():
    model = Model()
    calls = [((torch.randn(1, 5, 9), torch.randn(1, 3, 9)), {"options": {"scale": 1.0}})]
    with pytest.raises(RuntimeError, match="shapes"):
        next(calibration.stream_blocks(model, calls, calibration.Memory("cpu"), named_blocks(model),
                                        lambda name, block: {name: block.lin}, pass_through))


def test_the_sample_has_tokens_of_every_call_and_stays_small():
    stats = calibration.InputStats(expected_calls=16)
    for i in range(16):
        stats.add(torch.full((4096, 4), float(i)))
    sample = stats.sample()
    assert len(sample) <= calibration.SAMPLE_TOKENS and sample[:, 0].unique().tolist() == list(range(16))


def test_only_every_nth_call_is_kept():
    model = torch.nn.Identity()
    with calibration.recorded_calls(model, [], every=3) as calls:
        for i in range(8):
            model(torch.tensor(i))
    assert [int(args[0]) for args, _ in calls] == [0, 3, 6]


def test_a_call_that_skips_a_block_is_left_out_from_there_on():
    class Skipping(Model):
        def forward(self, img, txt, options=None):
            blocks = self.double_blocks[:1] if options.get("skip") else self.double_blocks
            for block in blocks:
                img, txt = block(img=img.clone(), txt=txt.clone(), vec=options["scale"])
            return torch.cat((txt, img), 1)

    model = Skipping()
    blocks = named_blocks(model)[:3]

    def call(skip):
        return (torch.randn(1, 5, 8), torch.randn(1, 3, 8)), {"options": {"scale": 1.0, "skip": skip}}

    def layers(name, block):
        return {name: block.lin}

    with torch.no_grad():
        streamed = calibration.stream_blocks(model, [call(False), call(True)], calibration.Memory("cpu"), blocks, layers, pass_through)
        assert [stats[name].tokens for name, stats in streamed] == [16, 8, 8]
        with pytest.raises(ValueError, match="never ran its block double_blocks.1"):
            list(calibration.stream_blocks(model, [call(True)], calibration.Memory("cpu"), blocks, layers, pass_through))


@torch.no_grad()
@pytest.mark.parametrize("skips", [False, True])
def test_a_group_of_blocks_is_replayed_in_one_forward_to_the_same_bits(skips):
    """Also if a call skips a block of a group, whose blocks are then replayed one by one."""
    class Skipping(Model):
        def forward(self, img, txt, options=None):
            forwards.append(options["scale"])
            for i, block in enumerate(self.double_blocks):
                if not (i == 1 and options["skip"]):
                    img, txt = block(img=img, txt=txt, vec=options["scale"])
                    img[:, :2] += 0.5
            x = torch.cat((txt, img), 1)
            for block in self.single_blocks:
                x = block(x, vec=options["scale"])
            return x

    model, g, forwards = Skipping(), torch.Generator().manual_seed(0), []
    calls = [((torch.randn(1, 5, 8, generator=g), torch.randn(1, 3, 8, generator=g)),
              {"options": {"scale": 1.0 + i, "skip": skips and i == 1}}) for i in range(3)]

    def streamed(last):
        forwards.clear()
        memory = calibration.Memory("cpu")
        stream = calibration.stream_blocks(model, list(calls), memory, named_blocks(model), lambda name, block: {name: block.lin},
                                           pass_through, with_gram=True, last=last)
        found = {name: (*stats[name].spans().values(), stats[name].sample(), stats[name].gram()) for name, stats in stream}
        assert not any(memory.states[-1].values())
        return found, len(forwards)

    (one_by_one, before), (in_groups, after) = streamed(None), streamed({"double_blocks.1", "single_blocks.0"})
    assert list(one_by_one) == list(in_groups) == [name for name, _ in named_blocks(model)]
    assert all(torch.equal(*pair) for name in in_groups for pair in zip(one_by_one[name], in_groups[name]))
    # 3 calls and 5 blocks, in groups of 2, 2 and 1. The blocks that a call skips are replayed again, and then without it.
    assert (before, after) == ((3 + 3 + 2 * 3, 3 + 6 + 2 + 2) if skips else (15, 9))


@torch.no_grad()
def test_a_group_that_has_no_room_is_replayed_block_by_block(monkeypatch):
    """The states and statistics stay on the device, whose room several blocks' statistics together have used up."""
    model, memory, replay, sizes = Model(), calibration.Memory("cpu"), calibration._replay, []
    calls = [((torch.randn(1, 5, 8), torch.randn(1, 3, 8)), {"options": {"scale": 1.0}})]

    def small(*args):
        sizes.append(len(args[5]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return replay(*args)

    monkeypatch.setattr(calibration, "_replay", small)
    stream = calibration.stream_blocks(model, calls, memory, named_blocks(model), lambda name, block: {name: block.lin}, pass_through,
                                       last={"double_blocks.1"})
    assert [name for name, stats in stream if stats[name].tokens == 8] == [name for name, _ in named_blocks(model)]
    assert sizes == [2, 1, 1, 3, 1, 1, 1] and memory.level == 0 and not memory.notes


def test_a_forward_that_is_set_on_a_module_stays():
    model = Model()
    block = model.double_blocks[0]
    own = block.forward = block.forward
    calls = [((torch.randn(1, 5, 8), torch.randn(1, 3, 8)), {"options": {"scale": 1.0}})]
    with torch.no_grad():
        list(calibration.stream_blocks(model, calls, calibration.Memory("cpu"), named_blocks(model),
                                        lambda name, block: {name: block.lin}, pass_through))
    assert block.__dict__["forward"] is own


class FakeDevice:
    """Replaces the CUDA calls of calibration: it records their order, and multiplies or raises."""

    def __init__(self, monkeypatch, product=None, pending=None):
        self.calls, self.product, self.pending = [], product, pending
        ones = torch.ones(16, 16)
        monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: ones)
        monkeypatch.setattr(torch, "mm", self.mm)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def mm(self, *_, out_dtype):
        self.calls.append("mm")
        if isinstance(self.product, Exception):
            raise self.product
        return torch.empty(0, dtype=out_dtype)

    def synchronize(self, _device):
        self.calls.append("synchronize")
        if self.pending == len(self.calls):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def sums_in_float32(self):
        return calibration._sums_in_float32.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize(("product", "supported"), [
    (None, True), (TypeError("unexpected keyword argument 'out_dtype'"), False), (NotImplementedError("aten::mm.dtype"), False),
    (RuntimeError("out_dtype is not supported"), False)])
def test_a_product_that_pytorch_lacks_is_found(monkeypatch, product, supported):
    device = FakeDevice(monkeypatch, product)
    assert device.sums_in_float32() is supported
    assert device.calls[:2] == ["synchronize", "mm"]
    assert isinstance(product, TypeError) or device.calls[2:] == ["synchronize"]


FAULTS = [torch.OutOfMemoryError("CUDA out of memory."), *([torch.AcceleratorError("CUDA error: an illegal memory access")]
                                                          if hasattr(torch, "AcceleratorError") else [])]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_device_is_not_taken_for_a_missing_product(monkeypatch, fault):
    with pytest.raises(type(fault)):
        FakeDevice(monkeypatch, fault).sums_in_float32()


@pytest.mark.parametrize("pending", [1, 3])
@pytest.mark.parametrize("product", [None, RuntimeError("out_dtype is not supported")])
def test_a_fault_that_comes_late_is_not_taken_for_a_missing_product(monkeypatch, product, pending):
    """CUDA is asynchronous: a fault of earlier work, or of the product itself, shows when the device is synchronized."""
    with pytest.raises(RuntimeError, match="illegal memory access"):
        FakeDevice(monkeypatch, product, pending).sums_in_float32()


def test_without_cuda_no_product_is_tried(monkeypatch):
    device = FakeDevice(monkeypatch)
    assert calibration._sums_in_float32.__wrapped__(torch.device("cpu")) is False and device.calls == []
