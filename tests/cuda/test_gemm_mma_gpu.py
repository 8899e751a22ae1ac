"""The mma.sync GEMM against float64, in every storage of codes and every tile, on activations that torch laid out from random codes.

The bounds allow the one rounding of y to 16 bits, and the rounding of the sums. In int4 the sums are rounded in fp32 once per group of 64,
within which they are exact integers; in int8 they are int32, with one rounding at the border of two parts. The error of a wrong scale, a
swapped nibble or another token is thousands of times as large.

Hopper has no 4-bit MMA; its compiler emulates one, so that the paths of sm_80 .. sm_89 and of Turing run here as well.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from comfyui_svdquant.cuda import compiler, gemm_mma, int4, targets
from comfyui_svdquant.cuda.activation_layout import CodeStorage, lay_out_codes, lay_out_lora_act
from comfyui_svdquant.cuda.gemm_mma import LARGE, MEDIUM, SMALL
from comfyui_svdquant.cuda.int4 import GELU_SHIFT
from comfyui_svdquant.cuda.operands import LayerOperands
from comfyui_svdquant.cuda.quantize_activation import Quantized

from .gemm_cases import activated, all_numbers, output_rounding

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage


@dataclass(frozen=True)
class Path:
    storage: CodeStorage
    tile: gemm_mma.Tile
    turing: bool | None
    dtype: torch.dtype

    def __str__(self):
        name = ("int8", "bytes", "nibbles")[self.storage] + "-" + {LARGE: "large", MEDIUM: "medium", SMALL: "small"}[self.tile]
        return name + ("-turing" if self.turing else "") + ("-fp16" if self.dtype == torch.float16 else "")


PATHS = [Path(storage, tile, None, torch.bfloat16) for storage in CodeStorage for tile in (LARGE, MEDIUM, SMALL)]
PATHS += [Path(storage, MEDIUM, None, torch.float16) for storage in CodeStorage]
PATHS += [Path(storage, tile, True, torch.float16) for storage in (INT8, INT4_NIBBLES) for tile in (MEDIUM, SMALL)]

# m, n, k, rank, unsigned_from, bias
SHAPES = [
    (1, 16, 64, 0, 64, False),
    (16, 128, 128, 16, 128, True),
    (37, 80, 192, 48, 64, True),         # a border within a block, half a block of columns at the end, half a block of ranks
    (129, 272, 448, 32, 192, False),
    (300, 144, 640, 128, 0, True),
    (513, 400, 1088, 0, 512, True),
    (70, 1040, 3072, 32, 3072, True),
    (33, 208, 256, 1024, 192, True),
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile all kernels in parallel."""
    target = targets.for_device(DEVICE)
    defines = [gemm_mma.defines_of(p.storage, p.tile, target, p.dtype, p.turing, gelu) for p in PATHS for gelu in (False, True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda d: compiler.compile_cubin(gemm_mma.SOURCE, d, target.arch), defines))


@dataclass
class Case:
    """A layer and its quantized activation as plain matrices on the GPU; float64 except for the kernel's own operands."""

    codes: torch.Tensor          # (M, K)
    act_scale: torch.Tensor      # (G, M) float32; int8: (2, M)
    lora_act: torch.Tensor       # (M, R)
    lora_act_scale: torch.Tensor  # (M,) float32
    weight: torch.Tensor         # (N, K) codes
    weight_scale: torch.Tensor   # (G, N)
    row_scale: torch.Tensor | None
    up: torch.Tensor             # (N, R)
    bias: torch.Tensor | None
    unsigned_from: int

    def tokens(self, rows):
        """The same layer for some of the tokens."""
        return replace(self, codes=self.codes[rows], act_scale=self.act_scale[:, rows], lora_act=self.lora_act[rows],
                       lora_act_scale=self.lora_act_scale[rows])

    def operands(self, gelu_from=None):
        """The LayerOperands of the GEMM, which doesn't read proj_down and smooth."""
        k, rank = self.codes.shape[1], self.up.shape[1]
        down, smooth = self.up.new_empty(k, rank), self.up.new_empty(k)
        return LayerOperands(int4.pack(self.weight), self.weight_scale, down, self.up, smooth, self.bias, self.unsigned_from,
                             4 if self.row_scale is None else 8, self.row_scale, gelu_from)


def random_case(path, m, n, k, rank, unsigned_from, bias, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed + 1000 * m + n + k)

    def whole(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=g, device=DEVICE)

    def octaves(low, high, *shape):
        return torch.exp2(torch.rand(shape, generator=g, device=DEVICE) * (high - low) + low)

    groups, row_scale = k // 64, None
    weight_scale = octaves(-7, -5, groups, n).to(path.dtype)
    if path.storage == INT8:
        codes, act_scale = whole(-127, 127, m, k), octaves(-8, -6, 2, m)
        act_scale[1 if unsigned_from >= k else 0] *= 0 < unsigned_from < k  # the row of a part without columns
        row_scale = whole(8, 15, n) * torch.exp2(whole(-12, -10, n).float())  # 4 bits, so that c i is exact in bf16
        weight_scale = (whole(-15, 16, groups, n) * row_scale).to(path.dtype)
    else:
        codes, act_scale = whole(-7, 7, m, k), octaves(-4, -2, groups, m)
        codes[:, unsigned_from:] = whole(0, 15, m, k - unsigned_from)
    normal = lambda *shape: torch.randn(shape, generator=g, device=DEVICE).to(path.dtype)  # noqa: E731
    return Case(codes, act_scale, normal(m, rank), torch.exp2(whole(-3, 3, m).float()), whole(-8, 7, n, k), weight_scale, row_scale,
                normal(n, rank), normal(n) if bias else None, unsigned_from)


def padded_rows(vectors):
    """(.., M) -> (.., padded M). The padding, which must not affect y, is NaN."""
    return torch.nn.functional.pad(vectors, (0, -vectors.shape[-1] % 16), value=float("nan")).contiguous()


def run(path, case, gelu_from=None):
    """y (M, N), from a poisoned buffer whose margins must not change."""
    (m, _), (n, _), margin = case.codes.shape, case.weight.shape, 4096
    buffer = torch.full((m * n + 2 * margin,), float("nan"), dtype=path.dtype, device=DEVICE)
    y = buffer[margin:-margin].view(m, n)
    branch = case.up.shape[1] > 0
    q = Quantized(lay_out_codes(case.codes, path.storage), padded_rows(case.act_scale),
                  lay_out_lora_act(case.lora_act) if branch else None, padded_rows(case.lora_act_scale) if branch else None)
    gemm_mma.launch(y, path.storage, path.tile, q, case.operands(gelu_from), path.turing)
    torch.cuda.synchronize()
    assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all(), "written outside y"
    return y


def exact(path, case, gelu_from=None):
    """y in float64, and the error bound of a correct kernel."""
    k = case.codes.shape[1]
    groups = k // 64
    scale = case.act_scale.double()
    if path.storage == INT8:
        part = (torch.arange(groups, device=DEVICE) >= case.unsigned_from // 64).long()
        scale = scale[part]
    act = (case.codes.double().unflatten(1, (groups, 64)) * scale.t()[..., None]).flatten(1)
    weight = (case.weight.double().unflatten(1, (groups, 64)) * case.weight_scale.double().t()[..., None]).flatten(1)
    lora_act, up = case.lora_act.double() * case.lora_act_scale.double()[:, None], case.up.double()
    y = act @ weight.t() + lora_act @ up.t()
    size = act.abs() @ weight.abs().t() + lora_act.abs() @ up.abs().t()
    if case.bias is not None:
        y += case.bias.double()
        size += case.bias.double().abs()
    roundings = up.shape[1] + 8 + (0 if path.storage == INT8 else groups)
    half_ulp = 2.0**-8 if path.dtype == torch.bfloat16 else 2.0**-11  # of y, relative
    bound = half_ulp * y.abs() + roundings * 2.0**-23 * size
    if path.storage == INT8 and 0 < case.unsigned_from < k:  # the rounding of the first part's sum at the border
        bound += 0.51 * scale[-1][:, None] * case.row_scale.double()
    return (y, bound) if gelu_from is None else activated(y, bound, gelu_from, path.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(int(v)) for v in s))
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_matches_float64_and_repeats(path, shape):
    case = random_case(path, *shape)
    y = run(path, case)
    expected, bound = exact(path, case)
    worst = ((y.double() - expected).abs() / bound.clamp(min=1e-30)).nan_to_num(torch.inf)
    at = divmod(int(worst.argmax()), y.shape[1])
    assert worst.max() <= 1, f"{int((worst > 1).sum())} of {y.numel()} wrong, worst at {at}: {y[at].item()} for {expected[at].item()}"
    assert torch.equal(y.view(torch.int16), run(path, case).view(torch.int16))


@pytest.mark.parametrize(("shape", "gelu_from"), [(SHAPES[1], 0), (SHAPES[2], 64), (SHAPES[3], 192), (SHAPES[4], 0), (SHAPES[6], 1040)])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gelu_from_a_column_on(path, shape, gelu_from):
    case = random_case(path, *shape)
    y = run(path, case, gelu_from)
    expected, bound = exact(path, case, gelu_from)
    assert ((y.double() - expected).abs() <= bound).all() and (y.abs() < 3).any()
    assert torch.equal(y[:, :gelu_from], run(path, case)[:, :gelu_from]) and torch.equal(y, run(path, case, gelu_from))


@pytest.mark.parametrize("path", [Path(INT8, LARGE, None, torch.bfloat16), Path(INT8, MEDIUM, None, torch.float16)], ids=str)
def test_gelu_of_every_number(path):
    """Each number is a bias, added to a product of zeros."""
    case = random_case(path, 1, 65536, 64, 0, 64, False)
    case.codes.zero_()
    case.bias = all_numbers(path.dtype)
    x = case.bias.double()[None]
    y, bound = activated(x, 2.0**-24 + output_rounding(path.dtype) * x.abs(), 0, path.dtype)
    got, finite = run(path, case, 0), x.isfinite()
    assert ((got.double() - y).abs() <= bound)[finite].all() and got[finite].min() > -GELU_SHIFT
    assert got[x.isnan()].isnan().all() and (got[x == torch.inf] == torch.inf).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_token_does_not_depend_on_its_neighbours(path):
    case = random_case(path, 150, 160, 320, 32, 192, True)
    whole = run(path, case)
    for rows in (slice(0, 1), slice(3, 100), slice(149, 150)):
        assert torch.equal(run(path, case.tokens(rows)), whole[rows])


@pytest.mark.parametrize(("row", "gelu_from"), [(0, None), (77, None), (77, 64)])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_nan_stays_in_its_row(path, row, gelu_from):
    case = random_case(path, 130, 144, 256, 16, 128, True)
    clean = run(path, case, gelu_from)
    case.act_scale[:1, row] = torch.nan  # scale of the first group, or of the first part
    case.codes[row] = 0
    y = run(path, case, gelu_from)
    others = torch.arange(130, device=DEVICE) != row
    assert y[row].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("path", [p for p in PATHS if p.dtype == torch.float16], ids=str)
def test_fp16_overflow_is_visible(path):
    case = random_case(path, 20, 32, 128, 16, 128, True)
    case.weight_scale.mul_(1024)
    if case.row_scale is not None:
        case.row_scale.mul_(1024)
    case.act_scale.mul_(1024)
    expected, _ = exact(path, case)
    y = run(path, case)
    large = expected.abs() > 70000
    assert large.any() and y[large].isinf().all() and torch.equal(y[large] > 0, expected[large] > 0)
    assert y[expected.abs() < 60000].isfinite().all()


@pytest.mark.parametrize("storage", CodeStorage, ids=lambda storage: storage.name)
def test_more_tokens_than_a_band_and_a_flux_layer(storage):
    """Several bands of tiles, and M = 4608 with choose()'s tile."""
    chosen = gemm_mma.fastest_tile(gemm_mma.tiles_of(targets.for_device(DEVICE)), targets.multiprocessors(DEVICE), 4608, 3072)
    for m, n, k, tile in ((6000, 272, 128, SMALL), (4608, 3072, 3072, chosen) if storage != INT4_NIBBLES else (4608, 384, 256, LARGE)):
        path = Path(storage, tile, None, torch.bfloat16)
        case = random_case(path, m, n, k, 32, k, True)
        y = run(path, case)
        expected, bound = exact(path, case)
        assert ((y.double() - expected).abs() <= bound).all()


def test_shapes_that_do_not_fit_are_refused():
    path = Path(INT8, SMALL, None, torch.bfloat16)
    case = random_case(path, 20, 32, 192, 16, 192, False)  # int8 has a scale per part, int4 one per group
    q = Quantized(lay_out_codes(case.codes, INT4_BYTES), padded_rows(case.act_scale), None, None)
    with pytest.raises(ValueError, match="activation is"):
        gemm_mma.gemm(INT4_BYTES, SMALL, q, case.operands(), 20)
