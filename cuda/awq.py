"""Launch of kernels/awq.cu: the W4A16 linear of the modulation layers, y = x W^T + bias with 4-bit W."""

import functools
import math

import torch

from . import kernel_loader, runtime
from .int4 import GROUP_SIZE

SOURCE, ENTRY = "awq.cu", "awq"
ROWS = 32         # rows of W per CTA, as in awq.cu
WARPS = 4         # warps per CTA, as in awq.cu
TILES = (1, 4)    # a CTA computes 8 * tiles tokens


def fastest_tiles(m):
    """The fastest of TILES for m tokens. A CTA reads its weights once for all its tokens."""
    return 1 if m <= 8 else 4


def variants(target):
    """Every (source, entry, defines) that `launcher` may ask for."""
    return [(SOURCE, ENTRY, defines_of(dtype, tiles)) for dtype in target.dtypes for tiles in TILES]


def defines_of(dtype, tiles):
    return ("HALF", int(dtype == torch.float16)), ("TILES", tiles)


@functools.lru_cache(maxsize=256)
def launcher(tiles, m, n, dtype, device):
    """A function that launches the kernel for m tokens; its arguments are the kernel's, as ints. tiles: one of TILES."""
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines_of(dtype, tiles), device)
    return kernel.launcher((-(-n // ROWS), -(-m // (8 * tiles))), (32 * WARPS,), 10, pdl=True)


@functools.lru_cache(maxsize=256)
def _prepared(tiles, shape, n, dtype, device):
    """The launcher for an x of this shape, and a function that allocates y."""
    *leading, k = shape
    return launcher(tiles, math.prod(leading), n, dtype, device), runtime.allocator((*leading, n), dtype, device)


def linear(tiles, x, weight, weight_scale, weight_zeros, bias):
    """As reference.awq_linear, on a GPU: x (..., K) bf16 or fp16 -> (..., N) in x.dtype.

    weight (N, K/2) int8, weight_scale and weight_zeros (K/64, N) and bias (N,) or None in x.dtype; N a multiple of 16.
    tiles: one of TILES. Made for few tokens: every 8 * tiles tokens read the weights once. Raises ValueError for other K and N.
    """
    k, n, dtype = x.shape[-1], weight.shape[0], x.dtype
    if k % GROUP_SIZE or n % 16 or weight.shape[1] * 2 != k:
        raise ValueError(f"The W4A16 kernel needs K in multiples of {GROUP_SIZE} and N in multiples of 16; x is "
                         f"{tuple(x.shape)}, the packed weight {tuple(weight.shape)}.")
    if not x.numel():
        return x.new_empty(*x.shape[:-1], n)
    m, (launch, allocated) = x.numel() // k, _prepared(tiles, x.shape, n, dtype, x.device)
    if x.is_contiguous():
        stride = k
    else:
        x = x.reshape(m, k)
        stride = x.stride(0)
    if x.stride(-1) != 1 or stride % 8 or x.data_ptr() % 16:  # the kernel reads 16 bytes at a time
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
    """The tensor itself, or a copy where it isn't contiguous or isn't aligned to 16 bytes."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
