"""The elementwise work of transformer blocks whose norms are RMSNorms with weights: kernels/rms_modulate.cu between linears, and
kernels/swiglu.cu within an MLP.

Shapes and arithmetic are those of reference.rms_modulate and reference.swiglu. As in block_ops.py, a call that something traces is a
torch.library custom op, and where there are no kernels the functions run the reference.
"""

import functools
from typing import List, Optional

import torch
from torch import Tensor

from . import block_ops, dispatch, kernel_loader, ops, reference, runtime
from .errors import KernelsUnavailable

MODULATE, SWIGLU = "rms_modulate", "swiglu"  # the kernels' entries, in <entry>.cu
SWIGLU_THREADS, PIECE = 256, 8  # threads of a CTA of swiglu.cu, and numbers of a thread
MAX_PIECES = 2**31 - SWIGLU_THREADS


def norm_modulate(x, weight, scale, eps):
    """RMSNorm(x) * weight * (1 + scale), (B, L, K) in x.dtype. scale: (B or 1, 1, K), or None for 0."""
    return _modulated(x, None, None, None, weight, scale, eps)[0]


def gated_residual(x, y, y_weight, gate, eps):
    """x + gate * RMSNorm(y) * y_weight, (B, L, K) in x.dtype: a new tensor. gate: (B or 1, 1, K), or None for 1."""
    return _modulated(x, y, y_weight, gate, None, None, eps)[0]


def gated_residual_norm(x, y, y_weight, gate, weight, scale, eps):
    """(z, m), both (B, L, K) in x.dtype: z = gated_residual(x, y, y_weight, gate, eps) and norm_modulate(z, weight, scale, eps). Both gate
    and scale are None, or neither is."""
    return _modulated(x, y, y_weight, gate, weight, scale, eps)


def swiglu(gate, up):
    """silu(gate) * up in gate's dtype, of equal shapes."""
    return (_swiglu if dispatch.plain(gate) else _swiglu_op)(gate, up)


def _modulated(*args):
    return (_modulate if dispatch.plain(args[0]) else _modulate_op)(*args)


def _modulate(x, y, y_weight, gate, weight, scale, eps):
    """[z if there is a y, m if there is a weight]"""
    if dispatch.on_gpu(x):
        try:
            return _modulate_by_kernel(x, y, y_weight, gate, weight, scale, eps)
        except KernelsUnavailable as error:
            ops.warn_once(str(error))
    return [part for part in reference.rms_modulate(x, y, y_weight, gate, weight, scale, eps) if part is not None]


def _swiglu(gate, up):
    if dispatch.on_gpu(gate) and gate.numel() % PIECE == 0 and gate.numel() // PIECE <= MAX_PIECES:
        try:
            return _swiglu_by_kernel(gate, up)
        except KernelsUnavailable as error:
            ops.warn_once(str(error))
    return reference.swiglu(gate, up)


# --- rms_modulate.cu --------------------------------------------------------------------------------------------------


def modulate_defines(residual, norm, modulated, k, dtype, eps):
    """The defines of rms_modulate.cu for rows of k columns."""
    team, pieces = block_ops.team_of(k)
    return (("HALF", int(dtype == torch.float16)), ("RESIDUAL", int(residual)), ("NORM", int(norm)), ("MODULATED", int(modulated)),
            ("TEAM", team), ("PIECES", pieces), ("EPSILON", f"{eps!r}f"))


@functools.lru_cache(maxsize=1024)
def _modulate_launch(residual, norm, modulated, shape, strides, eps, dtype, device):
    """(the kernel's launcher for 8 addresses, a function that allocates an output)"""
    defines = modulate_defines(residual, norm, modulated, shape[2], dtype, eps)
    return block_ops.row_launch(MODULATE, defines, shape, strides, 8, dtype, device)


def _modulate_by_kernel(x, y, y_weight, gate, weight, scale, eps):
    shape, dtype, residual, norm = x.shape, x.dtype, y is not None, weight is not None
    if not x.numel():
        return [torch.empty_like(x) for _ in range(residual + norm)]
    source, of_x = block_ops.tokens_of(x)
    other, of_y = block_ops.tokens_of(y) if residual else (None, 0)
    vectors = {"gate": gate, "scale": scale}
    read = {name: (None, 0) if vector is None else block_ops.vectors_of(vector, dtype) for name, vector in vectors.items()}
    weights = [None if w is None else w.to(x.device, dtype).contiguous() for w in (y_weight, weight)]
    strides = of_x, of_y, read["gate"][1], read["scale"][1]
    modulated = gate is not None or scale is not None
    launch, allocate = _modulate_launch(residual, norm, modulated, shape, strides, eps, dtype, x.device)
    out = [allocate() for _ in range(residual + norm)]
    launch(source.data_ptr(), *map(runtime.address, (other, weights[0], read["gate"][0], weights[1], read["scale"][0])),
           out[0].data_ptr() if residual else 0, out[-1].data_ptr() if norm else 0)
    return out


@torch.library.custom_op("svdquant::rms_modulate", mutates_args=())
def _modulate_op(x: Tensor, y: Optional[Tensor], y_weight: Optional[Tensor], gate: Optional[Tensor], weight: Optional[Tensor],
                 scale: Optional[Tensor], eps: float) -> List[Tensor]:
    return _modulate(x, y, y_weight, gate, weight, scale, eps)


@_modulate_op.register_fake
def _(x, y, y_weight, gate, weight, scale, eps):
    return [x.new_empty(x.shape) for _ in range((y is not None) + (weight is not None))]


# --- swiglu.cu --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _swiglu_launch(shape, dtype, device):
    """(the kernel's launcher for 3 addresses, a function that allocates an output)"""
    kernel = kernel_loader.kernel(f"{SWIGLU}.cu", SWIGLU, swiglu_defines(dtype), device)
    pieces = shape.numel() // PIECE
    return (kernel.launcher((-(-pieces // SWIGLU_THREADS),), (SWIGLU_THREADS,), 3, (pieces,), pdl=True),
            runtime.allocator(tuple(shape), dtype, device))


def swiglu_defines(dtype):
    return (("HALF", int(dtype == torch.float16)),)


def _swiglu_by_kernel(gate, up):
    if not gate.numel():
        return torch.empty_like(gate)
    gate, up = (x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format) for x in (gate, up))
    launch, allocate = _swiglu_launch(gate.shape, gate.dtype, gate.device)
    y = allocate()
    launch(gate.data_ptr(), up.data_ptr(), y.data_ptr())
    return y


@torch.library.custom_op("svdquant::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return _swiglu(gate, up)


@_swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


def variants(target):
    """As block_ops.variants."""
    found = {MODULATE: [], SWIGLU: [(f"{SWIGLU}.cu", SWIGLU, swiglu_defines(dtype)) for dtype in target.dtypes]}
    columns = block_ops.PIECES * block_ops.WARP_COLUMNS * 4
    kinds = ((False, True, True, columns), (True, False, True, columns), (True, True, True, columns), (True, True, False, columns),
             (True, True, True, block_ops.MAX_COLUMNS))
    for dtype in target.dtypes:
        found[MODULATE] += [(f"{MODULATE}.cu", MODULATE, modulate_defines(*kind, dtype, 1e-5)) for kind in kinds]
    return found
