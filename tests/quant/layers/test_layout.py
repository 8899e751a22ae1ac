"""The packed layer's description."""

import pytest
import torch
from comfyui_svdquant.quant.layers import layout


def test_tensor_names_and_shapes_are_comfy_kitchens():
    spec = layout.svdquant_spec(128, 96, 32, 128, True, torch.bfloat16)
    assert spec.format == "svdquant_w4a4"
    assert spec.tensors() == {
        "weight": ((96, 64), torch.int8), "weight_scale": ((2, 96), torch.bfloat16),
        "weight_proj_down": ((128, 32), torch.bfloat16), "weight_proj_up": ((96, 32), torch.bfloat16),
        "weight_smooth_factor": ((128,), torch.bfloat16), "bias": ((96,), torch.bfloat16)}
    assert spec.nbytes() == 96 * 64 + 2 * (2 * 96 + 128 * 32 + 96 * 32 + 128 + 96)


def test_w4a16_has_cores_names():
    spec = layout.LayerSpec(layout.AWQ, 128, 96, bias=False)
    assert spec.tensors() == {"weight": ((96, 64), torch.int8), "weight_scale": ((2, 96), torch.bfloat16),
                              "weight_zeros": ((2, 96), torch.bfloat16)}


@pytest.mark.parametrize(("unsigned_from", "name", "unsigned"),
                         [(256, "svdquant_w4a4", False), (0, "svdquant_w4a4", True), (64, "svdquant_w4a4_split", False)])
def test_only_a_split_layer_has_a_format_that_others_refuse(unsigned_from, name, unsigned):
    conf = layout.svdquant_spec(256, 96, 16, unsigned_from, True, torch.float16).conf()
    assert conf["format"] == name and conf["act_unsigned"] is unsigned
    assert conf.get("act_unsigned_from") == (64 if name.endswith("split") else None)


@pytest.mark.parametrize("unsigned_from", [0, 64, 256])
def test_int8_scales_are_a_format_of_files(unsigned_from):
    spec = layout.svdquant_spec(256, 96, 16, unsigned_from, True, torch.float16)
    stored = spec.stored(int8_scale=True)
    assert stored.pop("weight_scale_2") == ((96,), torch.float16) and stored["weight_scale"] == ((4, 96), torch.int8)
    assert stored | {"weight_scale": ((4, 96), torch.float16)} == spec.tensors() == spec.stored(int8_scale=False)
    conf = spec.conf(int8_scale=True)
    assert conf["format"] == "svdquant_w4a4_int8_scale" and conf["act_unsigned_from"] == unsigned_from
    assert conf | spec.conf() == spec.conf() | {"act_unsigned_from": unsigned_from}


@pytest.mark.parametrize(("k", "unsigned_from"), [(100, 100), (128, 32), (128, 192)])
def test_borders_within_a_group_are_refused(k, unsigned_from):
    with pytest.raises(ValueError, match="multiple of 64"):
        layout.svdquant_spec(k, 96, 16, unsigned_from, True, torch.float16)


def test_conf_round_trip_and_damage():
    conf = layout.svdquant_spec(128, 96, 32, 0, True, torch.bfloat16).conf()
    data = bytes(layout.encode_conf(conf))
    assert layout.decode_conf(data) == conf
    for damaged in (data[:-1], b"\xff\xfe", b"[1]"):
        with pytest.raises(ValueError, match="JSON"):
            layout.decode_conf(damaged)
