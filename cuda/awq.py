"""Launch of kernels/awq.cu: the W4A16 linear of the modulation layers, y = x W^T + bias with 4-bit W."""

import torch

from . import compiler
from .int4 import GROUP_SIZE

SOURCE, ENTRY = "awq.cu", "awq"
ROWS = 16         # of W a CTA, awq.cu's
WARPS = 8         # a CTA, awq.cu's
TILES = (1, 4)    # a CTA has 8 * tiles tokens


def variants(arch):
    """What `linear` may ask the compiler for: (source, entry, defines)."""
    halves = (1,) if arch == "sm_75" else (0, 1)
    return [(SOURCE, ENTRY, _defines(half, tiles)) for half in halves for tiles in TILES]


def _defines(half, tiles):
    return ("HALF", int(half)), ("TILES", tiles)


def linear(x, weight, weight_scale, weight_zeros, bias, tiles=None):
    """As reference.awq_linear, on a GPU: x (..., K) bf16 or fp16 -> (..., N) in x.dtype.

    weight (N, K/2) int8, weight_scale and weight_zeros (K/64, N) and bias (N,) or None in x.dtype; N a multiple of 16.
    Meant for few tokens: each 8, or each 32 where there are more than 8, read the weights once.
    """
    n, k = weight.shape[0], x.shape[-1]
    if k % GROUP_SIZE or n % ROWS or weight.shape[1] * 2 != k:
        raise ValueError(f"The W4A16 kernel needs K in multiples of {GROUP_SIZE} and N in multiples of {ROWS}; x is "
                         f"{tuple(x.shape)}, the packed weight {tuple(weight.shape)}.")
    tokens = x.reshape(-1, k)
    m = tokens.shape[0]
    if tokens.stride(1) != 1 or tokens.stride(0) % 8 or tokens.data_ptr() % 16:  # it reads 16 bytes at a time
        tokens = tokens.clone(memory_format=torch.contiguous_format)
    weight, weight_scale, weight_zeros = map(_readable, (weight, weight_scale.to(x.dtype), weight_zeros.to(x.dtype)))
    y = x.new_empty(*x.shape[:-1], n)
    if m == 0:
        return y
    if tiles is None:
        tiles = 1 if m <= 8 else 4
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    kernel = compiler.kernel(SOURCE, ENTRY, _defines(x.dtype == torch.float16, tiles), x.device)
    kernel((n // ROWS, -(-m // (8 * tiles))), (32 * WARPS,), tokens, weight, weight_scale, weight_zeros, bias, y, m, n, k,
           tokens.stride(0))
    return y


def _readable(tensor):
    """The tensor, contiguous from a multiple of 16 bytes on: itself, but for a view of something else."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
