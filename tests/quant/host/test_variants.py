"""Every FLUX.1 at reduced size, through ComfyUI's own nodes: loaded, quantized, saved, loaded and sampled, and the configuration
read from the file. Other models with FLUX.1's blocks are refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.chroma.model
import comfy.ldm.flux.redux
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy import quant_ops
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_flux import FluxGuidance
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from comfyui_svdquant.quant.checkpoint import inspection, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.families import TITLES
from comfyui_svdquant.quant.host import checks, loader
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from nodes import InpaintModelConditioning, StyleModelApply
from safetensors.torch import save_file

from ..comfy_models import CONTEXT, HIDDEN, prompts, quantized, sample, save, write_flux
from ..random_flux import flux_tensors

VAE_FILE = Path(__file__).resolve().parents[3] / "demo" / "tiny_flux" / "tiny_vae.safetensors"

pytestmark = pytest.mark.usefixtures("inference_mode")


def vae():
    """A real VAE of FLUX.1's shape: 16 channels, an eighth of the size."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE_FILE)))


def pixels():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))


def plain_prompts(count):
    return prompts(count)


def krea(count):
    return FluxGuidance.execute(prompts(count), 4.5)[0]


def kontext(count):
    return ReferenceLatent.execute(prompts(count), {"samples": vae().encode(pixels())})[0]


def fill(count):
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 8:40] = 1
    return InpaintModelConditioning().encode(prompts(count), prompts(count), pixels(), vae(), mask)[0]


def canny_or_depth(count):
    return InstructPixToPixConditioning.execute(positive=prompts(count), negative=prompts(count), vae=vae(), pixels=pixels())[0]


def redux(count, strength=2.0, strength_type="multiply"):
    encoder = comfy.ldm.flux.redux.ReduxImageEncoder(redux_dim=32, txt_in_features=CONTEXT)
    g = torch.Generator().manual_seed(6)
    encoder.load_state_dict({name: torch.randn(t.shape, generator=g) / t.shape[-1]**0.5 for name, t in encoder.state_dict().items()})
    # 64 similar patches, since random attention would average different ones.
    seen = SimpleNamespace(last_hidden_state=torch.randn(1, 1, 32, generator=g).repeat(1, 64, 1))
    return StyleModelApply().apply_stylemodel(prompts(count), comfy.sd.StyleModel(encoder), seen, strength, strength_type)[0]


def redux_by_attention(count):
    return redux(count, 20.0, "attn_bias")


# {name: (shapes of the file, conditioning, ComfyUI's class, latent channels of img_in, whether it takes guidance)}
VARIANTS = {
    "dev": ({}, plain_prompts, "Flux", 16, True),
    "schnell": ({"guidance": False}, plain_prompts, "Flux", 16, False),
    "Krea": ({}, krea, "Flux", 16, True),
    "Kontext": ({}, kontext, "Flux", 16, True),
    "Fill": ({"in_channels": 96}, fill, "Flux", 96, True),
    "Canny and Depth": ({"in_channels": 32}, canny_or_depth, "Flux", 32, True),
    "Redux": ({}, redux, "Flux", 16, True),
    "Redux by attention": ({}, redux_by_attention, "Flux", 16, True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_quantized_saved_loaded_and_sampled(tmp_path, variant):
    changes, conditioning, kind, channels, guidance = VARIANTS[variant]
    plain = loader.load_model(write_flux(tmp_path / "flux.safetensors", depth_single=1, **changes))
    cond = conditioning(1)
    exact = sample(plain, cond=cond)
    quantized_model, records = quantized(plain, conditioning=conditioning(2))
    assert len(records) == 16 + guidance  # guidance has one more layer in its embedder
    y = sample(quantized_model, cond=cond)
    error = relative_error(y, exact)
    assert 0.001 < error < 0.3, f"{variant}: relative error of the latent {error:.3f}"
    path = save(quantized_model, tmp_path / "flux_4bit.safetensors")
    again = loader.load_model(path)
    assert torch.equal(sample(again, cond=cond), y)
    if conditioning is not plain_prompts:
        # The variant's own input affects the 4-bit model: its picture is that of the 16-bit model with the input, not without.
        without = sample(plain)
        assert error < 0.5 * relative_error(y, without) and relative_error(exact, without) > 0.1
    for patcher in (plain, again):
        params, model = patcher.model.diffusion_model.params, patcher.model
        assert type(model).__name__ == kind and model.diffusion_model.img_in.weight.shape == (HIDDEN, channels * 4)
        assert (params.guidance_embed, params.in_channels, params.out_channels) == (guidance, channels, 16)
    config = native.config(read_header(path))
    assert (config["in_channels"], config["guidance_embed"], config["depth_single_blocks"]) == (channels, guidance, 1)
    # The noise schedule is the variant's own: schnell's is not dev's.
    assert type(again.model.model_config) is type(plain.model.model_config)
    assert again.model.model_type == plain.model.model_type
    assert torch.equal(again.get_model_object("model_sampling").sigmas, plain.get_model_object("model_sampling").sigmas)


def test_the_variants_are_distinguished(tmp_path):
    kinds = {variant: type(loader.load_model(write_flux(tmp_path / "flux.safetensors", depth_single=1, **VARIANTS[variant][0]))
                           .model.model_config).__name__ for variant in ("dev", "schnell", "Fill", "Canny and Depth")}
    assert kinds == {"dev": "Flux", "schnell": "FluxSchnell", "Fill": "FluxInpaint", "Canny and Depth": "Flux"}


def test_several_reference_latents_of_other_sizes(tmp_path):
    """Kontext with two pictures of different sizes, in a batch of prompts."""
    plain = loader.load_model(write_flux(tmp_path / "flux.safetensors", depth_single=1))
    cond = kontext(1)
    for height, width in ((4, 12), (6, 2)):
        cond = ReferenceLatent.execute(cond, {"samples": torch.randn(1, 16, height, width)})[0]
    quantized_model, records = quantized(plain, conditioning=cond + prompts(1))
    tokens = {record.name: record.tokens for record in records}
    assert tokens["double_blocks.0.img_attn.qkv"] == 2 * (16 + 16 + 12 + 3) + 2 * 16
    assert relative_error(sample(quantized_model, cond=cond), sample(plain, cond=cond)) < 0.3


# --- relatives -----------------------------------------------------------------------------------------------------


def relative(kind, **changes):
    """A MODEL of ComfyUI's class for a relative of FLUX.1 at reduced size; changes: differences from FLUX.1's configuration."""
    config = {"in_channels": 16, "out_channels": 16, "vec_in_dim": None, "context_in_dim": CONTEXT, "hidden_size": HIDDEN, "mlp_ratio": 4.0,
              "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
              "qkv_bias": True, "guidance_embed": False, "image_model": "flux", "txt_ids_dims": [1, 2]}
    config = getattr(comfy.supported_models, kind)(config | changes)
    config.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=None), torch.device("cpu"), torch.device("cpu"))


@pytest.mark.skipif(not hasattr(comfy.supported_models, "LongCatImage"), reason="this ComfyUI has neither")
def test_longcat_and_ovis_are_no_flux():
    """They run on FLUX.1's own class. Unsigned codes would clip the input of Ovis' linear2, which does not come from a GELU, and neither
    has FLUX.1's tensors. Their layers are those that calibration finds."""
    for model in (relative("LongCatImage"), relative("FluxSchnell", yak_mlp=True, txt_norm=True)):
        assert checks.check_model(model) is None


def test_another_packs_transformer_is_refused(tmp_path):
    patcher = loader.load_model(write_flux(tmp_path / "flux.safetensors", depth_single=1))
    patcher.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="this MODEL runs on another pack's Linear; load the 16-bit model"):
        checks.check_model(patcher)


def test_norms_under_newer_comfyuis_names(tmp_path):
    plain = loader.load_model(write_flux(tmp_path / "flux.safetensors", depth_single=1))
    tensors = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in flux_tensors(depth_single=1).items()}
    save_file(tensors, tmp_path / "newer.safetensors")
    assert torch.equal(sample(loader.load_model(str(tmp_path / "newer.safetensors"))), sample(plain))


@pytest.mark.parametrize("listed", [False, True])
def test_formats_that_this_comfyui_does_not_read(tmp_path, listed):
    name, conf = "double_blocks.0.img_attn.qkv", {"format": "w3a5"}
    tensors = flux_tensors(depth_single=1) | {f"{name}.weight_scale": torch.ones(())}
    metadata = {"_quantization_metadata": json.dumps({"layers": {name: conf}})} if listed else None
    if not listed:
        tensors[f"{name}.comfy_quant"] = layout.encode_conf(conf)
    save_file(tensors, tmp_path / "newer.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"newer.safetensors has layers in the format 'w3a5' \({name}\)"):
        loader.load_model(str(tmp_path / "newer.safetensors"))


def mxfp8_file(path, listed=False):
    """A FLUX.1 whose linear layer is in mxfp8: float8 codes, and a power of two for each 32 columns."""
    name, tensors = "double_blocks.0.img_attn.qkv", flux_tensors(depth_single=1)
    n, k = tensors[f"{name}.weight"].shape
    tensors |= {f"{name}.weight": torch.zeros(n, k, dtype=torch.float8_e4m3fn),
                f"{name}.weight_scale": torch.zeros(n, k // 32, dtype=torch.uint8).view(torch.float8_e8m0fnu)}
    if not listed:
        tensors[f"{name}.comfy_quant"] = layout.encode_conf({"format": "mxfp8"})
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": {name: {"format": "mxfp8"}}})} if listed else None)
    return str(path)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this PyTorch has no type of such scales")
@pytest.mark.parametrize("listed", [False, True])
def test_mxfp8_is_named(tmp_path, listed):
    path = mxfp8_file(tmp_path / "mx.safetensors", listed)
    facts = inspection.inspect(read_header(path))
    assert facts["format"] == "a FLUX.1 with layers in ComfyUI's format mxfp8" and "float8_e8m0fnu" in facts["bytes_by_dtype"]
    if "mxfp8" in getattr(quant_ops, "QUANT_ALGOS", {}):
        loader.load_model(path)
        return
    with pytest.raises(CheckpointError, match="mx.safetensors has layers in the format 'mxfp8' .* which this ComfyUI does not read"):
        loader.load_model(path)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this PyTorch has no type of such scales")
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_in_a_type_for_scales_are_refused(tmp_path, part):
    tensors = flux_tensors(depth_single=1)
    name = f"double_blocks.0.img_attn.qkv.{part}"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "odd.safetensors")
    for read in (loader.load_model, lambda path: inspection.inspect(read_header(path))):
        with pytest.raises(CheckpointError, match=f"odd.safetensors has {name}, and does not describe the format"):
            read(str(tmp_path / "odd.safetensors"))


def test_a_matrix_without_columns_is_refused(tmp_path):
    tensors = flux_tensors(depth_single=1) | {"txt_in.weight": torch.zeros(0, 0)}
    save_file(tensors, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="empty.safetensors has no matrix txt_in.weight"):
        loader.load_model(str(tmp_path / "empty.safetensors"))


RELATIVES = {
    "a Chroma Radiance model": ("nerf_blocks.0.norm.weight",),
    "a Chroma model with parts missing, or under diffusers' names": ("distilled_guidance_layer.in_proj.weight",),
    "a FLUX.2 model with parts missing": ("double_stream_modulation_img.lin.weight",),
    "a FLUX.2 model under diffusers' names, which ComfyUI does not read": ("double_stream_modulation_img.linear.weight",),
    "a HunyuanVideo model": ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.norm.key_norm.weight"),
    "a HiDream model": ("caption_projection.0.linear.weight",),
    "a Qwen-Image model with parts missing": ("transformer_blocks.0.img_mlp.net.0.proj.weight", "txt_norm.weight"),
    "a Z-Image model with parts missing": ("cap_embedder.1.weight",),
    "a Lumina 2 model": ("cap_embedder.1.weight", "layers.0.adaLN_modulation.1.weight"),
    "a Z-Image-Omni model": ("cap_embedder.1.weight", "siglip_embedder.0.weight"),
    "a Z-Image model in pixel space": ("cap_embedder.1.weight", "dec_net.cond_embed.weight"),
    "a Z-Image model under diffusers' names, which only Load Diffusion Model reads": ("noise_refiner.0.attention.norm_k.weight",),
}


@pytest.mark.parametrize("what", RELATIVES)
def test_relatives_are_refused_by_name(tmp_path, what):
    path = tmp_path / "model.safetensors"
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + key: torch.zeros(4, 4) for key in (*RELATIVES[what], "final_layer.linear.weight")}, path)
        with pytest.raises(CheckpointError, match=f"model.safetensors is {what}; choose a {TITLES} model"):
            loader.load_model(str(path))


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv.lora_down.weight", "double_blocks.0.img_attn.gate.weight"])
def test_a_tensor_that_the_model_does_not_have_is_named(tmp_path, name):
    save_file(flux_tensors(depth_single=1) | {name: torch.zeros(4, 4)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=f"odd.safetensors has tensor {name}, which a FLUX.1 of its size has no place for"):
        loader.load_model(str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_models_in_the_file_are_ignored(tmp_path, prefix):
    tensors = {prefix + name: tensor for name, tensor in flux_tensors(depth_single=1).items()}
    save_file(tensors | {"vae.decoder.conv_in.weight": torch.zeros(4, 4), "text_encoders.t5xxl.scaled_fp8": torch.zeros(2)},
              tmp_path / "whole.safetensors")
    assert torch.isfinite(sample(loader.load_model(str(tmp_path / "whole.safetensors")))).all()
