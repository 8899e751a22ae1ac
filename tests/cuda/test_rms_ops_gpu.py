"""rms_modulate.cu and swiglu.cu against the reference in float64, on a GPU."""

import pytest
import torch
from comfyui_svdquant.cuda import reference, rms_ops

from .test_block_ops_gpu import DTYPES, assert_rounded

pytestmark = pytest.mark.gpu
SHAPES = ((1, 512, 3840), (2, 37, 3072), (1, 1, 8), (3, 5, 264), (2, 9, 200), (1, 3, 6144), (2, 3, 15360), (1, 4096, 3840))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs are NaN before a launch, so that an element that isn't written shows."""
    made, caches = rms_ops.runtime.allocator, (rms_ops._modulate_launch, rms_ops._swiglu_launch)

    def allocator(*args):
        allocate = made(*args)
        return lambda: allocate().fill_(torch.nan)

    monkeypatch.setattr(rms_ops.runtime, "allocator", allocator)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("modulated", ("not", "one vector", "vectors"))
def test_modulate_is_float64s_result_and_repeats(dtype, shape, modulated):
    torch.manual_seed(sum(shape))
    b, _, k = shape
    x, y = (torch.randn(shape, device="cuda").mul_(3).to(dtype) for _ in range(2))
    y_weight, weight = torch.randn(2, k, device="cuda").to(dtype)
    gate = scale = None
    if modulated != "not":  # views with a stride, as a block has them
        gate, scale = torch.randn(b if modulated == "vectors" else 1, 1, 4 * k, device="cuda").to(dtype).chunk(4, dim=-1)[1:3]
    z, m = rms_ops.gated_residual_norm(x, y, y_weight, gate, weight, scale, 1e-5)
    exact = [None if t is None else t.double() for t in (x, y, y_weight, gate, weight, scale)]
    exact_z, _ = reference.rms_modulate(*exact[:4], eps=1e-5, dtype=torch.float64)
    assert_rounded(z, exact_z, dtype, (exact_z - exact[0]).abs() * 2 + exact[0].abs())
    _, exact_m = reference.rms_modulate(z.double(), None, None, None, exact[4], exact[5], 1e-5, torch.float64)
    assert_rounded(m, exact_m, dtype, exact_m.abs() * 4)
    again = rms_ops.gated_residual_norm(x, y, y_weight, gate, weight, scale, 1e-5)
    assert torch.equal(z, again[0]) and torch.equal(m, again[1])
    assert torch.equal(rms_ops.gated_residual(x, y, y_weight, gate, 1e-5), z)
    assert torch.equal(rms_ops.norm_modulate(z, weight, scale, 1e-5), m)


def test_modulate_reads_strided_tokens_and_other_types_of_weights():
    torch.manual_seed(1)
    wide = torch.randn(2, 19, 3 * 512, device="cuda").bfloat16()
    weight, scale = torch.randn(512, device="cuda").bfloat16(), torch.randn(2, 1, 512, device="cuda").bfloat16()
    x = wide[..., 512:1024]
    wanted = rms_ops.norm_modulate(x.contiguous(), weight, scale, 1e-5)
    assert torch.equal(rms_ops.norm_modulate(x, weight, scale, 1e-5), wanted)
    assert torch.equal(rms_ops.norm_modulate(x, weight.float().cpu(), scale.float(), 1e-5), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 4352, 10240), (2, 3, 8), (1, 37, 264), (1, 0, 64), (1, 3, 7)), ids=str)
def test_swiglu_is_float64s_result(dtype, shape):
    torch.manual_seed(shape[-1])
    gate, up = (torch.randn(shape, device="cuda").mul_(8).to(dtype) for _ in range(2))
    if gate.numel() > 8:
        gate.view(-1)[:3] = torch.tensor([-200.0, 200.0, 0.0])
    y, exact = rms_ops.swiglu(gate, up), reference.swiglu(gate.double(), up.double(), torch.float64)
    assert y.shape == gate.shape and y.dtype == dtype
    if y.numel():
        assert_rounded(y, exact, dtype, exact.abs() * 8)
    wide = torch.stack((gate, up), dim=-1)
    assert torch.equal(rms_ops.swiglu(wide[..., 0], wide[..., 1]), y)
