"""A FLUX.2 klein for nunchaku-lite in a real ComfyUI: its layers compute what an independent decoder of the file computes."""

import json

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import convert, inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from .. import nunchaku_files as files
from ..family_cases import FLUX2
from ..random_flux2 import flux2_shapes
from ..random_models import random_tensors

HIDDEN = 256
DOUBLE = {"img_attn.qkv": "attn.to_qkv", "img_attn.proj": "attn.to_out.0", "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
          "txt_attn.qkv": "attn.to_added_qkv", "txt_attn.proj": "attn.to_add_out", "txt_mlp.0": "ff_context.linear_in",
          "txt_mlp.2": "ff_context.linear_out"}
OUTSIDE = {"img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
           "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2", "final_layer.linear": "proj_out",
           "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
           "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
           "single_stream_modulation.lin": "single_stream_modulation.linear"}
NORMS = {"img_attn.norm.query": "attn.norm_q", "img_attn.norm.key": "attn.norm_k", "txt_attn.norm.query": "attn.norm_added_q",
         "txt_attn.norm.key": "attn.norm_added_k", "norm.query": "attn.norm_q", "norm.key": "attn.norm_k"}
CONFIG = {"_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32] * 4, "in_channels": 128,
          "joint_attention_dim": 128, "mlp_ratio": 3.0, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1,
          "rope_theta": 2000, "guidance_embeds": False}

pytestmark = pytest.mark.usefixtures("inference_mode")


def encoded(nvfp4):
    """({Nunchaku's name: tensor}, metadata) of a klein with a block of each kind."""
    rest, tensors = random_tensors(flux2_shapes(depth=1, depth_single=1, guidance=False)), {}

    def put(part, weight, seed):
        matrices = weight.chunk(3) if "qkv" in part else [weight]
        tensors.update({f"{part}.{leaf}": tensor for leaf, tensor in files.encoded(part, matrices, [], nvfp4, seed).items()})

    for seed, (ours, theirs) in enumerate(DOUBLE.items()):
        put(f"transformer_blocks.0.{theirs}", rest.pop(f"double_blocks.0.{ours}.weight"), seed)
    single, first, second = "single_transformer_blocks.0.attn", *(rest.pop(f"single_blocks.0.linear{i}.weight") for i in (1, 2))
    put(f"{single}.qkv_proj", first[:3 * HIDDEN], 20)
    put(f"{single}.mlp_fc1", first[3 * HIDDEN:], 20)  # the same smoothing factor
    put(f"{single}.out_proj", second[:, :HIDDEN], 21)
    put(f"{single}.mlp_fc2", second[:, HIDDEN:], 22)
    for ours, theirs in OUTSIDE.items():
        tensors[f"{theirs}.weight"] = rest.pop(f"{ours}.weight")
    tensors["norm_out.linear.weight"] = rest.pop("final_layer.adaLN_modulation.1.weight").roll(HIDDEN, 0)
    for name, tensor in rest.items():
        kind, index, norm = name.removesuffix("_norm.scale").split(".", 2)
        tensors[f"{'single_' if kind.startswith('single') else ''}transformer_blocks.{index}.{NORMS[norm]}.weight"] = tensor
    metadata = {"model_class": "NunchakuFlux2Transformer2DModel", "config": json.dumps(CONFIG),
                "quantization_config": json.dumps(files.NVFP4 if nvfp4 else files.INT4)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata


@pytest.mark.parametrize("nvfp4", [False, True])
def test_its_layers_compute_what_an_independent_decoder_does(tmp_path, nvfp4):
    path, g = tmp_path / "svdq-klein.safetensors", torch.Generator().manual_seed(0)
    tensors, metadata = encoded(nvfp4)
    save_file(tensors, path, metadata)
    patcher = loader.load_model(str(path), act_bits=8)
    layers, single = patcher.packed_layers(), "single_transformer_blocks.0.attn"

    def decoded(part, x):
        return files.Decoded(tensors, part, nvfp4)(x)

    x, wide = torch.randn(5, HIDDEN, generator=g), torch.randn(5, 4 * HIDDEN, generator=g)
    expected = {f"double_blocks.0.{ours}": (y := x if not ours.endswith("mlp.2") else wide[:, HIDDEN:],
                                            decoded(f"transformer_blocks.0.{theirs}", y)) for ours, theirs in DOUBLE.items()}
    expected["single_blocks.0.linear1"] = x, torch.cat([decoded(f"{single}.{part}", x) for part in ("qkv_proj", "mlp_fc1")], -1)
    expected["single_blocks.0.linear2"] = wide, (decoded(f"{single}.out_proj", wide[:, :HIDDEN])
                                                 + decoded(f"{single}.mlp_fc2", wide[:, HIDDEN:]))
    assert expected.keys() == layers.keys()
    for name, (given, y) in expected.items():
        assert relative_error(layers[name](given), y) < 0.03, name
    model = patcher.model.diffusion_model
    swapped = torch.cat(tensors["norm_out.linear.weight"].chunk(2)[::-1])
    assert torch.equal(model.final_layer.adaLN_modulation[1].weight, swapped)
    assert torch.isfinite(FLUX2.sample(patcher)).all()


def test_inspect_and_convert_read_it_and_refuse_another_smoothing(tmp_path):
    path, ours = tmp_path / "svdq-klein.safetensors", tmp_path / "ours.safetensors"
    tensors, metadata = encoded(False)
    save_file(tensors, path, metadata)
    text = inspection.text(inspection.inspect(read_header(str(path))))
    assert "Nunchaku layout, INT4" in text and "FLUX.2: 1 double and 1 single blocks, hidden size 256" in text
    convert.convert(str(path), str(ours), "native")
    first, second = (loader.load_model(str(file)).model.diffusion_model.state_dict() for file in (path, ours))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    smooth = "single_transformer_blocks.0.attn.mlp_fc1.smooth_factor"
    save_file(tensors | {smooth: tensors[smooth] * 2}, path, metadata)
    with pytest.raises(CheckpointError, match="read the same input with different smoothing factors"):
        loader.load_model(str(path))
    save_file(tensors | {"double_stream_modulation_img.linear.bias": torch.zeros(6 * HIDDEN)}, path, metadata)
    with pytest.raises(CheckpointError, match="has tensor double_stream_modulation_img.linear.bias, which a Nunchaku INT4 FLUX.2"):
        loader.load_model(str(path))
