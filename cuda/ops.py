"""The ops that a quantized model calls, as torch.library custom ops: one call a layer, opaque to torch.compile.

On a CUDA device they run the kernels (kernels/*.cu, two launches a layer), elsewhere the reference, which also takes over, with
one warning, where the kernels can't be had.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import awq, compiler, gemm_mma, gemm_wgmma, quantize, reference, runtime, scales
from .int4 import GROUP_SIZE

log = logging.getLogger(__name__)

# Compute capabilities with fast 4-bit tensor cores, RTX 20 to 40. The others' are missing, or starved by the scales (A100).
INT4_FASTER = ((7, 5), (8, 6), (8, 9))
RANKS = 16  # the kernels' branches have a multiple of this
GELU_COLUMNS = 64  # are activated together: a warp's rows of the weight in gemm_mma.cu, a warpgroup's in gemm_wgmma.cu
LARGEST = torch.finfo(torch.float16).max
PLAIN = Tensor, torch.nn.Parameter
_dynamo_traces, _dispatch_modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack


_capability = functools.cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def best_act_bits(device):
    """4 or 8: the activations' bits that `act_bits` 0 stands for on `device`. 4 on the CPU, as SVDQuant is published."""
    return 4 if device.type != "cuda" or torch.version.hip or _capability(device) in INT4_FASTER else 8


def svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale=None, gelu_from=None):
    """One SVDQuant layer, (..., K) -> (..., N) in x.dtype.

    Arguments as in reference.svdquant_linear. row_scale: (N,) float32, scales.row_scale of the layer, for act_bits 8 on a GPU
    (computed there if it is not given). With act_bits 8 the kernels compute with group scales that are integer multiples of it.
    gelu_from: a multiple of GELU_COLUMNS is the GEMM's, GELU from another column on comes after it.
    """
    run = _svdquant_linear if plain(x) else _svdquant_op
    return run(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from)


def awq_linear(x, weight, weight_scale, weight_zeros, bias):
    """One W4A16 layer, (..., K) -> (..., N) in x.dtype; arguments as in reference.awq_linear."""
    return (_awq_linear if plain(x) else _awq_op)(x, weight, weight_scale, weight_zeros, bias)


def plain(x):
    """Whether nobody traces: then the dispatcher, a third of a layer's time on the CPU, has nothing to add."""
    # An export traces with tensors of a class of their own.
    return type(x) in PLAIN and not _dynamo_traces() and not _dispatch_modes()


def _svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from):
    if kernels_run(x, weight):
        try:
            return _svdquant_kernels(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale,
                                     gelu_from)
        except compiler.KernelsUnavailable as error:
            warn_once(str(error))
    return reference.svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits,
                                     gelu_from=gelu_from)


def _awq_linear(x, weight, weight_scale, weight_zeros, bias):
    if kernels_run(x, weight):
        try:
            dtype = compute_dtype(x.dtype, weight_scale.dtype, x.device)
            return computed_in(dtype, x, lambda x: awq.linear(x, weight, weight_scale, weight_zeros, bias))
        except compiler.KernelsUnavailable as error:
            warn_once(str(error))
    return reference.awq_linear(x, weight, weight_scale, weight_zeros, bias)


def kernels_run(x, weight):
    """Whether x and the layer are something that the kernels take."""
    return x.is_cuda and not torch.version.hip and x.numel() > 0 and x.shape[-1] % GROUP_SIZE == 0 and weight.shape[0] % 16 == 0


@functools.lru_cache(maxsize=64)
def compute_dtype(dtype, layers, device):
    """The 16-bit type that the kernels compute a layer in: x's, or the layer's where x is float32; fp16 on Turing."""
    if compiler.architecture(device) == "sm_75":
        return torch.float16
    return dtype if dtype in (torch.bfloat16, torch.float16) else layers


def computed_in(dtype, x, run):
    """run(x), of x in `dtype`, in x.dtype.

    Where fp16 stands for a wider type, as it does on Turing, numbers beyond its range become its largest, as they do in ComfyUI's own
    fp16 models, and a token with NaN or Inf is NaN.
    """
    if x.dtype == dtype:
        return run(x)
    if dtype != torch.float16:
        return run(x.to(dtype)).to(x.dtype)
    broken = ~x.isfinite().all(dim=-1, keepdim=True)
    return run(x.clamp(-LARGEST, LARGEST).to(dtype)).to(x.dtype).clamp_(-LARGEST, LARGEST).masked_fill_(broken, torch.nan)


class _Plan(NamedTuple):
    """The two launches of a layer."""

    quantize: runtime.Launcher  # quantize.launcher's
    gemm: runtime.Launcher      # gemm_wgmma.launcher's or gemm_mma.launcher's
    varying: tuple              # of the kernels' arguments, those that change from call to call
    work: dict                  # {name: bytes} of what the first leaves to the second
    run: Callable               # both, of the addresses of the varying and of CONSTANT
    multiply: bool              # x @ proj_down by cuBLAS first, which takes the place of proj_down


CONSTANT = ("proj_down", "weight", "weight_scale", "smooth", "row_scale", "proj_up", "bias")
QUANTIZE = ("x", "smooth", "proj_down", "act", "act_scale", "low", "low_scale")
GEMM = ("y", "act", "act_scale", "low", "low_scale", "weight", "weight_scale", "row_scale", "proj_up", "bias")


@functools.lru_cache(maxsize=1024)
def _plan(m, n, k, rank, stride, unsigned_from, act_bits, gelu_from, dtype, device):
    """The _Plan for a layer of x's dtype; None where it takes more than that."""
    arch = compiler.architecture(device)
    if dtype not in ((torch.float16,) if arch == "sm_75" else (torch.bfloat16, torch.float16)) or rank % RANKS or n * k >= 1 << 33:
        return None
    wgmma = _wgmma(arch, act_bits, k, unsigned_from)
    if wgmma and rank > gemm_wgmma.MAX_RANK or gelu_from is not None and gelu_from % GELU_COLUMNS:
        return None
    codes = quantize.storage(act_bits, arch)
    first, cut = quantize.launcher(m, k, rank, stride, unsigned_from, codes, dtype, device, pdl=True)
    if wgmma:
        second = gemm_wgmma.launcher(m, n, k, rank, unsigned_from, dtype, device, pdl=True, gelu_from=gelu_from)
    else:
        kind = gemm_mma.INTEGER if act_bits == 8 else gemm_mma.NIBBLES if codes == quantize.NIBBLES else gemm_mma.BYTES
        second = gemm_mma.launcher(kind, m, n, k, rank, unsigned_from, dtype, device, gelu_from=gelu_from)
    multiply = cut.ranks < rank
    varying = "x", "y", *(quantize.PRODUCT[dtype] if multiply else ())
    work = dict(zip(quantize.Quantized._fields, quantize.output_bytes(m, k, rank, codes, dtype)))
    return _Plan(first, second, varying, work, _both(first, second, work, (*varying, *CONSTANT)), multiply)


def _both(first, second, work, names, constants=()):
    return runtime.chain(names, (first, QUANTIZE), (second, GEMM), work=work, constants=constants)


def prepare(m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from=None, *, device):
    """Compile and load the kernels of a layer, as warm_up has it."""
    dtype = compute_dtype(dtype, dtype, device)
    if act_bits is None:
        awq.launcher(m, n, dtype, device)
    else:
        _plan(m, n, k, rank, k, unsigned_from, act_bits, gelu_from, dtype, device)


def warm_up(layers, device, others=()):
    """Compile and load in threads, beside what the caller does next, the kernels that these layers will ask for: all but those of a
    layer that doesn't want them, or of a machine that can't have them, which its first call says.

    layers: [(M, N, K, rank, unsigned_from, act_bits, dtype, gelu_from or nothing)] as svdquant_linear gets them, contiguous; act_bits
    None: awq_linear.
    device: a CUDA device with its index; others: functions that do the same for more than a layer, and take longest.
    Returns the threads' futures.
    """
    def attempt(job):
        if not threading.main_thread().is_alive():  # the program ends: don't let it wait
            return
        try:
            job()
        except Exception:  # whoever needs the kernel meets it again, and says so
            log.debug("warm-up of %s", job, exc_info=True)

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="svdquant-compiler")
    single = (functools.partial(prepare, *layer, device=device) for layer in dict.fromkeys(layers))
    futures = [pool.submit(attempt, job) for job in (*others, *single)]
    pool.shutdown(wait=False)
    return futures


def _wgmma(arch, act_bits, k, unsigned_from):
    return act_bits == 8 and arch in gemm_wgmma.ARCHITECTURES and gemm_wgmma.takes(k, unsigned_from)


def _svdquant_kernels(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from):
    """The layer by two launches, as most are."""
    dtype, (*leading, k), (n, rank) = x.dtype, x.shape, proj_up.shape
    m, stride, source = x.numel() // k, k, x.data_ptr()
    if act_bits == 8 and row_scale is None:
        row_scale = scales.row_scale(weight_scale)
    readable = weight_scale.dtype == dtype and source % 16 == 0
    if not x.is_contiguous():
        tokens = x.reshape(m, k)
        stride = tokens.stride(0)
        readable = readable and tokens.data_ptr() == source and tokens.stride(1) == 1 and stride % 8 == 0
    plan = _plan(m, n, k, rank, stride, unsigned_from, act_bits, gelu_from, dtype, x.device) if readable else None
    if plan is None:
        return _svdquant_steps(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from)
    y = x.new_empty(*leading, n)  # a size in a tuple takes PyTorch half as long again
    product = quantize.multiplied(x.reshape(m, k), proj_down) if plan.multiply else ()
    plan.run(source, y.data_ptr(), *map(runtime.address, product),
             *map(runtime.address, (proj_down, weight, weight_scale, smooth, row_scale, proj_up, bias)))
    return y


def repeated(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from=None):
    """svdquant_linear for one layer and inputs like x, with everything looked up: again(x, weight_scale, proj_down, addresses), or None
    where that isn't two launches. The layer's tensors are on x's device; row_scale is given with act_bits 8.

    again takes an x that is plain() and has the same shape, the present tensors of the layer, and the addresses of CONSTANT's. While those
    are the same, so is the tensors' device: host and devices share one space of addresses. It returns y, or None where anything isn't as
    it was.
    """
    dtype, index, (*leading, k), (n, rank) = x.dtype, x.get_device(), x.shape, proj_up.shape
    if not kernels_run(x, weight) or weight_scale.dtype != dtype or not x.is_contiguous() or x.data_ptr() % 16:
        return None
    m = x.numel() // k
    try:
        plan = _plan(m, n, k, rank, k, unsigned_from, act_bits, gelu_from, dtype, x.device)
    except compiler.KernelsUnavailable:  # svdquant_linear says so
        return None
    if plan is None:
        return None
    there = tuple(map(runtime.address, (proj_down, weight, weight_scale, smooth, row_scale, proj_up, bias)))
    run = _both(plan.quantize, plan.gemm, plan.work, plan.varying, zip(CONSTANT, there))
    multiply, allocated = plan.multiply, runtime.allocator((*leading, n), dtype, x.device)

    def again(x, weight_scale, proj_down, addresses):
        source = x.data_ptr()
        if (addresses != there or x.dtype is not dtype or weight_scale.dtype is not dtype or x.get_device() != index or source % 16
                or not x.is_contiguous()):
            return None
        y = allocated()
        if multiply:
            product = quantize.multiplied(x.view(m, k), proj_down)
            run(source, y.data_ptr(), *map(runtime.address, product))
        else:
            run(source, y.data_ptr())
        return y

    return again


def _svdquant_steps(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from):
    """The same in every case: other dtypes, ranks that one GEMM doesn't take, an x that the kernels can't read."""
    dtype = compute_dtype(x.dtype, weight_scale.dtype, x.device)
    if weight_scale.dtype != dtype:
        weight_scale, proj_down, proj_up, smooth, bias = (
            None if t is None else t.to(dtype) for t in (weight_scale, proj_down, proj_up, smooth, bias))
    return computed_in(dtype, x, lambda x: _steps_in_one_dtype(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from,
                                                               act_bits, row_scale, gelu_from))


def _steps_in_one_dtype(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from):
    tokens, arch = x.reshape(-1, x.shape[-1]), compiler.architecture(x.device)
    if proj_up.shape[1] % RANKS:
        proj_down, proj_up = (pad(t, (0, -t.shape[1] % RANKS)) for t in (proj_down, proj_up))
    wgmma = _wgmma(arch, act_bits, x.shape[-1], unsigned_from)
    rest = wgmma and proj_up.shape[1] > gemm_wgmma.MAX_RANK
    down, up = (proj_down[:, :0], proj_up[:, :0]) if rest else (proj_down, proj_up)
    fused = None if rest or gelu_from is not None and gelu_from % GELU_COLUMNS else gelu_from
    q = quantize.quantize(tokens, smooth, down, unsigned_from, quantize.storage(act_bits, arch))
    if wgmma:
        y = gemm_wgmma.gemm(*q, weight, weight_scale, row_scale, up, bias, unsigned_from, tokens.shape[0], gelu_from=fused)
    else:
        mode = "int8" if act_bits == 8 else "int4"
        y = gemm_mma.gemm(mode, *q, weight, weight_scale, row_scale, up, bias, unsigned_from, tokens.shape[0], gelu_from=fused)
    if rest:
        y.addmm_(tokens @ proj_down, proj_up.t())
    if fused is None:
        reference.activated(y, gelu_from)
    return y.view(*x.shape[:-1], weight.shape[0])


@functools.cache
def warn_once(message):
    log.warning("%s Until then quantized layers run through PyTorch, which is many times slower.", message)


@torch.library.custom_op("svdquant::linear", mutates_args=())
def _svdquant_op(x: Tensor, weight: Tensor, weight_scale: Tensor, proj_down: Tensor, proj_up: Tensor, smooth: Tensor,
                 bias: Optional[Tensor], unsigned_from: int, act_bits: int, row_scale: Optional[Tensor] = None,
                 gelu_from: Optional[int] = None) -> Tensor:
    return _svdquant_linear(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from)


@_svdquant_op.register_fake
def _(x, weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale=None, gelu_from=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("svdquant::awq_linear", mutates_args=())
def _awq_op(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor, bias: Optional[Tensor]) -> Tensor:
    return _awq_linear(x, weight, weight_scale, weight_zeros, bias)


@_awq_op.register_fake
def _(x, weight, weight_scale, weight_zeros, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
