"""The ops that a quantized model calls, as torch.library custom ops: one call a layer, opaque to torch.compile.

On a CUDA device they run the kernels (kernels/*.cu, two launches a layer), elsewhere the reference, which also takes over, with
one warning, where the kernels can't be had.
"""

import functools
import logging
from typing import Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import awq, compiler, gemm_mma, gemm_wgmma, quantize, reference, scales
from .int4 import GROUP_SIZE

log = logging.getLogger(__name__)

# Compute capabilities on which int8 activations are the fast ones: their 4-bit tensor cores are missing, or starved by the scales.
INT8_FASTER = (80, 90, 100, 103, 110, 120, 121)
RANKS = 16  # the kernels' branches have a multiple of this


def best_act_bits(device):
    """4 or 8: the activations' bits that `act_bits` 0 stands for on `device`. 4 on the CPU, SVDQuant as published."""
    if device.type != "cuda" or torch.version.hip:
        return 4
    return 8 if 10 * torch.cuda.get_device_capability(device)[0] in INT8_FASTER else 4


def svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale=None):
    """One SVDQuant layer, (..., K) -> (..., N) in x.dtype.

    Arguments as in reference.svdquant_linear. row_scale: (N,) float32, scales.row_scale of the layer, for act_bits 8 on a GPU
    (computed there if it is not given). With act_bits 8 the kernels compute with group scales that are integer multiples of it.
    """
    run = _svdquant_linear if _plain(x) else _svdquant_op
    return run(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale)


def awq_linear(x, weight, weight_scale, weight_zeros, bias):
    """One W4A16 layer, (..., K) -> (..., N) in x.dtype; arguments as in reference.awq_linear."""
    return (_awq_linear if _plain(x) else _awq_op)(x, weight, weight_scale, weight_zeros, bias)


def _plain(x):
    """Whether nobody traces: then the dispatcher, a third of a layer's time on the CPU, has nothing to add."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()


def _svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale):
    if kernels_run(x, weight):
        try:
            return _svdquant_kernels(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale)
        except compiler.KernelsUnavailable as error:
            warn_once(str(error))
    return reference.svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits)


def _awq_linear(x, weight, weight_scale, weight_zeros, bias):
    if kernels_run(x, weight):
        try:
            dtype = compute_dtype(x, weight_scale)
            return awq.linear(x.to(dtype), weight, weight_scale, weight_zeros, bias).to(x.dtype)
        except compiler.KernelsUnavailable as error:
            warn_once(str(error))
    return reference.awq_linear(x, weight, weight_scale, weight_zeros, bias)


def kernels_run(x, weight):
    """Whether x and the layer are something that the kernels take."""
    return x.is_cuda and not torch.version.hip and x.numel() > 0 and x.shape[-1] % GROUP_SIZE == 0 and weight.shape[0] % 16 == 0


def compute_dtype(x, weight_scale):
    """The 16-bit type that the kernels compute a layer in: x's, or the layer's where x is float32; fp16 on Turing."""
    if compiler.architecture(x.device) == "sm_75":
        return torch.float16
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) else weight_scale.dtype


def _svdquant_kernels(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale):
    dtype, arch = compute_dtype(x, weight_scale), compiler.architecture(x.device)
    tokens = x.reshape(-1, x.shape[-1])
    if not dtype == x.dtype == weight_scale.dtype:
        tokens, weight_scale, proj_down, proj_up, smooth, bias = (
            None if t is None else t.to(dtype) for t in (tokens, weight_scale, proj_down, proj_up, smooth, bias))
    if proj_up.shape[1] % RANKS:
        proj_down, proj_up = (pad(t, (0, -t.shape[1] % RANKS)) for t in (proj_down, proj_up))
    if act_bits == 8 and row_scale is None:
        row_scale = scales.row_scale(weight_scale)
    wgmma = act_bits == 8 and arch in gemm_wgmma.ARCHITECTURES and gemm_wgmma.takes(x.shape[-1], unsigned_from)
    rest = wgmma and proj_up.shape[1] > gemm_wgmma.MAX_RANK
    down, up = (proj_down[:, :0], proj_up[:, :0]) if rest else (proj_down, proj_up)
    q = quantize.quantize(tokens, smooth, down, unsigned_from, quantize.storage(act_bits, arch))
    if wgmma:
        y = gemm_wgmma.gemm(*q, weight, weight_scale, row_scale, up, bias, unsigned_from, tokens.shape[0])
    else:
        mode = "int8" if act_bits == 8 else "int4"
        y = gemm_mma.gemm(mode, *q, weight, weight_scale, row_scale, up, bias, unsigned_from, tokens.shape[0])
    if rest:
        y.addmm_(tokens @ proj_down, proj_up.t())
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


@functools.cache
def warn_once(message):
    log.warning("%s Until then quantized layers run through PyTorch, which is many times slower.", message)


@torch.library.custom_op("svdquant::linear", mutates_args=())
def _svdquant_op(x: Tensor, weight: Tensor, weight_scale: Tensor, proj_down: Tensor, proj_up: Tensor, smooth: Tensor,
                 bias: Optional[Tensor], unsigned_from: int, act_bits: int, row_scale: Optional[Tensor] = None) -> Tensor:
    return _svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale)


@_svdquant_op.register_fake
def _(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("svdquant::awq_linear", mutates_args=())
def _awq_op(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor, bias: Optional[Tensor]) -> Tensor:
    return _awq_linear(x, weight, weight_scale, weight_zeros, bias)


@_awq_op.register_fake
def _(x, weight, weight_scale, weight_zeros, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
