"""modulate.cu and qk_norm_rope.cu against the reference in float64, on a GPU."""

import pytest
import torch
from comfyui_svdquant.cuda import block_ops, reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 512, 3072), (2, 37, 3072), (1, 1, 8), (3, 5, 264), (2, 9, 200), (1, 3, 6144), (2, 3, 15360), (1, 4096, 3072))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs are NaN before a launch, so that an element that isn't written shows."""
    made = block_ops.runtime.allocator

    def allocator(*args):
        allocate = made(*args)
        return lambda: allocate().fill_(torch.nan)

    monkeypatch.setattr(block_ops.runtime, "allocator", allocator)
    for cache in (block_ops._modulate_launch, block_ops._rope_launch):
        cache.cache_clear()
    yield
    for cache in (block_ops._modulate_launch, block_ops._rope_launch):
        cache.cache_clear()


def half_unit(dtype):
    """Half a unit in the last place, relative, and a little for fp32 arithmetic."""
    return torch.finfo(dtype).eps / 2 * 1.01


def assert_rounded(y, exact, dtype, terms):
    """y is the float64 result `exact`, rounded once to `dtype` after fp32 arithmetic on terms of magnitudes `terms`."""
    error = (y.double() - exact).abs()
    bound = half_unit(dtype) * exact.abs() + 2.0**-19 * terms + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    relative = (error.norm() / exact.norm()).item()
    assert (error <= bound).all(), f"relative error {relative:.3g}, {(error / bound).max().item():.3g} times the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_vector", (True, False), ids=("vector", "vectors"))
def test_modulate_is_float64s_result_and_repeats(dtype, shape, one_vector):
    torch.manual_seed(sum(shape))
    b, _, k = shape
    x, y = (torch.randn(shape, device="cuda").mul_(3).add_(0.5).to(dtype) for _ in range(2))
    modulation = torch.randn(1 if one_vector else b, 1, 3 * k, device="cuda").to(dtype)
    gate, scale, shift = modulation.chunk(3, dim=-1)  # views with a stride, as a block has them
    z, m = block_ops.gated_residual_norm(x, y, gate, scale, shift, 1e-6)
    exact_z, _ = reference.modulate(x.double(), y.double(), gate.double(), dtype=torch.float64)
    assert_rounded(z, exact_z, dtype, x.double().abs() + (gate.double() * y.double()).abs())
    size = z.double().abs().amax(dim=-1, keepdim=True) / z.double().std(dim=-1, keepdim=True, correction=0).clamp(min=1e-3)
    terms = size * (1 + scale.double().abs()) + shift.double().abs()
    exact_m = reference.modulate(z.double(), None, None, scale.double(), shift.double(), 1e-6, torch.float64)[1]
    assert_rounded(m, exact_m, dtype, terms)
    again = block_ops.gated_residual_norm(x, y, gate, scale, shift, 1e-6)
    assert torch.equal(z, again[0]) and torch.equal(m, again[1])
    assert torch.equal(block_ops.gated_residual(x, y, gate), z)
    assert torch.equal(block_ops.norm_modulate(z, scale, shift, 1e-6), m)


def test_modulate_reads_strided_tokens():
    torch.manual_seed(1)
    wide = torch.randn(2, 19, 3 * 512, device="cuda").bfloat16()
    x, scale, shift = wide[..., 512:1024], *torch.randn(2, 2, 1, 512, device="cuda").bfloat16()
    assert torch.equal(block_ops.norm_modulate(x, scale, shift, 1e-6), block_ops.norm_modulate(x.contiguous(), scale, shift, 1e-6))
    part = wide[:, 3:11, :512]  # images that don't follow each other
    assert torch.equal(block_ops.gated_residual(part, part, scale), block_ops.gated_residual(part.contiguous(), part.contiguous(), scale))


def test_fp16_stays_in_range():
    x = torch.tensor([60000.0, -60000.0, torch.nan, 1.0] * 4, device="cuda").half().view(1, 1, 16)
    z = block_ops.gated_residual(x, torch.full_like(x, 60000.0).copysign(x), torch.ones_like(x))
    assert z.view(-1)[:4].tolist() == [65504.0, -65504.0, 0.0, 60000.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head, heads", ((128, 24), (128, 3), (64, 5), (256, 2)))
@pytest.mark.parametrize("b, text, image", ((1, 512, 1024), (2, 7, 30), (3, 0, 5), (1, 1, 1)))
@pytest.mark.parametrize("parts", (2, 3))
def test_qk_norm_rope_is_float64s_result_and_repeats(dtype, head, heads, b, text, image, parts):
    torch.manual_seed(head * heads + b)
    wide = 3 * heads * head
    streams = []
    for tokens in (text, image):
        if tokens:
            rows = torch.randn(b, tokens, wide + 64, device="cuda").mul_(4).to(dtype)[..., :wide]
            streams.append((rows, *torch.randn(2, head, device="cuda").to(dtype)))
    angles = torch.randn(b, 1, text + image, head // 2, device="cuda") * 10
    pe = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1).unflatten(-1, (2, 2))
    joined = block_ops.qk_norm_rope(streams, pe, heads, parts, 1e-6)
    exact = reference.qk_norm_rope([[x.double() for x in stream] for stream in streams], pe.double(), heads, parts, 1e-6, torch.float64)
    assert len(joined) == parts
    for part, (x, wanted) in enumerate(zip(joined, exact)):
        x, wanted = x.transpose(1, 2), wanted.double()
        if part == 2:
            assert torch.equal(x.double(), wanted)
        else:
            pairs = wanted.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*wanted.shape[:-1], -1, 2).flatten(-2)
            assert_rounded(x, wanted, dtype, pairs * 2)
    again = block_ops.qk_norm_rope(streams, pe, heads, parts, 1e-6)
    assert all(torch.equal(x, y) for x, y in zip(joined, again))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head", "heads", "parts", "strides"), (
    (128, 24, 3, (0, 0, 0)), (64, 5, 2, (64, 64, 64)), (256, 2, 3, (0, 64, 8))))
@pytest.mark.parametrize("pe_dtype", (None, torch.float32, torch.float64), ids=("16 bits", "float32", "float64"))
def test_q_k_and_v_apart_and_any_pe_have_the_bits_of_joined_rows(dtype, head, heads, parts, strides, pe_dtype):
    """strides: columns beyond those of q, of k and of v."""
    torch.manual_seed(head)
    joined, apart, width = [], [], heads * head
    for tokens in (37, 110):
        rows, norms = torch.randn(2, tokens, 3 * width, device="cuda").to(dtype), torch.randn(2, head, device="cuda").to(dtype)
        joined.append((rows, *norms))
        pieces = [torch.nn.functional.pad(x, (0, more))[..., :width] for x, more in zip(rows.chunk(3, dim=-1), strides)]
        apart.append((pieces, *norms))
    pe = torch.randn(2, 1, 147, head // 2, 2, 2, device="cuda").to(dtype)  # numbers that every type has
    wanted = block_ops.qk_norm_rope(joined, pe.float(), heads, parts, 1e-6)
    found = block_ops.qk_norm_rope(apart, pe.to(pe_dtype or dtype), heads, parts, 1e-6)
    assert len(found) == parts and all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(found, wanted))


def test_norms_of_the_two_streams_are_their_own():
    torch.manual_seed(2)
    rows, norms = torch.randn(2, 1, 4, 3 * 128, device="cuda").bfloat16(), torch.randn(4, 128, device="cuda").bfloat16()
    pe = torch.eye(2, device="cuda").expand(1, 1, 8, 64, 2, 2).contiguous()
    q, k = block_ops.qk_norm_rope([(rows[0], *norms[:2]), (rows[1], *norms[2:])], pe, 1, 2, 1e-6)
    for i, joined in ((0, q), (1, k)):
        for stream in (0, 1):
            x = rows[stream][..., i * 128:(i + 1) * 128].double()
            wanted = torch.nn.functional.rms_norm(x, (128,), norms[2 * stream + i].double(), 1e-6)
            assert_rounded(joined[:, 0, 4 * stream:4 * stream + 4], wanted, torch.bfloat16, wanted.abs())
