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

The large arrays of a file (codes, NVFP4's scales) may be tensors or header.StoredTensor, which is read block by block: what is
read goes to its place while it lies in a core's own cache, and no memory is touched but the result's. What is here runs in
several threads at once, so it does without PyTorch's own (copies and arithmetic of many numbers), which would wait for each other,
and loops over blocks in NumPy: each of PyTorch's calls, be it a view, hands the interpreter over.

Modulation layers (W4A16) have codes 0..15, four rows side by side, and in each run of 32 columns eight 16-bit words
that hold the columns j, 8 + j, 16 + j, 24 + j. Their rows are interleaved: row j S + s of the file is row s d + j of
the layer, S = 6 or 3 chunks (shift, scale, gate once or twice) of d rows. The bias of the scale chunks has 1 added.
"""

import threading
from functools import lru_cache
from math import gcd, prod

import numpy as np
import torch

from ...layers.layout import GROUP_SIZE

TILE = 128  # N and K are multiples of it
RANK_TILE = 16  # the rank is a multiple of it
BRANCH_TILE = 24 * TILE  # channels of a branch that are moved at a time, where they divide all
BLOCK = 9 << 17  # bytes that are moved at a time: few enough for a cache, so many that calls from Python cost little
AWQ_ROWS = 4  # rows that lie side by side
AWQ_GROUP_TILE = 16  # groups are padded to a multiple of it
ADDED = 1 << 15  # numbers that are added at a time; of more PyTorch makes threads of its own
AWQ_UNIT = 12  # rows of which a block has a multiple: AWQ_ROWS, and 3 or 6 chunks
AWQ_PLANES = (0, 2, 1, 3)  # the plane of each byte of a word

# Steps of _exchange: (index of the planes that it is between, bits to shift by, which bits of the one).
AWQ_STEPS = ((1, 4, 0x0F0F0F0F0F0F0F0F),)
NVFP4_STEPS = ((0, 16, 0x0000FFFF0000FFFF), (1, 8, 0x00FF00FF00FF00FF))


def empty(*shape):
    """Memory for (...) int8. NumPy asks for large pages, which are had several times as fast as the ones that PyTorch gets."""
    return torch.from_numpy(np.empty(shape, np.int8))


_kept = threading.local()


def _scratch(use, count):
    """Memory for so many int32, kept for the thread's next block: what is freed between results leaves holes between them."""
    memory = vars(_kept).get(use)
    if memory is None or memory.size < count:
        memory = vars(_kept)[use] = np.empty(count, np.int32)
    return memory[:count]


def _words(tensor, counts):
    """Blocks of so many 32-bit words, one after the other, of a tensor or a StoredTensor, as NumPy arrays; each lasts until the next
    is asked for."""
    if isinstance(tensor, torch.Tensor):
        return np.split(tensor.contiguous().flatten().view(torch.int32).numpy(), np.cumsum(counts[:-1]))
    return tensor.words(counts, _scratch("words", max(counts)))


def _cut(total, most):
    """total as a list of numbers of which none is above `most`."""
    return [min(most, total - start) for start in range(0, total, most)]


@lru_cache(maxsize=32)
def _places(axes, order):
    """Where in a tile with `axes` each word comes from when they are permuted to `order`, one after the other; int32."""
    return torch.arange(prod(axes), dtype=torch.int32).view(axes).permute(order).reshape(-1)


def _reorder(source, axes, order, target):
    """Permute every tile: source, target (tiles, ...) of words; a tile's words have `axes` in the source.

    A gather by a table is several times as fast on a CPU as copying a permuted view, whose inner loops are short.
    """
    places = _places(axes, order)
    for words, out in zip(source.flatten(1), target):
        torch.index_select(words, 0, places, out=out.view(-1))
    return target


def _apart(words):
    """32-bit words -> (4, words / 4): the first, the second, ... of every four. Lasts until the thread asks for the next."""
    planes = _scratch("apart", words.size).reshape(4, -1)
    for plane, own in zip(planes, words.reshape(-1, 4).T):
        plane[:] = own  # one loop each, and a long one
    return planes


def _together(planes):
    """The inverse of _apart."""
    words = _scratch("together", planes.size).reshape(-1, 4)
    for plane, own in zip(planes, words.T):
        own[:] = plane
    return words


def _exchange(planes, steps):
    """planes: (2, 2, ...) int64, changed in place. A step exchanges, between the planes with index 0 and 1 on one axis, the bits
    `mask` of the second with those of the first that are `shift` above. The inverse: the steps in the reverse order."""
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
    """Where each run of four words of so many tiles of our codes comes from, in planes of the file's (a b T G p i)."""
    places = np.arange(tiles * groups * TILE * 2, dtype=np.intp).reshape(2, 2, tiles, groups, 8, 8)
    return places.transpose(2, 4, 0, 5, 3, 1).reshape(-1)


def unpack_codes(qweight, out=None):
    """(N, K/2) int8 in Nunchaku's order (or a StoredTensor) -> the same shape in ours (cuda/int4.py), in `out` if given."""
    out = empty(*qweight.shape) if out is None else out
    n, half = qweight.shape
    blocks = _cut(n // TILE, max(1, BLOCK // (TILE * half)))
    moved = _scratch("moved", blocks[0] * TILE * half // 4).view(np.int8).reshape(-1, half)
    rows = np.split(out.numpy(), np.cumsum(blocks[:-1]) * TILE)
    for words, tiles, target in zip(_words(qweight, [tiles * TILE * half // 4 for tiles in blocks]), blocks, rows):
        runs = _apart(words).reshape(-1).view(np.complex128)  # a plane for each a and b: runs of four j
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
    """(G, N) 16 bit, nominally; row g of the file is not group g. Returns (G, N) in our order."""
    groups, n = wscales.shape
    return _whole(wscales, (n // TILE, groups, 8, 4, 2), (1, 0, 2, 4, 3))


def pack_scales(scales):
    """(G, N) 16 bit -> the same shape in Nunchaku's order."""
    groups, n = scales.shape
    return _whole(scales, (groups, n // TILE, 8, 2, 4), (1, 0, 2, 4, 3))


def unpack_nvfp4_scales(wscales):
    """(K/16, N) e4m3 in Nunchaku's order, nominally (or a StoredTensor) -> (K/16, N) in ours."""
    groups, n = wscales.shape
    out = empty(groups, n)
    target = out.view(torch.int32).numpy().reshape(groups // 4, 4, n // TILE, TILE // 4)
    tiles, start = _cut(n // TILE, max(1, BLOCK // (groups * TILE))), 0
    planes = _scratch("planes", groups // 4 * tiles[0] * TILE)
    for words, count in zip(_words(wscales, [groups // 4 * count * TILE for count in tiles]), tiles):
        # The four g of a word, and four i in as many planes, change places.
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


@lru_cache(maxsize=8)
def _awq_places(rows, columns, chunks):
    """Where in so many rows of a modulation layer's file the 64 columns of each of the layer's rows come from: (chunks, ...)."""
    runs = np.arange(rows * columns // GROUP_SIZE, dtype=np.intp).reshape(-1, columns // GROUP_SIZE, AWQ_ROWS).swapaxes(1, 2)
    return runs.reshape(-1, chunks, columns // GROUP_SIZE).swapaxes(0, 1).reshape(chunks, -1)


def _awq_blocks(weight, chunks):
    """Views of so many rows of each chunk of our codes (N, K/2) as are worked on at a time: (chunks, rows, K/16) int64."""
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
    """A modulation layer: (N/4, K/2) int32, (padded G, N), (padded G, N), (N) as the file has them.

    Returns {parameter name: tensor} of our awq_w4a16 layer. The file says w = code * s + z, we say
    w = (code - 8) * s + z'; z' = z + 8 s is rounded to the dtype once, which moves a group by at most 2^-9 of z', and
    as z is about -7 s, z' is about s: a five-hundredth of a code's step. What adding 1 cost the bias of the scale chunks
    was lost when the file was written; taking it off is exact where the file says 0.5 or more, and rounds by at most
    2^-9 in bf16 where it says less, as computing 1 + scale in that type does.
    """
    n, k = qweight.shape[0] * AWQ_ROWS, qweight.shape[1] * 2
    weight = empty(n, k // 2)
    blocks = _awq_blocks(weight, chunks)
    for words, ours in zip(_words(qweight, [block.size * 2 for block in blocks]), blocks):
        shifted, planes = (_scratch(use, words.size) for use in ("moved", "planes"))
        for byte, plane in zip((0, 8, 16, 24), AWQ_PLANES):
            lowest = np.right_shift(words, byte, out=shifted) if byte else words
            np.copyto(planes.view(np.uint8).reshape(4, -1)[plane], lowest, casting="unsafe")  # the lowest byte of each
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
    """The inverse of unpack_awq: {leaf name: tensor} as the file has them.

    z = z' - 8 s is rounded to the dtype: not at all where it is the smallest weight of its group and the weights had that
    dtype, else by at most 2^-9 of z, a sixtieth of a code's step. 1 more on the bias of the scale chunks rounds it to
    multiples of 2^-7 in bf16 (2^-10 in fp16), as computing 1 + scale in that type does.
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
