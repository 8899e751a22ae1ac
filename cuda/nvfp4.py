"""NVFP4: 4-bit floats in groups of 16 that share a scale, in plain PyTorch, for any device.

A code is e2m1: a sign bit above the index of one of eight magnitudes. Two codes share a byte as in int4.py, the even column
in the low nibble. A weight has two scales (arXiv 2509.25149, section 2):

    w = e2m1 * weight_scale (e4m3, per row and 16 columns) * weight_scale_2 (float32, per row and K / B columns)

e2m1 * e4m3 has at most six significant bits, so it is exact in bf16 and in fp16. Activations have no second scale.

Only GPUs from compute capability 10.0 on multiply such codes. Here each layer's weight stays packed in memory, and a call dequantizes
it to 16 bits (to 32 bits in the reference). Activations are rounded to NVFP4 nevertheless, because the smoothing, branch and codes
of a published model are chosen for rounded activations.

M tokens, K inputs, N outputs, R the rank, G = K / 16 groups, B blocks of the second scale.
"""

import torch
from torch.nn.functional import embedding, linear

NVFP4_GROUP = 16  # columns that share one e4m3 scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = MAGNITUDES[-1]
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)  # VALUES[code], for the codes 0 to 15
CHUNK = 1 << 24  # weights that are dequantized at a time, which bounds the temporary memory


def decode(packed, dtype=torch.float32):
    """(..., K/2) int8 -> (..., K), the codes' values, exact in every float `dtype` of 16 bits and more."""
    values = torch.tensor(VALUES, dtype=dtype, device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # (256, 2): low nibble, high nibble
    return embedding(packed.view(torch.uint8).int(), pairs).flatten(-2)


def round_e2m1(x):
    """The nearest e2m1 value, ties to the even code, saturating, as the instruction cvt.rn.satfinite.e2m1x2 rounds. NaN stays NaN."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp(max=E2M1_MAX).copysign(x)


def dequantize_weight(weight, weight_scale, weight_scale_2, dtype=torch.float32):
    """weight: (N, K/2) int8; weight_scale: (G, N) e4m3; weight_scale_2: (B, N) float32. Returns (N, K), rounded
    once to `dtype`."""
    n, k = weight.shape[0], weight.shape[1] * 2
    exact = torch.promote_types(dtype, torch.float32)
    scales = weight_scale.to(exact) * weight_scale_2.to(exact).repeat_interleave(len(weight_scale) // len(weight_scale_2), dim=0)
    dense = torch.empty(n, k, dtype=dtype, device=weight.device)
    rows = max(CHUNK // k, 1)
    for part, codes, scale in zip(dense.split(rows), weight.split(rows), scales.t().split(rows)):
        part.unflatten(-1, (-1, NVFP4_GROUP)).copy_(decode(codes, exact).unflatten(-1, (-1, NVFP4_GROUP)) * scale.unsqueeze(-1))
    return dense


def quantize_activation(x, smooth, dtype=torch.float32):
    """Smooth each token and round it to NVFP4.

    x: (M, K) float; smooth: (K,) float, the divisor. Returns (M, K), the rounded values, exact in `dtype` (float, 16 bits or more).
    A group's scale is its largest magnitude / 6 in e4m3, at most 448. As in Nunchaku, the codes are chosen by the scale before it
    is rounded to e4m3.

    A NaN or Inf makes its whole group NaN, so that it stays visible.
    """
    groups = (x.float() / smooth.float()).unflatten(-1, (-1, NVFP4_GROUP))  # (M, G, 16)
    absmax = groups.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(absmax.isfinite(), (absmax / E2M1_MAX).clamp(max=E4M3_MAX), torch.nan)
    # Dividing by 1 instead of 0 avoids NaN in a group of zeros.
    codes = round_e2m1(groups / torch.where(scales == 0, 1.0, scales))
    return (codes * scales.to(torch.float8_e4m3fn).to(codes.dtype)).flatten(-2).to(dtype)


def nvfp4_linear(x, weight, weight_scale, weight_scale_2, proj_down, proj_up, smooth, bias, dtype=torch.float32):
    """One SVDQuant layer in NVFP4, y = Q(x / smooth) W^T + (x proj_down) proj_up^T + bias, computed in `dtype`.

    x: (..., K); weight, weight_scale, weight_scale_2: as in dequantize_weight; proj_down: (K, R); proj_up: (N, R); smooth: (K,);
    bias: (N,) or None. Returns (..., N) in x.dtype. In bf16 or fp16 the matrix products run on tensor cores: they
    accumulate in float32, and the dequantized weight, the product, the branch and y are each rounded once to 16 bits.
    """
    tokens = x.reshape(-1, x.shape[-1])
    act = quantize_activation(tokens, smooth, dtype)
    y = linear(act, dequantize_weight(weight, weight_scale, weight_scale_2, dtype), None if bias is None else bias.to(dtype))
    y += linear(linear(tokens.to(dtype), proj_down.to(dtype).t()), proj_up.to(dtype))
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
