"""Device images: how the quantize kernel stores a token's codes, so that every GEMM reads them without shuffling.

Weights stay in their natural order (quant/layout.py), so that a model in memory is the model in the file. A kernel's lane q
(0..3 of the four that share a weight row) reads whole 16- or 8-byte words of that row, and the columns which it happens to get
are not those that the tensor core's lane q holds. A dot product doesn't mind the order of its columns: the activation's codes
are stored in the order in which the weights come out of their words. Three orders, each within a block of 128 columns:

    order     position p of the block              holds column                  for
    INTEGER   32 s + 16 h + 4 q + b                32 q + 8 s + 2 b + h          int8 codes, one scale a token (s 0..3)
    GROUP     64 j + 32 s + 16 h + 4 q + b         64 j + 16 q + 8 s + 2 b + h   int8 codes, a scale a group (j, s 0..1)
    NIBBLE    64 j + 32 h + 8 q + t                64 j + 16 q + 8 h + t         4-bit codes, a scale a group (t 0..7)

with b = 0..3, h = 0..1, q = 0..3. s counts MMA steps of 32, h their halves, 4 q + b the bytes of a fragment's row: low nibbles
(even columns) of a word are one fragment register, its high nibbles (odd columns) the other.

An image is (blocks, rows, bytes of a block): any run of tokens is one contiguous piece a block, ready for a bulk copy into
shared memory, and already swizzled as wgmma and ldmatrix want it there. In pieces of 16 bytes:

    128-byte rows (int8 codes)                     piece c of row r lies at c ^ (r & 7)
     64-byte rows (4-bit codes; 32 ranks of low)   piece c of row r lies at c ^ ((r >> 1) & 3)

Rows are padded to a multiple of 16, columns to whole blocks; the padding holds zeros. The kernels write and read images; the functions
here are their definition, by which tests make and read them.
"""

import torch

BLOCK = 128       # columns of a block of codes
RANK_BLOCK = 32   # ranks of a block of the branch's activation
ROWS = 16         # rows are padded to a multiple of this


def padded(count, multiple):
    return -(-count // multiple) * multiple


def _order(column_of):
    return torch.tensor([column_of(p) for p in range(BLOCK)])


# ORDER[p] is the column at position p.
INTEGER = _order(lambda p: 32 * (p // 4 % 4) + 8 * (p // 32) + 2 * (p % 4) + p // 16 % 2)
GROUP = _order(lambda p: 64 * (p // 64) + 16 * (p // 4 % 4) + 8 * (p // 32 % 2) + 2 * (p % 4) + p // 16 % 2)
NIBBLE = _order(lambda p: 64 * (p // 64) + 16 * (p // 8 % 4) + 8 * (p // 32 % 2) + p % 8)


def _swizzled(image):
    """(blocks, rows, 64 or 128 bytes) uint8 with its 16-byte pieces in place; its own inverse."""
    blocks, rows, width = image.shape
    row = torch.arange(rows, device=image.device).unsqueeze(1)
    piece = torch.arange(width // 16, device=image.device)
    piece = piece ^ (row & 7 if width == 128 else (row >> 1) & 3)  # (rows, pieces)
    pieces = image.unflatten(-1, (-1, 16))
    return pieces.gather(2, piece[None, :, :, None].expand_as(pieces)).flatten(-2)


def _blocks(matrix, width):
    """(M, C) -> (blocks, padded M, width), padded with zeros."""
    rows, columns = matrix.shape
    matrix = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % ROWS))
    return matrix.unflatten(1, (-1, width)).transpose(0, 1)


def int8_image(codes, order):
    """codes (M, K) whole numbers, order INTEGER or GROUP -> (blocks, rows, 128) int8."""
    ordered = _blocks(codes.to(torch.int8), BLOCK)[..., order.to(codes.device)]
    return _swizzled(ordered.contiguous().view(torch.uint8)).view(torch.int8)


def int8_codes(image, order, shape):
    """The inverse of int8_image: (M, K) int8."""
    blocks = torch.empty_like(image)
    blocks[..., order.to(image.device)] = _swizzled(image.view(torch.uint8)).view(torch.int8)
    return blocks.transpose(0, 1).flatten(1)[:shape[0], :shape[1]]


def nibble_image(codes):
    """codes (M, K) whole numbers -8..15 -> (blocks, rows, 64) uint8, the even position in the low nibble."""
    nibbles = _blocks(codes.to(torch.int16) & 15, BLOCK)[..., NIBBLE.to(codes.device)]
    return _swizzled((nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8))


def nibble_codes(image, shape):
    """The inverse of nibble_image: (M, K) int8, 0..15 (the sign is the reader's)."""
    packed = _swizzled(image)
    blocks = torch.empty(*image.shape[:2], BLOCK, dtype=torch.int8, device=image.device)
    blocks[..., NIBBLE.to(image.device)] = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8)
    return blocks.transpose(0, 1).flatten(1)[:shape[0], :shape[1]]


def branch_image(low):
    """low (M, R) 16 bit -> (rank blocks, rows, 32) of the same dtype."""
    return _swizzled(_blocks(low, RANK_BLOCK).contiguous().view(torch.uint8)).view(low.dtype)


def branch_rows(image, shape):
    """The inverse of branch_image: (M, R)."""
    rows = _swizzled(image.view(torch.uint8)).view(image.dtype)
    return rows.transpose(0, 1).flatten(1)[:shape[0], :shape[1]]
