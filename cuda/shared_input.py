"""Layers that read one tensor and have one smoothing, such as q, k and v: it is quantized once, and each layer's GEMM reads the codes.

    x -> quantize: codes, scales, and the LoRA branches' x @ [proj_down of layer 1 | of layer 2 | ..]
         GEMM of layer 1, GEMM of layer 2, ...: each with the codes, and with its own blocks of the branches' product

The codes are those of the layers' own calls to the bit. A product with all branches may be computed by another kernel, or by cuBLAS in
place of a kernel, which adds up in another order: then a sum may be rounded to the next 16-bit number. In fp16 the branches of a token
also share the power of two that keeps them in range.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import choose, dispatch, expand_branch, gemm_mma, gemm_wgmma, ops, quantize_activation, runtime, self_test, targets
from .activation_layout import RANK_BLOCK, ROWS, padded
from .errors import KernelsUnavailable
from .operands import MAX_PART_RANK, MAX_PARTS, NO_LORA, LoRASizes

log = logging.getLogger(__name__)

LARGEST_ERROR = 0.02  # relative, of outputs whose branches' products may be rounded to a neighboring 16-bit number
OF_LAYER = ("weight", "weight_scale", "row_scale", "proj_up", "bias", "lora_up")  # a GEMM's constant arguments
GEMM = ("y", "act", "act_scale", "lora_act", "lora_act_scale", *OF_LAYER)
PROJ_UP = OF_LAYER.index("proj_up")
NUMBERED = {"y", "lora_act", *OF_LAYER}  # each layer has its own
_agreed = {}  # {arguments of _launches: the _Launches, whose outputs agreed with those of the layers' own calls, or () if they didn't}


def svdquant_linears(x, layers):
    """[ops.svdquant_linear(x, layer) for layer in layers], (..., N) each. layers: LayerOperands with equal values of smooth, on x's
    device."""
    if dispatch.plain(x) and dispatch.on_gpu(x):
        layers = list(map(expand_branch.in_16_bits, layers))
        try:
            outputs = by_kernels(x, layers)
            if outputs is not None:
                return outputs
        except KernelsUnavailable:  # svdquant_linear logs the reason
            pass
    return one_by_one(x, layers)


def one_by_one(x, layers):
    return [ops.svdquant_linear(x, layer) for layer in layers]


def by_kernels(x, layers):
    """As svdquant_linears, for branches in 16 bits, or None if the kernels don't take these layers together, or gave other results
    before."""
    k, dtype, first, source = x.shape[-1], x.dtype, layers[0], x.data_ptr()
    tokens = x.reshape(-1, k)
    if source % 16 or tokens.data_ptr() != source or tokens.stride(1) != 1 or tokens.stride(0) % 8:
        return None
    for layer in layers:
        if (layer.weight_scale.dtype != dtype or layer.unsigned_from != first.unsigned_from or layer.act_bits != first.act_bits
                or layer.act_bits == 8 and layer.row_scale is None):
            return None
    kind = _kind(tokens, layers)
    launches = _agreed.get(kind)
    if launches is not None:
        return launched(launches, x, tokens, layers) if launches else None
    launches = _launches(*kind)
    return None if launches is None else compared(kind, launches, x, tokens, layers)


def _kind(tokens, layers):
    """The arguments of _launches for tokens (M, K)."""
    sizes, first = tuple((*layer.proj_up.shape, layer.gelu_from, layer.lora) for layer in layers), layers[0]
    return *tokens.shape, sizes, first.unsigned_from, first.act_bits, tokens.dtype, tokens.stride(0), tokens.device


def cached_launch(x, layers):
    """svdquant_linears for these layers, without LoRAs, and inputs of x's shape, with all look-ups done: launch(x, proj_downs). None if
    their first call has not been compared yet, or if they don't run together.

    launch takes a plain() x of the same shape, and each layer's proj_down, while the layers' tensors are where they were. It returns the
    outputs, or None for an x of another dtype, device or layout.
    """
    if not dispatch.on_gpu(x) or not x.is_contiguous() or any(layer.weight_scale.dtype != x.dtype for layer in layers):
        return None
    *leading, k = x.shape
    dtype, index, tokens = x.dtype, x.get_device(), x.view(-1, k)
    launches, m = _agreed.get(_kind(tokens, layers)), len(tokens)
    if not launches or launches.lora.ranks:
        return None
    try:
        expanders = list(map(expand_branch.expander, layers))
    except KernelsUnavailable:  # svdquant_linear logs the reason
        return None
    ranks, smooth, own = [layer.proj_up.shape[1] for layer in layers], runtime.address(layers[0].smooth), _own(layers)

    def launch(x, proj_downs):
        source = x.data_ptr()
        if x.dtype is not dtype or x.get_device() != index or source % 16 or not x.is_contiguous():
            return None
        downs, values = [*proj_downs], [*own]
        for i, expand in enumerate(expanders):
            if expand is not None:
                branch = expand()
                downs[i] = expand_branch.matrix(*branch, k, ranks[i])
                _, values[PROJ_UP + i * len(OF_LAYER)] = expand_branch.addresses(*branch, k, ranks[i])
        down = torch.cat(downs, dim=1)
        product = quantize_activation.multiplied(x.view(m, k), down) if launches.product else (down,)
        outputs = [allocate() for allocate in launches.allocate]
        launches.run(source, smooth, 0, *(tensor.data_ptr() for tensor in (*product, *outputs)), *values)
        return outputs if len(leading) == 1 else [y.view(*leading, y.shape[1]) for y in outputs]

    return launch


def _own(layers):
    """The addresses of OF_LAYER of each layer."""
    own = []
    for layer in layers:
        own += layer.weight, layer.weight_scale, layer.row_scale, layer.proj_up, layer.bias, layer.lora_up
    return tuple(map(runtime.address, own))


def launched(launches, x, tokens, layers):
    """The outputs of _Launches for x, which as (M, K) is `tokens`."""
    down, lora_down, strength = joined(layers, launches.lora)
    product = quantize_activation.multiplied(tokens, down, lora_down, strength) if launches.product else (down,)
    outputs = [allocate() for allocate in launches.allocate]
    outputs = [y.view(*x.shape[:-1], y.shape[1]) for y in outputs] if x.ndim != 2 else outputs
    launches.run(*map(runtime.address, (x, layers[0].smooth, strength, *product, *outputs)), *_own(layers))
    return outputs


def compared(kind, launches, x, tokens, layers):
    """The outputs of _Launches. The first call of a kind whose numbers are all finite compares them with those of the layers' own calls and
    keeps the verdict, and the layers' own are its outputs if they differ: so it has the bits of later calls. While a CUDA graph is captured
    nothing can be compared."""
    if torch.cuda.is_current_stream_capturing():
        return one_by_one(x, layers)
    expected, outputs = one_by_one(x, layers), launched(launches, x, tokens, layers)
    errors = torch.stack([((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in zip(outputs, expected)])
    if torch.stack([y.isfinite().all() for y in expected]).all():
        _agreed[kind] = launches if bool((errors < LARGEST_ERROR).all()) else ()
        if not _agreed[kind]:
            log.warning("Layers that share the quantization of their input gave other results than one by one on %s (relative errors %s), "
                        "so that each of them now quantizes its own, which is slower; please report this line to the authors of the "
                        "SVDQuant nodes.", x.device, [f"{error:.2g}" for error in errors.tolist()])
            return expected
    return outputs


def joined(layers, lora):
    """(proj_down, lora_down, lora_strength) of the branches of all layers as one. lora: joined_sizes(). Without ranks: proj_down (K, ranks
    of all layers) and two Nones; else as those of LayerOperands, with the first layer's proj_down."""
    if not lora.ranks:
        return torch.cat([layer.proj_down for layer in layers], dim=1), None, None
    downs, strengths = [], []
    for layer in layers:
        downs.append(layer.proj_down.t() if layer.lora_down is None else layer.lora_down)
        own = layer.proj_down.new_ones(layer.proj_down.shape[1], dtype=torch.float32)
        strengths += [own] if layer.lora_strength is None else [own, layer.lora_strength]
    return layers[0].proj_down, torch.cat(downs), torch.cat(strengths)[layers[0].proj_down.shape[1]:]


def joined_sizes(ranks, loras):
    """The LoRASizes of the branches of layers with these ranks and LoRASizes as one branch with the first layer's ranks: the other layers'
    own ranks are parts of the LoRA. (Only the GEMMs ask for a part's rows.) None if there are more parts than the kernels take."""
    if not any(lora.ranks for lora in loras):
        return NO_LORA
    parts = [*loras[0].ranks]
    for rank, lora in zip(ranks[1:], loras[1:]):
        parts += [rank, *lora.ranks]
    return LoRASizes(tuple(parts)) if len(parts) <= MAX_PARTS and max(parts) <= MAX_PART_RANK else None


class _Launches(NamedTuple):
    """The launches of layers with one input."""

    lora: LoRASizes  # joined_sizes()
    product: bool    # cuBLAS computes the branches' product
    allocate: tuple  # functions that allocate the outputs, (M, N) each
    run: Callable    # takes the addresses of x, smooth, lora_strength, the product or proj_down, the outputs, and OF_LAYER of each layer


@functools.lru_cache(maxsize=1024)
def _launches(m, k, sizes, unsigned_from, act_bits, dtype, stride, device):
    """The _Launches for x (m, K) with rows `stride` elements apart, or None. sizes: (N, rank, gelu_from, LoRASizes) of each layer."""
    ns, ranks, _, loras = zip(*sizes)
    lora = joined_sizes(ranks, loras)
    if lora is None or any(not each or each % RANK_BLOCK for each in ranks):  # a layer's ranks begin with a block of their own
        return None
    chosen = [ops.chosen(choose.Layer(m, n, k, own, unsigned_from, act_bits, dtype, gelu_from, of_layer), device)
              for n, own, gelu_from, of_layer in sizes]
    if any(kernels is None or not kernels.whole for kernels in chosen):
        return None
    rank = ranks[0] if lora.ranks else sum(ranks)
    storage, plans = _quantizes(choose.Layer(m, ns[0], k, rank, unsigned_from, act_bits, dtype, lora=lora), device)
    if any(kernels.storage != storage for kernels in chosen):
        return None
    quantize, plan = quantize_activation.launcher(m, k, rank, stride, unsigned_from, storage, plans, dtype, device, True, lora)
    product = plan.ranks < rank or bool(lora.ranks)
    work = dict(zip(("act", "act_scale"), quantize_activation.output_bytes(m, k, rank, storage, dtype, lora)))
    # One tensor: a block of ranks is a multiple of the alignment of work memory, so that the layers' parts follow one another.
    block = padded(m, ROWS) * RANK_BLOCK * dtype.itemsize
    work |= {f"lora_act{i}": (own // RANK_BLOCK + of_layer.blocks(RANK_BLOCK)) * block for i, (_, own, _, of_layer) in enumerate(sizes)}
    products = quantize_activation.PRODUCT[dtype] if product else ("proj_down",)
    work["lora_act_scale"] = padded(m, ROWS) * 4
    steps = [(quantize, ("x", "smooth", "proj_down", "act", "act_scale", "lora_act0", "lora_act_scale",
                         *(("lora_strength",) if lora.ranks else ())))]
    for i, (size, kernels) in enumerate(zip(sizes, chosen)):
        gemm, takes_lora = _gemm(kernels, m, k, size, unsigned_from, dtype, device)
        steps.append((gemm, [f"{name}{i}" if name in NUMBERED else name for name in GEMM[:len(GEMM) - (not takes_lora)]]))
    names = ("x", "smooth", "lora_strength", *products, *(f"y{i}" for i in range(len(sizes))),
             *(f"{name}{i}" for i in range(len(sizes)) for name in OF_LAYER))
    return _Launches(lora, product, tuple(runtime.allocator((m, n), dtype, device) for n in ns), runtime.chain(names, *steps, work=work))


def _quantizes(layer, device):
    """(storage, plans) to quantize the input of a choose.Layer with the ranks of several layers, in kernels that passed their self-test."""
    target = targets.for_device(device)
    while True:
        kernels = choose.choose(layer, target, targets.multiprocessors(device), self_test.failed(device))
        if kernels is None:
            return None, ()
        if self_test.quantize_passes(kernels, layer, device):
            return kernels.storage, kernels.plans


def _gemm(kernels, m, k, size, unsigned_from, dtype, device):
    """(launcher of one layer's GEMM, whether it takes lora_up)"""
    n, rank, gelu_from, lora = size
    if kernels.wgmma:
        return (gemm_wgmma.launcher(kernels.tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from, True, lora),
                gemm_wgmma.takes_lora(rank, lora))
    return (gemm_mma.launcher(kernels.storage, kernels.tile, m, n, k, rank, unsigned_from, dtype, device, gelu_from, lora=lora),
            bool(lora.ranks))


def prepare(m, k, sizes, unsigned_from, act_bits, dtype, device):
    """Compile, load and test the kernels of layers with one contiguous input (m, k); arguments as of _launches."""
    _launches(m, k, sizes, unsigned_from, act_bits, targets.compute_dtype(dtype, dtype, device), k, device)


ops.choices.append(_launches)
