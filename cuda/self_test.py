"""The self-test: the first time a kernel runs on a GPU, its results on a small problem are compared with reference.py's.

Most GPU generations that the kernels are compiled for were not at hand when they were written. A compiler or a card may also make a kernel
wrong that was right elsewhere. A wrong result excludes the kernel's choose.Kind on this GPU, so that choose() takes the next possibility:

    gemm_wgmma.cu -> gemm_mma.cu -> reference.py             quantize_registers.cu -> quantize.cu -> reference.py
    an MLP in one pass -> its two layers                     awq.cu, gptq.cu, group_error.cu -> PyTorch

ops.chosen() runs the tests of the kernels that it chose, each compiled kernel's own. A verdict is kept beside the compiled kernels for
this GPU, driver, compiler and code of this pack (kernel_records.py), so that later processes only read a file. self_test_problems.py has
the problems.

The test can't catch a kernel that ends in a CUDA error, such as an illegal instruction or an access outside its memory: such an error
makes every later call of the process fail. There is no test while a CUDA graph is captured, where other work is an error, nor without
memory for it: a kernel that has no verdict yet then runs without one. After a warm-up it is tested when it is next chosen (ops.py).
SVDQUANT_SELF_TEST=0 switches the tests and their verdicts off.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import awq, compiler, gemm_mma, gemm_wgmma, kernel_loader, kernel_records, quantize_activation, targets
from . import self_test_problems as problems
from .activation_layout import RANK_BLOCK, padded
from .choose import AWQKernel, Kind, MLPKernels
from .operands import NO_LORA
from .self_test_problems import LORA

log = logging.getLogger(__name__)

VARIABLE = "SVDQUANT_SELF_TEST"  # environment variable: 0 never

_failed = {}    # {index of a GPU: frozenset of Kinds}
_verdicts = {}  # {a record's path: whether the kernel passed}
_others = {}    # {(source, defines, index of a GPU): the same, for kernels that choose() does not choose}
skipped = threading.Event()  # set when a kernel was chosen whose test could not run
_locks = {}     # {a record's path: a lock}, so that a kernel is tested once while other threads test others
_adding = threading.Lock()


# --- Verdicts --------------------------------------------------------------------------------------------------------


def failed(device):
    """The Kinds of kernels that gave a wrong result on a CUDA device with an index, as far as this process has asked."""
    return _failed.get(device.index, frozenset())


class Test(NamedTuple):
    """A compiled kernel and its problem."""

    kind: Kind
    compiled: tuple    # kernel_loader.kernel's source and defines
    run: Callable      # returns whether the kernel's results are right
    instead: str       # a clause: what runs in place of a wrong kernel


def passes(kernels, layer, device, run):
    """Whether choose()'s kernels for a layer give right results on `device`, a CUDA device with an index; True also if they can't
    be tested now. If they don't, failed(device) has a new Kind, and one warning says so.

    run: for MLPKernels, run(kernels, x, first, second) computes the MLP. Raises what compiling and running a kernel raises.
    """
    return all(_verdict(test, device) is not False for test in _tests(kernels, layer, device, run))


def quantize_passes(kernels, layer, device):
    """As passes, of the kernel alone that quantizes the layer's input."""
    lora = LORA if layer.lora.ranks else NO_LORA
    return _verdict(_quantize_test(kernels, layer, kernels.rank, lora, device)[1], device) is not False


QUANTIZER = "models are quantized by PyTorch alone, which is slower"


def kernel_passes(source, device, check, defines=(), instead=QUANTIZER):
    """As passes, for a kernel that choose() does not choose. check() returns whether its results are right; instead: as in Test. The
    quantizer asks thousands of times."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = source, defines, index
    if key not in _others:
        verdict = _verdict(Test(Kind(source), (source, defines), check, instead), torch.device("cuda", index))
        if verdict is None:
            return True
        _others[key] = verdict
    return _others[key]


def _verdict(test, device):
    """Whether the kernel of a Test passes, from this process, from the record, or by running the test. None if the test can't run now, or
    is switched off."""
    if os.environ.get(VARIABLE) == "0":
        return None
    path = _record(test.kind, test.compiled, device)
    with _locks.setdefault(path, threading.Lock()):
        if (verdict := _verdicts.get(path)) is None:
            verdict = kernel_records.read(path)
            if not isinstance(verdict, bool):
                if torch.cuda.is_current_stream_capturing():
                    skipped.set()
                    return None
                try:
                    verdict = test.run()
                except torch.OutOfMemoryError:  # the model needs the memory more
                    log.debug("no memory to test %s", test.compiled)
                    skipped.set()
                    return None
                kernel_records.write(path, verdict)
            _verdicts[path] = verdict
    if not verdict:
        _exclude(test, device)
    return verdict


def _record(kind, compiled, device):
    """The file of a kernel's verdict. Raises KernelsUnavailable without NVRTC, on which the verdict depends."""
    arch = targets.for_device(device).arch
    return kernel_records.path(f"{Path(compiled[0]).stem}-{arch}", device, compiler.digest(*compiled, arch), kind)


def recorded(kernels, layer, device):
    """The verdicts known for the LinearKernels of a choose.Layer without a LoRA on a CUDA device with an index, found without compiling or
    running a kernel: {source: True, False, or None if the kernel has not been tested}. Raises KernelsUnavailable without NVRTC."""
    def verdict(kind, compiled):
        path = _record(kind, compiled, device)
        found = _verdicts.get(path, kernel_records.read(path))
        return found if isinstance(found, bool) else None

    source, quantizes = quantize_activation.source(kernels.plans[0]), None
    for plan in kernels.plans:  # the first one that fits on the GPU runs, and is tested; only building it shows which one that is
        name, _, defines = quantize_activation.variant(layer.dtype, kernels.storage, plan)
        if (known := verdict(Kind(name, kernels.storage), (name, defines))) is not None:
            source, quantizes = name, known
            break
    gemm = _gemm_test(kernels, layer, NO_LORA, device)
    return {source: quantizes, gemm.kind.source: verdict(gemm.kind, gemm.compiled)}


def _exclude(test, device):
    with _adding:
        if test.kind in failed(device):
            return
        _failed[device.index] = failed(device) | {test.kind}
    source, defines = test.compiled
    gpu, _, driver = kernel_records.machine(device)
    log.warning("The CUDA kernel %s (%s) gave a wrong result in its self-test on %s (driver %s, NVRTC %s), so that from now on %s; please "
                "report this line to the authors of the SVDQuant nodes.", source, ", ".join(f"{name} {value}" for name, value in defines),
                gpu, driver, compiler.version_text(compiler.nvrtc().version), test.instead)


# --- The tests of a layer's kernels ----------------------------------------------------------------------------------


def _tests(kernels, layer, device, run):
    """A generator of the Tests of choose()'s kernels for a layer."""
    target = targets.for_device(device)
    if isinstance(kernels, AWQKernel):
        yield Test(Kind(awq.SOURCE), (awq.SOURCE, awq.defines_of(layer.dtype, kernels.tiles)),
                   functools.partial(problems.awq_is_right, kernels.tiles, layer.dtype, device), "modulation layers run through PyTorch")
    elif isinstance(kernels, MLPKernels):
        first, second = layer
        storage, dtype = kernels.storage, first.dtype
        defines = gemm_mma.defines_of(storage, kernels.tile, target, dtype, next_ranks=padded(second.rank, RANK_BLOCK))
        # An MLP whose kernel is unavailable asks in every call. This raises at once; to make the test's problem takes 0.1 s.
        kernel_loader.kernel(gemm_mma.SOURCE, gemm_mma.ENTRY, defines, device, dict(defines)["SHARED_BYTES"])
        plan, test = _quantize_test(kernels, first, first.rank, NO_LORA, device)
        yield test
        for gelu in (False, True):
            yield _mma_test(storage, kernels.second_tile, target, dtype, device, gelu, NO_LORA)
        yield Test(Kind(gemm_mma.SOURCE, storage, True), (gemm_mma.SOURCE, defines),
                   functools.partial(problems.mlp_is_right, kernels, plan, layer, device, run),
                   "an MLP's two layers run one after the other")
    else:
        lora = LORA if layer.lora.ranks else NO_LORA
        _, test = _quantize_test(kernels, layer, kernels.rank, lora, device)
        yield test
        yield _gemm_test(kernels, layer, lora, device)


def _quantize_test(kernels, layer, rank, lora, device):
    """(the Plan with which the layer's activation is quantized, its Test). lora: of the test."""
    _, plan = quantize_activation.launcher(layer.m, layer.k, rank, layer.k, layer.unsigned_from, kernels.storage, kernels.plans,
                                           layer.dtype, device, lora=layer.lora)
    source, _, defines = quantize_activation.variant(layer.dtype, kernels.storage, plan, bool(lora.ranks))
    slower = source == quantize_activation.REGISTERS_SOURCE
    return plan, Test(Kind(source, kernels.storage), (source, defines),
                      functools.partial(problems.quantize_is_right, kernels.storage, plan, layer.k, rank, lora, layer.dtype, device),
                      f"{quantize_activation.SOURCE} quantizes the activations, which is slower" if slower else THROUGH_PYTORCH)


THROUGH_PYTORCH = "quantized layers run through PyTorch, which is many times slower"
ADDED_APART = "residuals are added in a pass of their own, which is slower"


def _gemm_test(kernels, layer, lora, device):
    """The Test of the GEMM of LinearKernels. lora: of the test."""
    gelu, gated = kernels.gelu_from is not None, layer.gated and kernels.whole
    if not kernels.wgmma:
        return _mma_test(kernels.storage, kernels.tile, targets.for_device(device), layer.dtype, device, gelu, lora, gated)
    lora = LORA if gemm_wgmma.takes_lora(kernels.rank, layer.lora) else NO_LORA
    return Test(Kind(gemm_wgmma.SOURCE, kernels.storage, gated=gated),
                (gemm_wgmma.SOURCE, gemm_wgmma.defines_of(kernels.tile, layer.dtype, gelu, bool(lora.ranks), gated)),
                functools.partial(problems.wgmma_is_right, kernels.tile, layer.dtype, device, gelu, lora, gated),
                ADDED_APART if gated else f"{gemm_mma.SOURCE} computes the 8-bit layers, which is slower")


def _mma_test(storage, tile, target, dtype, device, gelu, lora, gated=False):
    defines = gemm_mma.defines_of(storage, tile, target, dtype, gelu=gelu, lora=bool(lora.ranks), gated=gated)
    return Test(Kind(gemm_mma.SOURCE, storage, gated=gated), (gemm_mma.SOURCE, defines),
                functools.partial(problems.mma_is_right, storage, tile, dtype, device, gelu, lora, gated),
                ADDED_APART if gated else THROUGH_PYTORCH)
