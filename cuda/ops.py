"""The ops that a quantized model calls, as torch.library custom ops: one call per layer, opaque to torch.compile.

On a CUDA device an op runs the kernels that choose() returns, elsewhere the reference. If the kernels are unavailable, the op logs one
warning and runs the reference.
"""

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import (
    autotune,
    awq,
    cupy_import,
    dispatch,
    expand_branch,
    gemm_mma,
    gemm_wgmma,
    quantize_activation,
    reference,
    runtime,
    self_test,
    self_test_problems,
    targets,
    traced,
)
from .choose import W4A16, AWQKernel, Layer, choose
from .errors import KernelsUnavailable
from .operands import NO_LORA, LayerOperands, LoRASizes

log = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float16).max


@traced.constant
def best_act_bits(device):
    """The activation bits, 4 or 8, that `act_bits` 0 selects on `device`. 4 on the CPU, as in the SVDQuant paper."""
    if device.type != "cuda" or torch.version.hip:
        return 4
    try:
        return targets.for_device(device).default_act_bits
    except KernelsUnavailable:  # the GPU is too old; the layers' calls log it
        return 8


def kernel_path(device, act_bits):
    """The code that computes W4A4 layers on `device`, in a few words for users. act_bits: as in LayerOperands; 0 for best_act_bits."""
    if device.type != "cuda" or torch.version.hip:
        return f"{'ROCm' if torch.version.hip else device.type.upper()}: PyTorch, slow"
    try:
        target = targets.for_device(device)
        if importlib.util.find_spec("cupy") is None and not cupy_import.installed():
            return f"no CuPy: pip install {cupy_import.cupy_package()}; until then PyTorch, slow"
        cupy_import.load_cupy()
    except KernelsUnavailable as error:
        return f"PyTorch, slow: {error}"
    return f"W4A{act_bits or target.default_act_bits} on {target.generation}'s tensor cores"


def svdquant_linear(x, operands):
    """One SVDQuant layer, (..., K) -> (..., N) in x.dtype.

    operands: LayerOperands, on x's device. With act_bits 8 a GPU needs their row_scale, and rounds the group scales to
    integer multiples of it. If gelu_from is a multiple of choose.GELU_COLUMNS, the GEMM applies GELU itself. A branch in 8 bits is expanded
    within the op, so that a traced graph has one node a layer.
    """
    return _svdquant_linear(x, operands) if dispatch.plain(x) else _svdquant_op(x, *operands.flat())


def awq_linear(x, weight, weight_scale, weight_zeros, bias):
    """One W4A16 layer, (..., K) -> (..., N) in x.dtype; arguments as in reference.awq_linear."""
    return (_awq_linear if dispatch.plain(x) else _awq_op)(x, weight, weight_scale, weight_zeros, bias)


def _svdquant_linear(x, operands):
    if dispatch.on_gpu(x):
        try:
            y = by_kernels(x, operands)
            if y is not None:
                return y
        except KernelsUnavailable as error:
            warn_once(str(error))
    return reference.svdquant_linear(x, expand_branch.in_16_bits(operands))


def _awq_linear(x, weight, weight_scale, weight_zeros, bias):
    if dispatch.on_gpu(x):
        try:
            k, n = x.shape[-1], weight.shape[0]
            kernel = chosen(Layer(x.numel() // k, n, k, 0, k, W4A16, x.dtype), x.device)
            if kernel is not None:
                dtype = targets.compute_dtype(x.dtype, weight_scale.dtype, x.device)
                return computed_in(dtype, x, lambda x: awq.linear(kernel.tiles, x, weight, weight_scale, weight_zeros, bias))
        except KernelsUnavailable as error:
            warn_once(str(error))
    return reference.awq_linear(x, weight, weight_scale, weight_zeros, bias)


def computed_in(dtype, x, run):
    """run(x), computed in `dtype` and returned in x.dtype.

    Where fp16 replaces a wider type, as on Turing, numbers beyond its range become its largest number, as in ComfyUI's own fp16 models.
    A token with NaN or Inf becomes NaN.
    """
    if x.dtype == dtype:
        return run(x)
    if dtype != torch.float16:
        return run(x.to(dtype)).to(x.dtype)
    broken = ~x.isfinite().all(dim=-1, keepdim=True)
    return run(x.clamp(-LARGEST, LARGEST).to(dtype)).to(x.dtype).clamp_(-LARGEST, LARGEST).masked_fill_(broken, torch.nan)


@functools.lru_cache(maxsize=4096)
def chosen(layer, device):
    """The kernels for a choose.Layer or choose.MLP on this device: choose()'s, or faster ones that autotune.py measured here. They have
    passed their self-test. None as of choose()."""
    target, run = targets.for_device(device), runners[type(layer)]
    runs = (layer if isinstance(layer, Layer) else layer.first).dtype in target.dtypes  # if not, the caller computes in another type
    while True:
        kernels = choose(layer, target, targets.multiprocessors(device), self_test.failed(device))
        if kernels is None or not runs:
            return kernels
        kernels = autotune.tuned(kernels, layer._replace(gated=False) if isinstance(layer, Layer) else layer, target, device)
        if self_test.passes(kernels, layer, device, run):
            return kernels


def _run(kernels, x, *operands):
    """A layer by the kernels of a choose.Layer. operands: LayerOperands, or a W4A16 layer's arguments."""
    if isinstance(kernels, AWQKernel):
        return awq.linear(kernels.tiles, x, *operands)
    return _steps_in_one_dtype(x, *operands, kernels)


class _Launches(NamedTuple):
    """The two launches of a layer."""

    quantize: runtime.Launcher  # quantize_activation.launcher's
    gemm: runtime.Launcher      # gemm_wgmma.launcher's or gemm_mma.launcher's
    product: tuple              # names of the kernels' arguments that quantize_activation.multiplied() computes first, by cuBLAS
    work: dict                  # {name: bytes} of the first launch's outputs
    inputs: tuple               # names of the tensors that change from call to call: x, y, and ADDED of a gated layer
    constant: tuple             # names of the layer's own tensors
    run: Callable               # runs both launches; takes the addresses of inputs, product and constant


FLOATS = ("weight_scale", "proj_down", "proj_up", "smooth", "bias", "lora_down", "lora_up")
CONSTANT = ("proj_down", "weight", "weight_scale", "smooth", "row_scale", "proj_up", "bias")
LORA_CONSTANT = ("lora_up", "lora_strength")
QUANTIZE = ("x", "smooth", "proj_down", "act", "act_scale", "lora_act", "lora_act_scale")
GEMM = ("y", "act", "act_scale", "lora_act", "lora_act_scale", "weight", "weight_scale", "row_scale", "proj_up", "bias")
ADDED = ("residual", "gate")  # the tensors that a gated layer takes beside x
GATED_GEMM = ("y", "residual", *GEMM[1:], "gate")


@functools.lru_cache(maxsize=1024)
def _launches(m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from, lora, stride, device, gated=False):
    """The _Launches of a choose.Layer, for x with rows `stride` elements apart; None if two launches on the operands as they are don't
    compute the layer. The Layer's fields are separate arguments because making a Layer costs a tenth of a call."""
    kernels = chosen(Layer(m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from, lora, gated), device)
    if kernels is None or not kernels.whole:
        return None
    storage = kernels.storage
    first, plan = quantize_activation.launcher(m, k, rank, stride, unsigned_from, storage, kernels.plans, dtype, device, True, lora)
    if kernels.wgmma:
        takes_lora = gemm_wgmma.takes_lora(rank, lora)
        second = gemm_wgmma.launcher(kernels.tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from, True, lora, gated)
    else:
        takes_lora = bool(lora.ranks)
        second = gemm_mma.launcher(storage, kernels.tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from, lora=lora,
                                   gated=gated)
    product = quantize_activation.PRODUCT[dtype] if plan.ranks < rank or lora.ranks else ()
    work = dict(zip(quantize_activation.Quantized._fields, quantize_activation.output_bytes(m, k, rank, storage, dtype, lora)))
    constant = *CONSTANT, *LORA_CONSTANT[:takes_lora + bool(lora.ranks)]
    launches = _Launches(first, second, product, work, ("x", "y", *(ADDED if gated else ())), constant, None)
    return launches._replace(run=_both(launches, (*launches.inputs, *product, *constant)))


runners = {Layer: _run}       # {type of layer: a function that runs it by given kernels}; mlp.py adds its own
choices = [chosen, _launches]  # the caches that hold chosen kernels; mlp.py adds its own


def choose_again():
    """Forget all choices, so that the next calls make them anew. Layers' cached launches stay: they compute the same."""
    for cache in choices:
        cache.cache_clear()
    _warm.clear()


def _both(launches, names, constants=()):
    quantize, gemm = ((*arguments, name) if name in launches.constant else arguments for arguments, name in (
        (QUANTIZE, "lora_strength"), (GATED_GEMM if launches.inputs[2:] else GEMM, "lora_up")))
    return runtime.chain(names, (launches.quantize, quantize), (launches.gemm, gemm), work=launches.work, constants=constants)


def prepare(m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from=None, lora=NO_LORA, gated=False, *, device):
    """Compile and load the kernels of a layer with a contiguous x; arguments as in choose.Layer."""
    layer = Layer(m, n, k, rank, unsigned_from, act_bits, targets.compute_dtype(dtype, dtype, device), gelu_from, lora)
    if act_bits != W4A16:
        _launches(*layer[:-1], k, device, gated)
    elif (kernel := chosen(layer, device)) is not None:
        awq.launcher(kernel.tiles, m, n, layer.dtype, device)


_warm = set()  # the layers and jobs that warm_up has prepared or is preparing


def warm_up(layers, device, others=()):
    """Compile, load and test the kernels of these layers in threads, while the caller goes on, and then measure them where autotune.py is
    to. Layers that an earlier call has prepared take no time. A kernel that is unavailable is skipped: the layer's first call logs the
    reason.

    layers: [as choose.Layer, or without its last fields], with contiguous inputs; device: a CUDA device with its index; others:
    functools.partials that prepare more than a layer. They take longest and so start first. Returns the threads' futures.
    """
    def attempt(job):
        if not threading.main_thread().is_alive():  # the program is ending and must not wait for this
            return
        try:
            job()
        except Exception:  # the layer that needs the kernel raises the error again
            log.debug("warm-up of %s", job, exc_info=True)
            _warm.discard(_identity(job))

    single = (functools.partial(prepare, *layer, device=device) for layer in dict.fromkeys(layers))
    jobs = [job for job in (*others, *single) if _identity(job) not in _warm]
    if not jobs and not self_test.skipped.is_set():
        return []
    _warm.update(map(_identity, jobs))
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="svdquant-compiler")
    futures = [pool.submit(attempt, job) for job in jobs]
    futures.append(pool.submit(attempt, functools.partial(_measure, device, tuple(futures))))
    pool.shutdown(wait=False)
    return futures


def _identity(job):
    """What a functools.partial calls, hashable."""
    return job.func, job.args, *job.keywords.items()


def _measure(device, prepared):
    """warm_up's last job: wait for the others, and measure what autotune.py is to."""
    for future in prepared:
        future.result()
    self_test_problems.forget_problems()
    if self_test.skipped.is_set():  # there may be memory for the tests now
        self_test.skipped.clear()
        choose_again()
    autotune.tune(device, runners, choose_again)


def by_kernels(x, operands, added=()):
    """Compute the layer by two launches, or in steps; None if choose() leaves it to the reference. added: tensors for ADDED, as
    gated_linear.addends returns them: the launches then add them too, and without such launches the result is None."""
    (weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from, proj_scale, lora_down, lora_up,
     lora_strength, lora) = operands
    dtype, (*leading, k), (n, rank) = x.dtype, x.shape, proj_up.shape
    m, stride, source = x.numel() // k, k, x.data_ptr()
    if act_bits == 8 and row_scale is None:
        raise ValueError("A layer with 8-bit activations needs its row_scale on a GPU (row_scales.row_scale).")
    readable = weight_scale.dtype == dtype and source % 16 == 0
    if not x.is_contiguous():
        tokens = x.reshape(m, k)
        stride = tokens.stride(0)
        readable = readable and tokens.data_ptr() == source and tokens.stride(1) == 1 and stride % 8 == 0
    launches = None
    if readable:
        launches = _launches(m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from, lora, stride, x.device, bool(added))
    if launches is None:
        return None if added else _in_steps(x, operands)
    y = x.new_empty(*leading, n)  # a size in a tuple takes PyTorch 1.5 times as long
    if proj_scale is None:
        down, up = proj_down.data_ptr(), proj_up.data_ptr()
    else:
        branch = expand_branch.expand(proj_down, proj_up, proj_scale, dtype)
        down, up = expand_branch.addresses(*branch, k, rank)
    product = ()
    if launches.product:
        proj_down = proj_down if proj_scale is None else expand_branch.matrix(*branch, k, rank)
        product = quantize_activation.multiplied(x.reshape(m, k), proj_down, lora_down, lora_strength)
    before_up, after_up = (weight, weight_scale, smooth, row_scale), (bias, lora_up, lora_strength)
    constant = down, *map(runtime.address, before_up), up, *map(runtime.address, after_up)
    launches.run(source, y.data_ptr(), *map(runtime.address, (*added, *product)), *constant[:len(launches.constant)])
    return y


def cached_launch(x, operands, gated=False):
    """svdquant_linear for one layer and inputs of x's shape, with all look-ups done: launch(x, weight_scale, proj_down, addresses,
    lora_down, lora_strength, added), or None if the layer isn't two launches. The operands are on x's device; with act_bits 8 they have a
    row_scale.

    launch takes a plain() x of the same shape, the layer's current tensors, and the current addresses of the tensors of CONSTANT, of
    LORA_CONSTANT if there is a LoRA, which has the LoRASizes of `operands`, and of proj_scale if the branch is in 8 bits. gated: it also
    takes `added`, as by_kernels, for residuals of y's shape. It returns y, or None if anything has changed. Equal addresses also mean equal
    devices, because the host and all devices share one address space.
    """
    (weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale, gelu_from, proj_scale, _, lora_up,
     lora_strength, lora) = operands
    dtype, index, (*leading, k), (n, rank) = x.dtype, x.get_device(), x.shape, proj_up.shape
    if not dispatch.on_gpu(x) or weight_scale.dtype != dtype or not x.is_contiguous() or x.data_ptr() % 16:
        return None
    m = x.numel() // k
    try:
        launches = _launches(m, n, k, rank, unsigned_from, act_bits, dtype, gelu_from, lora, k, x.device, gated)
        expand = expand_branch.expander(operands)
    except KernelsUnavailable:  # svdquant_linear logs the reason
        return None
    if launches is None:
        return None
    tensors = proj_down, weight, weight_scale, smooth, row_scale, proj_up, bias
    known = tuple(map(runtime.address, tensors if lora_up is None else (*tensors, lora_up, lora_strength)))
    constants = zip(launches.constant, (*known, 0))  # 0: a lora_up that the kernel has and the layer hasn't
    names = *launches.inputs, *launches.product, *(("proj_down", "proj_up") if expand else ())  # a name's first place counts
    run, allocated = _both(launches, names, constants), runtime.allocator((*leading, n), dtype, x.device)
    if expand:
        known = *known, runtime.address(proj_scale)

    def launch(x, weight_scale, proj_down, addresses, lora_down=None, lora_strength=None, added=()):
        source = x.data_ptr()
        if (addresses != known or x.dtype is not dtype or weight_scale.dtype is not dtype or x.get_device() != index or source % 16
                or not x.is_contiguous()):
            return None
        y, factors = allocated(), ()
        if expand:
            branch = expand()
            factors = expand_branch.addresses(*branch, k, rank)
        if launches.product:
            if expand:
                proj_down = expand_branch.matrix(*branch, k, rank)
            product = quantize_activation.multiplied(x.view(m, k), proj_down, lora_down, lora_strength)
            run(source, y.data_ptr(), *map(runtime.address, (*added, *product)), *factors)
        else:
            run(source, y.data_ptr(), *(tensor.data_ptr() for tensor in added), *factors)
        return y

    return launch


def _in_steps(x, operands):
    """Compute the layer also for other dtypes, for ranks that one GEMM doesn't take, and for an x that the kernels can't read in place;
    None as in by_kernels."""
    k, (n, rank) = x.shape[-1], operands.proj_up.shape
    dtype = targets.compute_dtype(x.dtype, operands.weight_scale.dtype, x.device)
    layer = Layer(x.numel() // k, n, k, rank, operands.unsigned_from, operands.act_bits, dtype, operands.gelu_from, operands.lora)
    kernels = chosen(layer, x.device)
    if kernels is None:
        return None
    operands = expand_branch.in_16_bits(operands)
    if operands.weight_scale.dtype != dtype:
        operands = operands._replace(**{name: t.to(dtype) for name in FLOATS if (t := getattr(operands, name)) is not None})
    return computed_in(dtype, x, lambda x: _steps_in_one_dtype(x, operands, kernels))


def _steps_in_one_dtype(x, operands, kernels):
    tokens, missing = x.reshape(-1, x.shape[-1]), kernels.rank - operands.proj_up.shape[1]
    fused = operands._replace(gelu_from=kernels.gelu_from)
    if missing:
        down, lora_down = pad(operands.proj_down, (0, missing)), operands.lora_down
        if lora_down is not None:
            lora_down = torch.cat((down.t(), lora_down[operands.proj_down.shape[1]:]))
        fused = fused._replace(proj_down=down, proj_up=pad(operands.proj_up, (0, missing)), lora_down=lora_down)
    q = quantize_activation.quantize(tokens, fused.smooth, fused.proj_down, fused.unsigned_from, kernels.storage, kernels.plans,
                                     fused.lora_down, fused.lora_strength, fused.lora)
    if kernels.wgmma:
        y = gemm_wgmma.gemm(kernels.tile, q, fused, tokens.shape[0])
    else:
        y = gemm_mma.gemm(kernels.storage, kernels.tile, q, fused, tokens.shape[0])
    if kernels.gelu_from is None:
        reference.activated(y, operands.gelu_from)
    return y.view(*x.shape[:-1], y.shape[1])


@functools.cache
def warn_once(message):
    log.warning("%s Until then quantized layers run through PyTorch, which is many times slower.", message)


# torch.library's schemas are flat: the arguments are those of LayerOperands.flat.


@torch.library.custom_op("svdquant::linear", mutates_args=())
def _svdquant_op(x: Tensor, weight: Tensor, weight_scale: Tensor, proj_down: Tensor, proj_up: Tensor, smooth: Tensor,
                 bias: Optional[Tensor], unsigned_from: int, act_bits: int, row_scale: Optional[Tensor], gelu_from: Optional[int],
                 proj_scale: Optional[Tensor], lora_down: Optional[Tensor], lora_up: Optional[Tensor], lora_strength: Optional[Tensor],
                 lora_ranks: Sequence[int], lora_part_rows: int) -> Tensor:
    return _svdquant_linear(x, LayerOperands(weight, weight_scale, proj_down, proj_up, smooth, bias, unsigned_from, act_bits, row_scale,
                                             gelu_from, proj_scale, lora_down, lora_up, lora_strength,
                                             LoRASizes(tuple(lora_ranks), lora_part_rows)))


@_svdquant_op.register_fake
def _(x, weight, *_operands):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("svdquant::awq_linear", mutates_args=())
def _awq_op(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor, bias: Optional[Tensor]) -> Tensor:
    return _awq_linear(x, weight, weight_scale, weight_zeros, bias)


@_awq_op.register_fake
def _(x, weight, weight_scale, weight_zeros, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
