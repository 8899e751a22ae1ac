"""The images' orders and swizzles: inverses of each other, and the words that a lane reads give the columns that it multiplies."""

import pytest
import torch
from comfyui_svdquant.cuda import images, int4

SHAPES = [(1, 64), (16, 128), (37, 192), (130, 320)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["INTEGER", "GROUP"])
def test_int8_image_is_undone(shape, order):
    order, codes = getattr(images, order), torch.randint(-128, 128, shape)
    image = images.int8_image(codes, order)
    assert image.shape == (-(-shape[1] // 128), -(-shape[0] // 16) * 16, 128)
    assert torch.equal(images.int8_codes(image, order, shape), codes.to(torch.int8))


@pytest.mark.parametrize("shape", SHAPES)
def test_nibble_image_is_undone(shape):
    codes = torch.randint(0, 16, shape)
    assert torch.equal(images.nibble_codes(images.nibble_image(codes), shape), codes.to(torch.int8))


@pytest.mark.parametrize("shape", [(1, 16), (37, 48), (20, 128)])
def test_branch_image_is_undone(shape):
    low = torch.randn(shape).bfloat16()
    assert torch.equal(images.branch_rows(images.branch_image(low), shape), low)


def fragments(words):
    """(..., words) of 4 packed bytes -> the fragment registers in their turn: low nibbles, high nibbles, word by word."""
    byte = words.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-2)  # (..., word, half, byte)


@pytest.mark.parametrize("order, lane_bytes", [("INTEGER", 16), ("GROUP", 8)])
def test_words_of_a_natural_row_meet_their_columns(order, lane_bytes):
    """What lane q expands from its words is, column by column, what the image holds at lane q's place of the MMA step."""
    codes = torch.randint(0, 16, (1, 128))
    natural = int4.pack(codes).view(torch.uint8)
    placed = codes[0, getattr(images, order)]  # position -> code
    lanes = natural.view(-1, 4, lane_bytes)  # (chunks, lane, bytes)
    for chunk in range(lanes.shape[0]):
        for q in range(4):
            registers = fragments(lanes[chunk, q].view(-1, 4))  # (word = step, half, 4)
            for step in range(registers.shape[0]):
                for half in range(2):
                    start = 8 * lane_bytes * chunk + 32 * step + 16 * half + 4 * q
                    assert torch.equal(registers[step, half].long(), placed[start:start + 4])


def test_nibble_words_of_a_natural_row_meet_their_columns():
    codes = torch.randint(0, 16, (1, 128))
    natural = int4.pack(codes).view(torch.uint8).view(2, 4, 2, 4)  # group, lane, word, byte
    placed = int4.pack(codes[:, images.NIBBLE]).view(torch.uint8).view(2, 2, 4, 4)  # group, half, lane, byte
    assert torch.equal(natural.transpose(1, 2), placed)
