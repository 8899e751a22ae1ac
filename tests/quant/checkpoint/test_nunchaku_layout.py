"""Nunchaku's byte order, against tensors that its own packers packed (tests/data/nunchaku), to the bit and both ways."""

import re
import sys
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import int4, reference
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, StoredTensor, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import layout as order
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parents[2] / "data" / "nunchaku"


def vectors(name):
    return load_file(DATA / f"{name}.safetensors")


def parts(tensors, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def test_a_linear_both_ways():
    v = vectors("int4_linear_n256_k256_r32")
    for name, ours, unpack, pack in (
        ("qweight", int4.pack(v["in.weight_q"]), order.unpack_codes, order.pack_codes),
        ("wscales", v["in.wscales"].t().contiguous(), order.unpack_scales, order.pack_scales),
        ("bias", v["in.bias"], order.unpack_vector, order.pack_vector),
        ("smooth", v["in.smooth"], order.unpack_vector, order.pack_vector),
        ("lora_down", v["in.lora_down"].t().contiguous(), order.unpack_down, order.pack_down),
        ("lora_up", v["in.lora_up"], order.unpack_up, order.pack_up),
    ):
        theirs = v[f"out.{name}"]
        assert torch.equal(unpack(theirs), ours), name
        assert torch.equal(pack(ours), theirs), name


def test_all_sixteen_codes_survive():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(128, 8)
    assert torch.equal(int4.unpack_signed(order.unpack_codes(order.pack_codes(int4.pack(codes)))), codes)


def test_a_shifted_layer_by_the_documented_formulas():
    """W = Wq / smooth + up down, and the bias holds the GELU shift correction, in float64 against the source layer."""
    v = vectors("int4_convert_shifted")
    packed, scales = order.unpack_codes(v["out.qweight"]), order.unpack_scales(v["out.wscales"])
    smooth, bias = order.unpack_vector(v["out.smooth"]).double(), order.unpack_vector(v["out.bias"]).double()
    down, up = order.unpack_down(v["out.lora_down"]).double(), order.unpack_up(v["out.lora_up"]).double()
    quantized = reference.dequantize_weight(packed, scales, torch.float64)
    assert torch.equal(smooth, v["in.smooth"].double()) and torch.equal(up, v["in.lora_b"].double())
    # lora_down is lora_a / smooth, rounded to bf16 once.
    assert torch.allclose(down.t() * smooth, v["in.lora_a"].double(), rtol=2**-8)
    # The codes are those of in.weight, the residual in the smoothed domain.
    step = v["in.scale"].double().repeat_interleave(64, dim=1)
    assert ((quantized - v["in.weight"].double()) / step).abs().max() < 0.52
    # in.bias already lacks shift * W of the whole weight; the packer adds the branch's part again, which reads x without the shift.
    expected_bias = v["in.bias"].double() + int4.GELU_SHIFT * (up @ down.sum(dim=0, keepdim=True).t()).squeeze(1)
    assert float(v["in.shift"]) == int4.GELU_SHIFT and (bias - expected_bias).abs().max() < 2**-7


@pytest.mark.parametrize(("name", "chunks"), [("awq_adanorm_zero_oc384_ic256", 6), ("awq_adanorm_single_oc192_ic256", 3)])
def test_a_modulation_layer_both_ways(name, chunks):
    v = vectors(name)
    theirs = parts(v, "out.")
    ours = order.unpack_awq(theirs["qweight"], theirs["wscales"], theirs["wzeros"], theirs["bias"], chunks)
    scale = v["in.scale"].double()  # in the layer's own order, not the file's
    assert torch.equal(ours["weight_scale"].double(), scale.t())
    weight = reference.dequantize_awq(ours["weight"], ours["weight_scale"], ours["weight_zeros"], torch.float64)
    steps = (weight - v["in.weight"].double()) / scale.repeat_interleave(64, dim=1)
    # Half a step of rounding, plus bf16's rounding of 7 s (in the file) and of z + 8 s (here).
    assert steps.abs().max() < 0.5 + 7 * 2**-8 + 2**-8
    diff = ours["bias"].double() - v["in.bias"].double()
    assert diff.abs().max() <= 2**-8 * (v["in.bias"].double().abs().max() + 1)  # 1 was added in bf16, and subtracted again
    again = order.pack_awq(*(ours[part] for part in ("weight", "weight_scale", "weight_zeros", "bias")), chunks)
    assert again.keys() == theirs.keys()
    for part, tensor in again.items():
        assert torch.equal(tensor, theirs[part]), part


def test_rounding_of_the_zeros_is_far_below_a_step():
    """This pack's w = (code - 8) s + z' against Nunchaku's w = code s + z: the error of the 16-bit z' as a fraction of a step."""
    theirs = parts(vectors("awq_adanorm_zero_oc384_ic256"), "out.")
    ours = order.unpack_awq(theirs["qweight"], theirs["wscales"], theirs["wzeros"], theirs["bias"], 6)
    scale, zeros = theirs["wscales"][:4].double(), theirs["wzeros"][:4].double()
    exact = order._deinterleave((zeros + 8 * scale).t(), 6).t()
    error = ((ours["weight_zeros"].double() - exact) / ours["weight_scale"].double()).abs().max()
    assert error < 1 / 500, f"{error:.4f} of a step"


# --- blocks --------------------------------------------------------------------------------------------------------


def random_array(kind, size):
    """(a large array of a file, the function that unpacks it); size multiplies its rows."""
    g = torch.Generator().manual_seed(3)
    if kind == "codes":
        return torch.randint(-128, 128, (128 * size, 3200), dtype=torch.int8, generator=g), order.unpack_codes
    if kind == "scales":
        stored = torch.randint(0, 127, (400, 128 * size), dtype=torch.uint8, generator=g)
        return stored.view(torch.float8_e4m3fn), lambda array: order.unpack_nvfp4_scales(array).view(torch.uint8)
    n = 6 * 68 * size  # 408 is 34 blocks of 12 rows
    scales, bias = torch.ones(2, 16, n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
    words = torch.randint(-(2**31), 2**31, (n // 4, 512), generator=g).int()
    return words, lambda array: order.unpack_awq(array, *scales[..., : array.shape[0] * 4], bias[: array.shape[0] * 4], 6)["weight"]


KINDS = ("codes", "scales", "modulation")


def stored(path, array):
    """The array as a StoredTensor."""
    save_file({"before": torch.zeros(3), "x": array, "y": torch.zeros(3)}, path)
    return StoredTensor(read_header(str(path)), "x")


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_several_blocks_from_memory_and_from_a_file(tmp_path, monkeypatch, kind):
    array, unpack = random_array(kind, 3)
    expected = unpack(array)
    assert torch.equal(unpack(stored(tmp_path / "x.safetensors", array)), expected)
    monkeypatch.setattr(order, "BLOCK", 1)
    assert torch.equal(unpack(stored(tmp_path / "x.safetensors", array)), expected)


def test_large_arrays_by_the_table_of_the_description():
    """The positions of 100 groups and of three tiles, by separate index arithmetic."""
    codes, _ = random_array("codes", 3)
    n, k = torch.arange(384).unsqueeze(1), torch.arange(0, 6400, 8).unsqueeze(0)
    word = ((n // 128 * 100 + k // 64) * 8 + n % 128 // 16) * 8 + n % 8
    word = (word * 4 + k % 32 // 8) * 4 + n % 16 // 8 * 2 + k % 64 // 32
    assert torch.equal(order.unpack_codes(codes).view(torch.int32), codes.view(torch.int32).flatten()[word])
    scales, unpack = random_array("scales", 3)
    n, group = torch.arange(384).unsqueeze(0), torch.arange(400).unsqueeze(1)
    byte = ((n // 128 * 100 + group // 4) * 8 + n % 8) * 4 + n % 32 // 8
    byte = byte * 16 + n % 128 // 32 * 4 + group % 4
    assert torch.equal(unpack(scales), scales.view(torch.uint8).flatten()[byte])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_while_it_is_read(tmp_path, kind):
    array, unpack = random_array(kind, 3)
    found = stored(tmp_path / "x.safetensors", array)
    with open(found.header.path, "rb+") as file:
        file.truncate(found.header.tensors["x"].stop - 4)
    with pytest.raises(CheckpointError, match="x.safetensors was changed, cut off or removed while it was read; wait until it is"):
        unpack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_is_vectorized(kind):
    """Counts Python calls: there are some per block, and none per row or word."""
    array, unpack = random_array(kind, 24)
    calls = 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        unpack(array)
    finally:
        sys.setprofile(None)
    assert 0 < calls < 100 + 50 * array.nbytes / 2**17, calls


@pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's count of a process's memory")
@pytest.mark.parametrize(("kind", "size"), [("codes", 100), ("scales", 800), ("modulation", 200)])
def test_no_memory_but_the_results_is_needed(tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr(order, "BLOCK", 1 << 17)  # several blocks are in memory at a time
    array, unpack = random_array(kind, size)  # too large for memory that was freed before
    found, nbytes = stored(tmp_path / "x.safetensors", array), array.nbytes
    unpack(random_array(kind, 3)[0])  # makes the tables, which are cached
    del array

    def memory(key):
        return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = memory("VmRSS")
    result = unpack(found)
    assert nbytes > 32 << 20 and result.nbytes == nbytes and memory("VmHWM") - before < nbytes + (6 << 20)
