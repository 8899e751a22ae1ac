"""Nunchaku's byte order against ours: every packed array of its INT4 files, both ways, and NVFP4's scales.

Each array is a permutation of ours, chosen so that one warp's mma fragments lie side by side. An index is split by
writing it as a sum, and the axes are listed slowest to fastest (a lower-case axis has the length in brackets):

    codes    n = 128 T + 16 p[8] + 8 a[2] + i[8],  k = 64 G + 32 b[2] + 8 j[4] + c[8]       int32 words of 8 codes c
             file T G p i j a b,   ours T p a i G b j
    vector   n = 128 T + 16 p[8] + 8 a[2] + 2 d[4] + e[2], one value a group G (scales) or one in all (bias, smooth)
             file T G p d a e,     ours G T p a d e
    down     k = 16 C + 8 c[2] + 2 d[4] + e[2],  r = 16 R + 8 a[2] + x[8];  file C R x d a c e,  ours C c d e R a x
    up       n = 16 C + 8 a[2] + x[8],  r = 16 R + 8 c[2] + 2 d[4] + e[2];  file C R x d a c e,  ours C a x R c d e
    e4m3     n = 128 T + 32 p[4] + 8 q[4] + i[8],  k = 64 G + 16 g[4] (scales of NVFP4, bytes)
             file T G i q p g,     ours G g T p q i

The eight codes of a word have the same places in both, so codes move as whole words and are never unpacked.

Modulation layers (W4A16) have codes 0..15, four rows side by side, and in each run of 32 columns eight 16-bit words
that hold the columns j, 8 + j, 16 + j, 24 + j. Their rows are interleaved: row j S + s of the file is row s d + j of
the layer, S = 6 or 3 chunks (shift, scale, gate once or twice) of d rows. The bias of the scale chunks has 1 added.
"""

from functools import lru_cache
from math import gcd, prod

import numpy as np
import torch

from ..layout import GROUP_SIZE

TILE = 128  # N and K are multiples of it
RANK_TILE = 16  # the rank is a multiple of it
BRANCH_TILE = 1024  # channels of a branch that are moved at a time, where they divide all
AWQ_ROWS = 4  # rows that lie side by side
AWQ_GROUP_TILE = 16  # groups are padded to a multiple of it
AWQ_BLOCK = 48  # rows that are worked on at a time: a multiple of AWQ_ROWS and of 6, few enough for a core's own cache

# Transposing a 4 x 4 matrix of nibbles in 64 bits: swap within the 2 x 2 blocks, then swap the blocks.
NIBBLE_SWAPS = ((12, 0x0000F0F00000F0F0), (24, 0x00000000FF00FF00))


def empty(*shape):
    """Memory for (...) int8. NumPy asks for large pages, which are had several times as fast as the ones that PyTorch gets."""
    return torch.from_numpy(np.empty(shape, np.int8))


@lru_cache(maxsize=16)
def _places(axes, order):
    """Where in a tile with `axes` each word comes from when they are permuted to `order`, one after the other; int32."""
    return torch.arange(prod(axes), dtype=torch.int32).view(axes).permute(order).reshape(-1)


def _reorder(source, axes, order, target):
    """Permute every tile: source, target (tiles, ...) of words; a tile's words have `axes` in the source.

    A gather by a table is several times as fast on a CPU as copying a permuted view, whose inner loops are short. Small copies
    are NumPy's: PyTorch would hand each to all cores, and wait for the one that is busy with something else.
    """
    places = _places(axes, order)
    for words, out in zip(source.flatten(1), target):
        if out.is_contiguous():
            torch.index_select(words, 0, places, out=out.view(-1))
        else:
            out.numpy()[...] = words.index_select(0, places).view(out.shape).numpy()
    return target


def _codes(codes):
    """(N, K/2) int8 as (tiles, rows, words)."""
    return codes.view(torch.int32).unflatten(0, (-1, TILE))


def unpack_codes(qweight, out=None):
    """(N, K/2) int8 in Nunchaku's order -> the same shape in ours (cuda/int4.py), in `out` if given."""
    out = empty(*qweight.shape) if out is None else out
    _reorder(_codes(qweight), (qweight.shape[1] // 32, 8, 8, 4, 2, 2), (1, 4, 2, 0, 5, 3), _codes(out))
    return out


def pack_codes(weight):
    """(N, K/2) int8 in our order -> (N, K/2) int8 in Nunchaku's."""
    out = empty(*weight.shape)
    _reorder(_codes(weight), (8, 2, 8, weight.shape[1] // 32, 2, 4), (3, 0, 2, 5, 1, 4), _codes(out))
    return out


def unpack_scales(wscales):
    """(G, N) 16 bit, nominally; row g of the file is not group g. Returns (G, N) in our order."""
    groups, n = wscales.shape
    return _whole(wscales, (n // TILE, groups, 8, 4, 2), (1, 0, 2, 4, 3))


def pack_scales(scales):
    """(G, N) 16 bit -> the same shape in Nunchaku's order."""
    groups, n = scales.shape
    return _whole(scales, (groups, n // TILE, 8, 2, 4), (1, 0, 2, 4, 3))


def unpack_nvfp4_scales(wscales):
    """(K/16, N) e4m3 in Nunchaku's order, nominally -> (K/16, N) in ours."""
    groups, n = wscales.shape
    out = torch.empty_like(wscales)
    target = out.view(torch.uint8).view(groups, n // TILE, TILE).transpose(0, 1)
    _reorder(wscales.view(torch.uint8).view(n // TILE, -1), (groups // 4, 8, 4, 4, 4), (0, 4, 3, 2, 1), target)
    return out


def unpack_vector(vector):
    """(N) bias or (K) smooth in Nunchaku's order -> in ours."""
    return vector.view(-1, 4, 2, 2).transpose(1, 2).reshape(-1)


def pack_vector(vector):
    """(N) or (K) 16 bit -> in Nunchaku's order."""
    return vector.view(-1, 2, 4, 2).transpose(1, 2).reshape(-1)


def _whole(tensor, axes, order, word=torch.int32):
    """A tensor's words permuted, all of them in one."""
    tensor = tensor.contiguous()
    out = torch.empty_like(tensor)
    _reorder(tensor.view(word).view(1, -1), axes, order, out.view(word).view(1, -1))
    return out


def _branch(tensor, axes, order, word):
    """A branch (channels, R), some channels at a time; axes: of 16 channels, behind their count."""
    tensor = tensor.contiguous()
    out, channels = torch.empty_like(tensor), gcd(BRANCH_TILE, tensor.shape[0])
    source, target = (t.view(word).unflatten(0, (-1, channels)) for t in (tensor, out))
    _reorder(source, (channels // 16, *axes), order, target)
    return out


def unpack_down(lora_down):
    """(K, R) 16 bit in Nunchaku's order -> weight_proj_down, (K, R)."""
    return _branch(lora_down, (lora_down.shape[1] // 16, 8, 4, 2, 2, 2), (0, 5, 3, 6, 1, 4, 2), torch.int16)


def pack_down(proj_down):
    """weight_proj_down (K, R) -> (K, R) in Nunchaku's order."""
    return _branch(proj_down, (2, 4, 2, proj_down.shape[1] // 16, 2, 8), (0, 4, 6, 2, 5, 1, 3), torch.int16)


def unpack_up(lora_up):
    """(N, R) 16 bit in Nunchaku's order -> weight_proj_up, (N, R)."""
    return _branch(lora_up, (lora_up.shape[1] // 16, 8, 4, 2, 2), (0, 4, 2, 1, 5, 3), torch.int32)


def pack_up(proj_up):
    """weight_proj_up (N, R) -> (N, R) in Nunchaku's order."""
    return _branch(proj_up, (2, 8, proj_up.shape[1] // 16, 2, 4), (0, 3, 2, 5, 1, 4), torch.int32)


# --- modulation layers ---------------------------------------------------------------------------------------------


def _transpose_nibbles(words):
    """int64 array, each word a 4 x 4 matrix of nibbles, transposed in place; its own inverse."""
    swapped = np.empty_like(words)
    for shift, mask in NIBBLE_SWAPS:
        np.right_shift(words, shift, out=swapped)
        swapped ^= words
        swapped &= mask
        words ^= swapped
        swapped <<= shift
        words ^= swapped
    return words


@lru_cache(maxsize=8)
def _awq_places(rows, columns, chunks, packing):
    """_places of the 16-bit words of `rows` rows of a modulation layer: of the file's for ours, of ours for the file's."""
    words = torch.arange(rows * columns // 4, dtype=torch.int32).view(-1, columns // 64, AWQ_ROWS, 2, 2, 4)
    places = words.permute(0, 2, 1, 3, 5, 4).reshape(-1, chunks, columns // 4).transpose(0, 1).reshape(-1)
    return places.argsort().int() if packing else places


def _blocks(rows):
    """(start, stop) of whole runs of AWQ_ROWS and of chunks, few enough that the steps between meet in a cache."""
    return ((start, min(start + AWQ_BLOCK, rows)) for start in range(0, rows, AWQ_BLOCK))


def _interleave(rows, chunks):
    """(N, ...) in the layer's order -> in the file's."""
    return rows.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(0, 1)


def _deinterleave(rows, chunks):
    """(N, ...) in the file's order -> in the layer's."""
    return rows.unflatten(0, (-1, chunks)).transpose(0, 1).flatten(0, 1)


def _awq_bias(bias, chunks, one):
    """Add `one` to the bias (N, in the layer's order) of the scale chunks: the second of every three."""
    bias = bias.float().unflatten(0, (chunks, -1)).clone()
    bias[1::3] += one
    return bias.flatten()


def unpack_awq(qweight, wscales, wzeros, bias, chunks):
    """A modulation layer: (N/4, K/2) int32, (padded G, N), (padded G, N), (N) as the file has them.

    Returns {parameter name: tensor} of our awq_w4a16 layer. The file says w = code * s + z, we say
    w = (code - 8) * s + z'; z' = z + 8 s is rounded to the dtype once, which moves a group by at most 2^-9 of z', and
    as z is about -7 s, z' is about s: a five-hundredth of a code's step. What adding 1 cost the bias of the scale chunks
    was lost when the file was written; taking it off is exact where the file says 0.5 or more, and rounds by at most
    2^-9 in bf16 where it says less, as computing 1 + scale in that type does.
    """
    n, k = qweight.shape[0] * AWQ_ROWS, qweight.shape[1] * 2
    codes, words = np.empty((chunks, n // chunks, k // 2), np.int8), qweight.view(torch.int64).numpy()
    for start, stop in _blocks(n):
        block = torch.from_numpy(_transpose_nibbles(words[start // AWQ_ROWS : stop // AWQ_ROWS].copy())).view(torch.int16)
        block = block.view(-1).index_select(0, _awq_places(stop - start, k, chunks, False))
        codes[:, start // chunks : stop // chunks] = block.view(torch.int8).view(chunks, -1, k // 2).numpy()
    scales, zeros = (_deinterleave(t[: k // GROUP_SIZE].t(), chunks).t().contiguous() for t in (wscales, wzeros))
    zeros = (zeros.float() + 8 * scales.float()).to(scales.dtype)
    return {"weight": torch.from_numpy(codes).view(n, k // 2), "weight_scale": scales, "weight_zeros": zeros,
            "bias": _awq_bias(_deinterleave(bias, chunks), chunks, -1).to(bias.dtype)}


def pack_awq(weight, weight_scale, weight_zeros, bias, chunks):
    """The inverse of unpack_awq: {leaf name: tensor} as the file has them.

    z = z' - 8 s is rounded to the dtype: not at all where it is the smallest weight of its group and the weights had that
    dtype, else by at most 2^-9 of z, a sixtieth of a code's step. 1 more on the bias of the scale chunks rounds it to
    multiples of 2^-7 in bf16 (2^-10 in fp16), as computing 1 + scale in that type does.
    """
    (n, half), groups = weight.shape, weight_scale.shape[0]
    qweight, codes = np.empty((n // AWQ_ROWS, half // 2), np.int64), weight.numpy().reshape(chunks, n // chunks, half)
    for start, stop in _blocks(n):
        block = torch.from_numpy(codes[:, start // chunks : stop // chunks].reshape(-1).view(np.int16))
        block = block.index_select(0, _awq_places(stop - start, half * 2, chunks, True)).view(torch.int64)
        qweight[start // AWQ_ROWS : stop // AWQ_ROWS] = _transpose_nibbles(block.numpy()).reshape(-1, half // 2)
    zeros = (weight_zeros.float() - 8 * weight_scale.float()).to(weight_zeros.dtype)
    padding = (0, 0, 0, -groups % AWQ_GROUP_TILE)
    scales, zeros = (torch.nn.functional.pad(_interleave(t.t(), chunks).t(), padding).contiguous()
                     for t in (weight_scale, zeros))
    return {"qweight": torch.from_numpy(qweight).view(torch.int32), "wscales": scales, "wzeros": zeros,
            "bias": _interleave(_awq_bias(bias, chunks, 1).to(bias.dtype), chunks).contiguous()}
