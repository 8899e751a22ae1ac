"""Nunchaku's Qwen-Image and Z-Image files: what is read of them, and one sentence for what is not. tests/quant/host draws with them."""

import json
import math
import re

import pytest
import torch
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import reader
from comfyui_svdquant.quant.families import qwen_image, z_image
from safetensors.torch import save_file

from .. import nunchaku_files as files
from ..header_files import DTYPE_SIZES, with_header

FAMILIES = {files.QWEN: qwen_image.FAMILY, files.Z_IMAGE: z_image.FAMILY}
QKV, FEED_FORWARD, MODULATION = "transformer_blocks.0.attn.to_qkv", "layers.0.feed_forward.net.0.proj", "transformer_blocks.0.img_mod.1"


@pytest.fixture(scope="module", params=[(kind, nvfp4) for kind in files.CONFIGS for nvfp4 in (False, True)],
                ids=lambda form: f"{form[0][8:13]}-{'NVFP4' if form[1] else 'INT4'}")
def model(request):
    """(kind, whether it is NVFP4, tensors, metadata)."""
    kind, nvfp4 = request.param
    return kind, nvfp4, *files.encoded_model(kind, nvfp4)[:2]


@pytest.fixture(scope="module")
def models():
    """{kind: (tensors, metadata)} in INT4."""
    return {kind: files.encoded_model(kind)[:2] for kind in files.CONFIGS}


def opened(path, tensors, metadata):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    header = read_header(str(path))
    assert reader.matches(header)
    return reader.open_file(header)


def refusal(path, tensors, metadata):
    with pytest.raises(CheckpointError) as caught:
        opened(path, tensors, metadata)
    assert path.name in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("bare", [False, True])
def test_the_tensors_are_those_of_the_family(model, tmp_path, bare):
    """Without metadata too: the tensors tell the family, the codes and the rank."""
    kind, nvfp4, tensors, metadata = model
    file = opened(tmp_path / "svdq.safetensors", tensors, {} if bare else metadata)
    read = dict(file.tensors())
    assert file.family is FAMILIES[kind]
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == file.shapes
    assert {name: tensor.dtype for name, tensor in read.items()} == file.dtypes
    w4a4 = {name: spec for name, spec in file.specs.items() if spec.format != "awq_w4a16"}
    assert {spec.format for spec in w4a4.values()} == {"svdquant_nvfp4" if nvfp4 else "svdquant_w4a4"}
    unsigned = {name for name, spec in w4a4.items() if spec.unsigned_from == 0}
    assert unsigned == ({name for name in w4a4 if name.endswith("_mlp.net.2")} if not nvfp4 else set())
    assert all(spec.rank == files.RANK for spec in w4a4.values())


def test_stacked_layers_have_memory_of_their_own(models, tmp_path):
    """A later change of q's smoothing factor or branch must not reach k and v."""
    read = dict(opened(tmp_path / "svdq.safetensors", *models[files.QWEN]).tensors())
    first, second = (f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k"))
    for part in ("", "_scale", "_smooth_factor", "_proj_down", "_proj_up"):
        assert read[first + part].untyped_storage().data_ptr() != read[second + part].untyped_storage().data_ptr()
    assert torch.equal(read[f"{first}_proj_down"], read[f"{second}_proj_down"])


def test_modulation_in_16_bits(models, tmp_path):
    """As files of others have it: rows in diffusers' order, and no 1 in the bias."""
    tensors, metadata = models[files.QWEN]
    dense = {"weight": torch.randn(1536, 256).bfloat16(), "bias": torch.randn(1536).bfloat16()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{MODULATION}.")}
    file = opened(tmp_path / "svdq.safetensors", kept | {f"{MODULATION}.{leaf}": tensor for leaf, tensor in dense.items()}, metadata)
    read = dict(file.tensors())
    assert MODULATION not in file.specs and all(torch.equal(read[f"{MODULATION}.{leaf}"], tensor) for leaf, tensor in dense.items())


@pytest.mark.parametrize(("kind", "missing"), [
    *((files.QWEN, f"{QKV}.{leaf}") for leaf in ("qweight", "wscales", "smooth_factor", "bias")), (files.QWEN, f"{MODULATION}.wzeros"),
    (files.QWEN, "txt_norm.weight"), (files.QWEN, "proj_out.bias"), (files.Z_IMAGE, f"{FEED_FORWARD}.proj_up"),
    (files.Z_IMAGE, "layers.1.attention.norm_q.weight"), (files.Z_IMAGE, "all_x_embedder.2-1.weight"), (files.Z_IMAGE, "cap_pad_token")])
def test_incomplete_files(models, tmp_path, kind, missing):
    """The sentence has the tensor's name in such files, not the one of the format's first version."""
    tensors, metadata = models[kind]
    kept = {name: tensor for name, tensor in tensors.items() if name != missing}
    assert f"lacks tensor {missing}; the file is incomplete" in refusal(tmp_path / "cut.safetensors", kept, metadata)


CHANGES = {"missing": lambda dtype, shape: None, "of another type": lambda dtype, shape: ["I64", shape],
           "of another size": lambda dtype, shape: [dtype, [*shape[:-1], shape[-1] + 1]]}


@pytest.mark.parametrize("change", CHANGES)
def test_every_tensor_is_needed_in_its_size_and_type(model, tmp_path, change):
    """All but the factors that no one reads. A file with more of them, or in another type, is the same model."""
    kind, nvfp4, tensors, metadata = model
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    names = {torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}
    entries, accepted = {name: [names[info.dtype], list(info.shape)] for name, info in read_header(str(path)).tensors.items()}, set()
    for name, entry in entries.items():
        changed = CHANGES[change](*entry)
        rest = {other: kept for other, kept in entries.items() if other != name}
        try:
            reader.open_file(read_header(str(with_header(path, rest | ({name: changed} if changed else {}), metadata))))
            accepted.add(name)
        except CheckpointError as error:
            assert "changed.safetensors" in str(error) and "\n" not in str(error)
    assert accepted == {name for name in entries if name.endswith("smooth_factor_orig")}


def test_a_layer_without_a_branch_is_incomplete(models, tmp_path):
    tensors, metadata = models[files.QWEN]
    kept = {name: tensor for name, tensor in tensors.items() if name not in (f"{QKV}.proj_down", f"{QKV}.proj_up")}
    assert re.search(rf"has proj_down or proj_up in layer \S+ and not in {re.escape(QKV)}; the file is incomplete",
                     refusal(tmp_path / "cut.safetensors", kept, metadata))


def test_a_file_that_says_it_is_another_model(models, tmp_path):
    tensors, metadata = models[files.QWEN]
    said = refusal(tmp_path / "svdq.safetensors", tensors, metadata | {"model_class": files.Z_IMAGE})
    assert "is a Nunchaku model that is a NunchakuZImageTransformer2DModel; choose a Nunchaku Qwen-Image model." in said
    assert "num_layers = 60" in refusal(tmp_path / "svdq.safetensors", tensors, metadata | {
        "config": json.dumps(json.loads(metadata["config"]) | {"num_layers": 60})})


def test_layers_and_tensors_that_do_not_fit(models, tmp_path):
    path, (qwen, said), (z, said_z) = tmp_path / "odd.safetensors", models[files.QWEN], models[files.Z_IMAGE]
    assert f"has tensor {FEED_FORWARD}.bias, which a Nunchaku INT4 Z-Image model has no place for" in refusal(
        path, z | {f"{FEED_FORWARD}.bias": torch.zeros(1536).bfloat16()}, said_z)
    assert "has tensor transformer_blocks.0.attn.to_q.weight, which" in refusal(
        path, qwen | {"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, said)
    n = 512  # two thirds of its rows
    cut = qwen | {f"{QKV}.{leaf}": qwen[f"{QKV}.{leaf}"][:n] for leaf in ("qweight", "bias", "proj_up")}
    cut[f"{QKV}.wscales"] = qwen[f"{QKV}.wscales"][:, :n]
    assert f"tensor {QKV}.qweight has 512 rows, which are not those of 3 equally high layers" in refusal(path, cut, said)


def test_refiners_in_16_bits(tmp_path):
    """"skip_refiners" in Nunchaku's configuration: q, k and v are then apart, and w3 and w1 are one layer."""
    tensors, metadata, plain = files.encoded_model(files.Z_IMAGE, skip_refiners=True)
    file = opened(tmp_path / "svdq.safetensors", tensors, metadata)
    read = dict(file.tensors())
    refiners = [name for name in plain if "_refiner." in name]
    assert all(torch.equal(read[name], plain[name]) for name in refiners) and not any("refiner" in name for name in file.specs)
    qkv = "noise_refiner.0.attention.to_k.weight"
    kept = {name: tensor for name, tensor in tensors.items() if name != qkv}
    assert f"lacks tensor {qkv}" in refusal(tmp_path / "cut.safetensors", kept, metadata)
    odd = tensors | {"noise_refiner.0.feed_forward.net.0.proj.weight": torch.zeros(1535, 256).bfloat16()}
    assert "instead of an even number of rows" in refusal(tmp_path / "odd.safetensors", odd, metadata)


# --- published sizes -------------------------------------------------------------------------------------------------

PUBLISHED = {
    files.Z_IMAGE: {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "in_channels": 16, "patch_size": 2,
                    "cap_feat_dim": 2560, "ffn_dim_multiplier": 8 / 3, "pad_tokens_multiple": 32},
    files.QWEN: {"in_channels": 64, "out_channels": 16, "num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128,
                 "joint_attention_dim": 3584, "use_additional_t_cond": False, "default_ref_method": "index"},
}
DEPTHS = {files.Z_IMAGE: (30, 2), files.QWEN: (60,)}


def published(kind, rank):
    """{name: [dtype, shape]} of an INT4 file of the published model."""
    rest = FAMILIES[kind].tensors(PUBLISHED[kind])
    layers, modulations, theirs = files.LAYERS[kind](*DEPTHS[kind])
    entries = {}
    for part, ours in layers.items():
        shapes = [rest.pop(f"{name}.weight") for name in ours]
        n, k = sum(shape[0] for shape in shapes), shapes[0][1]
        entries |= {f"{part}.qweight": ["I8", [n, k // 2]], f"{part}.wscales": ["BF16", [k // 64, n]],
                    f"{part}.proj_up": ["BF16", [n, rank]], f"{part}.proj_down": ["BF16", [k, rank]],
                    f"{part}.smooth_factor": ["BF16", [k]], f"{part}.smooth_factor_orig": ["BF16", [k]]}
        if [rest.pop(f"{name}.bias", None) for name in ours][0]:
            entries[f"{part}.bias"] = ["BF16", [n]]
    for name in modulations:
        n, k = rest.pop(f"{name}.weight")
        entries |= {f"{name}.qweight": ["I32", [n // 4, k // 2]], f"{name}.wscales": ["BF16", [k // 64, n]],
                    f"{name}.wzeros": ["BF16", [k // 64, n]], f"{name}.bias": ["BF16", list(rest.pop(f"{name}.bias"))]}
    return entries | {theirs(name): ["BF16", list(shape)] for name, shape in rest.items()}


@pytest.mark.parametrize(("kind", "rank", "size"), [(files.Z_IMAGE, 128, 4_011_374_152), (files.QWEN, 128, 12_654_443_120)])
def test_the_layout_has_the_size_of_published_files(tmp_path, kind, rank, size):
    """Sizes that users have published, of Nunchaku's Z-Image-Turbo and of a Qwen-Image-Edit-2511 for Nunchaku's loader. What is missing is
    the header: about a hundred bytes a tensor. One vector a block more or less would leave these bounds."""
    entries = published(kind, rank)
    data = sum(DTYPE_SIZES[dtype] * math.prod(shape) for dtype, shape in entries.values())
    assert 90 * len(entries) < size - data < 140 * len(entries)
    file = reader.open_file(read_header(str(with_header(tmp_path / "svdq.safetensors", entries, {}))))
    assert file.family is FAMILIES[kind] and {spec.rank for spec in file.specs.values()} <= {0, rank}
    assert {key: file.config[key] for key in PUBLISHED[kind]} == PUBLISHED[kind]


def test_the_numbers_of_a_published_files_tensors():
    """Of Nunchaku's Z-Image-Turbo in INT4 of rank 32, as its users have counted them."""
    entries = published(files.Z_IMAGE, 32)
    assert [sum(dtype == kind for dtype, _ in entries.values()) for kind in ("BF16", "I8")] == [963, 136]
    assert sum(math.prod(shape) for dtype, shape in entries.values() if dtype == "I8") == 3_008_102_400
