"""Damaged, hostile and foreign files: one sentence each, before anything is allocated."""

import json
import struct

import pytest
import torch
from comfyui_svdquant.quant.checkpoint.header import DTYPES, PAIRS, CheckpointError, read_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.int8), "none": torch.zeros(0, 3)}, path,
              metadata={"k": "v"})
    return path


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_header(str(path))
    message = str(caught.value)
    assert path.name in message and "\n" not in message and message.endswith(".")
    return message


def test_a_good_file(good):
    header = read_header(str(good))
    assert header.metadata == {"k": "v"} and header.file == "good.safetensors"
    assert {name: (info.shape, info.dtype) for name, info in header.tensors.items()} == {
        "a": ((2, 3), torch.float32), "b": ((4,), torch.int8), "none": ((0, 3), torch.float32)}
    assert header.read_bytes("b") == bytes(4)


def test_truncation_at_every_length(good, tmp_path):
    whole = good.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_a_pickle_is_named_as_one(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(2)}, path)
    assert "pickle" in refusal(path)


@pytest.mark.parametrize(("content", "says"), [
    (b"", "is empty, so its download went wrong"), (b"\0\0", "is not a safetensors file, despite its name"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1234\n", "is a Git LFS pointer, a few lines that stand for"),
    (b"<!DOCTYPE html>\n<html lang=en>", "is a web page"), (b"\xef\xbb\xbf \n<html>\n<body>", "is a web page"),
    (b"GGUF\x03\0\0\0\xff\xff", "is a GGUF file, which SVDQuant does not read"),
])
def test_a_failed_download_is_reported(tmp_path, content, says):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(content)
    assert says in refusal(path) and "download" in refusal(path) and "choose a .safetensors" not in refusal(path)


def test_a_file_of_another_kind_is_not_called_damaged(tmp_path):
    (tmp_path / "flux.gguf").write_bytes(b"GGUF\x03\0\0\0\xff\xff")
    assert refusal(tmp_path / "flux.gguf") == (
        "flux.gguf is a GGUF file, which SVDQuant does not read; download the bf16, fp16 or fp8 version of the model in safetensors "
        "format.")


def test_a_tensor_of_no_elements_is_read(tmp_path):
    tensors = {f"{dtype}".rpartition(".")[2]: torch.zeros(0, 3, dtype=dtype) for dtype in DTYPES.values()}
    save_file(tensors | {"columns": torch.zeros(3, 0), "one": torch.tensor(2.5)}, tmp_path / "x.safetensors")
    header = read_header(str(tmp_path / "x.safetensors"))
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        found = header.read_tensor(name)
        assert found.shape == tensor.shape and found.dtype == tensor.dtype and torch.equal(found.double(), tensor.double())


@pytest.mark.parametrize(("name", "stored"), [("float8_e8m0fnu", "F8_E8M0"), ("float8_e4m3fnuz", "F8_E4M3FNUZ"), ("uint16", "U16"),
                                              ("uint64", "U64"), ("complex64", "C64"), ("float4_e2m1fn_x2", "F4")])
def test_newer_types(tmp_path, name, stored):
    """The types of other programs' scales and codes."""
    dtype = getattr(torch, name, None)
    if dtype is None:
        assert stored not in DTYPES | PAIRS, "this PyTorch has none"
        return
    tensor = torch.arange(4 * 8 * dtype.itemsize, dtype=torch.uint8).view(dtype).view(4, 8)
    save_file({"a": tensor, "b": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert f'"{stored}"'.encode() in (tmp_path / "x.safetensors").read_bytes()
    header = read_header(str(tmp_path / "x.safetensors"))
    found = header.read_tensor("a")
    assert header.tensors["a"].shape == found.shape == (4, 8) and header.tensors["a"].dtype == found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("header", "says"), [
    ({"a": F32 | {"shape": [3]}}, "gives it 8 bytes"),
    ({"a": F32 | {"shape": [-2]}}, "tensor a"),
    ({"a": F32 | {"shape": [True, 2]}}, "tensor a"),
    ({"a": F32 | {"shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, "cut off"),
    ({"a": F32 | {"dtype": "F9"}}, "'F9'"),
    ({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, "stores tensor a as 'F6_E2M3', a type that is not supported"),
    ({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 8]}}, "tensor a"),
    ({"a": {"dtype": "F4", "shape": [2, 7], "data_offsets": [0, 7]}}, "tensor a"),
    ({"a": {"dtype": "F4", "shape": [], "data_offsets": [0, 8]}}, "tensor a"),
    ({"a": F32 | {"dtype": ["F32"]}}, "tensor a"),
    ({"a": F32 | {"data_offsets": [8, 0]}}, "gives it -8 bytes"),
    ({"a": F32 | {"data_offsets": [4, 12]}}, "cut off"),
    ({"a": F32 | {"shape": [1], "data_offsets": [4, 8]}}, "starts at byte"),
    ({"a": F32, "b": F32}, "starts at byte"),
    ({"a": {}}, "tensor a"),
    ({"a": 3}, "tensor a"),
    ([F32], "damaged"),
    ({"__metadata__": {"k": 1}, "a": F32}, "metadata"),
    (b'{"a": 1, "a": 2}', "damaged"),
    (b"[" * 100_000, "damaged"),
    (b"\xff\xfe{}", "damaged"),
])
def test_headers_that_lie(tmp_path, header, says):
    assert says in refusal(write(tmp_path / "bad.safetensors", header, bytes(8)))


def test_bytes_that_belong_to_no_tensor(tmp_path):
    assert "end at byte" in refusal(write(tmp_path / "bad.safetensors", {"a": F32}, bytes(9)))


def test_a_header_of_100_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 10**11) + b"{}")
    assert "not a safetensors file" in refusal(path)


@given(st.data())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_bytes_are_refused_or_read_but_never_crash(good, tmp_path, data):
    """A flipped byte may leave a header that still describes the file; then its contents must fit the file."""
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(str(path))
    except CheckpointError as error:
        assert "mutated.safetensors" in str(error)
    else:
        assert sum(info.stop - info.start for info in header.tensors.values()) <= len(raw)
