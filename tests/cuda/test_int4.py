"""The byte layout of 4-bit codes."""

import pytest
import torch
from comfyui_svdquant.cuda import int4
from hypothesis import given
from hypothesis import strategies as st


def test_the_even_column_is_the_low_nibble():
    assert int4.pack(torch.tensor([[1, 2, -1, -8]])).view(torch.uint8).tolist() == [[0x21, 0x8F]]


def test_every_byte_unpacks_to_the_two_codes_that_pack_to_it():
    byte = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    for unpack, low, high in ((int4.unpack_signed, -8, 7), (int4.unpack_unsigned, 0, 15)):
        codes = unpack(byte.unsqueeze(-1))
        assert codes.min() == low and codes.max() == high
        assert torch.equal(int4.pack(codes).squeeze(-1), byte)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_round_trip_on_any_shape(rows, pairs, seed):
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(int4.unpack_signed(int4.pack(codes)), codes)
    assert torch.equal(int4.unpack_unsigned(int4.pack(codes & 15)), codes & 15)


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="last dimension is 3"):
        int4.pack(torch.zeros(2, 3, dtype=torch.int8))
