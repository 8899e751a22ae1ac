"""Nunchaku's NVFP4 files: read as documented in all their forms, stored unchanged in this pack's layout, and refused if damaged."""

import json
import os
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.cuda import int4, nvfp4
from comfyui_svdquant.quant.checkpoint import convert, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import layout as order
from comfyui_svdquant.quant.checkpoint.nunchaku import reader as nunchaku
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import load_file, save_file

from ..nunchaku_nvfp4 import RANK, write_nvfp4
from ..nunchaku_places import e4m3_places
from .test_nunchaku import drop, put, rename_v2, rewritten, with_header

VECTORS = Path(__file__).resolve().parents[2] / "data" / "nunchaku" / "nvfp4_linear_n256_k256_r32.safetensors"
BLOCK = "single_transformer_blocks.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(the file, its 16-bit source model)."""
    path = tmp_path_factory.mktemp("nunchaku") / "svdq-fp4_r16-flux.safetensors"
    return path, write_nvfp4(path)


def opened(path):
    return nunchaku.open_file(read_header(str(path)))


def read(path):
    return dict(opened(path).tensors())


def dense(tensors, name):
    """(N, K) float64: the dequantized weight of a layer of this pack."""
    p = {part: tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2", "weight_smooth_factor",
                                                      "weight_proj_up", "weight_proj_down")}
    quantized = nvfp4.dequantize_weight(p["weight"], p["weight_scale"], p["weight_scale_2"], torch.float64)
    return quantized / p["weight_smooth_factor"].double() + p["weight_proj_up"].double() @ p["weight_proj_down"].double().t()


def test_nunchakus_packed_tensors_are_unpacked_to_the_bit():
    v = load_file(VECTORS)
    assert torch.equal(order.unpack_codes(v["out.qweight"]), int4.pack(v["in.weight_code"]))
    scales = order.unpack_nvfp4_scales(v["out.wscales"])
    assert scales.dtype == torch.float8_e4m3fn
    assert torch.equal(scales.float(), v["in.wscales"].t().to(torch.float8_e4m3fn).float())
    assert torch.equal(v["out.wscales"].flatten().float()[e4m3_places(256, 256)], scales.t().float())
    for name in ("bias", "smooth", "wcscales", "lora_up"):
        unpack = order.unpack_up if name == "lora_up" else order.unpack_vector
        assert torch.equal(unpack(v[f"out.{name}"]), v[f"in.{name}"]), name
    assert torch.equal(order.unpack_down(v["out.lora_down"]), v["in.lora_down"].t())


def test_scales_of_several_tiles():
    scales = torch.arange(256 * 320 // 16).to(torch.uint8).view(256, 20)
    stored = torch.empty(scales.numel(), dtype=torch.uint8)
    stored[e4m3_places(256, 320)] = scales
    stored = stored.view(torch.float8_e4m3fn).view(20, 256)
    assert torch.equal(order.unpack_nvfp4_scales(stored).view(torch.uint8), scales.t())


def test_every_layer_is_the_one_that_was_quantized(model):
    path, plain = model
    file, tensors = opened(path), read(path)
    names = [name for name, spec in file.specs.items() if spec.format == layout.NVFP4]
    assert len(names) == 10 and {file.specs[name].format for name in set(file.specs) - set(names)} == {layout.AWQ}
    assert file.recipe == {"preset": "Nunchaku NVFP4", "rank": RANK} and file.source == path.name
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == file.shapes
    assert {name: tensor.dtype for name, tensor in tensors.items()} == file.dtypes
    assert file.specs["single_blocks.0.linear2"].scale_blocks == 5 and file.specs["single_blocks.0.linear1"].scale_blocks == 1
    for name in names:
        weight, spec = plain[f"{name}.weight"].double(), file.specs[name]
        error = float((dense(tensors, name) - weight).norm() / weight.norm())
        # e2m1's error on a normal distribution in groups of 16; another matrix's second scale would give an error of 1.
        assert error < 0.12, f"{name}: {error:.3f}"
        assert spec.unsigned_from == spec.in_features
        # The bias of a layer that reads a GELU has no shift correction.
        assert torch.equal(tensors[f"{name}.bias"], plain[f"{name}.bias"]), name


def test_the_second_scales_of_each_matrix(model):
    path, _ = model
    theirs, ours = load_file(path), read(path)
    first, second = (theirs[f"{BLOCK}.{part}.wtscale"].float() for part in ("out_proj", "mlp_fc2"))
    assert first != second
    assert torch.equal(ours["single_blocks.0.linear2.weight_scale_2"], torch.stack([first, *[second] * 4]).expand(5, 128))
    rows = ours["single_blocks.0.linear1.weight_scale_2"]
    assert rows.shape == (1, 7 * 128) and rows.dtype == torch.float32
    assert len(rows[0, :384].unique()) == 3 and (rows[0, 384:] == theirs[f"{BLOCK}.mlp_fc1.wtscale"]).all()


@pytest.mark.parametrize("change", [lambda tensors: None, rename_v2])
def test_without_metadata_the_float8_tensors_identify_the_format(model, tmp_path, change):
    path = rewritten(model[0], tmp_path / "model.safetensors", change, metadata={})
    before, after = read(model[0]), read(path)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_of_two_files(model, tmp_path):
    tensors = load_file(model[0])
    blocks = {name: tensor for name, tensor in tensors.items() if "transformer_blocks." in name}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in blocks}, tmp_path / "unquantized_layers.safetensors")
    before, after = read(model[0]), read(tmp_path / "unquantized_layers.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", [lambda t: t.float(), lambda t: t.float()[0], lambda t: t.half() * 0 + 2**-14])
def test_other_types_of_the_second_scale(model, tmp_path, form):
    name = "transformer_blocks.0.out_proj"
    path = rewritten(model[0], tmp_path / "model.safetensors", put(f"{name}.wtscale", form))
    stored = load_file(path)[f"{name}.wtscale"].float()
    assert (read(path)["double_blocks.0.img_attn.proj.weight_scale_2"] == stored).all()


def test_very_old_files_without_second_scales_and_branches(model, tmp_path):
    def strip(tensors):
        for name in [name for name in tensors if "lora_" in name or name.endswith(("wtscale", "wcscales"))]:
            del tensors[name]

    file = opened(rewritten(model[0], tmp_path / "old.safetensors", strip))
    tensors = dict(file.tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == file.shapes
    assert all((tensor == 1).all() for name, tensor in tensors.items() if name.endswith("weight_scale_2"))
    assert {spec.rank for spec in file.specs.values()} == {0}


@pytest.mark.parametrize("kind", ["wtscale", "wcscales", "lora_"])
def test_one_layer_without_its_second_scale_or_branch_has_lost_it(model, tmp_path, kind):
    """Missing ones, read as 1 and as no branch, would silently give a picture with an error of up to 96 %."""
    def strip(tensors):
        layer = next(name for name in tensors if kind in name.rpartition(".")[2]).rpartition(".")[0]
        for name in [name for name in tensors if name.startswith(f"{layer}.{kind}")]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"^bad.safetensors has \S+ or \S+ in layer \S+ and not in \S+; the file is incomplete, "):
        opened(rewritten(model[0], tmp_path / "bad.safetensors", strip))


def test_converted_to_our_layout_and_read_back_it_is_the_same_to_the_bit(model, tmp_path):
    target = tmp_path / "native.safetensors"
    convert.convert(str(model[0]), str(target), "native")
    first, second = opened(model[0]), native.open_file(read_header(str(target)))
    assert first.specs == second.specs and first.recipe == second.recipe
    before, after = dict(first.tensors()), dict(second.tensors())
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
               for name in before)
    conf = layout.decode_conf(second.header.read_bytes("single_blocks.0.linear2.comfy_quant"))
    assert (conf["format"], conf["group_size"], conf["rank"]) == ("svdquant_nvfp4", 16, 2 * RANK)
    packed = sum(t.nbytes for name, t in after.items() if name.startswith("single_blocks.0.linear1.weight") and "proj" not in name)
    assert packed < 0.6 * 7 * 128 * 128  # bytes per weight: it stays packed


def test_nunchakus_int4_layout_is_refused(model, tmp_path):
    convert.convert(str(model[0]), str(tmp_path / "native.safetensors"), "native")
    for source, says in ((model[0], "is in the nunchaku layout already"),
                         (tmp_path / "native.safetensors", "is NVFP4, and Nunchaku's layout is written for INT4 models only")):
        with pytest.raises(CheckpointError, match=says) as caught:
            convert.convert(str(source), str(tmp_path / "out.safetensors"), "nunchaku")
        assert str(caught.value).endswith(".")
    assert os.listdir(tmp_path) == ["native.safetensors"]


@pytest.mark.parametrize(("change", "says"), [
    (drop(f"{BLOCK}.mlp_fc2.wscales"), f"lacks tensor {BLOCK}.mlp_fc2.wscales"),
    (put(f"{BLOCK}.mlp_fc2.wscales", lambda t: t.bfloat16()), "torch.bfloat16 instead of torch.float8_e4m3fn"),
    (put(f"{BLOCK}.mlp_fc2.wscales", lambda t: t[::4].contiguous()), "has shape [8, 128] instead of [32, 128]"),
    (put(f"{BLOCK}.mlp_fc2.wtscale", lambda t: t.repeat(2)), "has shape [2] instead of [1]"),
    (put(f"{BLOCK}.mlp_fc2.wtscale", lambda t: t.to(torch.int8)), "torch.int8 instead of torch.bfloat16"),
    (put(f"{BLOCK}.qkv_proj.wcscales", lambda t: t[:128]), "has shape [128] instead of [384]"),
    (put(f"{BLOCK}.qkv_proj.wcscales", lambda t: t.float()), "torch.float32 instead of torch.bfloat16"),
    (put(f"{BLOCK}.qkv_proj.qweight", lambda t: t.view(torch.float8_e4m3fn)), "torch.float8_e4m3fn instead of torch.int8"),
    (put(f"{BLOCK}.norm.linear.wscales", lambda t: t.to(torch.float8_e4m3fn)), "instead of torch.bfloat16"),
    (put(f"{BLOCK}.norm.linear.wtscale", lambda t: torch.ones(1)), f"has tensor {BLOCK}.norm.linear.wtscale"),
    (put(f"{BLOCK}.mlp_fc1.smooth", lambda t: t + 1), "different smoothing factors"),
])
def test_damaged_files(model, tmp_path, change, says):
    with pytest.raises(CheckpointError) as caught:
        opened(rewritten(model[0], tmp_path / "bad.safetensors", change))
    message = str(caught.value)
    assert "bad.safetensors" in message and "\n" not in message and message.endswith(".") and says in message


def test_metadata_that_do_not_fit_the_tensors(model, tmp_path):
    metadata = read_header(str(model[0])).metadata
    stated = json.dumps({"weight": {"dtype": "int4"}})
    with pytest.raises(CheckpointError, match=r"wscales has shape \[8, 384\] instead of \[2, 384\]"):
        opened(rewritten(model[0], tmp_path / "bad.safetensors", metadata=metadata | {"quantization_config": stated}))


NAME = "single_blocks.0.linear2"


@pytest.mark.parametrize(("change", "says"), [
    (drop(f"{NAME}.weight_scale_2"), f"lacks tensor {NAME}.weight_scale_2"),
    (put(f"{NAME}.weight_scale_2", lambda t: t[:3]), "has 3 rows of second scales"),
    (put(f"{NAME}.weight_scale_2", lambda t: t[0].clone()), "second scales"),
    (put(f"{NAME}.weight_scale_2", lambda t: t.bfloat16()), "torch.bfloat16 instead of torch.float32"),
    (put(f"{NAME}.weight_scale", lambda t: t.view(torch.int8)), "torch.int8 instead of torch.float8_e4m3fn"),
    (put(f"{NAME}.weight_scale", lambda t: t[:10]), "has shape [10, 128] instead of [40, 128]"),
    (put(f"{NAME}.comfy_quant", lambda t: layout.encode_conf({"format": "svdquant_nvfp4", "group_size": 64})), "group size 64"),
    (put(f"{NAME}.comfy_quant", lambda t: layout.encode_conf({"format": ["svdquant_nvfp4"]})), "format ['svdquant_nvfp4']"),
])
def test_damaged_files_of_ours(model, tmp_path, change, says):
    convert.convert(str(model[0]), str(tmp_path / "native.safetensors"), "native")
    with pytest.raises(CheckpointError) as caught:
        native.open_file(read_header(str(rewritten(tmp_path / "native.safetensors", tmp_path / "bad.safetensors", change))))
    message = str(caught.value)
    assert "bad.safetensors" in message and "\n" not in message and message.endswith(".") and says in message


# --- full size -----------------------------------------------------------------------------------------------------


def published(nvfp4, rank=32, h=3072):
    """{name: [dtype, shape]} of a published FLUX.1-dev; sections 1.1 and 1.3 of the format's description."""
    entries = {}

    def put_all(prefix, **leaves):
        entries.update({f"{prefix}.{leaf}": entry for leaf, entry in leaves.items()})

    def w4a4(prefix, n, k):
        scales = ["F8_E4M3", [k // 16, n]] if nvfp4 else ["BF16", [k // 64, n]]
        fused = {"wcscales": ["BF16", [n]]} if "qkv_proj" in prefix else {"wtscale": ["BF16", [1]]}
        put_all(prefix, qweight=["I8", [n, k // 2]], wscales=scales, bias=["BF16", [n]], smooth=["BF16", [k]],
                smooth_orig=["BF16", [k]], lora_down=["BF16", [k, rank]], lora_up=["BF16", [n, rank]], **(fused if nvfp4 else {}))

    def awq(prefix, n, k):
        put_all(prefix, qweight=["I32", [n // 4, k // 2]], wscales=["BF16", [k // 64, n]], wzeros=["BF16", [k // 64, n]],
                bias=["BF16", [n]])

    for i in range(19):
        block = f"transformer_blocks.{i}"
        for stream, mlp in (("", ""), ("_context", "_context")):
            awq(f"{block}.norm1{stream}.linear", 6 * h, h)
            w4a4(f"{block}.qkv_proj{stream}", 3 * h, h)
            w4a4(f"{block}.out_proj{stream}", h, h)
            w4a4(f"{block}.mlp{mlp}_fc1", 4 * h, h)
            w4a4(f"{block}.mlp{mlp}_fc2", h, 4 * h)
        entries |= {f"{block}.{norm}.weight": ["BF16", [128]] for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    for i in range(38):
        block = f"single_transformer_blocks.{i}"
        awq(f"{block}.norm.linear", 3 * h, h)
        for name, n, k in (("qkv_proj", 3 * h, h), ("mlp_fc1", 4 * h, h), ("out_proj", h, h), ("mlp_fc2", h, 4 * h)):
            w4a4(f"{block}.{name}", n, k)
        entries |= {f"{block}.{norm}.weight": ["BF16", [128]] for norm in ("norm_q", "norm_k")}
    outside = {"x_embedder": (h, 64), "context_embedder": (h, 4096), "norm_out.linear": (2 * h, h), "proj_out": (64, h)}
    for embedder, width in (("timestep", 256), ("guidance", 256), ("text", 768)):
        outside |= {f"time_text_embed.{embedder}_embedder.linear_1": (h, width), f"time_text_embed.{embedder}_embedder.linear_2": (h, h)}
    for name, shape in outside.items():
        put_all(name, weight=["BF16", list(shape)], bias=["BF16", [shape[0]]])
    return entries


@pytest.mark.parametrize(("nvfp4", "count", "nbytes"), [(False, 2604, 6_767_999_104), (True, 2908, 7_038_360_136)])
def test_the_header_of_a_published_flux(tmp_path, nvfp4, count, nbytes):
    """The file's data is a hole: only the header and the few compared bytes are read."""
    entries = published(nvfp4)
    path = with_header(tmp_path / "svdq.safetensors", entries, {"model_class": "NunchakuFluxTransformer2dModel"})
    header = read_header(str(path))
    assert len(entries) == count and sum(info.stop - info.start for info in header.tensors.values()) == nbytes
    file = nunchaku.open_file(header)
    assert len(file.specs) == 19 * 10 + 38 * 3 and {spec.format for spec in file.specs.values()} == (
        {layout.NVFP4, layout.AWQ} if nvfp4 else {layout.SVDQUANT, layout.SVDQUANT_SPLIT, layout.AWQ})
    assert FAMILY.configuration.of(file.shapes) == {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24,
        "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096, "vec_in_dim": 768, "mlp_ratio": 4.0, "qkv_bias": True,
        "guidance_embed": True, "axes_dim": [16, 56, 56], "theta": 10000}
