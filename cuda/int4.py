"""Four-bit codes: the one definition of their range, their position in a byte, and the GELU shift.

Two codes share a byte along K, the even column in the low nibble:

    bit     7 6 5 4 | 3 2 1 0
    column   2j + 1 |   2j

Signed codes are two's complement (-8..7), unsigned codes are 0..15. The order is comfy-kitchen's natural one.
"""

import torch

GROUP_SIZE = 64  # columns of K that share one scale
SIGNED_MIN, SIGNED_MAX = -8, 7
UNSIGNED_MAX = 15
INT8_MAX = 127
# tanh-GELU never goes below -0.17; this shift makes its output non-negative, so that all 16 unsigned codes are used.
GELU_SHIFT = 0.171875


def pack(codes):
    """Pack 4-bit codes two to a byte.

    codes: (..., K) any integer or float dtype, values -8..15 (signed and unsigned share the nibble); K even.
    Returns (..., K/2) int8.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes are packed in pairs, but the last dimension is {codes.shape[-1]}.")
    nibbles = codes.to(torch.int16) & 0x0F
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8).view(torch.int8)


def unpack_unsigned(packed):
    """(..., K/2) int8 -> (..., K) int8, codes 0..15."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 0x0F, byte >> 4), dim=-1).flatten(-2).view(torch.int8)


def unpack_signed(packed):
    """(..., K/2) int8 -> (..., K) int8, codes -8..7."""
    # Toggling the sign bit and subtracting its weight is sign extension: 0..7 stay, 8..15 become -8..-1.
    return (unpack_unsigned(packed) ^ 8) - 8
