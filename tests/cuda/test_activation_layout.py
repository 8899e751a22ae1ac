"""The activation layout: reading inverts laying out, and a lane's words hold the columns that the lane multiplies.
"""

import pytest
import torch
from comfyui_svdquant.cuda import int4
from comfyui_svdquant.cuda.activation_layout import ORDER, CodeStorage, lay_out_codes, lay_out_lora_act, read_codes, read_lora_act

SHAPES = [(1, 64), (16, 128), (37, 192), (130, 320)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", CodeStorage)
def test_codes_are_read_back(shape, storage):
    nibbles = storage == CodeStorage.INT4_NIBBLES
    codes = torch.randint(*((0, 16) if nibbles else (-128, 128)), shape)
    data = lay_out_codes(codes, storage)
    assert data.shape == (-(-shape[1] // 128), -(-shape[0] // 16) * 16, 64 if nibbles else 128)
    assert data.dtype == (torch.uint8 if nibbles else torch.int8)
    assert torch.equal(read_codes(data, storage, shape), codes.to(torch.int8))


@pytest.mark.parametrize("shape", [(1, 16), (37, 48), (20, 128)])
def test_the_lora_branchs_activation_is_read_back(shape):
    lora_act = torch.randn(shape).bfloat16()
    assert torch.equal(read_lora_act(lay_out_lora_act(lora_act), shape), lora_act)


def fragments(words):
    """(..., words) of 4 packed bytes -> the fragment registers in order: low nibbles and high nibbles of each word."""
    byte = words.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-2)  # (..., word, half, byte)


@pytest.mark.parametrize("storage, lane_bytes", [(CodeStorage.INT8, 16), (CodeStorage.INT4_BYTES, 8)])
def test_words_of_a_natural_row_meet_their_columns(storage, lane_bytes):
    """The codes that lane q expands from its words have the columns at lane q's positions of the MMA step in the layout."""
    codes = torch.randint(0, 16, (1, 128))
    natural = int4.pack(codes).view(torch.uint8)
    placed = codes[0, ORDER[storage]]  # position -> code
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
    placed = int4.pack(codes[:, ORDER[CodeStorage.INT4_NIBBLES]]).view(torch.uint8).view(2, 2, 4, 4)  # group, half, lane, byte
    assert torch.equal(natural.transpose(1, 2), placed)
