"""The tensors that a family declares, by which files are checked without ComfyUI, are those of ComfyUI's own model."""

import comfy.model_detection
import pytest
from comfyui_svdquant.quant import families
from comfyui_svdquant.quant.host import build

from ..random_chroma import chroma_tensors
from ..random_flux import flux_shapes

FLUX, CHROMA = (families.of_image_model(name) for name in ("flux", "chroma"))
CHROMA_SHAPES = {name: tuple(tensor.shape) for name, tensor in chroma_tensors().items()}


@pytest.mark.parametrize(("family", "shapes", "stored"), [
    (FLUX, flux_shapes(), {}), (FLUX, flux_shapes(guidance=False), {}), (FLUX, flux_shapes(in_channels=96, depth=2, depth_single=0), {}),
    (FLUX, flux_shapes(), {"mlp_ratio": 2.5, "axes_dim": [16, 24, 24]}), (FLUX, flux_shapes(), {"patch_size": 1}),
    (CHROMA, CHROMA_SHAPES, {}), (CHROMA, CHROMA_SHAPES, {"mlp_ratio": 0.3, "patch_size": 1}),
])
def test_they_are_those_of_the_host(family, shapes, stored):
    config = family.configuration.of(shapes, stored)
    tensors = build.shapes_as_tensors(shapes)
    detected = comfy.model_detection.detect_unet_config(tensors, "")
    model = build.empty_model(comfy.model_detection.model_config_from_unet_config(detected | config, tensors), {}, None)
    host = {build.stored_name(model, name): tuple(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    assert family.tensors(config) == host
