"""A low-rank branch in 8 bits (branch_bits of quant/layers/layout.py's LayerSpec), expanded to 16 bits before each call of its layer by
kernels/expand_branch.cu.

The branch takes half the memory, and the kernels of the layer itself stay as they are. The expansion takes a few microseconds a layer.
"""

import functools

import torch
from torch import Tensor

from . import kernel_loader, ops, reference, runtime, self_test, self_test_problems
from .errors import KernelsUnavailable
from .operands import CODES_STEP

SOURCE, ENTRY = "expand_branch.cu", "expand_branch"
THREADS = 256  # threads of a CTA, as in expand_branch.cu; each expands CODES_STEP ranks of a row
INSTEAD = "branches in 8 bits are expanded by PyTorch, which is slower"


def expanded(proj_down, proj_up, scale, dtype):
    """(proj_down (K, R), proj_up (N, R)) in `dtype`: reference.expand_branch of each, to the bit.

    proj_down: (K, R), proj_up: (N, R), int8, contiguous, R a multiple of CODES_STEP; scale: (K + N,) bf16, of the rows of proj_down and of
    proj_up. All on one device; dtype: bf16 or fp16.
    """
    branch = (_expand if ops.plain(proj_down) else _expand_op)(proj_down, proj_up, scale, dtype)
    return branch[:proj_down.shape[0]], branch[proj_down.shape[0]:]


@functools.lru_cache(maxsize=1024)
def launcher(k, n, rank, dtype, device):
    """(a function that launches the kernel, a function that allocates its output (K + N, R)), for the addresses of (proj_down, proj_up,
    scale, output). k: rows of proj_down to expand; 0: only proj_up, of whose rows alone the scales then are. device: a CUDA device with an
    index. Raises KernelsUnavailable."""
    defines = defines_of(dtype)
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines, device)
    if not self_test.kernel_passes(SOURCE, device, lambda: self_test_problems.expand_branch_is_right(expand_by, dtype, device), defines,
                                   INSTEAD):
        raise KernelsUnavailable(f"The CUDA kernel {SOURCE} failed its self-test.")
    return _launcher(kernel, k, n, rank), runtime.allocator((k + n, rank), dtype, device)


def prepare(dtype, stored, device):
    """Compile, load and test the kernel for layers whose floats are stored in `stored`, in a model in `dtype`."""
    computed = ops.compute_dtype(dtype, stored, device)  # layers that are computed in fp16 are also held in it
    launcher(0, CODES_STEP, CODES_STEP, computed if computed == torch.float16 else stored, device)


def defines_of(dtype):
    return (("HALF", int(dtype == torch.float16)),)


def variants(target):
    """Every (source, entry, defines) that launcher() may compile for a Target."""
    return [(SOURCE, ENTRY, defines_of(dtype)) for dtype in target.dtypes]


def expand_by(proj_down, proj_up, scale, out):
    """Launch the kernel on these tensors, untested; out: (K + N, R)."""
    (k, rank), n = proj_down.shape, proj_up.shape[0]
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines_of(out.dtype), out.device)
    _launcher(kernel, k, n, rank)(*map(runtime.address, (proj_down, proj_up, scale, out)))
    return out


def _launcher(kernel, k, n, rank):
    pieces = (k + n) * rank // CODES_STEP
    return kernel.launcher((-(-pieces // THREADS),), (THREADS,), 4, (k * rank // CODES_STEP, pieces, rank // CODES_STEP), pdl=True)


def _expand(proj_down, proj_up, scale, dtype):
    if ops.on_gpu(proj_down):
        try:
            launch, allocate = launcher(proj_down.shape[0], *proj_up.shape, dtype, proj_down.device)
            out = allocate()
            launch(*map(runtime.address, (proj_down, proj_up, scale, out)))
            return out
        except KernelsUnavailable:  # the layer's own call logs the reason
            pass
    return reference.expand_branch(torch.cat((proj_down, proj_up)), scale, dtype)


@torch.library.custom_op("svdquant::expand_branch", mutates_args=())
def _expand_op(proj_down: Tensor, proj_up: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _expand(proj_down, proj_up, scale, dtype)


@_expand_op.register_fake
def _(proj_down, proj_up, scale, dtype):
    return proj_down.new_empty(proj_down.shape[0] + proj_up.shape[0], proj_down.shape[1], dtype=dtype)
