"""The activation layout: how the quantize kernels store a token's codes, so that every GEMM reads them without shuffling.

Weights keep their natural order (quant/layers/layout.py), so that a model in memory equals the model in its file. Four lanes of a kernel
share a weight row, and lane q = 0..3 of them reads whole 16- or 8-byte words of the row. These words hold other columns than the tensor
core expects in lane q. A dot product doesn't depend on the order of its columns, so the activation's codes are stored in the order in
which the weights come out of their words. Each storage has its own order within a block of 128 columns:

    storage       position p of the block              holds column                  a scale for each
    INT8          32 s + 16 h + 4 q + b                32 q + 8 s + 2 b + h          token (and part), s 0..3
    INT4_BYTES    64 j + 32 s + 16 h + 4 q + b         64 j + 16 q + 8 s + 2 b + h   group of 64 columns, j and s 0..1
    INT4_NIBBLES  64 j + 32 h + 8 q + t                64 j + 16 q + 8 h + t         group of 64 columns, t 0..7

with b = 0..3, h = 0..1, q = 0..3. s counts MMA steps of 32 columns, h the halves of a step, and 4 q + b the bytes of a fragment's row.
The low nibbles of a word (even columns) form one fragment register, the high nibbles (odd columns) the other.

A tensor in this layout is (blocks, rows, bytes of a block). Any run of tokens is one contiguous piece of each block, ready for a bulk
copy into shared memory, and already swizzled as wgmma and ldmatrix read it. In pieces of 16 bytes:

    128-byte rows (codes of a byte each)           piece c of row r lies at c ^ (r & 7)
     64-byte rows (nibbles; 32 ranks of lora_act)  piece c of row r lies at c ^ ((r >> 1) & 3)

Rows are padded to a multiple of 16, columns to whole blocks; the padding holds zeros. The kernels write and read this layout; the
functions here define it, and the tests make and read tensors with them.
"""

from enum import IntEnum

import torch

BLOCK = 128       # columns in a block of codes
RANK_BLOCK = 32   # ranks in a block of the LoRA branch's activation
ROWS = 16         # rows are padded to a multiple of this


class CodeStorage(IntEnum):
    """How the codes of an activation are stored. The kernels use the same numbers (common.cuh)."""

    INT8 = 0          # 8-bit codes, one scale per token and part
    INT4_BYTES = 1    # 4-bit codes, one to a byte, one scale per token and group: for tensor cores without int4
    INT4_NIBBLES = 2  # 4-bit codes, two to a byte, one scale per token and group: for tensor cores with int4


def padded(count, multiple):
    return -(-count // multiple) * multiple


def _order(column_of):
    return torch.tensor([column_of(p) for p in range(BLOCK)])


# ORDER[storage][p] is the column at position p of a block.
ORDER = {
    CodeStorage.INT8: _order(lambda p: 32 * (p // 4 % 4) + 8 * (p // 32) + 2 * (p % 4) + p // 16 % 2),
    CodeStorage.INT4_BYTES: _order(lambda p: 64 * (p // 64) + 16 * (p // 4 % 4) + 8 * (p // 32 % 2) + 2 * (p % 4) + p // 16 % 2),
    CodeStorage.INT4_NIBBLES: _order(lambda p: 64 * (p // 64) + 16 * (p // 8 % 4) + 8 * (p // 32 % 2) + p % 8),
}


def _swizzled(data):
    """Swizzle the 16-byte pieces of (blocks, rows, 64 or 128) uint8. The function is its own inverse."""
    blocks, rows, width = data.shape
    row = torch.arange(rows, device=data.device).unsqueeze(1)
    piece = torch.arange(width // 16, device=data.device)
    piece = piece ^ (row & 7 if width == 128 else (row >> 1) & 3)  # (rows, pieces)
    pieces = data.unflatten(-1, (-1, 16))
    return pieces.gather(2, piece[None, :, :, None].expand_as(pieces)).flatten(-2)


def _blocks(matrix, width):
    """(M, C) -> (blocks, padded M, width), padded with zeros."""
    rows, columns = matrix.shape
    matrix = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % ROWS))
    return matrix.unflatten(1, (-1, width)).transpose(0, 1)


def lay_out_codes(codes, storage):
    """codes (M, K), whole numbers of any dtype -> (blocks, padded M, 128) int8, or (blocks, padded M, 64) uint8 for INT4_NIBBLES, with
    the even position in the low nibble."""
    order = ORDER[storage].to(codes.device)
    if storage != CodeStorage.INT4_NIBBLES:
        return _swizzled(_blocks(codes.to(torch.int8), BLOCK)[..., order].contiguous().view(torch.uint8)).view(torch.int8)
    nibbles = _blocks(codes.to(torch.int16) & 15, BLOCK)[..., order]
    return _swizzled((nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8))


def read_codes(data, storage, shape):
    """The inverse of lay_out_codes: (M, K) int8. Nibbles come back as 0..15, because the layout doesn't record whether they are signed."""
    order = ORDER[storage].to(data.device)
    blocks = torch.empty(*data.shape[:2], BLOCK, dtype=torch.int8, device=data.device)
    unswizzled = _swizzled(data.view(torch.uint8))
    if storage == CodeStorage.INT4_NIBBLES:
        unswizzled = torch.stack((unswizzled & 15, unswizzled >> 4), -1).flatten(-2)
    blocks[..., order] = unswizzled.view(torch.int8)
    return blocks.transpose(0, 1).flatten(1)[:shape[0], :shape[1]]


def lay_out_lora_act(lora_act):
    """lora_act (M, R), 16-bit -> (rank blocks, padded M, 32) of the same dtype."""
    return _swizzled(_blocks(lora_act, RANK_BLOCK).contiguous().view(torch.uint8)).view(lora_act.dtype)


def read_lora_act(data, shape):
    """The inverse of lay_out_lora_act: (M, R)."""
    rows = _swizzled(data.view(torch.uint8)).view(data.dtype)
    return rows.transpose(0, 1).flatten(1)[:shape[0], :shape[1]]
