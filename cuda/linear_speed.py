"""The speed of one linear on a GPU: in 16 bits, in fp8, and by the kernels. benchmarks/linears.py measures more, and more exactly."""

import itertools

import torch
from torch.nn.functional import linear

from . import autotune, ops
from .errors import KernelsUnavailable

COPIES = 3  # number of copies of a layer's tensors; using them in turn keeps them out of the L2 cache, as in a model
CALLS = 10  # number of calls that are timed together
ROUNDS = 3  # the least time counts
FP8_MAX = 448.0


def sixteen_bits(layer, device):
    """A function that runs a choose.Layer as PyTorch's own 16-bit linear."""
    tensors = itertools.cycle([_random(layer, device) for _ in range(COPIES)])
    x = torch.randn(layer.m, layer.k, dtype=layer.dtype, device=device)
    return lambda: linear(x, *next(tensors))


def fp8(layer, device):
    """A function that runs a choose.Layer in fp8, as ComfyUI does with --fast: x is cast in each call, and torch._scaled_mm multiplies with
    fast accumulation. The function raises RuntimeError on a GPU without fp8."""
    tensors = itertools.cycle([(weight.to(torch.float8_e4m3fn), bias) for weight, bias in (_random(layer, device) for _ in range(COPIES))])
    x, one = torch.randn(layer.m, layer.k, dtype=layer.dtype, device=device), torch.ones((), device=device)

    def run():
        weight, bias = next(tensors)
        codes = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=x.dtype, use_fast_accum=True)

    return run


def by_kernels(layer, device):
    """A function that runs a choose.Layer by the kernels, which are compiled and tested here. Raises KernelsUnavailable if there are none,
    since the op would then run the reference."""
    if ops.chosen(layer, device) is None:
        raise KernelsUnavailable("No kernel computes this layer on this GPU.")
    made = [autotune.random_operands(layer, device) for _ in range(COPIES)]
    x, operands = made[0][0], itertools.cycle([own for _, own in made])
    return lambda: ops.svdquant_linear(x, next(operands))


def seconds(run, device):
    """The least seconds of one run() on a CUDA device."""
    best = float("inf")
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        for _ in range(ROUNDS):
            start.record()
            for _ in range(CALLS):
                run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1000 / CALLS)
    return best


def _random(layer, device):
    return tuple(torch.randn(shape, dtype=layer.dtype, device=device) for shape in ((layer.n, layer.k), (layer.n,)))
