"""Files whose group scales are integers times one float per row: exact to the bit, half as large, and refused if invalid."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import convert, inspection, int8_scales, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import reader as nunchaku
from comfyui_svdquant.quant.layers import layout
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ..packed_flux import packed_flux

HALVES = (torch.bfloat16, torch.float16)
QKV, PROJ, LINEAR1, LINEAR2 = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "single_blocks.0.linear1",
                               "single_blocks.0.linear2")


def bits(tensor):
    return tensor.view(torch.int16)


def integer_scales(groups, rows, dtype, seed=0, low=-15, high=16):
    """(G, N) products of integers low..high and one float per row with four significant bits, none of them -0."""
    g = torch.Generator().manual_seed(seed)
    i = torch.randint(low, high + 1, (groups, rows), generator=g)
    c = torch.randint(8, 16, (rows,), generator=g) * 2.0 ** torch.randint(-14, -8, (rows,), generator=g)
    return (i * c + 0.0).to(dtype)


def free(scale):
    """Scales that are not integer multiples of one float per row."""
    return scale + (torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)) * scale.float()).to(scale.dtype)


# --- the integers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("low", "high"), [(-15, 16), (1, 16), (-15, -1), (0, 1), (-1, 0), (7, 7)])
def test_products_are_found_to_the_bit(dtype, low, high):
    scale = integer_scales(17, 600, dtype, low=low, high=high)
    scale[:, 100] = 0
    row_scale = int8_scales.find_row_scale(scale)
    i = int8_scales.integers(scale, row_scale)
    assert row_scale.dtype == dtype and row_scale.shape == (600,) and (row_scale >= 0).all() and row_scale[100] == 0
    assert -15 <= i.amin() and i.amax() <= 16
    assert torch.equal(bits(int8_scales.product(i, row_scale)), bits(scale))


@given(st.sampled_from(HALVES), st.integers(8, 15), st.integers(-10, -3), st.lists(st.integers(-15, 16), min_size=1, max_size=12))
def test_every_row_of_products_is_found(dtype, mantissa, exponent, row):
    scale = (torch.tensor(row) * (mantissa * 2.0**exponent) + 0.0).to(dtype).unsqueeze(1)
    row_scale = int8_scales.find_row_scale(scale)
    i = int8_scales.integers(scale, row_scale)
    assert torch.equal(bits(int8_scales.product(i, row_scale)), bits(scale))


def changed(index, value):
    def change(scale):
        scale[index] = value
    return change


@pytest.mark.parametrize("change", [
    changed((9, 700), float("nan")), changed((9, 700), float("inf")), changed((slice(None), 700), float("inf")),
    changed((9, 700), -0.0),  # -0 is no 0 * c to the bit
    changed((slice(None), 700), torch.arange(1, 18) / 1024),  # 17 of them
    changed((slice(None), 700), torch.arange(-16, 1) / 1024), lambda scale: scale.copy_(free(scale)),
    changed((16, 700), 3.0),  # the new largest scale; the others are no multiples of a 16th of it
])
@pytest.mark.parametrize("dtype", HALVES)
def test_one_row_that_is_no_product_is_detected(dtype, change):
    scale = integer_scales(17, 1000, dtype)
    scale[:, 700] = torch.arange(17) / 1024
    assert int8_scales.find_row_scale(scale) is not None
    change(scale)
    assert int8_scales.find_row_scale(scale) is None


def test_fp16_where_the_float_of_a_row_underflows():
    i = torch.tensor([[16], [5], [1]])
    assert int8_scales.find_row_scale((i * 2.0**-24).half()) is not None  # fp16's smallest number
    assert int8_scales.find_row_scale((i * (9 * 2.0**-26)).half()) is None  # 2.25 times the smallest number, rounded
    assert int8_scales.find_row_scale(torch.tensor([[9 * 4608.0], [4608.0]]).half()) is None  # 16 * c is not finite


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A model with negative integers and a row of zeros; one layer is in fp16, one has free scales."""
    tensors, specs, config = packed_flux(depth_single=2)
    tensors[f"{LINEAR2}.weight_scale"][:, 5] = 0
    tensors[f"{LINEAR2}.weight_scale"][::2, 7] *= -1
    for part in specs[QKV].tensors():
        if part != "weight":
            tensors[f"{QKV}.{part}"] = tensors[f"{QKV}.{part}"].half()
    specs[QKV] = replace(specs[QKV], dtype=torch.float16)
    tensors[f"{PROJ}.weight_scale"] = free(tensors[f"{PROJ}.weight_scale"])
    return tensors, specs, config


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "ours.safetensors"
    native.save(str(path), *model, {"preset": "data-free"}, "flux")
    return path


def version_1(model, path, recipe=None):
    """The file as written before int8 scales existed."""
    tensors, specs, config = model
    infos = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    native.save_stream(str(path), infos, tensors.items(), specs, config, recipe or {"preset": "data-free"}, "flux")
    return path


def same(path, model):
    packed = native.open_file(read_header(str(path)))
    assert packed.specs == model[1]
    read = dict(packed.tensors())
    assert read.keys() == model[0].keys() == packed.shapes.keys() == packed.dtypes.keys()
    for name, tensor in model[0].items():
        for found in (read[name], packed.read(name)):
            assert found.dtype == tensor.dtype == packed.dtypes[name] and packed.shapes[name] == tensor.shape == found.shape, name
            assert torch.equal(found.contiguous().flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8)), name
    return packed


def test_a_model_is_read_back_to_the_bit(path, model):
    packed = same(path, model)
    header = read_header(str(path))
    linears = {name for name, spec in model[1].items() if spec.format != layout.AWQ}
    assert packed.computed == {f"{name}.weight_scale" for name in linears - {PROJ}}
    assert header.metadata["svdquant.version"] == "2"
    for name in linears - {PROJ}:
        n, groups = model[1][name].out_features, model[1][name].in_features // 64
        scale, second = (header.tensors[f"{name}.{part}"] for part in ("weight_scale", "weight_scale_2"))
        assert (scale.shape, scale.dtype) == ((groups, n), torch.int8)
        assert (second.shape, second.dtype) == ((n,), torch.float16 if name == QKV else torch.bfloat16)
    assert header.tensors[f"{PROJ}.weight_scale"].dtype == torch.bfloat16 and f"{PROJ}.weight_scale_2" not in header.tensors
    formats = {name: layout.decode_conf(header.read_bytes(f"{name}.comfy_quant"))["format"] for name in (PROJ, QKV, LINEAR2)}
    assert formats == {PROJ: "svdquant_w4a4", QKV: "svdquant_w4a4_int8_scale", LINEAR2: "svdquant_w4a4_int8_scale"}


def test_the_scales_take_half_the_bytes(path, model, tmp_path):
    old, new = (data_bytes(file) for file in (version_1(model, tmp_path / "old.safetensors"), path))
    spared = sum(spec.out_features * (spec.in_features // 64 - 2) for name, spec in model[1].items()
                 if spec.format != layout.AWQ and name != PROJ)
    assert 0 < spared == old - new


def data_bytes(path):
    return sum(info.stop - info.start for name, info in read_header(str(path)).tensors.items() if not name.endswith(".comfy_quant"))


def test_files_of_version_1(model, path, tmp_path, monkeypatch):
    old = version_1(model, tmp_path / "old.safetensors")
    assert read_header(str(old)).metadata["svdquant.version"] == "1" and not same(old, model).computed
    tensors = {name: free(tensor) if name.endswith("weight_scale") else tensor for name, tensor in model[0].items()}
    native.save(str(tmp_path / "free.safetensors"), tensors, *model[1:], {}, "flux")
    assert read_header(str(tmp_path / "free.safetensors")).metadata["svdquant.version"] == "1"
    monkeypatch.setattr(native, "VERSION", 1)  # an old reader opens version 1, and refuses version 2 by its number
    for name in ("old", "free"):
        native.open_file(read_header(str(tmp_path / f"{name}.safetensors")))
    with pytest.raises(CheckpointError, match="ours.safetensors has SVDQuant format version 2, and this pack reads up to 1; update"):
        native.open_file(read_header(str(path)))


def test_conversions_read_the_scales(path, model, tmp_path):
    """Through Nunchaku's layout and back, and with only comfy-kitchen's names."""
    tensors = {name: tensor.bfloat16() if name.startswith(QKV) and tensor.is_floating_point() else tensor
               for name, tensor in model[0].items()}
    specs = model[1] | {QKV: replace(model[1][QKV], dtype=torch.bfloat16)}
    native.save(str(tmp_path / "ours.safetensors"), tensors, specs, model[2], {}, "flux")
    convert.convert(str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors"), "nunchaku")
    convert.convert(str(tmp_path / "theirs.safetensors"), str(tmp_path / "again.safetensors"), "native")
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "bare.safetensors")
    convert.convert(str(tmp_path / "bare.safetensors"), str(tmp_path / "named.safetensors"), "native")
    theirs = dict(nunchaku.open_file(read_header(str(tmp_path / "theirs.safetensors"))).tensors())
    for read in (theirs, *(dict(native.open_file(read_header(str(tmp_path / f"{name}.safetensors"))).tensors())
                           for name in ("again", "named"))):
        for name in specs:
            if specs[name].format != layout.AWQ:
                assert torch.equal(bits(read[f"{name}.weight_scale"]), bits(tensors[f"{name}.weight_scale"])), name


def test_inspection_lists_them(path, model, tmp_path):
    old = version_1(model, tmp_path / "old.safetensors")
    new, before = (inspection.inspect(read_header(str(file))) for file in (path, old))
    linears = sum(spec.format != layout.AWQ for spec in model[1].values())
    assert (new["int8_scales"], before["int8_scales"]) == (linears - 1, 0) and new["layers"] == before["layers"]
    assert before["bytes_by_kind"]["scales"] - new["bytes_by_kind"]["scales"] == data_bytes(old) - data_bytes(path)
    line = f"scales: 8-bit integers times one number per row, in {linears - 1} layers"
    assert line in inspection.text(new).splitlines() and "8-bit" not in inspection.text(before)


# --- files that are not sound --------------------------------------------------------------------------------------


def rewritten(path, target, change, metadata=None):
    """`path` as `target`, its tensors {name: tensor} changed by `change`."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target,
              metadata=read_header(str(path)).metadata | (metadata or {}))
    return target


def put(name, function):
    return lambda tensors: tensors.__setitem__(name, function(tensors[name]))


def drop(name):
    return lambda tensors: tensors.pop(name)


def describe(name, **changes):
    def change(conf):
        return layout.encode_conf(json.loads(bytes(conf)) | changes)
    return put(f"{name}.comfy_quant", change)


@pytest.mark.parametrize(("change", "says"), [
    (put(f"{LINEAR2}.weight_scale", lambda t: t.bfloat16()), f"{LINEAR2}.weight_scale is torch.bfloat16 instead of torch.int8"),
    (put(f"{LINEAR2}.weight_scale", lambda t: t.t()), f"{LINEAR2}.weight_scale has shape [128, 10] instead of [10, 128]"),
    (put(f"{LINEAR2}.weight_scale_2", lambda t: t[:-1]), f"{LINEAR2}.weight_scale_2 has shape [127] instead of [128]"),
    (put(f"{LINEAR2}.weight_scale_2", lambda t: t[None]), f"{LINEAR2}.weight_scale_2 has shape [1, 128] instead of [128]"),
    (put(f"{LINEAR2}.weight_scale_2", lambda t: t.float()), f"layer {LINEAR2} has scales of type torch.float32"),
    (put(f"{LINEAR2}.weight_scale_2", lambda t: t.half()), "is torch.bfloat16 instead of torch.float16"),
    (drop(f"{LINEAR2}.weight_scale_2"), f"lacks tensor {LINEAR2}.weight_scale_2"),
    (drop(f"{LINEAR2}.weight_scale"), f"lacks tensor {LINEAR2}.weight_scale"),
    (put(f"{PROJ}.weight_scale", lambda t: t.to(torch.int8)), f"layer {PROJ} has scales of type torch.int8"),
    (lambda tensors: tensors.update({f"{PROJ}.weight_scale_2": torch.ones(128).bfloat16()}),
     f"has tensor {PROJ}.weight_scale_2, which a layer of format svdquant_w4a4 has no place for"),
    (describe(QKV, format="svdquant_w4a4"), f"has tensor {QKV}.weight_scale_2, which a layer of format svdquant_w4a4 has no place for"),
    (describe(LINEAR2, act_unsigned_from=True), f"{LINEAR2}.comfy_quant lacks a valid act_unsigned_from"),
    (describe(LINEAR2, act_unsigned_from=96), "not at a multiple of 64"),
    (describe(PROJ, act_unsigned=1), f"{PROJ}.comfy_quant says act_unsigned = 1 instead of true or false"),
    (describe(QKV, act_unsigned="x"), f"{QKV}.comfy_quant says act_unsigned = 'x' instead of true or false"),
    (describe(PROJ, act_unsigned=True), f"layer {PROJ} has its first unsigned column at 0, where a FLUX.1 has it at 128"),
    (describe(QKV, act_unsigned=True, act_unsigned_from=0), f"layer {QKV} has its first unsigned column at 0, where a FLUX.1"),
    (describe(QKV, act_unsigned=True), f"{QKV}.comfy_quant lacks a valid act_unsigned_from, or contradicts it in act_unsigned"),
    (describe(LINEAR2, act_unsigned_from=64), f"layer {LINEAR2} has its first unsigned column at 64, where a FLUX.1 has it at 128"),
    (describe(LINEAR2, act_unsigned_from=640), f"layer {LINEAR2} has its first unsigned column at 640, where a FLUX.1 has it at 128"),
])
def test_tensors_that_do_not_fit(path, tmp_path, change, says):
    bad = rewritten(path, tmp_path / "bad.safetensors", change)
    for open_file in (native.open_file, inspection.inspect):
        with pytest.raises(CheckpointError) as caught:
            open_file(read_header(str(bad)))
        assert says in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_version_1_has_no_int8_scales(path, tmp_path):
    bad = rewritten(path, tmp_path / "bad.safetensors", lambda tensors: None, {"svdquant.version": "1"})
    with pytest.raises(CheckpointError, match="bad.safetensors says .* format version 1, but .*weight_scale needs version 2"):
        native.open_file(read_header(str(bad)))


@pytest.mark.parametrize(("part", "value"), [
    ("weight_scale", -16), ("weight_scale", 17), ("weight_scale", -128), ("weight_scale_2", -1.0), ("weight_scale_2", math.nan),
    ("weight_scale_2", math.inf), ("weight_scale_2", 3e38)])
def test_values_that_are_no_scales(path, tmp_path, part, value):
    name = f"{LINEAR1}.{part}"
    change = put(name, lambda t: t.flatten().index_fill(0, torch.tensor(3), value).view(t.shape))
    bad = rewritten(path, tmp_path / "bad.safetensors", change)
    packed = native.open_file(read_header(str(bad)))
    assert packed.read(f"{LINEAR2}.weight_scale").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=rf"^bad.safetensors: tensor {name} has values [^;]*; download or save it again\.$"):
        packed.read(f"{LINEAR1}.weight_scale")
    with pytest.raises(CheckpointError, match=f"tensor {name} has values"):
        convert.convert(str(bad), str(tmp_path / "out.safetensors"), "nunchaku")
    assert os.listdir(tmp_path) == ["bad.safetensors"]
