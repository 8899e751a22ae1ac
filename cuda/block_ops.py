"""The elementwise work of transformer blocks: kernels/modulate.cu between linears, kernels/qk_norm_rope.cu before attention.

Shapes and arithmetic are those of reference.modulate and reference.qk_norm_rope. A call that something traces is a torch.library custom op.
On a CUDA device the functions run the kernels; elsewhere, and where a kernel is unavailable, they run the reference. takes() says whether a
device has the kernels; without them a block's own forward is faster.
"""

import functools
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from . import dispatch, kernel_loader, ops, reference, runtime, targets
from .cupy_import import load_cupy
from .errors import KernelsUnavailable

MODULATE, ROPE = "modulate", "qk_norm_rope"  # the kernels' entries, in <entry>.cu
WARP_COLUMNS = 256            # rows.cuh: columns of a warp's first pieces
PIECES, MAX_TEAM = 3, 32      # rows.cuh: the most pieces of a lane (on an H200 the fastest number), and the most warps of a token
WARPS = 8                     # rows.cuh: warps of a CTA whose tokens have one warp each
ROPE_THREADS = 128            # threads of a CTA of qk_norm_rope.cu
HEAD_WIDTHS = (64, 128, 256)  # the D that qk_norm_rope takes
MAX_COLUMNS = PIECES * MAX_TEAM * WARP_COLUMNS


@functools.lru_cache(maxsize=64)
def takes(dtype, device):
    """Whether `device` has these kernels for hidden states of `dtype`."""
    if device.type != "cuda" or torch.version.hip:
        return False
    try:
        load_cupy()
        return dtype in targets.for_device(device).dtypes
    except KernelsUnavailable:  # the linears' calls log the reason
        return False


def norm_modulate(x, scale, shift, eps):
    """LayerNorm(x) * (1 + scale) + shift, (B, L, K) in x.dtype."""
    return _modulated(x, None, None, scale, shift, eps)[0]


def gated_residual(x, y, gate):
    """x + gate * y, (B, L, K) in x.dtype: a new tensor."""
    return _modulated(x, y, gate, None, None, 0.0)[0]


def gated_residual_norm(x, y, gate, scale, shift, eps):
    """(z, m), both (B, L, K) in x.dtype: z = x + gate * y, and LayerNorm(z) * (1 + scale) + shift for the next linear."""
    return _modulated(x, y, gate, scale, shift, eps)


def qk_norm_rope(streams, pe, heads, parts, eps):
    """q, k and, with 3 `parts`, v, each (B, heads, L, D) in memory of the order (B, L, heads, D). One or two streams, D of HEAD_WIDTHS.

    streams: as of reference.qk_norm_rope, all with joined rows or all with q, k and v apart.
    """
    sources, norms = [stream[0] for stream in streams], [norm for stream in streams for norm in stream[1:]]
    rows = sources if isinstance(sources[0], Tensor) else [x for source in sources for x in source[:parts]]
    joined = (_rope if dispatch.plain(rows[0]) else _rope_op)(rows, norms, pe, heads, parts, eps)
    return [x.transpose(1, 2) for x in joined]


def _modulated(*args):
    return (_modulate if dispatch.plain(args[0]) else _modulate_op)(*args)


def _modulate(x, y, gate, scale, shift, eps):
    """[z if there is a y, m if there is a scale]"""
    if dispatch.on_gpu(x):
        try:
            return _modulate_by_kernel(x, y, gate, scale, shift, eps)
        except KernelsUnavailable as error:
            ops.warn_once(str(error))
    return [part for part in reference.modulate(x, y, gate, scale, shift, eps) if part is not None]


def _rope(rows, norms, pe, heads, parts, eps):
    """[(B, L, heads, D)]"""
    if dispatch.on_gpu(rows[0]):
        try:
            return _rope_by_kernel(rows, norms, pe, heads, parts, eps)
        except KernelsUnavailable as error:
            ops.warn_once(str(error))
    of_streams = _of_streams(rows, norms)
    sources = [of_stream if len(of_stream) > 1 else of_stream[0] for of_stream in of_streams]
    return reference.qk_norm_rope([(x, *norms[2 * i:2 * i + 2]) for i, x in enumerate(sources)], pe, heads, parts, eps)


def _of_streams(rows, norms):
    """The rows of each stream: one tensor, or q, k and perhaps v. norms: two of each stream."""
    each = 2 * len(rows) // len(norms)
    return [rows[i:i + each] for i in range(0, len(rows), each)]


# --- modulate.cu -----------------------------------------------------------------------------------------------------


def modulate_defines(residual, norm, k, dtype, eps):
    """The defines of modulate.cu for rows of k columns; eps of the LayerNorm, unused without one."""
    team, pieces = team_of(k)
    return (("HALF", int(dtype == torch.float16)), ("RESIDUAL", int(residual)), ("NORM", int(norm)), ("TEAM", team),
            ("PIECES", pieces), ("EPSILON", f"{eps if norm else 0.0!r}f"))


def team_of(k):
    """(TEAM, PIECES) of rows.cuh for rows of k columns."""
    pieces = -(-k // WARP_COLUMNS)
    team = -(-pieces // PIECES)
    return team, -(-pieces // team)


@functools.lru_cache(maxsize=1024)
def _modulate_launch(residual, norm, shape, strides, eps, dtype, device):
    """(the kernel's launcher for 7 addresses, a function that allocates an output)"""
    return row_launch(MODULATE, modulate_defines(residual, norm, shape[2], dtype, eps), shape, strides, 7, dtype, device)


def row_launch(entry, defines, shape, strides, addresses, dtype, device):
    """(the launcher of a kernel with rows in registers (rows.cuh) for this number of addresses, a function that allocates an output)"""
    images, per_image, k = shape
    if k % 8 or not 0 < k <= MAX_COLUMNS:
        raise ValueError(f"{entry}.cu needs rows of up to {MAX_COLUMNS} columns in multiples of 8; these have {k}.")
    team, tokens = dict(defines)["TEAM"], images * per_image
    kernel = kernel_loader.kernel(f"{entry}.cu", entry, defines, device)
    grid, warps = (-(-tokens // WARPS), WARPS) if team == 1 else (tokens, team)
    return (kernel.launcher((grid,), (32 * warps,), addresses, (tokens, per_image, k, *strides), pdl=True),
            runtime.allocator(tuple(shape), dtype, device))


def _modulate_by_kernel(x, y, gate, scale, shift, eps):
    shape, dtype, residual, norm = x.shape, x.dtype, y is not None, scale is not None
    if not x.numel():
        return [torch.empty_like(x) for _ in range(residual + norm)]
    source, of_x = tokens_of(x)
    other, of_y = tokens_of(y) if residual else (None, 0)
    gate, of_gate = vectors_of(gate, dtype) if residual else (None, 0)
    of_norm = 0
    if norm:
        (scale, of_norm), (shift, of_shift) = vectors_of(scale, dtype), vectors_of(shift, dtype)
        if of_norm != of_shift:
            scale, shift = (t.expand(shape[0], 1, -1).contiguous() for t in (scale, shift))
            of_norm = shape[2]
    launch, allocate = _modulate_launch(residual, norm, shape, (of_x, of_y, of_gate, of_norm), eps, dtype, x.device)
    out = [allocate() for _ in range(residual + norm)]
    launch(source.data_ptr(), runtime.address(other), runtime.address(gate), runtime.address(scale), runtime.address(shift),
           out[0].data_ptr() if residual else 0, out[-1].data_ptr() if norm else 0)
    return out


def tokens_of(x):
    """A (B, L, C) tensor as rows that lie equally far apart, in pieces of 16 bytes: (the tensor or a copy, elements between rows)."""
    if not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0:
            return rows, rows.stride(0)
    elif x.data_ptr() % 16 == 0:
        return x, x.shape[-1]
    return x.clone(memory_format=torch.contiguous_format), x.shape[-1]


def vectors_of(vectors, dtype):
    """(B or 1, 1, K) modulation vectors for a kernel: (the tensor or a copy, elements between an image's vector and the next one's)."""
    if vectors.dtype != dtype or vectors.stride(-1) != 1 or vectors.stride(0) % 8 or vectors.data_ptr() % 16:
        vectors = vectors.to(dtype).clone(memory_format=torch.contiguous_format)
    return vectors, vectors.stride(0) if vectors.shape[0] > 1 else 0


@torch.library.custom_op("svdquant::modulate", mutates_args=())
def _modulate_op(x: Tensor, y: Optional[Tensor], gate: Optional[Tensor], scale: Optional[Tensor], shift: Optional[Tensor],
                 eps: float) -> List[Tensor]:
    return _modulate(x, y, gate, scale, shift, eps)


@_modulate_op.register_fake
def _(x, y, gate, scale, shift, eps):
    return [x.new_empty(x.shape) for _ in range((y is not None) + (scale is not None))]


# --- qk_norm_rope.cu -------------------------------------------------------------------------------------------------


def rope_defines(head, heads, parts, dtype, eps, pe16=False):
    """The defines of qk_norm_rope.cu. pe16: whether the position embedding has `dtype` too, in place of float32."""
    return (("HALF", int(dtype == torch.float16)), ("HEAD", head), ("HEADS", heads), ("PARTS", parts), ("PE16", int(pe16)),
            ("EPSILON", f"{eps!r}f"))


@functools.lru_cache(maxsize=1024)
def _rope_launch(images, lengths, strides, of_pe, head, heads, parts, eps, dtype, pe16, device):
    """(the kernel's launcher for 14 addresses, a function that allocates an output)"""
    if head not in HEAD_WIDTHS:
        raise ValueError(f"qk_norm_rope.cu needs heads of {HEAD_WIDTHS} columns; these have {head}.")
    kernel = kernel_loader.kernel(f"{ROPE}.cu", ROPE, rope_defines(head, heads, parts, dtype, eps, pe16), device)
    tokens = sum(lengths)
    sizes = (lengths[0] if len(lengths) > 1 else 0, tokens, strides[0], strides[-1], of_pe)
    return (kernel.launcher((tokens, images), (ROPE_THREADS,), 14, sizes, pdl=True),
            runtime.allocator((images, tokens, heads, head), dtype, device))


def _rope_by_kernel(rows, norms, pe, heads, parts, eps):
    first, head = rows[0], norms[0].shape[0]
    dtype, device, images = first.dtype, first.device, first.shape[0]
    read = [_qkv(of_stream, heads * head) for of_stream in _of_streams(rows, norms)]
    norms = [norm if norm.dtype == dtype and norm.device == device and norm.is_contiguous() else norm.to(device, dtype).contiguous()
             for norm in norms]
    pe = (pe if pe.dtype == dtype else pe.to(torch.float32)).contiguous()
    of_pe = pe.stride(0) // 4 if pe.shape[0] > 1 else 0  # the kernel reads a pair's matrix at once
    lengths = tuple(of_stream[0].shape[1] for of_stream in _of_streams(rows, norms))
    launch, allocate = _rope_launch(images, lengths, tuple(stride for _, stride, _ in read), of_pe, head, heads, parts, eps, dtype,
                                    pe.dtype == dtype, device)
    out = [allocate() for _ in range(parts)]
    launch(*read[0][0], *read[-1][0], *(norm.data_ptr() for norm in (*norms[:2], *norms[-2:])), pe.data_ptr(),
           *(x.data_ptr() for x in out), *([0] * (3 - parts)))
    return out


def _qkv(of_stream, width):
    """Where the kernel finds a stream: (addresses of q, k and v, elements between their rows, the tensors, which must live as long).

    of_stream: [(B, L, [q | k | v | ..])], or q, k and perhaps v apart; width: columns of q.
    """
    if len(of_stream) == 1:
        rows, stride = tokens_of(of_stream[0])
        begin = rows.data_ptr()
        return [begin + part * width * rows.element_size() for part in range(3)], stride, (rows,)
    read = [tokens_of(x) for x in of_stream]
    if len({stride for _, stride in read}) > 1:
        read = [tokens_of(x.contiguous()) for x in of_stream]
    addresses = [rows.data_ptr() for rows, _ in read]
    return (addresses + [0])[:3], read[0][1], tuple(rows for rows, _ in read)


@torch.library.custom_op("svdquant::qk_norm_rope", mutates_args=())
def _rope_op(rows: Sequence[Tensor], norms: Sequence[Tensor], pe: Tensor, heads: int, parts: int, eps: float) -> List[Tensor]:
    return _rope(rows, norms, pe, heads, parts, eps)


@_rope_op.register_fake
def _(rows, norms, pe, heads, parts, eps):
    shape = rows[0].shape[0], sum(x[0].shape[1] for x in _of_streams(rows, norms)), heads, norms[0].shape[0]
    return [rows[0].new_empty(shape) for _ in range(parts)]


def variants(target):
    """{entry: [(source, entry, defines)]} for the tests of machine code: every kind of pass, the longest rows, and the widest heads."""
    found = {MODULATE: [], ROPE: []}
    for dtype in target.dtypes:
        columns = PIECES * WARP_COLUMNS * 4
        kinds = (False, True, columns), (True, False, columns), (True, True, columns), (True, True, MAX_COLUMNS)
        found[MODULATE] += [(f"{MODULATE}.cu", MODULATE, modulate_defines(*kind, dtype, 1e-6)) for kind in kinds]
        found[ROPE] += [(f"{ROPE}.cu", ROPE, rope_defines(head, 24, parts, dtype, 1e-6, pe16))
                        for head, parts, pe16 in ((128, 2, False), (256, 3, False), (128, 3, True))]
    return found
