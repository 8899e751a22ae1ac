"""Files under comfy-kitchen's names: descriptions in the metadata, tensors packed for its tiles."""

import json

import pytest
import torch
from comfy_kitchen.backends.eager import svdquant as theirs
from comfyui_svdquant.quant.checkpoint import comfy_kitchen, convert, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import reader as nunchaku
from comfyui_svdquant.quant.families import qwen_image
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import load_file, save_file

from ..packed_flux import packed_flux, packed_tensors
from ..random_models import random_tensors
from ..random_qwen_image import qwen_image_shapes

QKV, LINEAR2 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def model():
    return packed_flux()


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("kitchen") / "ours.safetensors"
    native.save(str(path), *model, {"preset": "data-free"}, "flux")
    return path


def opened(path):
    header = read_header(str(path))
    assert comfy_kitchen.matches(header)
    return comfy_kitchen.open_file(header)


def write(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def same(file, model):
    tensors, specs, _ = model
    read = dict(file.tensors())
    assert file.specs == specs and read.keys() == tensors.keys() == file.shapes.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype == file.dtypes[name] and torch.equal(read[name], tensor), name
        assert torch.equal(file.read(name), tensor)


def take_descriptions(tensors, prefix=""):
    """Remove every X.comfy_quant and return them in the form of the metadata."""
    keys = [name for name in tensors if name.endswith(".comfy_quant")]
    layers = {prefix + key.removesuffix(".comfy_quant"): layout.decode_conf(bytes(tensors.pop(key))) for key in keys}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


# --- descriptions in the metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "listed"), [("", ""), (PREFIX, PREFIX), (PREFIX, "")])
def test_descriptions_in_the_metadata(ours, model, tmp_path, prefix, listed):
    tensors = load_file(ours)
    metadata = take_descriptions(tensors, listed)
    file = opened(write(tmp_path / "listed.safetensors", {prefix + name: t for name, t in tensors.items()}, metadata))
    same(file, model)
    assert file.prefix == prefix and file.source == "listed.safetensors"


def test_descriptions_in_both_places(ours, model, tmp_path):
    tensors = load_file(ours)
    metadata = take_descriptions(dict(tensors))
    same(opened(write(tmp_path / "both.safetensors", tensors, metadata)), model)
    tensors[f"{QKV}.comfy_quant"] = layout.encode_conf({"format": "svdquant_w4a4", "act_unsigned": True})
    with pytest.raises(CheckpointError, match=f"both.safetensors has two different descriptions of layer {QKV}, in"):
        opened(write(tmp_path / "both.safetensors", tensors, metadata))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("name", "changes", "says"), [
    (QKV, {"act_unsigned": True}, f"layer {QKV} has its first unsigned column at 0, where a FLUX.1 has it at 128"),
    (QKV, {"act_unsigned": 1}, "says act_unsigned = 1 instead of true or false"),
    ("single_blocks.0.linear1", {"format": "svdquant_w4a4_split", "act_unsigned_from": 64}, "has its first unsigned column at 64"),
    (LINEAR2, {"act_unsigned_from": 0, "act_unsigned": True}, "has its first unsigned column at 0"),
    (LINEAR2, {"act_unsigned_from": 256}, "has its first unsigned column at 256, where a FLUX.1 has it at 128"),
])
def test_inputs_that_are_coded_otherwise_than_the_familys(model, tmp_path, listed, name, changes, says):
    """Codes for signed inputs, multiplied with unsigned ones, would silently give a picture with an error of 20 %."""
    tensors, specs, _ = model
    tensors = dict(tensors)
    described = {layer: spec.conf() for layer, spec in specs.items()}
    described[name] |= changes
    metadata = {"_quantization_metadata": json.dumps({"layers": described})} if listed else None
    if not listed:
        tensors |= {f"{layer}.comfy_quant": layout.encode_conf(conf) for layer, conf in described.items()}
    with pytest.raises(CheckpointError) as caught:
        opened(write(tmp_path / "kitchen.safetensors", tensors, metadata))
    assert says in str(caught.value)


def test_layers_of_a_text_encoder_in_the_same_file(ours, model, tmp_path):
    tensors = load_file(ours)
    metadata = json.loads(take_descriptions(tensors, PREFIX)["_quantization_metadata"])
    metadata["layers"]["text_encoders.t5.q"] = {"format": "float8_e4m3fn"}
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items()} | {"text_encoders.t5.q.weight": torch.zeros(2, 2)}
    same(opened(write(tmp_path / "whole.safetensors", tensors, {"_quantization_metadata": json.dumps(metadata)})), model)


@pytest.mark.parametrize("damaged", ["", "3", "[]", "{}", '{"layers": 3}', '{"layers": {"a": 3}}', "[" * 100_000])
def test_damaged_metadata(ours, tmp_path, damaged):
    path = write(tmp_path / "damaged.safetensors", load_file(ours), {"_quantization_metadata": damaged})
    with pytest.raises(CheckpointError, match="damaged.safetensors has no valid _quantization_metadata"):
        comfy_kitchen.matches(read_header(str(path)))


def test_other_formats_beside_ours_are_named(ours, tmp_path):
    tensors = load_file(ours)
    metadata = json.loads(take_descriptions(tensors)["_quantization_metadata"])
    metadata["layers"][QKV]["format"] = "float8_e4m3fn"
    path = write(tmp_path / "mixed.safetensors", tensors, {"_quantization_metadata": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=f"mixed.safetensors: layer {QKV} has format 'float8_e4m3fn'"):
        opened(path)


# --- tiles ---------------------------------------------------------------------------------------------------------


def tile(tensors, layer, parts=("weight", "weight_scale", "weight_proj_up")):
    """Pack a layer's tensors by index, after the tables in comfy_kitchen.py."""
    (n, half), rank = tensors[f"{layer}.weight"].shape, tensors[f"{layer}.weight_proj_up"].shape[1]
    rows = torch.arange(n).view(n // 128, 32, 4)  # tile, line, row within the line
    if "weight" in parts:
        groups = tensors[f"{layer}.weight"].view(n, half // 32, 32)
        tensors[f"{layer}.weight"] = torch.stack([
            torch.stack([torch.cat([groups[rows[t, :, r], g] for r in range(4)], 1) for g in range(half // 32)])
            for t in range(n // 128)])
    if "weight_scale" in parts:
        tensors[f"{layer}.weight_scale"] = torch.stack(tensors[f"{layer}.weight_scale"].split(128, 1))
    if "weight_proj_up" in parts:
        tensors[f"{layer}.weight_proj_up"] = tensors[f"{layer}.weight_proj_up"].view(n // 128, 128, rank).transpose(1, 2)


@pytest.mark.parametrize("parts", [("weight", "weight_scale", "weight_proj_up"), ("weight",), ("weight_scale",), ("weight_proj_up",)])
def test_tensors_packed_in_tiles(ours, model, tmp_path, parts):
    tensors = load_file(ours)
    tile(tensors, QKV, parts)
    tile(tensors, "single_blocks.0.linear1", parts)
    file = opened(write(tmp_path / "tiles.safetensors", tensors))
    same(file, model)
    assert file.prefix is None  # its tensors can't be mapped directly


def test_tiles_are_comfy_kitchens():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (2, 3, 32, 128), generator=g, dtype=torch.int8)
    scales, up = torch.randn(2, 3, 128, generator=g), torch.randn(2, 16, 128, generator=g)
    assert torch.equal(comfy_kitchen.untile_codes(codes), theirs._tile_packed_weight_to_row_major(codes))
    assert torch.equal(comfy_kitchen.untile_scales(scales), theirs._tile_packed_scales_to_natural(scales))
    assert torch.equal(comfy_kitchen.untile_up(up), theirs._tile_packed_lora_up_to_natural(up))


def test_both_forms_at_once_convert_to_both_layouts(ours, model, tmp_path):
    tensors = load_file(ours)
    metadata = take_descriptions(tensors)
    for layer, spec in model[1].items():
        if spec.format == layout.SVDQUANT:
            tile(tensors, layer)
    source = str(write(tmp_path / "tiles.safetensors", tensors, metadata))
    for to, reader in (("native", native), ("nunchaku", nunchaku)):
        convert.convert(source, str(tmp_path / f"{to}.safetensors"), to)
        read = dict(reader.open_file(read_header(str(tmp_path / f"{to}.safetensors"))).tensors())
        unequal = {name for name in model[0] if not torch.equal(read[name], model[0][name])}
        # Nunchaku's modulation layers hold their bias plus one, and differently defined zeros, in 16 bits.
        assert all("mod" in name for name in unequal) if to == "nunchaku" else not unequal


@pytest.mark.parametrize(("shape", "says"), [((10, 4, 32, 32), "instead of (N, K/2)"), ((40960,), "instead of (N, K/2)"),
                                             ((10, 32, 128), "instead of (N, K/2)"), ((5, 2, 32, 128), "instead of [2, 640]"),
                                             ((640, 64), "instead of [2, 640]")])
def test_other_shapes_of_codes_are_refused(ours, tmp_path, shape, says):
    tensors = load_file(ours)
    tensors[f"{LINEAR2}.weight"] = tensors[f"{LINEAR2}.weight"].reshape(shape)
    with pytest.raises(CheckpointError) as caught:
        opened(write(tmp_path / "bad.safetensors", tensors))
    assert says in str(caught.value) and "bad.safetensors" in str(caught.value) and LINEAR2 in str(caught.value)


# --- comfy-quants' names -------------------------------------------------------------------------------------------


def by_comfy_quants(model, tensors, layer, basis):
    """A layer as in comfy-quants' documentation of the format."""
    conf = {"format": "svdquant_w4a4", "act_unsigned": model[1][layer].unsigned_from == 0, "layout": "kitchen_tile_packed_w4a4"}
    tensors[f"{layer}.weight_scale"] = model[0][f"{layer}.weight_scale"]  # replaces the integers of this pack's format
    tensors.pop(f"{layer}.weight_scale_2", None)
    smooth, down = (tensors.pop(f"{layer}.weight_{part}") for part in ("smooth_factor", "proj_down"))
    if basis != "raw":
        down = (down.float() * smooth.float()[:, None]).to(down.dtype)
    conf |= {"lowrank_branch_input_basis": basis, "proj_down_smooth_folded": basis == "raw"}
    tile(tensors, layer)
    tensors |= {f"{layer}.smooth_factor": smooth, f"{layer}.proj_down": down, f"{layer}.proj_up": tensors.pop(f"{layer}.weight_proj_up"),
                f"{layer}.comfy_quant": layout.encode_conf(conf)}


def test_comfy_quants_names(ours, model, tmp_path):
    tensors = load_file(ours)
    for layer in (QKV, "double_blocks.0.img_mlp.2"):
        by_comfy_quants(model, tensors, layer, "raw")
    modulation = "double_blocks.0.img_mod.lin"
    tensors[f"{modulation}.weight_zero"] = tensors.pop(f"{modulation}.weight_zeros")
    file = opened(write(tmp_path / "quants.safetensors", tensors))
    same(file, model)
    assert file.prefix is None


@pytest.mark.parametrize("modulation", [True, False])
def test_comfy_quants_qwen_image_edit(tmp_path, modulation):
    """Its export of Qwen-Image-Edit-2511: attention and MLPs in W4A4, in tiles; modulation in W4A16, or in 16 bits for a host without it;
    the tensor that marks 2511, from the model in 16 bits."""
    plain = random_tensors(qwen_image_shapes(depth=1, marked=True))
    tensors, specs = packed_tensors(qwen_image.FAMILY, plain)
    if not modulation:
        for name in [name for name, spec in specs.items() if spec.format == layout.AWQ]:
            del specs[name]
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
            tensors |= {f"{name}.{leaf}": plain[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    stored = dict(tensors)
    for name, spec in specs.items():
        if spec.format == layout.AWQ:
            stored[f"{name}.weight_zero"] = stored.pop(f"{name}.weight_zeros")
            stored[f"{name}.comfy_quant"] = layout.encode_conf({"format": "awq_w4a16", "group_size": 64})
        else:
            by_comfy_quants((tensors, specs), stored, name, "raw")
    file = opened(write(tmp_path / "qwen.safetensors", stored))
    same(file, (tensors, specs, None))
    assert file.family is qwen_image.FAMILY and file.config["default_ref_method"] == "index_timestep_zero"
    assert {name for name, spec in specs.items() if spec.unsigned_from == 0} == {
        f"transformer_blocks.0.{stream}_mlp.net.2" for stream in ("img", "txt")}


def test_a_branch_that_reads_the_smoothed_input(ours, model, tmp_path):
    """If the branch were taken to read x, it would silently draw another picture."""
    tensors = load_file(ours)
    by_comfy_quants(model, tensors, QKV, "post_smoothing")
    read = dict(opened(write(tmp_path / "smoothed.safetensors", tensors)).tensors())
    for name, tensor in model[0].items():
        if name == f"{QKV}.weight_proj_down":
            torch.testing.assert_close(read[name], tensor, rtol=2**-7, atol=0)  # rounded once more
        else:
            assert torch.equal(read[name], tensor), name


def test_a_branch_with_another_input_is_refused(ours, model, tmp_path):
    tensors = load_file(ours)
    by_comfy_quants(model, tensors, QKV, "rotated")
    with pytest.raises(CheckpointError, match=f"layer {QKV} has lowrank_branch_input_basis 'rotated'"):
        opened(write(tmp_path / "rotated.safetensors", tensors))
