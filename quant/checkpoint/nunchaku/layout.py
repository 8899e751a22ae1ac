"""Convert between Nunchaku's byte order and ours: every packed array of INT4 files in both directions, and NVFP4's scales from Nunchaku's.

Each array is a permutation of ours in which one warp's mma fragments lie side by side. Below, each index is written as a sum of axes, and
the axes are listed from slowest to fastest (the number in brackets is the length of a lower-case axis):

    codes    n = 128 T + 16 p[8] + 8 a[2] + i[8],  k = 64 G + 32 b[2] + 8 j[4] + c[8]       int32 words of 8 codes c
             file T G p i j a b,   ours T p a i G b j
    vector   n = 128 T + 16 p[8] + 8 a[2] + 2 d[4] + e[2], one value per group G (scales) or one in all (bias, smooth)
             file T G p d a e,     ours G T p a d e
    down     k = 16 C + 8 c[2] + 2 d[4] + e[2],  r = 16 R + 8 a[2] + x[8];  file C R x d a c e,  ours C c d e R a x
    up       n = 16 C + 8 a[2] + x[8],  r = 16 R + 8 c[2] + 2 d[4] + e[2];  file C R x d a c e,  ours C a x R c d e
    e4m3     n = 128 T + 32 p[4] + 8 q[4] + i[8],  k = 64 G + 16 g[4] (scales of NVFP4, bytes)
             file T G i q p g,     ours G g T p q i

The eight codes of a word are in the same order in both, so codes move as whole words and are never unpacked.

The large arrays of a file (codes, NVFP4's scales) may be tensors or header.StoredTensor. The latter is read block by block: a block is
moved to its final place while it is in a core's own cache, and the result is the only large memory. These functions run in several
threads at once. They avoid the operations for which PyTorch starts threads of its own (copies and arithmetic of many numbers), since
those threads would wait for each other, and they loop over blocks in NumPy, since every PyTorch call, even a view, releases the
interpreter lock.

Modulation layers (W4A16) have codes 0..15, four rows side by side. Each run of 32 columns is eight 16-bit words, which hold the columns
j, 8 + j, 16 + j, 24 + j. The rows are interleaved: row j S + s of the file is row s d + j of the layer, with S = 6 or 3 chunks (shift,
scale, gate once or twice) of d rows. In the scale chunks, 1 is added to the bias.
"""

import threading
from functools import lru_cache
from math import gcd, prod

import numpy as np
import torch

from ...layers.layout import GROUP_SIZE

TILE = 128  # N and K are multiples of it
RANK_TILE = 16  # the rank is a multiple of it
BRANCH_TILE = 24 * TILE  # channels of a branch that are moved at a time, if they divide the total
BLOCK = 9 << 17  # bytes that are moved at a time: few enough for a cache, enough to make the cost of Python calls small
AWQ_ROWS = 4  # rows side by side
AWQ_GROUP_TILE = 16  # groups are padded to a multiple of it
ADDED = 1 << 15  # numbers that are added at a time; for more, PyTorch starts threads of its own
AWQ_UNIT = 12  # a block's number of rows is a multiple of it, and so of AWQ_ROWS and of 3 or 6 chunks
AWQ_PLANES = (0, 2, 1, 3)  # the plane of each byte of a word

# Steps of _exchange: (axis of the planes, bits to shift by, mask).
AWQ_STEPS = ((1, 4, 0x0F0F0F0F0F0F0F0F),)
NVFP4_STEPS = ((0, 16, 0x0000FFFF0000FFFF), (1, 8, 0x00FF00FF00FF00FF))


def empty(*shape):
    """An uninitialized int8 tensor of this shape. NumPy requests large pages, which the system provides several times as fast as those that
    PyTorch requests."""
    return torch.from_numpy(np.empty(shape, np.int8))


_kept = threading.local()


def _scratch(use, count):
    """A buffer of `count` int32, reused by the thread's next call with the same `use`; freeing it would fragment the memory."""
    memory = vars(_kept).get(use)
    if memory is None or memory.size < count:
        memory = vars(_kept)[use] = np.empty(count, np.int32)
    return memory[:count]


def _words(tensor, counts):
    """The 32-bit words of a tensor or StoredTensor in consecutive blocks of `counts` words, as NumPy arrays. An array is valid until the
    next one is requested."""
    if isinstance(tensor, torch.Tensor):
        return np.split(tensor.contiguous().flatten().view(torch.int32).numpy(), np.cumsum(counts[:-1]))
    return tensor.words(counts, _scratch("words", max(counts)))


def _cut(total, most):
    """`total` as a sum of numbers that are at most `most`; a list."""
    return [min(most, total - start) for start in range(0, total, most)]


@lru_cache(maxsize=32)
def _places(axes, order):
    """The source indices of a tile's words if its `axes` are permuted to `order`; (words,) int32."""
    return torch.arange(prod(axes), dtype=torch.int32).view(axes).permute(order).reshape(-1)


def _reorder(source, axes, order, target):
    """Permute the words of every tile from `axes` to `order`. source, target: (tiles, ...) of words.

    On a CPU, a gather by a table is several times as fast as copying a permuted view, whose inner loops are short.
    """
    places = _places(axes, order)
    for words, out in zip(source.flatten(1), target):
        torch.index_select(words, 0, places, out=out.view(-1))
    return target


def _apart(words):
    """32-bit words -> (4, words / 4): the first, second, third and fourth of every four words. Valid until the thread's next call."""
    planes = _scratch("apart", words.size).reshape(4, -1)
    for plane, own in zip(planes, words.reshape(-1, 4).T):
        plane[:] = own  # one long inner loop per plane
    return planes


def _together(planes):
    """The inverse of _apart."""
    words = _scratch("together", planes.size).reshape(-1, 4)
    for plane, own in zip(planes, words.T):
        own[:] = plane
    return words


def _exchange(planes, steps):
    """Exchange bits between planes (2, 2, ...) int64, in place. Each step takes the planes with index 0 and 1 on its axis and exchanges
    the bits `mask` of the second with the bits `mask << shift` of the first. The inverse is the same steps in reverse order."""
    spare = _scratch("spare", planes[0].size * 2).view(np.int64).reshape(planes[0].shape)
    for axis, shift, mask in steps:
        first, second = planes.swapaxes(0, axis)
        np.right_shift(first, shift, out=spare)
        np.bitwise_xor(spare, second, out=spare)
        np.bitwise_and(spare, mask, out=spare)
        np.bitwise_xor(second, spare, out=second)
        np.left_shift(spare, shift, out=spare)
        np.bitwise_xor(first, spare, out=first)


def _codes(codes):
    """(N, K/2) int8 as (tiles, rows, words)."""
    return codes.view(torch.int32).unflatten(0, (-1, TILE))


@lru_cache(maxsize=8)
def _code_places(tiles, groups):
    """The source indices of our codes' runs of four words for this many tiles, in planes of the file's words (a b T G p i)."""
    places = np.arange(tiles * groups * TILE * 2, dtype=np.intp).reshape(2, 2, tiles, groups, 8, 8)
    return places.transpose(2, 4, 0, 5, 3, 1).reshape(-1)


def unpack_codes(qweight, out=None):
    """(N, K/2) int8 in Nunchaku's order (or a StoredTensor) -> the same shape in our order (cuda/int4.py), in `out` if given."""
    out = empty(*qweight.shape) if out is None else out
    n, half = qweight.shape
    blocks = _cut(n // TILE, max(1, BLOCK // (TILE * half)))
    moved = _scratch("moved", blocks[0] * TILE * half // 4).view(np.int8).reshape(-1, half)
    rows = np.split(out.numpy(), np.cumsum(blocks[:-1]) * TILE)
    for words, tiles, target in zip(_words(qweight, [tiles * TILE * half // 4 for tiles in blocks]), blocks, rows):
        runs = _apart(words).reshape(-1).view(np.complex128)  # one plane for each (a, b): runs of four j
        whole = target if target.flags.c_contiguous else moved[: len(target)]
        np.take(runs, _code_places(tiles, half // 32), out=whole.reshape(-1).view(runs.dtype), mode="clip")
        if whole is not target:
            target[:] = whole
    return out


def pack_codes(weight):
    """(N, K/2) int8 in our order -> (N, K/2) int8 in Nunchaku's."""
    out = empty(*weight.shape)
    _reorder(_codes(weight), (8, 2, 8, weight.shape[1] // 32, 2, 4), (3, 0, 2, 5, 1, 4), _codes(out))
    return out


def unpack_scales(wscales):
    """(G, N) 16-bit in Nunchaku's order, in which row g is not group g -> (G, N) in ours."""
    groups, n = wscales.shape
    return _whole(wscales, (n // TILE, groups, 8, 4, 2), (1, 0, 2, 4, 3))


def pack_scales(scales):
    """(G, N) 16-bit in our order -> the same shape in Nunchaku's."""
    groups, n = scales.shape
    return _whole(scales, (groups, n // TILE, 8, 2, 4), (1, 0, 2, 4, 3))


def unpack_nvfp4_scales(wscales):
    """(K/16, N) e4m3 in Nunchaku's order (or a StoredTensor) -> (K/16, N) in ours."""
    groups, n = wscales.shape
    out = empty(groups, n)
    target = out.view(torch.int32).numpy().reshape(groups // 4, 4, n // TILE, TILE // 4)
    tiles, start = _cut(n // TILE, max(1, BLOCK // (groups * TILE))), 0
    planes = _scratch("planes", groups // 4 * tiles[0] * TILE)
    for words, count in zip(_words(wscales, [groups // 4 * count * TILE for count in tiles]), tiles):
        # A transposition: the four g within a word against four i in four planes.
        block, places = planes[: words.size], _places((count, groups // 4, 2, 2, 2, 4, 4), (3, 4, 1, 0, 6, 5, 2))
        torch.index_select(torch.from_numpy(words), 0, places, out=torch.from_numpy(block))
        _exchange(block.view(np.int64).reshape(2, 2, -1), NVFP4_STEPS)
        target[:, :, start : start + count] = block.reshape(4, groups // 4, count, -1).swapaxes(0, 1)
        start += count
    return out.view(torch.float8_e4m3fn)


def unpack_vector(vector):
    """(N) bias or (K) smooth in Nunchaku's order -> in ours."""
    return vector.view(-1, 4, 2, 2).transpose(1, 2).reshape(-1)


def pack_vector(vector):
    """(N) or (K) 16-bit in our order -> in Nunchaku's."""
    return vector.view(-1, 2, 4, 2).transpose(1, 2).reshape(-1)


def _whole(tensor, axes, order, word=torch.int32):
    """A copy of a tensor with all its words permuted as one tile."""
    tensor = tensor.contiguous()
    out = torch.empty_like(tensor)
    _reorder(tensor.view(word).view(1, -1), axes, order, out.view(word).view(1, -1))
    return out


def _branch(tensor, axes, order, word):
    """A copy of a branch (channels, R) with its words permuted, some channels at a time. axes: those of one group of 16 channels."""
    tensor = tensor.contiguous()
    out, channels = torch.empty_like(tensor), gcd(BRANCH_TILE, tensor.shape[0])
    source, target = (t.view(word).unflatten(0, (-1, channels)) for t in (tensor, out))
    _reorder(source, (channels // 16, *axes), order, target)
    return out


def unpack_down(lora_down):
    """(K, R) 16-bit in Nunchaku's order -> weight_proj_down, (K, R)."""
    return _branch(lora_down, (lora_down.shape[1] // 16, 8, 4, 2, 2, 2), (0, 5, 3, 6, 1, 4, 2), torch.int16)


def pack_down(proj_down):
    """weight_proj_down (K, R) -> (K, R) in Nunchaku's order."""
    return _branch(proj_down, (2, 4, 2, proj_down.shape[1] // 16, 2, 8), (0, 4, 6, 2, 5, 1, 3), torch.int16)


def unpack_up(lora_up):
    """(N, R) 16-bit in Nunchaku's order -> weight_proj_up, (N, R)."""
    return _branch(lora_up, (lora_up.shape[1] // 16, 8, 4, 2, 2), (0, 4, 2, 1, 5, 3), torch.int32)


def pack_up(proj_up):
    """weight_proj_up (N, R) -> (N, R) in Nunchaku's order."""
    return _branch(proj_up, (2, 8, proj_up.shape[1] // 16, 2, 4), (0, 3, 2, 5, 1, 4), torch.int32)


# --- modulation layers ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _awq_places(rows, columns, chunks):
    """The source indices of the layer's runs of 64 columns in this many rows of a modulation layer's file; (chunks, ...)."""
    runs = np.arange(rows * columns // GROUP_SIZE, dtype=np.intp).reshape(-1, columns // GROUP_SIZE, AWQ_ROWS).swapaxes(1, 2)
    return runs.reshape(-1, chunks, columns // GROUP_SIZE).swapaxes(0, 1).reshape(chunks, -1)


def _awq_blocks(weight, chunks):
    """Views of our codes (N, K/2), with the rows of each chunk that are processed at a time: [(chunks, rows, K/16) int64]."""
    n, half = weight.shape
    rows = max(1, BLOCK // (AWQ_UNIT * half)) * AWQ_UNIT // chunks
    chunked = weight.view(torch.int64).numpy().reshape(chunks, n // chunks, -1)
    return np.split(chunked, range(rows, n // chunks, rows), 1)


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
    """A modulation layer in Nunchaku's order: (N/4, K/2) int32, (padded G, N), (padded G, N), (N) -> {parameter name: tensor} of our
    awq_w4a16 layer.

    In the file w = code * s + z, in our layer w = (code - 8) * s + z'. z' = z + 8 s is rounded to the dtype once, which shifts a group by
    at most 2^-9 of z'. Since z is about -7 s, z' is about s, and the shift is about 1/500 of a code's step. Adding 1 to the bias of the
    scale chunks lost precision when the file was written. Subtracting it is exact for stored values of 0.5 or more, and rounds by at most
    2^-9 in bf16 for smaller ones, as computing 1 + scale in that type does.
    """
    n, k = qweight.shape[0] * AWQ_ROWS, qweight.shape[1] * 2
    weight = empty(n, k // 2)
    blocks = _awq_blocks(weight, chunks)
    for words, ours in zip(_words(qweight, [block.size * 2 for block in blocks]), blocks):
        shifted, planes = (_scratch(use, words.size) for use in ("moved", "planes"))
        for byte, plane in zip((0, 8, 16, 24), AWQ_PLANES):
            lowest = np.right_shift(words, byte, out=shifted) if byte else words
            np.copyto(planes.view(np.uint8).reshape(4, -1)[plane], lowest, casting="unsafe")  # the lowest byte of each word
        _exchange(planes.view(np.int64).reshape(2, 2, -1), AWQ_STEPS)
        runs = _together(planes.reshape(4, -1)).view(np.int64).reshape(-1, 4)
        for rows, places in zip(ours, _awq_places(len(ours) * ours.shape[1], k, chunks)):
            np.take(runs, places, 0, out=rows.reshape(-1, 4), mode="clip")
    groups = k // GROUP_SIZE
    scales, zeros = torch.empty(groups, n, dtype=bias.dtype), torch.empty(groups, n, dtype=bias.dtype)
    for ours, theirs in ((scales, wscales), (zeros, wzeros)):
        chunked = theirs[:groups].view(torch.int16).numpy().reshape(groups, -1, chunks)
        ours.view(torch.int16).numpy().reshape(groups, chunks, -1)[:] = chunked.swapaxes(1, 2)
    for zero, scale in zip(*(t.view(-1).split(ADDED) for t in (zeros, scales))):
        torch.add(zero, scale, alpha=8, out=zero)  # in float32, rounded once
    return {"weight": weight, "weight_scale": scales, "weight_zeros": zeros,
            "bias": _awq_bias(_deinterleave(bias, chunks), chunks, -1).to(bias.dtype)}


def pack_awq(weight, weight_scale, weight_zeros, bias, chunks):
    """The inverse of unpack_awq: {leaf name: tensor} in Nunchaku's order.

    z = z' - 8 s is rounded to the dtype. The rounding is exact if z is the smallest weight of its group and the weights had that dtype;
    otherwise its error is at most 2^-9 of z, about 1/60 of a code's step. Adding 1 to the bias of the scale chunks rounds it to multiples
    of 2^-7 in bf16 (2^-10 in fp16), as computing 1 + scale in that type does.
    """
    (n, half), groups = weight.shape, weight_scale.shape[0]
    qweight, blocks = empty(n, half).view(torch.int32), _awq_blocks(weight, chunks)
    for words, ours in zip(_words(qweight, [block.size * 2 for block in blocks]), blocks):
        runs = np.empty((ours.size // 4, 4), np.int64)
        runs[_awq_places(len(ours) * ours.shape[1], half * 2, chunks)] = ours.reshape(chunks, -1, 4)
        planes = _apart(runs.view(np.int32))
        _exchange(planes.view(np.int64).reshape(2, 2, -1), AWQ_STEPS)
        words.view(np.uint8).reshape(-1, 4)[:] = planes.view(np.uint8).reshape(4, -1)[[*AWQ_PLANES]].T
    zeros = (weight_zeros.float() - 8 * weight_scale.float()).to(weight_zeros.dtype)
    padding = (0, 0, 0, -groups % AWQ_GROUP_TILE)
    scales, zeros = (torch.nn.functional.pad(_interleave(t.t(), chunks).t(), padding).contiguous()
                     for t in (weight_scale, zeros))
    return {"qweight": qweight.view(n // AWQ_ROWS, half), "wscales": scales, "wzeros": zeros,
            "bias": _interleave(_awq_bias(bias, chunks, 1).to(bias.dtype), chunks).contiguous()}
