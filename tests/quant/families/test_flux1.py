"""FLUX.1's declaration: which linears are packed, and how."""

import pytest
import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.layers import layout


@pytest.mark.parametrize(("name", "form"), [
    ("double_blocks.0.img_attn.qkv", layout.SVDQUANT), ("double_blocks.18.txt_attn.proj", layout.SVDQUANT),
    ("double_blocks.3.txt_mlp.0", layout.SVDQUANT), ("double_blocks.3.img_mlp.2", layout.SVDQUANT),
    ("single_blocks.37.linear1", layout.SVDQUANT), ("single_blocks.0.linear2", layout.SVDQUANT),
    ("double_blocks.0.img_mod.lin", layout.AWQ), ("double_blocks.0.txt_mod.lin", layout.AWQ),
    ("single_blocks.5.modulation.lin", layout.AWQ), ("final_layer.adaLN_modulation.1", layout.AWQ), ("time_in.out_layer", layout.AWQ),
    ("img_in", None), ("final_layer.linear", None), ("txt_in", None), ("time_in.in_layer", None),
    ("double_blocks.0.img_attn.norm.query_norm", None), ("double_blocks.0.img_mlp.1", None),
])
def test_which_layers_are_packed(name, form):
    spec = FAMILY.layer(name) and layout.layer_spec(FAMILY.layer(name), name, (256, 256), 16, True, torch.bfloat16)
    assert (spec and spec.format) == form


@pytest.mark.parametrize(("changes", "name"), [
    ({}, "FLUX.1-dev"), ({"guidance_embed": False}, "FLUX.1-schnell"), ({"in_channels": 96}, "FLUX.1-Fill-dev"),
    ({"in_channels": 32}, "FLUX.1-Canny-dev or FLUX.1-Depth-dev"), ({"in_channels": 20}, "FLUX.1"), ({"depth": 8}, "FLUX.1"),
    ({"hidden_size": 256}, "FLUX.1"),
])
def test_published_models_are_called_by_their_names(changes, name):
    config = {"hidden_size": 3072, "depth": 19, "depth_single_blocks": 38, "in_channels": 16, "guidance_embed": True}
    assert FAMILY.variant(config | changes) == name


def test_where_the_gelu_columns_begin():
    def first(name, shape):
        return layout.layer_spec(FAMILY.layer(name), name, shape, 16, True, torch.bfloat16).unsigned_from

    assert first("double_blocks.0.img_mlp.2", (3072, 12288)) == 0
    assert first("single_blocks.0.linear2", (3072, 15360)) == 3072
    assert first("single_blocks.0.linear1", (21504, 3072)) == 3072
    assert first("double_blocks.0.img_attn.qkv", (9216, 3072)) == 3072


def test_k_that_no_group_divides_names_the_layer():
    with pytest.raises(ValueError, match=r"double_blocks.0.img_attn.qkv has 100 input columns"):
        name = "double_blocks.0.img_attn.qkv"
        layout.layer_spec(FAMILY.layer(name), name, (300, 100), 16, True, torch.bfloat16)
