"""The tensors that a family declares, by which files are checked without ComfyUI, are those of ComfyUI's own model."""

import comfy.model_detection
import pytest
from comfyui_svdquant.quant import families
from comfyui_svdquant.quant.host import build, loader

from ..random_chroma import chroma_tensors
from ..random_flux import flux_shapes
from ..random_flux2 import flux2_shapes
from ..random_qwen_image import qwen_image_shapes
from ..random_z_image import z_image_shapes

# Configurations of published models whose widths every version of ComfyUI detects.
PUBLISHED = {
    "FLUX.2-dev": ("flux2", {"hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48, "context_in_dim": 15360,
                             "in_channels": 128, "out_channels": 128, "mlp_ratio": 3.0, "patch_size": 1, "guidance_embed": True}),
    "Qwen-Image": ("qwen_image", {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584,
                                  "in_channels": 64, "out_channels": 16, "use_additional_t_cond": False, "default_ref_method": "index"}),
    "Z-Image": ("lumina2", {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "cap_feat_dim": 2560, "in_channels": 16,
                            "patch_size": 2, "ffn_dim_multiplier": 8 / 3, "pad_tokens_multiple": 32}),
}

FLUX, FLUX2, CHROMA, QWEN, Z_IMAGE = families.FAMILIES
CHROMA_SHAPES = {name: tuple(tensor.shape) for name, tensor in chroma_tensors().items()}


@pytest.mark.parametrize(("family", "shapes", "stored"), [
    (FLUX, flux_shapes(), {}), (FLUX, flux_shapes(guidance=False), {}), (FLUX, flux_shapes(in_channels=96, depth=2, depth_single=0), {}),
    (FLUX, flux_shapes(), {"mlp_ratio": 2.5, "axes_dim": [16, 24, 24]}), (FLUX, flux_shapes(), {"patch_size": 1}),
    (CHROMA, CHROMA_SHAPES, {}), (CHROMA, CHROMA_SHAPES, {"mlp_ratio": 0.3, "patch_size": 1}),
    (FLUX2, flux2_shapes(), {}), (FLUX2, flux2_shapes(guidance=False, depth=2, depth_single=1), {}),
    (FLUX2, flux2_shapes(), {"mlp_ratio": 2.5, "axes_dim": [32, 32, 32, 160]}),
    (QWEN, qwen_image_shapes(), {}), (QWEN, qwen_image_shapes(hidden=384, depth=1), {}),
    (Z_IMAGE, z_image_shapes(), {}), (Z_IMAGE, z_image_shapes(hidden=384, refiners=1, pad_tokens=False), {}),
    (Z_IMAGE, z_image_shapes(), {"ffn_dim_multiplier": 4.0, "axes_dims": [32, 112, 112]}),
])
def test_they_are_those_of_the_host(family, shapes, stored):
    config = family.configuration.of(shapes, stored)
    tensors = build.shapes_as_tensors(shapes)
    detected = comfy.model_detection.detect_unet_config(tensors, "")
    host = family.configuration.added_to(detected, config)
    model = build.empty_model(comfy.model_detection.model_config_from_unet_config(host, tensors), {}, None)
    host = {build.stored_name(model, name): tuple(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    assert family.tensors(config) == host


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_left_to_comfyuis_own_loader(name):
    """Its detection and the family's agree on them; on smaller models they don't, which ComfyUI's loader would build too wide."""
    image_model, config = PUBLISHED[name]
    family = families.of_image_model(image_model)
    shapes = family.tensors(config)
    found = family.configuration.of(shapes)
    assert found == found | config and family.variant(found) == name and loader._core_agrees(family, shapes)
    small = {"flux2": flux2_shapes, "qwen_image": qwen_image_shapes, "lumina2": z_image_shapes}[image_model]()
    assert image_model == "flux2" or not loader._core_agrees(family, small)
