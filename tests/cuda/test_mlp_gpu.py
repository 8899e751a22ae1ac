"""An MLP's two layers in one pass. The codes between them equal those of the two layers run one after the other, to the bit.

Hopper has no 4-bit MMA; its compiler emulates one, so that the paths of sm_80 .. sm_89 run here as well.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from comfyui_svdquant.cuda import compiler, gemm_mma, mlp, ops, quantize_activation, reference, runtime, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage, read_lora_act
from comfyui_svdquant.cuda.gemm_mma import NARROW, SMALL, WIDE
from comfyui_svdquant.cuda.operands import LayerOperands
from comfyui_svdquant.quant.layers import layout, linear, packed_mlp

from .layers import check_in_graphs, on_cuda, plans_here, random_input, random_layer, relative_error

pytestmark = pytest.mark.gpu
PARAMETERS = ("weight", "weight_scale", "weight_proj_down", "weight_proj_up", "weight_smooth_factor", "bias")  # in mlp.LAYER's order
DEVICE = torch.device("cuda", 0)
BYTES, NIBBLES = CodeStorage.INT4_BYTES, CodeStorage.INT4_NIBBLES
BF16 = 3e-3  # test_ops_gpu.py's


@dataclass(frozen=True)
class Path:
    storage: CodeStorage
    tile: gemm_mma.Tile
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        name = {BYTES: "bytes", NIBBLES: "nibbles"}[self.storage] + "-" + {WIDE: "wide", NARROW: "narrow", SMALL: "small"}[self.tile]
        return name + ("-fp16" if self.dtype == torch.float16 else "")


PATHS = [Path(NIBBLES, WIDE), Path(NIBBLES, NARROW), Path(NIBBLES, SMALL), Path(NIBBLES, WIDE, torch.float16),
         Path(BYTES, NARROW), Path(BYTES, SMALL), Path(BYTES, NARROW, torch.float16)]
SHAPES = [  # M, K, hidden, N, ranks, the second layer's unsigned_from
    (1, 64, 256, 16, 0, 16, 0), (17, 192, 256, 208, 32, 32, 0), (77, 320, 768, 96, 16, 64, 256), (129, 128, 512, 272, 128, 48, 512),
    (512, 448, 256, 64, 32, 32, 0), (1000, 256, 1280, 128, 64, 64, 0)]


@dataclass
class Case:
    """x (M, K) and both layers, on the GPU."""

    x: torch.Tensor
    first: LayerOperands
    second: LayerOperands

    def args(self):
        return self.x, self.first, self.second

    def sizes(self):
        """The sizes, in mlp.layers()'s order."""
        (m, k), (hidden, rank), (n, second_rank) = self.x.shape, self.first.proj_up.shape, self.second.proj_up.shape
        return m, k, hidden, n, rank, second_rank, self.first.unsigned_from, self.second.unsigned_from, self.x.dtype


def kernels_of(path, case):
    """choose.MLPKernels for a path that may be another GPU's."""
    chosen = ops.chosen(mlp.layers(*case.sizes()), DEVICE)
    return chosen._replace(storage=path.storage, tile=path.tile)


def random_case(m, k, hidden, n, first_rank, second_rank, unsigned_from, dtype=torch.bfloat16):
    """A case whose hidden states have a few outlier columns. It has no bias if N is 96."""
    first = random_layer(hidden, k, first_rank, bias=n != 96, dtype=dtype, seed=m, gelu_from=0)
    second = random_layer(n, hidden, second_rank, unsigned_from, n != 96, dtype, seed=m + 1)
    first.weight_scale[:, ::50] *= 8
    return Case(random_input(m, k, dtype, seed=n).cuda() / 4, on_cuda(first), on_cuda(second))


def run(path, case):
    """(y, the second layer's Quantized), from poisoned memory whose margins must not change."""
    x, first, second = case.args()
    m, _, hidden, n, _, second_rank, *_ = case.sizes()
    dtype, margin = x.dtype, 4096
    launches = mlp._launches(*case.sizes(), DEVICE, kernels_of(path, case))
    offsets, size = runtime.laid_out(launches.work)
    buffers = [torch.full((size + 2 * margin,), torch.nan, dtype=dtype, device=DEVICE) for size in (m * n, size // 2)]
    y, work = (buffer[margin:-margin] for buffer in buffers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "_take", lambda asked, stream: work.data_ptr() if asked == size else 0)
        patch.setattr(runtime, "_give", lambda begin: None)
        mlp.launch(launches, x, y, first, second)
    torch.cuda.synchronize()
    assert all(b[:margin].isnan().all() and b[-margin:].isnan().all() for b in buffers), "written outside"
    parts = []
    outputs = quantize_activation.outputs(m, hidden, second_rank, path.storage, dtype)
    for name, (shape, kind) in zip(quantize_activation.Quantized._fields, outputs, strict=True):
        part = work.view(torch.uint8)[offsets[name + "2"]:]
        parts.append(part[:torch.Size(shape).numel() * kind.itemsize].view(kind).view(shape))
    return y.view(m, n), quantize_activation.Quantized(*parts)


def layer_by_layer(path, case):
    """(hidden states (M, hidden), their Quantized), computed by the kernels of two layers."""
    hidden = gemm(path, quantized(path, case.x, case.first), case.first, case.x.shape[0])
    return hidden, quantized(path, hidden, case.second)


def quantized(path, x, layer):
    plans = plans_here(*x.shape, layer.proj_down.shape[1], path.storage)
    return quantize_activation.quantize(x, layer.smooth, layer.proj_down, layer.unsigned_from, path.storage, plans)


def gemm(path, q, layer, m):
    tiles = gemm_mma.tiles_of(targets.for_device(DEVICE))
    tile = gemm_mma.fastest_tile(tiles, targets.multiprocessors(DEVICE), m, layer.weight.shape[0])
    return gemm_mma.gemm(path.storage, tile, q, layer, m)


def bits(tensor):
    return tensor.view(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile all kernels in parallel."""
    target = targets.for_device(DEVICE)
    kernels = [(mlp.PARTIAL_SUMS, mlp.add_defines(dtype, ranks)) for dtype in (torch.bfloat16, torch.float16) for ranks in (32, 64)]
    for path in PATHS:
        kernels += [(gemm_mma.SOURCE, gemm_mma.defines_of(path.storage, path.tile, target, path.dtype, next_ranks=ranks))
                   for ranks in (32, 64)]
        kernels += [(gemm_mma.SOURCE, gemm_mma.defines_of(path.storage, tile, target, path.dtype, gelu=gelu))
                   for tile in gemm_mma.tiles_of(target) for gelu in (False, True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda w: compiler.compile_cubin(*w, target.arch), dict.fromkeys(kernels)))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_is_the_two_layers(path, shape):
    case = random_case(*shape, path.dtype)
    y, q = run(path, case)
    hidden, expected = layer_by_layer(path, case)
    assert torch.equal(bits(q.act), bits(expected.act)), f"{int((bits(q.act) != bits(expected.act)).sum())} bytes of codes differ"
    assert torch.equal(bits(q.act_scale), bits(expected.act_scale))

    # The branch's sums have another order than quantize.cu's, and the same error bound against float64 as in that kernel's test.
    m, down = hidden.shape[0], case.second.proj_down
    rows = read_lora_act(q.lora_act, (q.lora_act.shape[1], 32 * q.lora_act.shape[0]))
    assert (rows[m:] == 0).all() and (rows[:, down.shape[1]:] == 0).all() and (q.lora_act_scale[m:] == 0).all()
    scale, exact = q.lora_act_scale[:m].double()[:, None], hidden.double() @ down.double()
    assert (torch.frexp(scale)[0] == 0.5).all() and (path.dtype == torch.float16 or (scale == 1).all())
    got, size = rows[:m, :down.shape[1]].double() * scale, hidden.double().abs() @ down.double().abs()
    bound = exact.abs() * (2.0**-8 if path.dtype == torch.bfloat16 else 2.0**-11) + size * 2.0**-18 + scale * 2.0**-25
    worst = ((got - exact).abs() / bound).max()
    assert worst <= 1, f"x @ proj_down is off by {worst:.3g} times its bound"

    second = case.second
    behind = gemm(path, q, second, m)
    assert torch.equal(bits(y), bits(behind))
    error = relative_error(y, reference.svdquant_linear(hidden.double(), second, torch.float64))
    assert error < BF16, f"relative error {error:.2e}"
    second_run = run(path, case)
    assert torch.equal(bits(y), bits(second_run[0])), "two runs differ"
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(q, second_run[1])), "two runs differ"


def test_fp16s_branch_is_scaled_down():
    """x @ proj_down exceeds the range of fp16."""
    path = Path(NIBBLES, WIDE, torch.float16)
    case = random_case(77, 128, 512, 64, 16, 32, 0, torch.float16)
    down = case.second.proj_down
    down.abs_().mul_(2000)
    _, q = run(path, case)
    hidden, expected = layer_by_layer(path, case)
    assert q.lora_act_scale[:77].max() > 1 and torch.equal(q.lora_act_scale, expected.lora_act_scale)
    exact = hidden.double() @ down.double()
    got = read_lora_act(q.lora_act, (77, 32)).double() * q.lora_act_scale[:77].double()[:, None]
    assert ((got - exact).abs() <= 2.0**-10 * exact.abs().amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_nan_stays_in_its_row(path):
    case = random_case(130, 128, 512, 64, 16, 32, 256, path.dtype)
    clean, _ = run(path, case)
    case.x[77, 5], case.x[129, 0] = torch.nan, torch.inf
    y, q = run(path, case)
    _, expected = layer_by_layer(path, case)
    assert torch.equal(bits(q.act), bits(expected.act)) and torch.equal(bits(q.act_scale), bits(expected.act_scale))
    others = torch.ones(130, dtype=torch.bool, device=DEVICE)
    others[[77, 129]] = False
    assert y[~others].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_zeros(path):
    """Hidden states of zeros: signed groups have neither codes nor scales, shifted ones have both."""
    case = random_case(33, 128, 512, 64, 16, 32, 256, path.dtype)
    case.x.zero_()
    case.first.bias.zero_()
    _, q = run(path, case)
    _, expected = layer_by_layer(path, case)
    assert torch.equal(bits(q.act), bits(expected.act)) and torch.equal(bits(q.act_scale), bits(expected.act_scale))
    assert (q.act_scale[:4] == 0).all() and (q.act_scale[4:, :33] > 0).all()
    assert (q.lora_act == 0).all() and (q.lora_act_scale[:33] == 1).all()


def test_a_token_does_not_depend_on_its_neighbours():
    for path in PATHS:
        case = random_case(150, 128, 256, 64, 16, 32, 0, path.dtype)
        whole, x = run(path, case)[0], case.x
        for rows in (slice(0, 1), slice(3, 100), slice(149, 150)):
            case.x = x[rows].contiguous()
            assert torch.equal(run(path, case)[0], whole[rows]), path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_op(dtype):
    """The op with choose()'s kernels against two layers, from which only the rounding of the branch differs."""
    case = random_case(300, 1024, 3072, 768, 32, 32, 0, dtype)
    x, first, second = case.args()
    assert mlp.fused(*case.args()) is not None
    y = mlp.svdquant_mlp(x.view(3, 100, 1024), first, second)
    hidden = ops.svdquant_linear(x, first)
    two = ops.svdquant_linear(hidden, second)
    exact = reference.svdquant_linear(hidden.double(), second, torch.float64)
    assert y.shape == (3, 100, 768) and y.dtype == dtype
    assert relative_error(y.view(300, 768), two) < BF16 and relative_error(y.view(300, 768), exact) < BF16


def test_the_fallback_is_the_two_layers():
    for shape in ((70, 128, 320, 64, 16, 32, 0), (70, 128, 256, 64, 16, 128, 0), (70, 128, 256, 64, 16, 0, 0)):
        x, first, second = random_case(*shape).args()
        assert mlp.fused(x, first, second) is None
        assert torch.equal(mlp.svdquant_mlp(x, first, second), ops.svdquant_linear(ops.svdquant_linear(x, first), second))


def test_in_one_graph_in_a_cuda_graph_and_on_a_stream():
    args = random_case(70, 256, 512, 256, 32, 32, 0).args()
    x, rest = args[0], args[1:]

    def model(x):
        return mlp.svdquant_mlp(x, *rest) * 2

    expected = check_in_graphs(model, x)
    torch.library.opcheck(torch.ops.svdquant.mlp.default, (x, *mlp.flat(*rest)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)  # a kernel that reads too early reads zeros
        late = torch.zeros_like(x)
        late.copy_(x)
        y = model(late)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("pays", [None, True])
@pytest.mark.parametrize("act_bits", [0, 4])
def test_a_models_mlp_in_one_graph(act_bits, pays, monkeypatch):
    """The device's own choice gives one graph, and so does other GPUs' choice."""
    if pays:
        monkeypatch.setattr(mlp, "pays", lambda device: pays)
    k, hidden, n = 256, 512, 128
    case = random_case(1, k, hidden, n, 32, 32, 0)
    layers = []
    for size, tensors, split, gelu_from in (((k, hidden), case.first, k, 0), ((hidden, n), case.second, 0, None)):
        layers.append(layer := linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, *size, 32, split), "cuda"))
        for name, tensor in zip(PARAMETERS, tensors.tensors, strict=True):
            getattr(layer, name).data.copy_(tensor)
        layer.act_bits, layer.gelu_from = act_bits, gelu_from
    model = packed_mlp.PackedMLP(layers[0], torch.nn.Identity(), layers[1])
    with torch.inference_mode():
        check_in_graphs(model, random_input(70, k, torch.bfloat16).cuda())
