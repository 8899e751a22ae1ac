"""Launch of kernels/awq.cu: the W4A16 linear of the modulation layers, y = x W^T + bias with 4-bit W."""

import functools
import math

import torch

from . import runtime
from .int4 import GROUP_SIZE

SOURCE, ENTRY = "awq.cu", "awq"
ROWS = 32         # of W a CTA, awq.cu's
WARPS = 4         # a CTA, awq.cu's
TILES = (1, 4)    # a CTA has 8 * tiles tokens


def variants(arch):
    """What `linear` may ask the compiler for: (source, entry, defines)."""
    halves = (1,) if arch == "sm_75" else (0, 1)
    return [(SOURCE, ENTRY, _defines(half, tiles)) for half in halves for tiles in TILES]


def _defines(half, tiles):
    return ("HALF", int(half)), ("TILES", tiles)


@functools.lru_cache(maxsize=256)
def launcher(m, n, dtype, device, tiles=None):
    """A function of the kernel's arguments as ints, for m tokens."""
    tiles = tiles or (1 if m <= 8 else 4)
    kernel = runtime.kernel(SOURCE, ENTRY, _defines(dtype == torch.float16, tiles), device)
    return kernel.launcher((-(-n // ROWS), -(-m // (8 * tiles))), (32 * WARPS,), 10, pdl=True)


@functools.lru_cache(maxsize=256)
def _prepared(shape, n, dtype, device, tiles):
    """launcher's function for an x of this shape, and one that allocates y."""
    *leading, k = shape
    return launcher(math.prod(leading), n, dtype, device, tiles), runtime.allocator((*leading, n), dtype, device)


def linear(x, weight, weight_scale, weight_zeros, bias, tiles=None):
    """As reference.awq_linear, on a GPU: x (..., K) bf16 or fp16 -> (..., N) in x.dtype.

    weight (N, K/2) int8, weight_scale and weight_zeros (K/64, N) and bias (N,) or None in x.dtype; N a multiple of 16.
    Meant for few tokens: each 8, or each 32 where there are more than 8, read the weights once. tiles: in place of what M says.
    """
    k, n, dtype = x.shape[-1], weight.shape[0], x.dtype
    if k % GROUP_SIZE or n % 16 or weight.shape[1] * 2 != k:
        raise ValueError(f"The W4A16 kernel needs K in multiples of {GROUP_SIZE} and N in multiples of 16; x is "
                         f"{tuple(x.shape)}, the packed weight {tuple(weight.shape)}.")
    if not x.numel():
        return x.new_empty(*x.shape[:-1], n)
    m, (launch, allocated) = x.numel() // k, _prepared(x.shape, n, dtype, x.device, tiles)
    if x.is_contiguous():
        stride = k
    else:
        x = x.reshape(m, k)
        stride = x.stride(0)
    if x.stride(-1) != 1 or stride % 8 or x.data_ptr() % 16:  # it reads 16 bytes at a time
        x, stride = x.clone(memory_format=torch.contiguous_format), k
    if not dtype == weight_scale.dtype == weight_zeros.dtype or bias is not None and bias.dtype != dtype:
        weight_scale, weight_zeros, bias = (t if t is None else t.to(dtype) for t in (weight_scale, weight_zeros, bias))
    weight, weight_scale, weight_zeros = _readable(weight), _readable(weight_scale), _readable(weight_zeros)
    bias = None if bias is None else bias.contiguous()
    y = allocated()
    launch(x.data_ptr(), weight.data_ptr(), weight_scale.data_ptr(), weight_zeros.data_ptr(), 0 if bias is None else bias.data_ptr(),
           y.data_ptr(), m, n, k, stride)
    return y


def _readable(tensor):
    """The tensor, contiguous from a multiple of 16 bytes on: itself, but for a view of something else."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
