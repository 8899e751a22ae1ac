"""The packed layers without a model: the source of their parameters, and the kernels of a warm-up."""

import copy
import pickle

import pytest
import torch
from comfyui_svdquant.cuda import block_ops, ops, reference, row_scales, targets
from comfyui_svdquant.cuda.choose import W4A16
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.operands import NO_LORA, LayerOperands
from comfyui_svdquant.quant.layers import layout, linear, preparation
from comfyui_svdquant.quant.layers.lora_branch import Dense, LoRABranch, LowRank

from ...cuda.launches import addresses, aligned, recorded

NAMES = {"weight": "weight", "weight_scale": "weight_scale", "weight_proj_down": "proj_down", "weight_proj_up": "proj_up",
         "weight_smooth_factor": "smooth", "bias": "bias"}  # {parameter: the op's argument}


def filled(module):
    for p in module.parameters():
        p.data.copy_(torch.randint(-8, 8, p.shape) if p.dtype == torch.int8 else torch.rand(p.shape) + 0.5)
    return module


@pytest.fixture
def module():
    made = filled(linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, 256, 208, 32, 256), "cpu"))
    made.act_bits = 4
    return made


def test_parameters_that_are_there_are_not_touched():
    module = linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, 128, 64, 16, 128), "cpu")
    here = module.at(torch.zeros(1, 128))
    assert all(here[name] is p for name, p in module._parameters.items()) and here.keys() == module._parameters.keys()
    here["bias"] = None  # as ComfyUI sets an offloaded layer's patched tensors
    assert module.bias is not None
    elsewhere = module.at(torch.zeros(1, 128, device="meta"))
    assert {p.device.type for p in elsewhere.values()} == {"meta"} and list(elsewhere) == list(module._parameters)
    module.weight_scale = torch.nn.Parameter(elsewhere["weight_scale"], requires_grad=False)  # one of them has moved
    assert {p.device.type for p in module.at(torch.zeros(1, 128, device="meta")).values()} == {"meta"}


@pytest.mark.parametrize(("dtype", "computed"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
                                                 (torch.float32, torch.bfloat16)])
def test_warm_up_asks_for_every_kind_of_layer_once(monkeypatch, dtype, computed):
    """A warm-up uses the model's dtype if it has 16 bits, otherwise the layers'. The first number of tokens is the most urgent."""
    asked = []
    monkeypatch.setattr(linear.ops, "warm_up", lambda layers, device, others: asked.append((list(layers), device, others)) or [])
    wide, split = (layout.svdquant_spec(k, 64, 16, 128, True, torch.bfloat16) for k in (128, 256))
    awq = layout.LayerSpec(layout.AWQ, 128, 192)
    model = torch.nn.Sequential(*map(linear.SVDQuantLinear, (wide, wide, split)), linear.AWQLinear(awq), torch.nn.Linear(8, 8))
    preparation.set_act_bits(model, 8)
    model[2].gelu_from, model[1].gated = 64, True
    assert preparation.warm_up(model, torch.device("cpu"), torch.bfloat16, (5,)) == [] and asked == []
    preparation.warm_up(model, torch.device("cuda", 1), dtype, tokens=(70, 5))
    (layers, device, others), = asked
    assert device == torch.device("cuda", 1) and others == []
    lora = NO_LORA
    assert layers == [(1, 192, 128, 0, 128, W4A16, computed), *((m, 64, k, 16, 128, 8, computed, gelu_from, lora, *gated)
                                                                for m in (70, 5) for k, gelu_from, gated in (
                                                                    (128, None, ()), (128, None, (True,)), (256, 64, ())))]


@pytest.mark.parametrize(("number", "dtype", "held"), [
    (89, torch.float16, torch.float16), (89, torch.bfloat16, torch.bfloat16), (89, torch.float32, torch.bfloat16),
    (75, torch.bfloat16, torch.float16), (75, torch.float32, torch.float16), (None, torch.float16, torch.bfloat16)])
def test_layers_in_the_models_type(module, monkeypatch, number, dtype, held):
    """Codes don't change, and the conversion back is exact. Nothing is converted for a GPU without kernels, or on the CPU."""
    def for_device(device):
        if number is None:
            raise KernelsUnavailable("too old")
        return targets.TARGETS[number]

    monkeypatch.setattr(targets, "for_device", for_device)
    awq = linear.AWQLinear(layout.LayerSpec(layout.AWQ, 128, 192), "cpu")
    for p in awq.parameters():
        p.data.copy_(torch.ones(p.shape))
    model = torch.nn.Sequential(module, awq, torch.nn.Linear(8, 8, dtype=torch.bfloat16))
    before = {name: p.clone() for name, p in model.named_parameters()}
    targets.compute_dtype.cache_clear()
    preparation.compute_in(model, dtype, torch.device("cpu"))
    assert all(p.dtype == before[name].dtype for name, p in model.named_parameters())
    preparation.compute_in(model, dtype, torch.device("cuda", 7))
    for name, p in model.named_parameters():
        own = before[name]
        assert p.dtype == (own.dtype if own.dtype == torch.int8 or name.startswith("2.") else held)
        assert torch.equal(p.to(own.dtype), own)
    assert module.spec.dtype == awq.spec.dtype == torch.bfloat16
    stored = linear.AWQLinear(layout.LayerSpec(layout.AWQ, 128, 192, dtype=torch.float16), "cpu")
    preparation.compute_in(stored, dtype, torch.device("cuda", 7))
    assert stored.weight_scale.dtype == torch.float16, "bf16 has less bits"
    targets.compute_dtype.cache_clear()


def present(module):
    return addresses(**{NAMES[name]: p for name, p in module._parameters.items()})


def replaced(module, name):
    setattr(module, name, torch.nn.Parameter(getattr(module, name).clone(), requires_grad=False))


def moved(module, name):
    p = getattr(module, name)
    p.data = p.data.clone()


@pytest.mark.parametrize("change", [replaced, moved])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_get_the_present_parameters(module, monkeypatch, name, change):
    x, old = aligned(torch.randn(5, 256).bfloat16()), []
    with recorded(monkeypatch) as calls:
        for step in range(6):
            if step == 3:
                old.append(getattr(module, name).data)  # kept, so that no new tensor gets its address
                before = present(module)
                change(module, name)
                assert present(module) != before
            y = module(x)
            assert len(calls) == step + 1 and calls[-1].items() >= present(module).items()
            assert calls[-1]["y"] == y.data_ptr() and calls[-1]["x"] == x.data_ptr()


@pytest.mark.parametrize(("kind", "gelu", "joined"), [("none", True, False), ("lora", True, True), ("other", False, True),
                                                      ("gain", False, False)])
def test_warm_up_asks_for_the_kernels_of_a_forward(module, monkeypatch, kind, gelu, joined):
    asked, given = [], []
    monkeypatch.setattr(ops, "warm_up", lambda layers, *others: asked.extend(layers))
    monkeypatch.setattr(ops, "svdquant_linear", lambda x, operands: given.append(operands) or x.new_zeros(*x.shape[:-1], 208))
    module.gelu_from = 64
    module.set_lora_branch(branch := lora_branch(kind))
    preparation.warm_up(module, torch.device("cuda", 0), torch.bfloat16, (5,))
    module(torch.randn(5, 256).bfloat16())
    assert [layer[7:] for layer in asked] == [(given[0].gelu_from, given[0].lora)]
    assert given[0].gelu_from == (64 if gelu else None) and given[0].lora == (branch.lora if joined else NO_LORA)


def test_the_second_call_looks_nothing_up(module, monkeypatch):
    """A cached launch serves the same shape and earlier shapes; each call checks settings, LoRA branches and bias patches."""
    general, op = [], ops.svdquant_linear
    monkeypatch.setattr(ops, "svdquant_linear", lambda *args: general.append(args) or op(*args))
    one, two = (aligned(torch.randn(m, 256).bfloat16()) for m in (5, 6))

    def generals(x):
        before = len(general)
        assert module(x).shape == (*x.shape[:-1], 208)
        return len(general) - before

    with recorded(monkeypatch) as calls:
        assert [generals(x) for x in (one, two, one, two, one[None])] == [1, 1, 0, 0, 1]
        module.act_bits = 8
        assert [generals(one), generals(one)] == [1, 0]
        module.act_bits = 4
        assert [generals(one), generals(one)] == [1, 0]
        for kind, expected in (("lora", [1, 0]), ("lora", [1, 0]), ("other", [1, 0]), ("gain", [1, 1])):
            module.set_lora_branch(lora_branch(kind))
            assert [generals(one), generals(one)] == expected, kind
        module.set_lora_branch(None)
        assert [generals(one), generals(one)] == [1, 0]
        module.bias_function = [torch.neg]
        assert generals(one) == 1
        module.bias_function = []
        assert [generals(one), generals(one[:, :].float()), generals(one)] == [0, 1, 0]
        assert len(calls) == 22  # one input was float32, which has no cached launch
        for m in range(20, 20 + 2 * linear.SHAPES):
            module(aligned(torch.randn(m, 256).bfloat16()))
        assert len(module._launches) <= linear.SHAPES
        assert len(calls) == 22 + 2 * linear.SHAPES


def added(x, n=208):
    """(a residual, a gate) for outputs of a layer."""
    residual, gates = torch.randn(*x.shape[:-1], n).to(x.dtype), torch.randn(1, 1, 3 * n).to(x.dtype)
    return aligned(residual), gates.chunk(3, dim=-1)[1]


@pytest.mark.parametrize("kind", ["none", "lora", "other", "gain"])
def test_a_gated_layer_has_the_bits_of_two_passes(module, kind):
    x = torch.randn(1, 5, 256).bfloat16()
    residual, gate = added(x)
    module.set_lora_branch(lora_branch(kind))
    z = module.add_gated(x, residual, gate)
    assert (z is None) is (kind in ("other", "gain")), "what is added to the layer's own output needs that"
    assert z is None or torch.equal(z, block_ops.gated_residual(residual, module(x), gate)) and not torch.equal(z, residual)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "global hook", "forward", "gelu", "W4A16"])
def test_a_layer_whose_own_output_somebody_needs_is_not_gated(module, monkeypatch, kind):
    x = torch.randn(1, 5, 256).bfloat16()
    if kind == "hook":
        module.register_forward_hook(lambda *args: None)
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda *args: None)
    elif kind == "global hook":
        monkeypatch.setitem(linear.module_hooks._global_forward_hooks, 1, lambda *args: None)
    elif kind == "forward":
        module.forward = lambda x: x
    elif kind == "gelu":
        module.gelu_from = 64
    else:
        module = filled(linear.AWQLinear(layout.LayerSpec(layout.AWQ, 256, 208), "cpu"))
    assert module.add_gated(x, *added(x)) is None


def test_the_second_gated_call_looks_nothing_up(module, monkeypatch):
    """It passes the same addresses as the first. A layer has cached launches for calls with a residual and without one."""
    module.act_bits, x = 8, aligned(torch.randn(1, 70, 256).bfloat16())
    looked, cached = [], ops.cached_launch
    monkeypatch.setattr(ops, "cached_launch", lambda *args: looked.append(args[2]) or cached(*args))
    with recorded(monkeypatch) as calls:
        for branch in (None, lora_branch("lora")):
            module.set_lora_branch(branch)
            looked.clear()
            for _ in range(3):
                module(x)
                assert "residual" not in calls[-1]
                residual, gate = added(x)
                z = module.add_gated(x, residual, gate)
                assert calls[-1].items() >= addresses(x=x, y=z, residual=residual, gate=gate).items()
                kept = {name: address for name, address in present(module).items() if branch is None or name != "proj_down"}
                assert calls[-1].items() >= kept.items() and z.shape == residual.shape
            assert looked == [False, True] and len(module._launches) == 2
        module.bias_function = [torch.neg]
        module.add_gated(x, *added(x))
        assert looked == [False, True, True]


def lora_branch(kind, dtype=torch.bfloat16, rank=32):
    """A LoRA branch of a layer of 208 x 256 and this rank: a LoRA, with another term or with a gain; or none."""
    lora, other = LowRank((64, 192), (0, 256), torch.randn(128, 4), torch.randn(4, 256)), Dense((0, 64), (0, 256), torch.randn(64, 256))
    gain = (torch.rand(208) + 0.5, torch.randn(208)) if kind == "gain" else ()
    terms = [lora, other] if kind == "other" else [lora]
    return None if kind == "none" else LoRABranch.of(terms, (208, 256), dtype, "cpu", rank, *gain)


@pytest.mark.parametrize("kind", ["none", "lora", "other", "gain"])
@pytest.mark.parametrize("form", [layout.SVDQUANT, layout.AWQ])
def test_gelu_comes_after_everything_else(form, kind):
    """The layer's GELU equals a GELU after the layer, up to the rounding between the two."""
    made = linear.SVDQuantLinear if form == layout.SVDQUANT else linear.AWQLinear
    module = filled(made(layout.LayerSpec(form, 256, 208, 32 if form == layout.SVDQUANT else 0, 256), "cpu"))
    module.weight_scale.data.mul_(2.0**-6)
    module.set_lora_branch(lora_branch(kind, torch.float32, module.spec.rank))
    x = torch.randn(5, 256)
    expected = module(x)
    expected[:, 80:] = torch.nn.functional.gelu(expected[:, 80:], approximate="tanh")
    module.gelu_from = 80
    assert torch.equal(module(x), expected)


def test_gelu_is_the_kernels_unless_something_is_added(module, monkeypatch):
    """This holds also when LoRAs are added and removed between cached launches."""
    after, x, activated = [], aligned(torch.randn(5, 256).bfloat16()), reference.activated
    monkeypatch.setattr(reference, "activated", lambda y, gelu_from: after.append(gelu_from) or activated(y, gelu_from))
    module.gelu_from = 128
    with recorded(monkeypatch):
        for kind in ("none", "none", "lora", "other", "other", "none", "lora", "lora", "other", "none"):
            module.set_lora_branch(lora_branch(kind))
            module(x)
            assert module._launches[x.shape].gelu_from == (None if kind == "other" else 128)
            assert after == ([128] if kind == "other" else [])
            after.clear()


def test_a_branch_shares_the_memory_of_proj_down(module, monkeypatch):
    """While a layer has a LoRA, its proj_down is a view of the branch's factor, also after a move, with the same values."""
    monkeypatch.setattr(linear, "SHARING", {"cpu"})
    state = {name: t.clone() for name, t in module.state_dict().items()}
    layout_before = module.weight_proj_down.stride()

    def shares(layer):
        assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
        assert torch.equal(layer.lora_branch.lora_down[:32].t(), layer.weight_proj_down)
        return layer.weight_proj_down.data_ptr() == layer.lora_branch.lora_down.data_ptr()

    branch = lora_branch("lora")
    module.set_lora_branch(branch)
    assert shares(module) and branch.nbytes() == 2 * branch.lora_up.numel() + 2 * 8 * 256 + 4 * 8
    assert shares(module._apply(torch.clone))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        shares(copied)
        copied.set_lora_branch(None)
        assert all(torch.equal(t, state[name]) for name, t in copied.state_dict().items()) and shares(module)
    module.set_lora_branch(lora_branch("gain"))
    assert not shares(module), "its kernels read proj_down itself"
    module.set_lora_branch(None)
    assert module.weight_proj_down.stride() == layout_before
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    with pytest.raises(ValueError, match="The LoRA branch is for a layer of rank 16; this one has rank 32."):
        module.set_lora_branch(lora_branch("lora", rank=16))


@pytest.mark.parametrize("kind", ["none", "lora", "other", "gain"])
def test_kernels_get_operands_in_the_layout_and_the_type_they_read(module, monkeypatch, kind):
    """Kernels take addresses only: a proj_down that they read is contiguous, and all floats are of weight_scale's type."""
    monkeypatch.setattr(linear, "SHARING", {"cpu"})
    given, svdquant_linear = [], ops.svdquant_linear
    monkeypatch.setattr(ops, "svdquant_linear", lambda x, operands: given.append(operands) or svdquant_linear(x, operands))
    for parameter in module.parameters():  # as preparation.compute_in does
        parameter.data = parameter.data.half() if parameter.dtype == torch.bfloat16 else parameter.data
    module.set_lora_branch(lora_branch(kind, torch.float16))
    module(torch.randn(5, 256).half())
    operands, = given
    assert operands.lora_down is not None or operands.proj_down.is_contiguous()
    tensors = {name: t for name in ops.FLOATS if (t := getattr(operands, name)) is not None}
    assert {name: t.dtype for name, t in tensors.items()} == dict.fromkeys(tensors, torch.float16)


@pytest.mark.parametrize("sharing", [{"cpu"}, set()])
def test_a_layer_with_a_lora_is_moved_outside_of_inference_mode(module, monkeypatch, sharing):
    """ComfyUI makes LoRA branches in inference mode. Nodes that train models have ComfyUI move layers outside of it."""
    monkeypatch.setattr(linear, "SHARING", sharing)
    with torch.inference_mode():
        module.set_lora_branch(lora_branch("lora"))
    before = module.weight_proj_down.clone()
    module.to("cpu")
    assert torch.equal(module.weight_proj_down, before) and torch.equal(module.lora_branch.lora_down[:32].t(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_branch_has_the_proj_down_of_a_state_dict(module, assign):
    module.set_lora_branch(lora_branch("lora"))
    state = module.state_dict() | {"weight_proj_down": torch.randn(256, 32).bfloat16()}
    module.load_state_dict(state, assign=assign)
    assert torch.equal(module.lora_branch.lora_down[:32].t(), state["weight_proj_down"])


def test_in_host_memory_nothing_is_shared(module):
    """There the parameters keep their layout, which streaming needs, and the branch counts its copy of proj_down."""
    address, branch = module.weight_proj_down.data_ptr(), lora_branch("lora")
    module.set_lora_branch(branch)
    assert module.weight_proj_down.data_ptr() == address and torch.equal(branch.lora_down[:32].t(), module.weight_proj_down)
    assert branch.nbytes() == 2 * branch.lora_up.numel() + 2 * (32 + 8) * 256 + 4 * 8


def test_copies_are_layers_of_their_own(module, monkeypatch):
    """Copies of a layer that has run: by copy, and through a file."""
    x = aligned(torch.randn(5, 256).bfloat16())
    with recorded(monkeypatch) as calls:
        module(x)
        module.row_scale(module.weight_scale)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other._row_scale is None and not other._launches and module._launches
            for _ in range(2):
                other(x)
                assert calls[-1].items() >= present(other).items() and present(other) != present(module)


def test_row_scale_is_that_of_the_present_scales(module, monkeypatch):
    """Computed once per parameter, also if it is moved; again for another parameter or other contents."""
    found = []
    monkeypatch.setattr(linear.row_scales, "row_scale", lambda s, real=row_scales.row_scale: found.append(s) or real(s))

    def fresh():
        before = len(found)
        value = module.row_scale(module.weight_scale)
        assert torch.equal(value, found[-1].float().abs().amax(dim=0) * 0 + value)
        return len(found) - before, value

    assert fresh()[0] == 1 and fresh()[0] == 0
    moved(module, "weight_scale")
    assert fresh()[0] == 0
    module.load_state_dict({name: 2 * p if name == "weight_scale" else p for name, p in module.state_dict().items()})
    assert len(found) == 2 and fresh()[0] == 0, "computed when the weights were loaded"
    module.weight_scale = torch.nn.Parameter(4 * module.weight_scale.data, requires_grad=False)
    assert fresh()[0] == 1 and fresh()[0] == 0
    assert torch.equal(fresh()[1], row_scales.row_scale(module.weight_scale))


def test_made_in_inference_mode():
    """ComfyUI loads models in inference mode, where PyTorch doesn't count the writes to parameters."""
    with torch.inference_mode():
        module = filled(linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, 256, 208, 32, 256), "cpu"))
        first = module.row_scale(module.weight_scale)
        assert module.row_scale(module.weight_scale) is first
        replaced(module, "weight_scale")
        assert module.row_scale(module.weight_scale) is not first


@pytest.mark.parametrize("act_bits", [4, 8])
def test_one_graph_under_torch_compile(module, act_bits):
    module.act_bits, x = act_bits, torch.randn(5, 256).bfloat16()
    expected = module(x)
    module.row_scale(module.weight_scale)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    args = {argument: module._parameters[name] for name, argument in NAMES.items()}
    assert torch.equal(expected, reference.svdquant_linear(x, LayerOperands(unsigned_from=256, act_bits=act_bits, **args)))


def test_other_sizes_come_after_the_usual_ones():
    assert preparation.of_other_sizes((4096, 512, 4608)) == (4096, 512, 4608, 1024, 256, 2304, 9216, 16384, 1536, 768, 2816, 9728, 16896)
