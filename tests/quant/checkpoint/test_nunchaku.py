"""Nunchaku's FLUX.1 files: a written file is read back unchanged, by this pack and by the documented formulas."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.cuda import reference
from comfyui_svdquant.quant.checkpoint import convert, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import layout as order
from comfyui_svdquant.quant.checkpoint.nunchaku import reader as nunchaku
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.families.flux1 import DOUBLE, FAMILY, SINGLE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from .. import nunchaku_places as places
from ..header_files import DTYPE_SIZES, with_header
from ..nunchaku_nvfp4 import write_nvfp4
from ..packed_flux import packed_flux

RECIPE = {"preset": "data-free"}


@pytest.fixture(scope="module")
def model():
    return packed_flux(depth_single=2)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("nunchaku") / "svdq-int4_r16-flux.safetensors"
    nunchaku_writer.save(str(path), *model, RECIPE, "flux", False)
    return path


@pytest.fixture(scope="module")
def written_nvfp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("nunchaku") / "svdq-fp4_r16-flux.safetensors"
    write_nvfp4(path)
    return path


def opened(path):
    return nunchaku.open_file(read_header(str(path)))


def rewritten(source, path, change=lambda tensors: None, metadata=None):
    tensors = load_file(source)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path,
              metadata=read_header(str(source)).metadata if metadata is None else metadata)
    return path


def same(file, model):
    """Check that every tensor equals the written one; zeros of modulation layers up to a rounding."""
    tensors, specs, _ = model
    read = dict(file.tensors())
    assert file.specs == specs and read.keys() == tensors.keys() == file.shapes.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and tuple(read[name].shape) == file.shapes[name], name
        if name.endswith("weight_zeros"):
            step = tensors[name.replace("zeros", "scale")].float()
            assert ((read[name].float() - tensor.float()).abs() <= step * 2**-5).all(), name
        elif "mod" in name and name.endswith("bias"):
            assert torch.allclose(read[name].float(), tensor.float(), rtol=0, atol=2**-8), name  # + 1 and - 1 in bf16
        else:
            assert torch.equal(read[name], tensor), name


def test_written_and_read_is_the_identity(written, model):
    file = opened(written)
    same(file, model)
    assert file.recipe == RECIPE and file.source == "flux"
    assert {key: file.config[key] for key in model[2]} == model[2]
    assert os.listdir(written.parent) == [written.name]


def test_read_and_written_is_the_identity_to_the_byte(written, tmp_path):
    """This includes files with one branch per half, as Nunchaku's own tools write them."""
    g = torch.Generator().manual_seed(1)

    def own_branches(tensors):
        for name, tensor in tensors.items():
            if "lora_" in name:
                tensors[name] = torch.randn(tensor.shape, generator=g).to(tensor.dtype)

    source = rewritten(written, tmp_path / "theirs.safetensors", own_branches)
    file = opened(source)
    assert file.specs["single_blocks.0.linear1"].rank == 32 == file.specs["single_blocks.1.linear2"].rank
    again = tmp_path / "again.safetensors"
    nunchaku_writer.save(str(again), dict(file.tensors()), file.specs, file.config, file.recipe, file.source, False)
    first, second = load_file(source), load_file(again)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_branch_a_half_is_the_sum_of_the_halves(written, tmp_path):
    """linear1 and linear2 with the branches of their halves equal the separate halves."""
    g = torch.Generator().manual_seed(2)
    path = rewritten(written, tmp_path / "theirs.safetensors", lambda tensors: tensors.update(
        {name: torch.randn(t.shape, generator=g).to(t.dtype) for name, t in tensors.items() if "lora_" in name}))
    theirs, ours = load_file(path), dict(opened(path).tensors())

    def branch(part):
        part = f"single_transformer_blocks.0.{part}"
        return (order.unpack_up(theirs[f"{part}.lora_up"]).double()
                @ order.unpack_down(theirs[f"{part}.lora_down"]).double().t())

    def own(name):
        return (ours[f"single_blocks.0.{name}.weight_proj_up"].double()
                @ ours[f"single_blocks.0.{name}.weight_proj_down"].double().t())

    assert torch.equal(own("linear1"), torch.cat((branch("qkv_proj"), branch("mlp_fc1"))))
    assert torch.equal(own("linear2"), torch.cat((branch("out_proj"), branch("mlp_fc2")), 1))


def dense(tensors, part, shifted):
    """Section 2.8 of the format's description, by separate index arithmetic in float64: (W, b)."""
    qweight = tensors[f"{part}.qweight"]
    n, k = qweight.shape[0], qweight.shape[1] * 2
    byte, high = places.code_places(n, k)
    data = qweight.flatten().view(torch.uint8)[byte].int()
    codes = torch.where(high, data >> 4, data & 15)
    codes = torch.where(codes > 7, codes - 16, codes).double()
    scale = tensors[f"{part}.wscales"].flatten().double()[places.scale_places(n, k)].repeat_interleave(64, 1)
    quantized = codes * scale / tensors[f"{part}.smooth"].double()[places.vector_places(k)]
    down, up = tensors[f"{part}.lora_down"].flatten().double(), tensors[f"{part}.lora_up"].flatten().double()
    rank = down.numel() // k
    weight = quantized + up[places.up_places(n, rank)] @ down[places.down_places(k, rank)].t()
    bias = tensors[f"{part}.bias"].double()[places.vector_places(n)]
    return weight, bias + (0.171875 * quantized.sum(1) if shifted else 0)


@pytest.mark.parametrize("rank", [16, 128])
def test_written_files_dequantize_equally_by_the_documented_formulas(tmp_path, rank):
    model = packed_flux(depth_single=1, rank=rank)
    path = tmp_path / "svdq-int4.safetensors"
    nunchaku_writer.save(str(path), *model, RECIPE, "flux", False)
    tensors, specs, theirs = model[0], model[1], load_file(path)
    for name in ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1", "single_blocks.0.linear2"):
        block, _, layer = name.replace("double_blocks", "transformer_blocks").replace(
            "single_blocks", "single_transformer_blocks").split(".", 2)[0:3]
        kind = DOUBLE if name.startswith("double") else SINGLE
        parts = [f"{block}.0.{part}" for part in FAMILY.nunchaku.linears[kind][layer]]
        halves = [dense(theirs, part, part.endswith("fc2")) for part in parts]
        p, spec = {part: tensors[f"{name}.{part}"] for part in specs[name].tensors()}, specs[name]
        quantized = reference.dequantize_weight(p["weight"], p["weight_scale"], torch.float64) / p["weight_smooth_factor"].double()
        weight = quantized + p["weight_proj_up"].double() @ p["weight_proj_down"].double().t()
        bias = p["bias"].double() + 0.171875 * quantized[:, spec.unsigned_from:].sum(1)
        if name.endswith("linear2"):
            found = torch.cat([w for w, _ in halves], 1), sum(b for _, b in halves)
        else:
            found = torch.cat([w for w, _ in halves]), torch.cat([b for _, b in halves])
        for ours, its in zip((weight, bias), found):
            error = float((ours - its).abs().max())
            assert error < 1e-12, f"{name}: {error:.1e}"


def test_modulation_layers_by_the_documented_formulas(written, model):
    """w = code * s + z of each interleaved row is this pack's (code - 8) * s + z', up to the 16-bit rounding of z."""
    tensors, theirs = model[0], load_file(written)
    name, part, chunks = "single_blocks.0.modulation.lin", "single_transformer_blocks.0.norm.linear", 3
    words = theirs[f"{part}.qweight"].flatten().view(torch.int16).int() & 0xFFFF
    scale, zero = theirs[f"{part}.wscales"].double(), theirs[f"{part}.wzeros"].double()
    n_total, k_total = scale.shape[1], 128
    word, shift = places.w4a16_places(n_total, k_total)
    codes = ((words[word] >> shift) & 15).double()
    weight = codes * scale[: k_total // 64].t().repeat_interleave(64, 1) + zero[: k_total // 64].t().repeat_interleave(64, 1)
    d = n_total // chunks
    weight = torch.stack([weight[j * chunks + s] for s in range(chunks) for j in range(d)])
    bias = theirs[f"{part}.bias"].double().view(d, chunks).t().clone()
    bias[1] -= 1
    ours = reference.dequantize_awq(*(tensors[f"{name}.{p}"] for p in ("weight", "weight_scale", "weight_zeros")), torch.float64)
    step = tensors[f"{name}.weight_scale"].double().t().repeat_interleave(64, 1)
    assert ((weight - ours) / step).abs().max() < 2**-5
    assert (bias.flatten() - tensors[f"{name}.bias"].double()).abs().max() <= 2**-8


# --- forms of the file ---------------------------------------------------------------------------------------------


V2 = {
    "transformer_blocks": {
        "qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.add_qkv_proj", "out_proj": "attn.to_out.0",
        "out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2",
        "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2", "norm_q": "attn.norm_q",
        "norm_k": "attn.norm_k", "norm_added_q": "attn.norm_added_q", "norm_added_k": "attn.norm_added_k"},
    "single_transformer_blocks": {
        "qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out", "norm_q": "attn.norm_q", "norm_k": "attn.norm_k"},
}
V2_LEAVES = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig"}


def v2(name):
    kind, _, rest = name.partition(".")
    if kind not in V2:
        return name
    index, _, rest = rest.partition(".")
    module, _, leaf = rest.rpartition(".")
    return f"{kind}.{index}.{V2[kind].get(module, module)}.{V2_LEAVES.get(leaf, leaf)}"


def rename_v2(tensors):
    renamed = {v2(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


@pytest.mark.parametrize("metadata", [None, {}])
@pytest.mark.parametrize("change", [lambda tensors: None, rename_v2])
def test_both_versions_of_the_names_with_and_without_metadata(written, model, tmp_path, change, metadata):
    file = opened(rewritten(written, tmp_path / "model.safetensors", change, metadata))
    same(file, model)
    assert file.source == ("flux" if metadata is None else "model.safetensors")
    assert file.config["depth"] == 1


@pytest.mark.parametrize("chosen", ["transformer_blocks.safetensors", "unquantized_layers.safetensors"])
def test_a_folder_of_two_files(written, model, tmp_path, chosen):
    tensors, metadata = load_file(written), read_header(str(written)).metadata
    blocks = {name: tensor for name, tensor in tensors.items() if "transformer_blocks." in name}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    with pytest.raises(CheckpointError, match="unquantized_layers.safetensors is not beside it; put both into one folder."):
        opened(tmp_path / "transformer_blocks.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in blocks}, tmp_path / "unquantized_layers.safetensors")
    (tmp_path / "config.json").write_text(metadata["config"])
    header = read_header(str(tmp_path / chosen))
    assert nunchaku.matches(header)
    file = nunchaku.open_file(header)
    same(file, model)
    assert file.config["depth_single_blocks"] == 2 and file.config["axes_dim"] == [16, 56, 56]


def test_very_old_files_without_a_branch(written, tmp_path):
    file = opened(rewritten(written, tmp_path / "old.safetensors",
                            lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora_" in name]))
    assert {spec.rank for spec in file.specs.values()} == {0}
    read = dict(file.tensors())
    assert read["single_blocks.0.linear2.weight_proj_down"].shape == (5 * 128, 0)
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == file.shapes


def test_modulation_layers_in_16_bits(written, model, tmp_path):
    """nunchaku-lite reads files with unconverted modulation layers: rows in diffusers' order, which is this pack's, and
    no 1 in the bias."""
    ours, theirs = "double_blocks.0.txt_mod.lin", "transformer_blocks.0.norm1_context.linear"
    dense = {"weight": torch.randn(6 * 128, 128).bfloat16(), "bias": torch.randn(6 * 128).bfloat16()}

    def leave(tensors):
        for leaf in ("qweight", "wscales", "wzeros", "bias"):
            del tensors[f"{theirs}.{leaf}"]
        tensors |= {f"{theirs}.{leaf}": tensor for leaf, tensor in dense.items()}

    tensors, specs, config = model
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(ours)}
    kept |= {f"{ours}.{leaf}": tensor for leaf, tensor in dense.items()}
    specs = {name: spec for name, spec in specs.items() if name != ours}
    path = rewritten(written, tmp_path / "lite.safetensors", leave)
    same(opened(path), (kept, specs, config))
    with pytest.raises(CheckpointError, match=f"lacks tensor {theirs}.bias"):
        opened(rewritten(path, tmp_path / "less.safetensors", lambda tensors: tensors.pop(f"{theirs}.bias")))


def test_the_keys_that_nunchakus_loader_reads(written):
    header = read_header(str(written))
    assert header.metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    config, comfy, quantization = (json.loads(header.metadata[key]) for key in ("config", "comfy_config", "quantization_config"))
    assert config["num_layers"] == 1 and config["num_single_layers"] == 2 and config["attention_head_dim"] == 128
    assert config["in_channels"] == 64 and config["guidance_embeds"] is True
    assert comfy["model_class"] == "Flux" and comfy["model_config"]["disable_unet_model_creation"] is True
    assert quantization["rank"] == 16 and quantization["weight"] == {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    part = "single_transformer_blocks.1.mlp_fc2"
    infos = {name.removeprefix(f"{part}."): (info.shape, info.dtype) for name, info in header.tensors.items()
             if name.startswith(part)}
    bf16 = torch.bfloat16
    assert infos == {"qweight": ((128, 256), torch.int8), "wscales": ((8, 128), bf16), "bias": ((128,), bf16),
                     "smooth": ((512,), bf16), "smooth_orig": ((512,), bf16), "lora_down": ((512, 16), bf16),
                     "lora_up": ((128, 16), bf16)}
    assert header.tensors["single_transformer_blocks.1.norm.linear.wscales"].shape == (16, 384)
    # 34 tensors per single block, 68 per double block and 20 outside, as in published files.
    assert len(header.tensors) == 68 + 2 * 34 + 20


def test_the_files_own_two_configurations_must_agree(written, tmp_path):
    metadata = read_header(str(written)).metadata
    metadata = metadata | {"config": json.dumps(json.loads(metadata["config"]) | {"num_layers": 7})}
    with pytest.raises(CheckpointError, match="says depth = 7 in its config and 1 in its comfy_config"):
        opened(rewritten(written, tmp_path / "bad.safetensors", metadata=metadata))


# --- refusals ------------------------------------------------------------------------------------------------------

BLOCK = "single_transformer_blocks.1"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


@pytest.mark.parametrize(("change", "says"), [
    (drop(f"{BLOCK}.mlp_fc2.wscales"), f"lacks tensor {BLOCK}.mlp_fc2.wscales"),
    (drop(f"{BLOCK}.norm_q.weight"), f"lacks tensor {BLOCK}.norm_q.weight"),
    (drop(f"{BLOCK}.qkv_proj.lora_up"), f"lacks tensor {BLOCK}.qkv_proj.lora_up"),
    (drop("proj_out.bias"), "lacks tensor proj_out.bias"),
    (drop("x_embedder.weight"), "lacks tensor x_embedder.weight"),
    (put(f"{BLOCK}.mlp_fc2.qweight", lambda t: t.view(torch.float8_e4m3fn)), "torch.float8_e4m3fn instead of torch.int8"),
    (put(f"{BLOCK}.mlp_fc2.qweight", lambda t: t[:64]), "multiples of 128"),
    (put(f"{BLOCK}.mlp_fc2.smooth", lambda t: t[:256]), "has shape [256] instead of [512]"),
    (put(f"{BLOCK}.mlp_fc2.lora_up", lambda t: t.repeat(1, 2)), "has shape [128, 32] instead of [128, 16]"),
    (put(f"{BLOCK}.mlp_fc2.lora_down", lambda t: t[:, :8]), "rank 8, which is not a multiple of 16"),
    (put(f"{BLOCK}.mlp_fc2.bias", lambda t: t.float()), "torch.float32 instead of torch.bfloat16"),
    (put(f"{BLOCK}.mlp_fc1.smooth", lambda t: t + 1), "different smoothing factors"),
    (put(f"{BLOCK}.norm.linear.qweight", lambda t: t.view(torch.int8)), "torch.int8 instead of torch.int32"),
    (put(f"{BLOCK}.norm.linear.qweight", lambda t: t[:95]), "has shape [95, 64] instead of (N/4, K/2)"),
    (put(f"{BLOCK}.out_proj.wscales", lambda t: t.float()), "torch.float32 instead of torch.bfloat16"),
    (put(f"{BLOCK}.norm.linear.wzeros", lambda t: t[:2]), "has shape [2, 384] instead of [16, 384]"),
    (put(f"{BLOCK}.extra.qweight", lambda t: torch.zeros(2, 2)), f"has tensor {BLOCK}.extra.qweight"),
    (put("single_transformer_blocks.7.norm_q.weight", lambda t: torch.ones(128)), "lacks tensor single_transformer_blocks.2"),
    (put(f"{BLOCK}.attn.to_qkv.smooth_factor", lambda t: torch.ones(128)), "twice"),
    (put(f"{BLOCK}.mlp_fc2.wcscales", lambda t: torch.ones(128)), f"has tensor {BLOCK}.mlp_fc2.wcscales, which a Nunchaku INT4"),
    (put(f"{BLOCK}.mlp_fc2.wscales", lambda t: t.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn instead of torch.bfloat16"),
    (put("norm_out.linear.bias", lambda t: t[:3]), "an even number of rows"),
])
def test_damaged_and_foreign_files(written, tmp_path, change, says):
    path = rewritten(written, tmp_path / "bad.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    message = str(caught.value)
    assert "bad.safetensors" in message and "\n" not in message and message.endswith((".", ")."))
    assert says in message


@pytest.mark.parametrize(("metadata", "says"), [
    ({"model_class": "NunchakuQwenImageTransformer2DModel"}, "NunchakuQwenImageTransformer2DModel"),
    ({"quantization_config": '{"weight": {"dtype": "fp4_e2m1_all"}}'}, r"wscales has shape \[2, 384\] instead of \[8, 384\]"),
    ({"config": "[]"}, "no valid config"), ({"comfy_config": "{"}, "no valid comfy_config"),
    ({"comfy_config": '{"model_config": 3}'}, "no valid comfy_config"), ({"quantization_config": "["}, "quantization_config"),
])
def test_metadata_of_other_models_and_damaged_metadata(written, tmp_path, metadata, says):
    path = rewritten(written, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=says):
        opened(path)


def test_a_model_that_nunchakus_layout_cannot_hold_is_refused(model, tmp_path):
    tensors, specs, config = model

    def refusal(specs, tensors=tensors):
        with pytest.raises(CheckpointError) as caught:
            nunchaku_writer.save(str(tmp_path / "out.safetensors"), tensors, specs, config, RECIPE, "flux", False)
        assert os.listdir(tmp_path) == []
        return str(caught.value)

    name, narrow = "single_blocks.0.linear2", "double_blocks.0.img_mlp.0"
    missing = refusal({key: spec for key, spec in specs.items() if key != name})
    assert f"Layer {name} is not in 4 bits" in missing and missing.endswith("; choose layout native.")
    signed = replace(specs[name], format="svdquant_w4a4", unsigned_from=specs[name].in_features)
    assert f"Layer {name} has other unsigned input columns" in refusal(specs | {name: signed})
    assert f"Layer {name} has activations of 8 bits" in refusal(specs | {name: replace(specs[name], act_bits=8)})
    assert "not multiples of 128" in refusal(specs | {narrow: replace(specs[narrow], out_features=64)})
    assert "img_in.bias" in refusal(specs, {key: t for key, t in tensors.items() if key != "img_in.bias"})
    (tmp_path / "taken.safetensors").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        nunchaku_writer.save(str(tmp_path / "taken.safetensors"), tensors, specs, config, RECIPE, "flux", False)


def test_a_model_without_branches(model, tmp_path):
    """The preset naive has no branches; in Nunchaku's layout each layer then has a branch of zeros."""
    tensors, specs, config = model
    bare = {name: replace(spec, rank=0) for name, spec in specs.items()}
    tensors = {name: tensor[:, :0].contiguous() if name.endswith(("proj_down", "proj_up")) else tensor for name, tensor in tensors.items()}
    native.save(str(tmp_path / "native.safetensors"), tensors, bare, config, RECIPE, "flux")
    nunchaku_writer.save(str(tmp_path / "expected.safetensors"), tensors, bare, config, RECIPE, "flux")
    convert.convert(str(tmp_path / "native.safetensors"), str(tmp_path / "found.safetensors"), "nunchaku")
    expected, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("expected", "found"))
    assert expected.keys() == found.keys() and all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    convert.convert(str(tmp_path / "found.safetensors"), str(tmp_path / "back.safetensors"), "native")
    back = dict(native.open_file(read_header(str(tmp_path / "back.safetensors"))).tensors())
    assert all(torch.equal(back[f"{name}.weight"], tensors[f"{name}.weight"]) for name in specs)
    assert not any(tensor.any() for name, tensor in back.items() if name.endswith("proj_up"))


# --- mutated headers -----------------------------------------------------------------------------------------------

@st.composite
def mutations(draw):
    """(index of a tensor, kind of change, value)."""
    kind = draw(st.sampled_from(("drop", "rename", "dtype", "shape", "extra", "metadata")))
    value = {"drop": st.none(), "rename": st.sampled_from(("", "x", "transformer_blocks.0.qkv_proj.qweight",
                                                                      "transformer_blocks.9999.a.b")),
             "dtype": st.sampled_from(sorted(DTYPE_SIZES)), "extra": st.text(max_size=20),
             "shape": st.lists(st.sampled_from((0, 1, 2, 3, 16, 64, 96, 128, 256, 10**5)), max_size=3),
             "metadata": st.tuples(st.sampled_from(("config", "comfy_config", "quantization_config", "model_class",
                                                    "svdquant.recipe")),
                                   st.sampled_from(("", "{}", "[]", "3", "null", '{"model_config": {"depth": 2}}',
                                                    "[" * 3000, '{"weight": 3}', '{"weight": {"dtype": 4}}')))}
    return draw(st.integers(0, 10**6)), kind, draw(value[kind])


@given(nvfp4=st.booleans(), changes=st.lists(mutations(), min_size=1, max_size=3))
@example(nvfp4=False, changes=[(158, "shape", [96, 96])])  # a modulation layer for a wider model
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_mutated_headers_are_refused_or_describe_a_whole_model(written, written_nvfp4, tmp_path, nvfp4, changes):
    header = read_header(str(written_nvfp4 if nvfp4 else written))
    types = {torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}
    entries = {name: [types[info.dtype], list(info.shape)] for name, info in header.tensors.items()}
    metadata = dict(header.metadata)
    for index, kind, value in changes:
        name = list(entries)[index % len(entries)]
        if kind == "drop":
            del entries[name]
        elif kind == "rename":
            entries[value or name.upper()] = entries.pop(name)
        elif kind == "extra":
            entries[name + value] = entries[name]
        elif kind == "metadata":
            metadata[value[0]] = value[1]
        else:
            entries[name] = [value, entries[name][1]] if kind == "dtype" else [entries[name][0], value]
        if math.prod(entries.get(name, ["", [1]])[1]) > 10**9:
            entries[name][1] = [10**9]
    path = with_header(tmp_path / "mutated.safetensors", entries, metadata)
    try:
        file = opened(path)
    except CheckpointError as error:
        assert "mutated.safetensors" in str(error) and "\n" not in str(error)
    else:
        # A header that is still accepted has every tensor in the shape that its layers require.
        for name, spec in file.specs.items():
            assert all(file.shapes[f"{name}.{part}"] == shape for part, (shape, _) in spec.tensors().items())
        assert {name: tuple(info.shape) for name, info in header.tensors.items() if name.endswith("qweight")} == {
            name: tuple(entries[name][1]) for name in entries if name.endswith("qweight")}
