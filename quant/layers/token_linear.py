"""The W4A16 linear of text encoders, whose inputs have a row for each token of a prompt.

The W4A16 kernel is made for few rows: it reads the codes again for every 32 of them, most of the times from the GPU's cache. For many rows
it is cheaper to dequantize the weight once, for a product that runs at cuBLAS's speed. T5-XXL on an H200 takes 21, 23 and 43 ms for 77, 256
and 512 tokens by the kernel, and 53, 51 and 56 ms by dequantized weights, so that they would meet at about 700.

ComfyUI's text encoders compute in float32, whatever type their weights have: T5's MLPs leave the range of float16. On GPUs with bfloat16
tensor cores the product is in bfloat16, which has float32's range: it adds an error of about 2^-9, a thirtieth of what 4-bit weights have,
and takes a tenth of the time. Everywhere else it is in the type of the input.
"""

import functools

import torch
from torch.nn.functional import linear

from ...cuda import dispatch, ops, reference, targets
from ...cuda.errors import KernelsUnavailable
from ...cuda.int4 import GROUP_SIZE
from .linear import AWQLinear

KERNEL_ROWS = 512     # more rows than this are multiplied by the dequantized weight
CHUNK = 1 << 25       # weights that are dequantized at a time, so that their codes in 8 bits stay small beside the result


@functools.lru_cache(maxsize=64)
def product_dtype(dtype, device):
    """The type in which a layer multiplies an input in `dtype` on `device`."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip:
        return dtype
    try:
        return torch.bfloat16 if targets.for_device(device).bf16 else dtype
    except KernelsUnavailable:  # the GPU is too old
        return dtype


def dequantized(weight, weight_scale, weight_zeros, dtype):
    """(N, K) in `dtype`, the values of reference.dequantize_awq, in few passes over memory. Arguments as there."""
    n, half = weight.shape
    k = 2 * half
    dense = torch.empty(n, k // GROUP_SIZE, GROUP_SIZE, dtype=dtype, device=weight.device)
    scale, zeros = (factor.t().unsqueeze(-1).to(dtype) for factor in (weight_scale, weight_zeros))
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        # Toggling the high bit of an unsigned code gives code - 8 in two's complement, so that a shift extends its sign.
        pairs, signed = dense[part].view(-1, half, 2), weight[part] ^ -0x78
        pairs[..., 1] = signed >> 4
        pairs[..., 0] = (signed << 4) >> 4
        torch.addcmul(zeros[part], dense[part], scale[part], out=dense[part])
    return dense.view(n, k)


class TokenLinear(AWQLinear):
    """W4A16 for any number of rows: x (..., K) -> (..., N) in x's type."""

    def product(self, x, p, bias, gelu_from=None, lora=()):
        dtype = product_dtype(x.dtype, x.device)
        few = dtype != torch.float32 and x.numel() <= KERNEL_ROWS * x.shape[-1]
        if few and dispatch.on_gpu(x):
            y = ops.awq_linear(x.to(dtype), p["weight"], p["weight_scale"], p["weight_zeros"], bias)
        else:
            weight = dequantized(p["weight"], p["weight_scale"], p["weight_zeros"], dtype)
            y = linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        return reference.activated(y.to(x.dtype), gelu_from)
