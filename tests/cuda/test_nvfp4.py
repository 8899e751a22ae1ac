"""NVFP4: codes against comfy-kitchen's and against the inputs of Nunchaku's packer, and the layer against float64."""

from pathlib import Path

import pytest
import torch
from comfy_kitchen.float_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32
from comfyui_svdquant.cuda import int4, nvfp4, nvfp4_ops
from safetensors.torch import load_file

from .layers import random_input, relative_error

VECTORS = Path(__file__).resolve().parents[1] / "data" / "nunchaku" / "nvfp4_linear_n256_k256_r32.safetensors"
N, K, RANK = 96, 320, 16


def layer(blocks=1, dtype=torch.bfloat16, seed=0):
    """Packed tensors with all sixteen codes, scales over four octaves and second scales over four more."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.rand(K // 16, N, generator=g) * 4 + 4).to(torch.float8_e4m3fn)
    second = torch.exp2(torch.rand(blocks, N, generator=g) * 4 - 14)
    smooth = torch.exp2(torch.rand(K, generator=g) * 6 - 3).to(dtype)
    down, up = (torch.randn(K, RANK, generator=g) / K**0.5).to(dtype), torch.randn(N, RANK, generator=g).to(dtype)
    return (int4.pack(torch.randint(0, 16, (N, K), generator=g)), scale, second, down, up, smooth,
            torch.randn(N, generator=g).to(dtype))


def activation(x, smooth):
    """Q(x / smooth) in float64, group by group, by comfy-kitchen's e2m1 and e4m3."""
    rounded = torch.empty(x.shape, dtype=torch.float64)
    for g in range(0, x.shape[1], 16):
        group = x[:, g:g + 16].float() / smooth[g:g + 16].float()
        scale = (group.abs().amax(1, keepdim=True) / 6).clamp(max=448)
        codes = _floatx_unpacked_to_f32(_f32_to_floatx_unpacked((group / scale).nan_to_num(), 2, 1), 2, 1)
        rounded[:, g:g + 16] = codes.double() * scale.to(torch.float8_e4m3fn).double()
    return rounded


def exact(x, weight, scale, second, down, up, smooth, bias):
    """The layer in float64, with the format's rounding of each element."""
    byte = weight.view(torch.uint8).long()
    codes = torch.stack((byte & 15, byte >> 4), dim=-1).flatten(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)[codes]
    column = torch.arange(K)
    dense = values * scale.double()[column // 16].t() * second.double()[column * len(second) // K].t()
    y = activation(x, smooth) @ dense.t() + (x.double() @ down.double()) @ up.double().t()
    return y if bias is None else y + bias.double()


def test_e2m1_rounds_as_comfy_kitchens_does():
    halves = torch.cat([torch.linspace(-7, 7, 14 * 64 + 1), torch.randn(1000)])  # every tie and both sides of it
    theirs = _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(halves, 2, 1), 2, 1)
    assert torch.equal(nvfp4.round_e2m1(halves), theirs)
    assert torch.equal(nvfp4.round_e2m1(halves.bfloat16()).float(), nvfp4.round_e2m1(halves.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_exact_in_16_bits(dtype):
    codes = int4.pack(torch.arange(16).repeat(126, 1))
    scale = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(0)  # every positive finite e4m3
    dense = nvfp4.dequantize_weight(codes, scale, torch.ones(1, 126), dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense.double(), scale.double().t() * torch.tensor(nvfp4.VALUES, dtype=torch.float64))


def test_nunchakus_codes_decode_to_its_inputs():
    v = load_file(VECTORS)
    dense = nvfp4.dequantize_weight(int4.pack(v["in.weight_code"]), v["in.wscales"].t().to(torch.float8_e4m3fn),
                                    v["in.wcscales"].float().unsqueeze(0), torch.float64)
    signed = v["in.weight_code"].double()
    magnitude = torch.where(signed % 8 < 4, signed % 8 / 2, torch.where(signed % 8 < 6, signed % 8 - 2, 2 * (signed % 8) - 8))
    scale = v["in.wscales"].to(torch.float8_e4m3fn).double().repeat_interleave(16, dim=1) * v["in.wcscales"].double().unsqueeze(1)
    assert torch.equal(dense, torch.where(signed > 7, -magnitude, magnitude) * scale)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("blocks", [1, 5])
def test_float32_is_float64_to_rounding(monkeypatch, blocks, chunk):
    monkeypatch.setattr(nvfp4, "CHUNK", chunk)
    tensors, x = layer(blocks), random_input(40, K)
    error = relative_error(nvfp4.nvfp4_linear(x, *tensors), exact(x, *tensors))
    assert error < 2e-6, f"relative error {error:.2e}"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_16_bit_results_are_close_to_float64(dtype, bound):
    """The dequantized weight, the product, the branch and y are rounded to 16 bits, each by at most half of `bound`."""
    tensors, x = layer(5, dtype), random_input(64, K, dtype)
    error = relative_error(nvfp4.nvfp4_linear(x, *tensors, dtype=dtype), exact(x, *tensors))
    assert error < bound, f"relative error {error:.2e}"


def test_the_bounds_detect_a_wrong_scale_and_a_swapped_byte():
    tensors, x = layer(5), random_input(40, K)
    right = exact(x, *tensors)
    for i, change in ((0, lambda t: t.view(torch.uint8)[0, 0].bitwise_xor_(0x90)), (1, lambda t: t.view(torch.uint8)[3, 4].add_(2)),
                      (2, lambda t: t[1, 7].mul_(1.01)), (5, lambda t: t[9].mul_(2)), (6, lambda t: t[3].add_(1))):
        wrong = [t.clone() for t in tensors]
        change(wrong[i])
        assert relative_error(nvfp4.nvfp4_linear(x, *wrong), right) > 1e-5, i


def test_zeros_extremes_and_values_that_are_not_finite():
    smooth = torch.ones(64)
    x = torch.zeros(4, 64)
    x[1] = 1e-6  # a scale below e4m3's smallest is 0, as in Nunchaku
    x[2] = 1e6  # the largest scale and the largest code
    x[3, 20], x[3, 40] = torch.inf, torch.nan
    y = nvfp4.quantize_activation(x, smooth)
    assert not y[:2].any() and (y[2] == 448 * 6).all()
    assert y[3].isnan().tolist() == [16 <= k < 48 for k in range(64)]


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    *tensors, last = layer()
    # test_schema is left out: it compares the inputs before and after, and PyTorch can't compare float8.
    torch.library.opcheck(nvfp4_ops.nvfp4_linear, (random_input(5, K, torch.bfloat16), *tensors, last if bias else None),
                          test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_one_graph_under_torch_compile():
    tensors, x = layer(), random_input(5, K).reshape(1, 5, K)

    def model(x):
        return torch.nn.functional.gelu(nvfp4_ops.nvfp4_linear(x, *tensors)) * 2

    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-5)])
def test_on_a_gpu(dtype, bound):
    tensors, x = layer(5, dtype if dtype != torch.float32 else torch.bfloat16), random_input(64, K, dtype)
    y = nvfp4_ops.nvfp4_linear(x.cuda(), *(t.cuda() for t in tensors))
    error = relative_error(y.cpu(), exact(x, *tensors))
    assert error < bound, f"relative error {error:.2e}"
