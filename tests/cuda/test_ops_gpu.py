"""The ops on a GPU against the reference in float64."""

import gc
import threading

import pytest
import torch
from comfyui_svdquant.cuda import int4, kernel_loader, ops, reference, row_scales, runtime
from comfyui_svdquant.cuda.choose import W4A16
from comfyui_svdquant.quant.layers import layout, linear, preparation
from comfyui_svdquant.quant.layers.lora_branch import LoRABranch, LowRank

from .layers import check_in_graphs, decided, on_cuda, random_input, random_layer, relative_error, with_row_scale

pytestmark = pytest.mark.gpu

BF16 = 3e-3  # rounding of the output (1.7e-3 for uniform values) and of the branch's activation, and codes that round differently
SHAPES = [  # M, N, K, R, unsigned_from
    (1, 16, 64, 0, None), (37, 80, 192, 16, None), (200, 400, 384, 48, 0), (513, 1040, 1024, 128, None), (130, 384, 640, 24, 128),
    (300, 208, 1536, 160, 1024), (64, 192, 320, 32, 192)]


def integer_layer(n, k, rank, unsigned_from=None, bias=True, dtype=torch.bfloat16, seed=0, act_bits=4):
    """A random layer on the GPU with group scales that are integer multiples of a row scale, as the quantizer writes them."""
    layer = random_layer(n, k, rank, unsigned_from, bias, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(8, 16, (n,), generator=g) * 2.0**-11
    layer = on_cuda(layer._replace(weight_scale=(torch.randint(6, 17, (k // 64, n), generator=g) * row).to(dtype)))
    return with_row_scale(layer) if act_bits == 8 else layer


def in_threads(work, count):
    """Run work(0), work(1), ... at the same time, each in its own thread."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k", "rank", "unsigned_from"), SHAPES)
def test_is_the_references_product(m, n, k, rank, unsigned_from, dtype, act_bits):
    layer, x = integer_layer(n, k, rank, unsigned_from, n != 80, dtype, m, act_bits), random_input(m, k, dtype, seed=n).cuda()
    if unsigned_from is not None:
        x[:, unsigned_from:] = torch.nn.functional.gelu(x[:, unsigned_from:], approximate="tanh")
    y = ops.svdquant_linear(x, layer)
    assert y.dtype == dtype
    exact = reference.svdquant_linear(x.double(), layer, torch.float64)
    error = relative_error(y, exact)
    assert error < BF16, f"relative error {error:.2e} at M={m} N={n} K={k} R={rank} in {dtype}, {act_bits} bits"
    assert torch.equal(y, ops.svdquant_linear(x, layer)), "two runs differ"


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("n", "rank", "gelu_from", "dtype"), [
    (384, 32, 0, torch.bfloat16), (384, 128, 128, torch.float16), (384, 160, 128, torch.bfloat16), (208, 16, 80, torch.bfloat16),
    (192, 0, 64, torch.float32), (192, 24, 192, torch.bfloat16)])
def test_gelu_from_a_column_on(n, rank, gelu_from, dtype, act_bits):
    """The kernel applies GELU if it can; otherwise PyTorch applies it after the kernel."""
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    layer, x = integer_layer(n, 256, rank, None, n != 208, stored, act_bits=act_bits), random_input(70, 256, dtype, seed=n).cuda()
    activated = layer._replace(gelu_from=gelu_from)
    y = ops.svdquant_linear(x, activated)
    exact = reference.svdquant_linear(x.to(stored).double(), activated, torch.float64)
    error = relative_error(y, exact)
    assert y.dtype == dtype and error < 1.5 * BF16, f"relative error {error:.2e}"
    plain = ops.svdquant_linear(x, layer)
    assert torch.equal(y[:, :gelu_from], plain[:, :gelu_from])
    assert relative_error(y, reference.activated(plain, gelu_from)) < BF16


@pytest.mark.parametrize("act_bits", [4, 8])
def test_free_scales_float32_and_strides(act_bits):
    layer = on_cuda(random_layer(192, 256, 32))
    layer = with_row_scale(layer) if act_bits == 8 else layer
    x = random_input(100, 512).cuda()[:, 128:384].reshape(2, 50, 256)
    y = ops.svdquant_linear(x, layer)
    assert y.dtype == torch.float32 and y.shape == (2, 50, 192)
    known = layer if act_bits == 4 else layer._replace(weight_scale=row_scales.rounded(layer.weight_scale, layer.row_scale))
    exact = reference.svdquant_linear(x.bfloat16().double(), known, torch.float64)
    sure = decided(x.bfloat16().flatten(0, 1), layer).view(2, 50)
    assert sure.float().mean() > 0.9
    error = relative_error(y[sure], exact[sure])
    assert error < BF16, f"relative error {error:.2e} in {act_bits} bits"


@pytest.mark.parametrize("act_bits", [4, 8])
def test_nan_and_inf_stay_in_their_rows(act_bits):
    layer, x = integer_layer(192, 256, 32, act_bits=act_bits), random_input(70, 256, torch.bfloat16).cuda()
    x[3, 5], x[44, 200] = torch.nan, torch.inf
    y = ops.svdquant_linear(x, layer)
    assert (~torch.isfinite(y)).any(dim=1).nonzero().flatten().tolist() == [3, 44]
    assert torch.equal(y[:3], ops.svdquant_linear(x[:3], layer)), "a row depends on the others"


def test_awq_is_the_references_product():
    weight = int4.pack(torch.randint(0, 16, (96, 128))).cuda()
    scale, zeros, bias = (t.bfloat16().cuda() for t in (torch.rand(2, 96), torch.randn(2, 96), torch.randn(96)))
    x = torch.randn(2, 128, device="cuda").bfloat16()
    error = relative_error(ops.awq_linear(x, weight, scale, zeros, bias), reference.awq_linear(x.double(), weight, scale, zeros, bias))
    assert error < BF16, f"relative error {error:.2e}"


@pytest.mark.parametrize("act_bits", [4, 8])
def test_in_threads_with_streams_of_their_own(act_bits):
    """Each thread has its own shapes, and memory that its stream has just written."""
    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.inference_mode():
            for step in range(20):
                torch.cuda._sleep(100_000)  # a kernel that reads too early reads the previous step's values
                x = inputs[i] * 2**step
                results[i].append(ops.svdquant_linear(x, layers[i]))
        stream.synchronize()

    layers = [integer_layer(192 + 16 * i, 256, 32, seed=i, act_bits=act_bits) for i in range(4)]
    inputs = [random_input(64 + 16 * i, 256, torch.bfloat16, seed=i).cuda() for i in range(4)]
    expected = [[ops.svdquant_linear(x * 2**step, layer) for step in range(20)] for x, layer in zip(inputs, layers)]
    torch.cuda.synchronize()
    results = [[] for _ in layers]
    in_threads(work, 4)
    for i in range(4):
        assert len(results[i]) == 20 and all(map(torch.equal, results[i], expected[i])), f"thread {i}"


def module_of(n, k, rank, act_bits, seed=0):
    """An SVDQuantLinear with integer_layer's tensors."""
    module, layer = linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, k, n, rank, k), "cuda"), integer_layer(n, k, rank, seed=seed)
    names = "weight", "weight_scale", "weight_proj_down", "weight_proj_up", "weight_smooth_factor", "bias"
    for name, tensor in zip(names, layer.tensors):
        getattr(module, name).data.copy_(tensor)
    module.act_bits = act_bits
    return module


def by_the_op(module, x):
    """The output of the layer's op, without a cached launch."""
    p = {name: None if p is None else p.cuda() for name, p in module._parameters.items()}
    row_scale = row_scales.row_scale(p["weight_scale"]) if module.act_bits == 8 else None
    return ops.svdquant_linear(x, linear.operands(p, p["bias"], module.spec.unsigned_from, module.act_bits, row_scale, module.gelu_from))


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_layer_with_gelu_and_loras(act_bits):
    """LoRAs are added and removed, and their output is added before the GELU."""
    module, x = module_of(384, 256, 32, act_bits), random_input(70, 256, torch.bfloat16).cuda()
    plain = module(x)
    term = LowRank((64, 320), (0, 256), torch.randn(256, 4), torch.randn(4, 256) / 16)
    added = LoRABranch.of([term], (384, 256), torch.bfloat16, "cuda", own=32)
    loaded = reference.activated(added.add(plain.clone(), x), 128)
    module.gelu_from = 128
    fused = by_the_op(module, x)
    assert relative_error(fused, reference.activated(plain, 128)) < BF16
    for branch, expected in ((None, fused), (added, loaded)) * 3:
        module.set_lora_branch(branch)
        y = module(x)
        assert torch.equal(module(x), y)
        assert torch.equal(y, expected) if branch is None else relative_error(y, expected) < BF16


def other_tensors(module):
    for name, p in module_of(192, 256, module.spec.rank, 8, seed=5)._parameters.items():
        setattr(module, name, p)


def other_values(module):
    module.load_state_dict(module_of(192, 256, module.spec.rank, 8, seed=6).state_dict())


def one_offloaded(module):
    module.weight.data = module.weight.data.cpu()


CHANGES = [other_tensors, other_values, one_offloaded, lambda module: module.cpu(), lambda module: module.cpu().cuda(),
           lambda module: setattr(module, "act_bits", 12 - module.act_bits)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rank", [32, 128])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_layer_that_changes_between_two_calls(act_bits, rank, change):
    module = module_of(192, 256, rank, act_bits)
    inputs = [random_input(m, 256, torch.bfloat16, seed=m).cuda() for m in (70, 33)]
    kept = [[module(x) for x in inputs] for _ in range(3)]
    expected = [by_the_op(module, x) for x in inputs]
    assert all(map(torch.equal, kept[0] + kept[2], expected * 2))
    change(module)
    filler = [torch.full((1 << 16,), 0x7FC0, dtype=torch.int16, device="cuda") for _ in range(64)]  # NaN where freed memory was
    for _ in range(3):
        assert all(torch.equal(module(x), by_the_op(module, x)) for x in inputs)
    assert all(map(torch.equal, kept[0] + kept[1] + kept[2], expected * 3)), "an earlier output has changed"
    del filler
    half, x = inputs[0].float(), torch.zeros(70, 512, dtype=torch.bfloat16, device="cuda")
    x[:, 128:384] = inputs[0]
    assert torch.equal(module(half), by_the_op(module, half)) and torch.equal(module(x[:, 128:384]), module(inputs[0]))


@pytest.mark.parametrize("act_bits", [4, 8])
def test_one_layer_in_threads(act_bits):
    """The threads share the layer's cached launches but not a launch's memory. Each has its own stream and two shapes."""
    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.inference_mode():
            for step in range(100):
                x = inputs[i][step % 2] * 2 ** (step % 5)
                results[i].append(module(x))
        stream.synchronize()

    module = module_of(192, 256, 32, act_bits)
    inputs = [[random_input(m + i, 256, torch.bfloat16, seed=i).cuda() for m in (16, 64)] for i in range(4)]
    expected = [[by_the_op(module, pair[step % 2] * 2 ** (step % 5)) for step in range(10)] for pair in inputs]
    torch.cuda.synchronize()
    results = [[] for _ in inputs]
    in_threads(work, 4)
    for i in range(4):
        assert len(results[i]) == 100 and all(torch.equal(y, expected[i][step % 10]) for step, y in enumerate(results[i])), f"thread {i}"


@pytest.mark.parametrize("rank", [32, 128])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_layer_in_cuda_graphs_and_compiled(act_bits, rank):
    """A layer that has run before is recorded twice, and replayed while it also runs outside the graph."""
    module = module_of(192, 256, rank, act_bits)
    with torch.inference_mode():
        x = random_input(70, 256, torch.bfloat16).cuda()
        expected = module(x)
        assert torch.equal(module(x), expected)
        recorded = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recorded.append((graph, module(module(x)[:, :192].repeat(1, 2)[:, :256].contiguous())))
        outside = module(expected.repeat(1, 2)[:, :256].contiguous())
        for graph, y in recorded:
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(module(x), expected) and torch.equal(y, outside)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("rank", [0, 32, 128])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_old_contents_of_work_memory_have_no_effect(act_bits, rank, monkeypatch):
    """Nothing is written outside it either: by the layer's first call, by a cached launch, and by the op."""
    module, x, margin, taken = module_of(192, 256, rank, act_bits), random_input(70, 256, torch.bfloat16).cuda(), 4096, []

    def take(size, stream):
        taken.append(torch.full((size + 2 * margin,), 0xFF, dtype=torch.uint8, device="cuda"))
        return taken[-1].data_ptr() + margin

    expected = module_of(192, 256, rank, act_bits)(x)
    monkeypatch.setattr(runtime, "_take", take)
    monkeypatch.setattr(runtime, "_give", lambda begin: None)
    for y in (module(x), module(x), by_the_op(module, x)):
        assert torch.equal(y, expected)
    assert len(taken) == 3 and all((t[:margin] == 0xFF).all() and (t[-margin:] == 0xFF).all() for t in taken)
    assert all((t[margin:-margin] != 0xFF).any() for t in taken)


@pytest.mark.parametrize("rank", [32, 128])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_layer_of_a_model_in_fp16(act_bits, rank):
    """A layer stored in bf16 and held in fp16 equals a call that converts everything, and its next call uses a cached launch."""
    module, x = module_of(192, 256, rank, act_bits), random_input(70, 256, torch.float16).cuda()
    expected = by_the_op(module, x)
    preparation.compute_in(module, torch.float16, x.device)
    assert module.weight_scale.dtype == torch.float16 and module.weight.dtype == torch.int8
    for _ in range(3):
        assert torch.equal(module(x), expected)
    assert len(module._launches) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_a_layers_output_is_all_that_stays(inference):
    """A first call and a cached launch leave no other memory, and the output is an ordinary PyTorch tensor."""
    module, x = module_of(192, 256, 32, 8), random_input(70, 256, torch.bfloat16).cuda().view(2, 35, 256)
    module(x)
    gc.collect()  # the garbage of earlier tests would be freed in between
    with torch.inference_mode(inference):
        before, ys = torch.cuda.memory_allocated(), []
        for _ in range(3):
            ys.append(module(x))
            assert torch.cuda.memory_allocated() - before == len(ys) * -(-70 * 192 * 2 // 512) * 512
    for y in ys:
        assert y.is_inference() is inference and not y.requires_grad and y.is_contiguous() and y.shape == (2, 35, 192)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_behind_a_copy_in_a_cuda_graph(act_bits):
    """The layer's first kernel may start early, but must also wait for a copy, which is no kernel."""
    module, x = module_of(192, 256, 32, act_bits), random_input(1 << 16, 256, torch.bfloat16).cuda()
    source, copied = x.clone(), torch.zeros_like(x)
    with torch.inference_mode():
        expected = module(x)
        module(copied)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            copied.copy_(source)
            y = module(copied)
        for factor in (1, 2, -1):
            source.copy_(x * factor)
            graph.replay()
            assert torch.equal(y, expected if factor == 1 else module(x * factor))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_device_than_the_current():
    module, x = module_of(192, 256, 32, 8), random_input(70, 256, torch.bfloat16).cuda()
    expected = module(x)
    module.to("cuda:1")
    for _ in range(3):
        y = module(x.to("cuda:1"))
        assert y.device == torch.device("cuda", 1) and torch.equal(y.cpu(), expected.cpu())
        assert torch.equal(module(x), expected), "brought to the input"
    assert torch.cuda.current_device() == 0


def test_warm_up():
    """Warm-up builds the kernels, and an unavailable kernel is not an error."""
    device = torch.device("cuda", torch.cuda.current_device())
    layers = [(70, 192, 256, 32, 256, act_bits, torch.bfloat16) for act_bits in (4, 8)]
    for future in ops.warm_up([*layers, (1, 64, 128, 0, 128, W4A16, torch.bfloat16), (70, 192, 256, 7, 256, 8, torch.float64)], device):
        assert future.result() is None
    before = set(kernel_loader._kernels)
    for act_bits in (4, 8):
        ops.svdquant_linear(random_input(70, 256, torch.bfloat16).cuda(), integer_layer(192, 256, 32, act_bits=act_bits))
    assert set(kernel_loader._kernels) == before


@pytest.mark.parametrize("act_bits", [4, 8])
def test_in_one_graph_and_in_a_cuda_graph(act_bits):
    layer, x = integer_layer(192, 256, 32, act_bits=act_bits), random_input(70, 256, torch.bfloat16).cuda()

    def model(x):
        return torch.nn.functional.gelu(ops.svdquant_linear(x, layer)) * 2

    check_in_graphs(model, x)
    torch.library.opcheck(torch.ops.svdquant.linear.default, (x, *layer.flat()))
