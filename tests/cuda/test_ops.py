"""The custom ops: their registration, their graphs under torch.compile, and their results against the reference."""

import itertools

import pytest
import torch
from comfyui_svdquant.cuda import int4, ops, quantize_activation, reference, targets
from comfyui_svdquant.cuda.choose import W4A16
from comfyui_svdquant.cuda.operands import NO_LORA, LayerOperands, LoRASizes

from .launches import addresses, aligned, expanding, memory, recorded
from .layers import random_input, random_layer, with_codes, with_lora, with_row_scale


def awq_layer():
    weight = int4.pack(torch.randint(0, 16, (96, 128)))
    return weight, torch.rand(2, 96), torch.randn(2, 96), torch.randn(96)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    layer = random_layer(96, 128, 16, 64, bias)
    for operands in (layer, with_row_scale(layer)._replace(gelu_from=32), with_lora(layer, (8,)), with_codes(with_lora(layer, (8,)))[0]):
        torch.library.opcheck(torch.ops.svdquant.linear.default, (random_input(5, 128, torch.bfloat16), *operands.flat()))
    weight, scale, zeros, awq_bias = awq_layer()
    torch.library.opcheck(torch.ops.svdquant.awq_linear.default, (random_input(2, 128), weight, scale, zeros, awq_bias if bias else None))


def test_the_op_is_the_reference():
    layer, x = random_layer(96, 128, 16), random_input(5, 128, torch.float16)
    for operands in (layer, with_row_scale(layer), with_lora(layer, (24,))):
        for gelu_from in (None, 32):
            operands = operands._replace(gelu_from=gelu_from)
            expected = reference.svdquant_linear(x, operands)
            assert torch.equal(ops.svdquant_linear(x, operands), expected)
            assert torch.equal(torch.ops.svdquant.linear(x, *operands.flat()), expected)


@pytest.mark.parametrize("lora", [(), (24,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_in_8_bits_is_expanded_within_the_op(lora, dtype):
    layer, x = random_layer(96, 128, 16, dtype=dtype, gelu_from=32), random_input(5, 128, torch.float16)
    narrow, wide = with_codes(with_lora(layer, lora) if lora else layer)
    expected = reference.svdquant_linear(x, wide)
    assert torch.equal(ops.svdquant_linear(x, narrow), expected)
    assert torch.equal(torch.ops.svdquant.linear(x, *narrow.flat()), expected)
    assert torch.equal(torch.ops.svdquant.linear(x, *wide.flat()), expected)


def test_a_lora_of_parts():
    """Each part of the rows gets the product of its own ranks, and a part without ranks gets nothing."""
    layer, x = with_lora(random_layer(2000, 64, 16), (8, 0, 24), 768), random_input(5, 64, torch.float64)
    down, up = layer.lora_strength[:, None].double() * layer.lora_down[16:].double(), layer.lora_up.double()
    added = reference.svdquant_linear(x, layer, torch.float64) - reference.svdquant_linear(x, random_layer(2000, 64, 16), torch.float64)
    first, last = x @ down[:8].t() @ up[:768 * 8].view(768, 8).t(), x @ down[8:].t() @ up[768 * 8:].view(464, 24).t()
    torch.testing.assert_close(added, torch.cat((first, torch.zeros(5, 768), last), dim=1))


def test_the_schema_is_the_operands():
    """The op's arguments are x and the fields of LayerOperands and LoRASizes, in their order."""
    arguments = torch.ops.svdquant.linear.default._schema.arguments
    lora = [f"lora_{name}" for name in LoRASizes._fields]
    assert [argument.name for argument in arguments] == ["x", *LayerOperands._fields[:-1], *lora]


def test_one_graph_under_torch_compile():
    layer, x = random_layer(96, 128, 16), random_input(5, 128).reshape(1, 5, 128)

    def model(x):
        return torch.nn.functional.gelu(ops.svdquant_linear(x, layer)) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_tracers_see_the_op():
    """torch.export and dispatch modes see the op, not the operations inside it."""
    layer, x = with_codes(random_layer(96, 128, 16))[0], random_input(5, 128)
    unsigned_from = layer.unsigned_from  # PyTorch 2.5 would look for the whole layer's tensors among the module's

    class Model(torch.nn.Module):
        def __init__(self):  # PyTorch 2.5 can't export tensors that aren't the module's
            super().__init__()
            for i, tensor in enumerate((*layer.tensors, layer.proj_scale)):
                self.register_buffer(f"tensor{i}", tensor)

        def forward(self, x):
            *tensors, proj_scale = self.buffers()
            return ops.svdquant_linear(x, LayerOperands(*tensors, unsigned_from, proj_scale=proj_scale, lora=NO_LORA))

    for strict in (True, False):
        program = torch.export.export(Model(), (x,), strict=strict)
        assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["svdquant.linear.default"]

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Mode():
        Model()(x)
    assert seen == ["svdquant.linear.default"]


@pytest.mark.parametrize(("capability", "act_bits", "cupy", "text"), [
    ((9, 0), 0, True, "W4A8 on Hopper's tensor cores"), ((8, 9), 0, True, "W4A4 on Ada's tensor cores"),
    ((12, 0), 4, True, "W4A4 on Blackwell's tensor cores"), ((7, 5), 8, True, "W4A8 on Turing's tensor cores"),
    ((13, 0), 0, True, "W4A8 on this GPU's tensor cores"),
    ((9, 0), 0, False, "no CuPy: pip install cupy-cuda12x; until then PyTorch, slow"),
    ((6, 1), 0, True, "PyTorch, slow: The CUDA kernels need an NVIDIA GPU of compute capability 7.5 (RTX 20) or newer; this one has 6.1."),
])
def test_the_code_of_a_device_in_words(monkeypatch, capability, act_bits, cupy, text):
    monkeypatch.setattr(ops.targets, "for_device", lambda device: ops.targets.for_capability(capability))
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: cupy or None)
    monkeypatch.setattr(ops.cupy_import, "load_cupy", lambda: None)
    monkeypatch.setattr(ops.cupy_import, "cupy_package", lambda: "cupy-cuda12x")
    monkeypatch.setattr(ops.cupy_import, "installed", dict)
    assert ops.kernel_path(torch.device("cuda", 0), act_bits) == text
    assert ops.kernel_path(torch.device("cpu"), act_bits) == "CPU: PyTorch, slow"


@pytest.mark.parametrize("found", [True, None])  # None: its files are gone and its package is not
def test_a_cupy_that_does_not_fit_is_named(monkeypatch, found):
    def load():
        raise ops.KernelsUnavailable("The CUDA kernels need CuPy 13 or newer; this is CuPy 12.3.")

    monkeypatch.setattr(ops.targets, "for_device", lambda device: ops.targets.for_capability((9, 0)))
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(ops.cupy_import, "installed", lambda: {"cupy-cuda12x": "12.3.0"})
    monkeypatch.setattr(ops.cupy_import, "load_cupy", load)
    assert ops.kernel_path(torch.device("cuda", 0), 0) == "PyTorch, slow: The CUDA kernels need CuPy 13 or newer; this is CuPy 12.3."


@pytest.mark.parametrize(("capability", "bits"), [
    ((6, 1), 8), ((7, 5), 4), ((8, 0), 8), ((8, 6), 4), ((8, 9), 4), ((9, 0), 8), ((10, 0), 8), ((10, 3), 8), ((12, 0), 8), ((12, 1), 8),
    ((13, 0), 8)])
def test_the_devices_choice_of_bits(monkeypatch, capability, bits):
    """RTX 20 to 40 have fast 4-bit tensor cores; A100, Hopper and Blackwell are faster with 8."""
    monkeypatch.setattr(targets, "for_device", lambda device: targets.for_capability(capability))
    assert ops.best_act_bits(torch.device("cuda", 0)) == bits
    assert ops.best_act_bits(torch.device("cpu")) == 4


FLUX = [  # N, K, unsigned_from, gelu_from of FLUX.1's linears
    (9216, 3072, 3072, None), (3072, 3072, 3072, None), (12288, 3072, 3072, 0), (3072, 12288, 0, None), (21504, 3072, 3072, 9216),
    (3072, 15360, 3072, None)]


@pytest.mark.parametrize("sms", [16, 68, 132, 170])
@pytest.mark.parametrize("number", targets.TARGETS)
def test_every_gpu_runs_fluxs_layers_by_two_launches(monkeypatch, number, sms):
    """For every GPU, both types, and 4 and 8 bits there is a plan, and it fits in the GPU's shared memory."""
    target = targets.TARGETS[number]
    with recorded(monkeypatch), pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "for_device", lambda device: target)
        patch.setattr(targets, "multiprocessors", lambda device: sms)
        for m, rank, act_bits, dtype in itertools.product((1, 512, 4608), (0, 32, 64, 128), (4, 8), target.dtypes):
            for n, k, unsigned_from, gelu_from in FLUX:
                for lora in (NO_LORA, LoRASizes((16,)), LoRASizes((64, 0, 160), 3072)):
                    layer = m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from, lora
                    launches = ops._launches(*layer, k, torch.device("cuda", 0))
                    assert max(launches.quantize.kernel.shared, launches.gemm.kernel.shared) <= target.shared_per_cta
                    assert min(launches.quantize.head[:3] + launches.gemm.head[:3]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp16_in_place_of_a_wider_type(dtype):
    """Numbers beyond fp16's range become its largest number; NaN and Inf stay visible in their own rows."""
    x = torch.tensor([[1, 2], [-3e4, 7e4], [torch.nan, 1], [1, -torch.inf], [1e30, -1e30]], dtype=dtype)
    y = ops.computed_in(torch.float16, x, lambda x: 2 * x)
    largest = torch.finfo(torch.float16).max
    assert y.dtype == dtype and y[[2, 3]].isnan().all()
    assert torch.equal(y[[0, 1, 4]], torch.tensor([[2, 4], [-6e4, largest], [largest, -largest]]).to(dtype).clamp(-largest, largest))
    assert ops.computed_in(torch.float16, x.half(), lambda x: 2 * x)[1, 1].isinf(), "a model in fp16 has its own guards"
    assert torch.equal(ops.computed_in(torch.bfloat16, x, lambda x: x)[4], x[4].bfloat16().to(dtype)), "as wide a type"


@pytest.mark.parametrize(("number", "computed"), [(75, torch.float16), (89, torch.bfloat16)])
def test_kernels_are_prepared_in_the_type_that_they_compute_in(monkeypatch, number, computed):
    asked = []
    monkeypatch.setattr(targets, "for_device", lambda device: targets.TARGETS[number])
    monkeypatch.setattr(targets, "multiprocessors", lambda device: 68)
    monkeypatch.setattr(ops.self_test, "passes", lambda *args: True)
    monkeypatch.setattr(ops.autotune, "wanted", lambda target: False)
    monkeypatch.setattr(ops, "_launches", lambda *layer: asked.append(layer[6]))
    monkeypatch.setattr(ops.awq, "launcher", lambda *args: asked.append(args[-2]))
    for cache in (targets.compute_dtype, ops.chosen):
        cache.cache_clear()
    for act_bits in (4, W4A16):
        ops.prepare(70, 192, 256, 32, 256, act_bits, torch.bfloat16, device=torch.device("cuda", 5))
    for cache in (targets.compute_dtype, ops.chosen):
        cache.cache_clear()
    assert asked == [computed, computed]


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("rank", "lora"), [(0, ()), (32, ()), (128, ()), (32, (8,)), (0, (8,)), (160, ())])
def test_the_kernels_arguments(monkeypatch, rank, lora, act_bits):
    """The first call and a cached launch pass the right addresses, and the parts of the work memory don't overlap."""
    m, n, k = 37, 208, 256
    layer = random_layer(n, k, rank, bias=rank != 32, act_bits=act_bits)._replace(row_scale=torch.rand(n) if act_bits == 8 else None)
    layer = with_lora(layer, lora) if lora else layer
    x = aligned(random_input(m, k, torch.bfloat16)).view(1, m, k)
    names = (*ops.CONSTANT, *(ops.LORA_CONSTANT if lora else ()))
    constant = addresses(**{name: getattr(layer, name) for name in (*ops.CONSTANT, *ops.LORA_CONSTANT)})
    with recorded(monkeypatch) as calls:
        y = [ops.svdquant_linear(x, layer)]
        launch = ops.cached_launch(x, layer)
        y.append(launch(x, layer.weight_scale, layer.proj_down, tuple(constant[name] for name in names), layer.lora_down,
                        layer.lora_strength))
        assert len(calls) == 2
    for call, out in zip(calls, y):
        assert out.shape == (1, m, n) and out.dtype == x.dtype
        if rank >= 128 or lora:  # cuBLAS multiplies
            assert call.pop("proj_down") != layer.proj_down.data_ptr()
        assert ("lora_up" in call) is (bool(lora) or rank == 160 and act_bits == 8)
        assert ("lora_strength" in call) is bool(lora)
        assert call.items() >= {name: constant[name] for name in call.keys() & constant.keys()}.items()
        assert call["x"] == x.data_ptr() and call["y"] == out.data_ptr()
        assert call["act_scale"] >= call["act"] + 48 * k
        assert (call["lora_act"] != 0) is (call["lora_act_scale"] != 0) is (rank + len(lora) > 0)
        if rank or lora:
            assert call["lora_act"] >= call["act_scale"] + 4 * 48 * (2 if act_bits == 8 else k // 64)
            assert call["lora_act_scale"] >= call["lora_act"] + 2 * 48 * (rank + 32 * len(lora))


@pytest.mark.parametrize("rank", [32, 128])
def test_the_kernels_arguments_with_a_branch_in_8_bits(monkeypatch, rank):
    """The kernels, and cuBLAS for the larger rank, get the expanded branch, in the first call and in a cached launch."""
    narrow, wide = with_codes(with_row_scale(random_layer(208, 256, rank)))
    x, given, multiplied = aligned(random_input(37, 256, torch.bfloat16)), [], quantize_activation.multiplied
    monkeypatch.setattr(quantize_activation, "multiplied", lambda *args: given.append(args[1]) or multiplied(*args))
    there = *(addresses(**{name: getattr(narrow, name)})[name] for name in ops.CONSTANT), narrow.proj_scale.data_ptr()
    with recorded(monkeypatch) as calls, expanding(monkeypatch) as launches:
        ops.svdquant_linear(x, narrow)
        launch = ops.cached_launch(x, narrow)
        for i in range(len(there)):
            assert launch(x, narrow.weight_scale, narrow.proj_down, (*there[:i], there[i] + 64, *there[i + 1:])) is None
        assert launches == [1] and launch(x, narrow.weight_scale, narrow.proj_down, there) is not None
        assert launches == [1, 1] and len(calls) == 2
        for call in calls:
            assert torch.equal(memory(call["proj_up"], torch.bfloat16, 208, rank), wide.proj_up)
            assert rank == 128 or torch.equal(memory(call["proj_down"], torch.bfloat16, 256, rank), wide.proj_down)
    assert len(given) == (2 if rank == 128 else 0) and all(torch.equal(down, wide.proj_down) for down in given)


def test_8_bits_on_a_gpu_need_a_row_scale(monkeypatch):
    """The layer computes it once; an op would compute it in every call of a graph. The CPU doesn't use it."""
    layer, x = random_layer(208, 256, 32, act_bits=8), aligned(random_input(37, 256, torch.bfloat16))
    ops.svdquant_linear(x, layer)
    with recorded(monkeypatch) as calls, pytest.raises(ValueError, match="needs its row_scale"):
        ops.svdquant_linear(x, layer)
    assert not calls


def test_when_a_cached_launch_is_not_taken(monkeypatch):
    layer, x = random_layer(208, 256, 32), aligned(random_input(37, 256, torch.bfloat16))
    weight_scale, proj_down = layer.weight_scale, layer.proj_down
    there = tuple(addresses(**{name: getattr(layer, name) for name in ops.CONSTANT})[name] for name in ops.CONSTANT)
    with recorded(monkeypatch) as calls:
        launch = ops.cached_launch(x, layer)
        assert launch(x, weight_scale, proj_down, there) is not None and len(calls) == 1
        for i in range(len(there)):
            moved = (*there[:i], there[i] + 64, *there[i + 1:])
            assert launch(x, weight_scale, proj_down, moved) is None
        for other in (x.half(), x.float(), x.t().contiguous().t(), aligned(torch.cat((x, x)).flatten())[1:37 * 256 + 1].view(37, 256)):
            assert launch(other, weight_scale, proj_down, there) is None
            assert ops.cached_launch(other, layer) is None
        assert launch(x, weight_scale.half(), proj_down, there) is None
        assert len(calls) == 1


def test_a_warm_up_prepares_what_no_earlier_one_did(monkeypatch):
    """A LoRA of the same sizes as one before takes no kernels of its own. What failed is tried again, and all of it after choose_again."""
    prepared, fails = [], {1}

    def prepare(m, *layer, device):
        prepared.append(m)
        if m in fails:
            raise ops.KernelsUnavailable("none")

    def warm_up(*ms):
        prepared.clear()
        for future in ops.warm_up([(m, 192, 256, 32, 256, 8, torch.bfloat16) for m in ms], torch.device("cuda", 0)):
            future.result()
        return sorted(prepared)

    monkeypatch.setattr(ops, "prepare", prepare)
    monkeypatch.setattr(ops.autotune, "tune", lambda *args: None)
    monkeypatch.setattr(ops, "_warm", set())
    assert warm_up(1, 2, 2) == [1, 2] and warm_up(1, 2, 3) == [1, 3] and warm_up(2, 3) == []
    assert ops.warm_up([(2, 192, 256, 32, 256, 8, torch.bfloat16)], torch.device("cuda", 0)) == [], "no thread"
    ops.choose_again()
    assert warm_up(2, 3) == [2, 3]
