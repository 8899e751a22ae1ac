"""Where Nunchaku's packed arrays have each value, as index arithmetic after the format's description, apart from the pack's own code.

Each function gives offsets into a flat array: of codes in bytes, with the nibble; of all others in values.
"""

import torch


def code_places(n, k):
    """((N, K) byte, (1, K) whether the code is the high nibble) of W4A4 codes."""
    row, column = torch.arange(n).unsqueeze(1), torch.arange(k).unsqueeze(0)
    word = ((row // 128 * (k // 64) + column // 64) * 8 + row % 128 // 16) * 8 + row % 8
    word = (word * 4 + column % 32 // 8) * 4 + row % 16 // 8 * 2 + column % 64 // 32
    return 4 * word + column % 8 // 2, column % 2 == 1


def vector_places(count):
    """(count,) of a bias, a smoothing factor or scales of rows."""
    i = torch.arange(count)
    return i // 16 * 16 + i % 8 // 2 * 4 + i % 16 // 8 * 2 + i % 2


def scale_places(n, k):
    """(N, K/64) of INT4's scales."""
    row, group = vector_places(n).unsqueeze(1), torch.arange(k // 64)
    return (row // 128 * (k // 64) + group) * 128 + row % 128


def e4m3_places(n, k):
    """(N, K/16) of NVFP4's scales."""
    row, group = torch.arange(n).unsqueeze(1), torch.arange(k // 16).unsqueeze(0)
    tile = row // 128 * (k // 64) + group // 4
    return ((tile * 8 + row % 8) * 4 + row % 32 // 8) * 16 + row % 128 // 32 * 4 + group % 4


def down_places(k, rank):
    """(K, R) of a branch's down projection."""
    channel, r = torch.arange(k).unsqueeze(1), torch.arange(rank)
    place = ((channel // 16 * (rank // 16) + r // 16) * 8 + r % 8) * 4 + channel % 8 // 2
    return place * 8 + r % 16 // 8 * 4 + channel % 16 // 8 * 2 + channel % 2


def up_places(n, rank):
    """(N, R) of a branch's up projection."""
    row, r = torch.arange(n).unsqueeze(1), torch.arange(rank)
    place = ((row // 16 * (rank // 16) + r // 16) * 8 + row % 8) * 4 + r % 8 // 2
    return place * 8 + row % 16 // 8 * 4 + r % 16 // 8 * 2 + r % 2


def w4a16_places(n, k):
    """((N, K) 16-bit word, (1, K) shift in bits) of W4A16 codes, in the order of the file's rows."""
    row, column = torch.arange(n).unsqueeze(1), torch.arange(k).unsqueeze(0)
    word = (((row // 4 * (k // 64) + column // 64) * 4 + row % 4) * 2 + column % 64 // 32) * 8 + column % 8
    return word, column % 32 // 8 * 4
