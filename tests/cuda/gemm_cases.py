"""Random operands for the GEMM kernels, in the activation layout, and their product in float64."""

from dataclasses import dataclass

import torch
from comfyui_svdquant.cuda import int4
from comfyui_svdquant.cuda.activation_layout import ROWS, CodeStorage, lay_out_codes, lay_out_lora_act, padded
from comfyui_svdquant.cuda.operands import LayerOperands
from comfyui_svdquant.cuda.quantize_activation import Quantized
from torch.nn.functional import gelu


@dataclass
class Int8Case:
    """Operands of the int8 GEMM, and its expected output."""

    q: Quantized
    operands: LayerOperands
    m: int
    exact: torch.Tensor  # (M, N) float64
    bound: torch.Tensor  # (M, N) float64: the largest error that the kernel's arithmetic allows

    def gelu_from(self, column):
        """The LayerOperands, with GELU from column `gelu_from` on."""
        return self.operands._replace(gelu_from=column)


def output_rounding(dtype):
    """The largest relative rounding error of the type: half a unit in the last place."""
    return 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11


def activated(exact, bound, gelu_from, dtype):
    """(exact, bound) with GELU from a column on. GELU's slope is at most 1.13, and the kernels' error before rounding is at
    most 2^-12 |x|."""
    x = exact[:, gelu_from:]
    y, sums = gelu(x, approximate="tanh"), bound[:, gelu_from:] - output_rounding(dtype) * x.abs()
    after = 1.13 * sums + 1.01 * 2.0**-12 * x.abs() + output_rounding(dtype) * y.abs() * 1.01
    return torch.cat((exact[:, :gelu_from], y), dim=1), torch.cat((bound[:, :gelu_from], after), dim=1)


def all_numbers(dtype):
    """(65536,): every number of a 16-bit type, with all its NaNs."""
    return torch.arange(-2**15, 2**15, device="cuda").to(torch.int16).view(dtype)


def int8_case(m, n, k, rank, unsigned_from=None, bias=True, dtype=torch.bfloat16, device="cuda", seed=0, scale=1.0):
    """A case with all codes and integers, token scales over two octaves, and the parts' scales within a factor of 16. scale: a factor of
    all token scales."""
    g = torch.Generator(device).manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, device=device)

    unsigned_from = k if unsigned_from is None else unsigned_from
    rows = padded(m, ROWS)
    codes = torch.randint(-127, 128, (m, k), generator=g, device=device)
    weight = torch.randint(-8, 8, (n, k), generator=g, device=device)
    integer = torch.randint(-15, 17, (k // 64, n), generator=g, device=device).float()
    row_scale = torch.randint(8, 16, (n,), generator=g, device=device).float() * torch.exp2((uniform(n) * 4).floor() - 14)
    act_scale = scale * torch.exp2(uniform(2, rows) * 2 - 6)
    act_scale[:, m:] = 0
    lora_act = (scale * torch.randn(m, rank, generator=g, device=device)).to(dtype)
    lora_act_scale = torch.exp2((uniform(rows) * 5).floor() - 2) if dtype == torch.float16 else torch.ones(rows, device=device)
    up = torch.randn(n, rank, generator=g, device=device).to(dtype)
    bias = torch.randn(n, generator=g, device=device).to(dtype) if bias else None

    part = (torch.arange(k, device=device) >= unsigned_from).long()
    x = codes.double() * act_scale[:, :m].double()[part].t()
    w = weight.double() * (integer * row_scale).double().t().repeat_interleave(64, dim=1)
    branch = lora_act_scale[:m, None].double() * (lora_act.double() @ up.double().t())
    exact = x @ w.t() + branch + (0 if bias is None else bias.double())
    sizes = x.abs() @ w.abs().t() + lora_act_scale[:m, None].double() * (lora_act.double().abs() @ up.double().abs().t()) + 4
    bound = output_rounding(dtype) * exact.abs() * 1.01 + 2e-7 * sizes
    if 0 < unsigned_from < k:  # the first part's sum is rounded to units of the second part's scale
        bound = bound + 0.51 * act_scale[1, :m, None].double() * row_scale.double()
    q = Quantized(lay_out_codes(codes, CodeStorage.INT8), act_scale, lay_out_lora_act(lora_act) if rank else None,
                  lora_act_scale if rank else None)
    operands = LayerOperands(int4.pack(weight), (integer * row_scale).to(dtype), up.new_empty(k, rank), up, up.new_empty(k), bias,
                             unsigned_from, 8, row_scale)
    return Int8Case(q, operands, m, exact, bound)
