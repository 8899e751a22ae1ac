"""Files that ComfyUI would silently read wrongly, and relatives with FLUX.1's names: each is refused by name in one sentence, before
anything is loaded. Also the prefixes under which other programs store a FLUX.1."""

import json

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import foreign
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import save_file

from ..random_flux import flux_tensors

QKV = "double_blocks.0.img_attn.qkv"


def header_of(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)
    return read_header(str(path))


def without(*starts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_(**parts):
    """A change that replaces the tensors of layer QKV."""
    return lambda tensors: tensors | {f"{QKV}.{name}": tensor for name, tensor in parts.items()}


def nf4(tensors):
    state = {f"{QKV}.weight.{part}": torch.zeros(4) for part in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")}
    return tensors | state | {f"{QKV}.weight": torch.zeros(6144, 1, dtype=torch.uint8)}


CODES = torch.zeros(192, 64, dtype=torch.int8)
SCALED = torch.zeros(192, 64, dtype=torch.float8_e4m3fn)

FP8 = {"format": "float8_e4m3fn"}


def listed(*layers):
    return {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers, FP8)})}


NO_FORMAT = ", and does not describe the format"

# {kind of file: (file's name, change of a FLUX.1 with 3 blocks of each kind, text in the message)}
REFUSED = {
    "a double block is missing": ("a.safetensors", without("double_blocks.1."), "has double_blocks.2 and no double_blocks.1;"),
    "a single block is missing": ("a.safetensors", without("single_blocks.0."), "has single_blocks.2 and no single_blocks.0;"),
    "another prefix": ("a.safetensors", renamed("transformer."), "under names that begin with 'transformer.'"),
    "LongCat-Image": ("a.safetensors", without("vector_in.", "guidance_in."), "no vector_in, like LongCat-Image"),
    "NF4": ("a.safetensors", nf4, "is a FLUX.1 in bitsandbytes' 4 bits"),
    "bitsandbytes' int8": ("a.safetensors", with_(weight=CODES, SCB=torch.ones(192)), "is a FLUX.1 in bitsandbytes' 8 bits (LLM.int8),"),
    "codes without a description": ("a.safetensors", with_(weight=CODES), f"has {QKV}.weight{NO_FORMAT}"),
    "fp8 without a description": ("a.safetensors", with_(weight=SCALED, weight_scale=torch.ones(())), f"has {QKV}.weight_scale{NO_FORMAT}"),
    "scaled fp8 without its mark": ("a.safetensors", with_(weight=SCALED, scale_weight=torch.ones(())), f"{QKV}.scale_weight{NO_FORMAT}"),
    "the first shard": ("flux-00001-of-00003.safetensors", without("single_blocks.2."), "is a part of a model in 3 files"),
    "another shard": ("flux-00002-of-00003.safetensors", without("img_in", "double_blocks."), "is a part of a model in 3 files"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_comfyui_reads_wrongly_are_refused(tmp_path, what):
    name, change, says = REFUSED[what]
    header = header_of(tmp_path / name, change(flux_tensors(hidden=64, depth=3, depth_single=3)))
    with pytest.raises(CheckpointError) as caught:
        foreign.find(header)
    message = str(caught.value)
    assert message.startswith(f"{name} ") and says in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.", "model.model.", "net."])
def test_the_prefixes_of_a_flux(tmp_path, prefix):
    encoder = {"text_encoders.t5.q.weight": CODES, "text_encoders.t5.q.weight_scale": torch.ones(1)} if prefix else {}
    header = header_of(tmp_path / "a.safetensors", renamed(prefix)(flux_tensors(hidden=64)) | encoder)
    assert foreign.find(header) == (FAMILY, prefix)


@pytest.mark.parametrize(("change", "metadata"), [
    (with_(weight=SCALED, scale_weight=torch.ones(()), scale_input=torch.ones(())), None),
    (with_(weight=CODES, weight_scale=torch.ones(192, 1), comfy_quant=layout.encode_conf({"format": "int8_tensorwise"})), None),
    (with_(weight=SCALED, weight_scale=torch.ones(())), listed(QKV)),
])
def test_described_weights_are_left_to_comfyui(tmp_path, change, metadata):
    mark = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    assert foreign.find(header_of(tmp_path / "a.safetensors", change(flux_tensors(hidden=64)) | mark, metadata)) == (FAMILY, "")


@pytest.mark.parametrize(("key", "what"), [
    ("double_blocks.0.img_mlp.gate_proj.weight", "an Ovis-Image model"), ("context_embedder_norm.weight", "an Ovis-Image model"),
    ("time_embed.timestep_embedder.linear_1.weight", "a LongCat-Image model"),
])
def test_relatives_are_recognized_by_their_names(tmp_path, key, what):
    diffusers = {name: torch.ones(2, 2) for name in ("transformer_blocks.0.attn.norm_added_k.weight", "x_embedder.weight")}
    for tensors in (flux_tensors(hidden=64), diffusers):
        header = header_of(tmp_path / "a.safetensors", tensors | {key: torch.ones(2)})
        assert foreign.find(header) is None and not foreign.find_diffusers(header) and foreign.kind(header) == what


def test_a_whole_model_may_have_numbers_in_its_name(tmp_path):
    tensors = flux_tensors(hidden=128)
    assert foreign.find(header_of(tmp_path / "checkpoint-3-of-10.safetensors", tensors)) == (FAMILY, "")
    with pytest.raises(CheckpointError, match="is a part of a model in 10 files"):
        foreign.find(header_of(tmp_path / "checkpoint-3-of-10.safetensors", without("vector_in.")(tensors)))


def test_what_is_called_a_lora(tmp_path):
    lora = {"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(2, 2)}
    assert foreign.kind(header_of(tmp_path / "a.safetensors", lora)) == "a LoRA"
    few = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2), "c.lora_down.weight": torch.zeros(2, 2)}
    assert foreign.kind(header_of(tmp_path / "a.safetensors", few)) is None
    assert foreign.kind(header_of(tmp_path / "a.safetensors", lora | {"text.alpha": torch.zeros(())})) == "a LoRA"
    nunchaku = {"transformer_blocks.0.qkv_proj.qweight": CODES, "transformer_blocks.0.qkv_proj.lora_down": torch.zeros(2, 2)}
    assert foreign.kind(header_of(tmp_path / "a.safetensors", nunchaku)) is None


OTHER = "double_blocks.0.txt_attn.qkv"
LOST = {
    "a scale of another tool's": (with_(weight=SCALED, weight_scale_inv=torch.ones(())), None, f"{QKV}.weight_scale_inv{NO_FORMAT}"),
    "a scale by its bare name": (with_(weight=SCALED, scale=torch.ones(())), None, f"{QKV}.scale{NO_FORMAT}"),
    "a scale below the weight": (with_(**{"weight": SCALED, "weight._scale": torch.ones(())}), None, f"{QKV}.weight._scale{NO_FORMAT}"),
    "fp8, another layer listed": (with_(weight=SCALED, weight_scale=torch.ones(())), listed(OTHER), f"{QKV}.weight_scale{NO_FORMAT}"),
    "int8, another layer listed": (with_(weight=CODES), listed(OTHER), f"{QKV}.weight{NO_FORMAT}"),
    "listed under another prefix": (with_(weight=SCALED, weight_scale=torch.ones(())), listed(f"model.diffusion_model.{QKV}"), NO_FORMAT),
    "the mark beside a list": (with_(weight=SCALED, scale_weight=torch.ones(())), listed(OTHER), f"{QKV}.scale_weight{NO_FORMAT}"),
    "a damaged description": (with_(comfy_quant=torch.full((9,), 65, dtype=torch.uint8)), None, f"{QKV}.comfy_quant is not JSON"),
}


@pytest.mark.parametrize("what", LOST)
def test_scales_that_comfyui_would_not_apply_are_refused(tmp_path, what):
    """ComfyUI takes an 8-bit weight whose scale it does not find for the weight itself."""
    change, metadata, says = LOST[what]
    tensors = change(flux_tensors(hidden=64))
    if metadata == listed(OTHER):
        tensors |= {f"{OTHER}.weight": SCALED.clone(), f"{OTHER}.weight_scale": torch.ones(()),
                    "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    header = header_of(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError) as caught:
        foreign.find(header)
    assert says in str(caught.value) and "a.safetensors" in str(caught.value)
