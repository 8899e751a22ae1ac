"""The type in which a model computes, and its packed layers' tensors."""

import pytest
import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import build, fused_blocks, loader
from comfyui_svdquant.quant.layers.preparation import of_other_sizes

from ..comfy_models import quantized

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_layers_are_converted_to_the_models_type(flux_file, native_file, monkeypatch, dtype):
    """This holds for a file and for a newly quantized model, on the device on which it will run. The warm-up expects the same dtype."""
    taken, warmed = [], []
    monkeypatch.setattr(build, "compute_in", lambda model, *rest: taken.append((len(model.diffusion_model.state_dict()), *rest)))
    monkeypatch.setattr(loader, "warm_up", lambda model, *rest: warmed.append(rest))
    device = build.comfy.model_management.get_torch_device()
    loaded = loader.load_model(native_file, dtype)
    entries = len(loaded.model.diffusion_model.state_dict())
    assert taken == [(entries, dtype, device)]
    [(*of_layers, others)] = warmed
    assert of_layers == [device, dtype, of_other_sizes(FAMILY.tokens)]
    # Partial functions are equal if they are the same object only. Elsewhere than on a GPU there are none.
    expected = fused_blocks.preparations(loaded.model.diffusion_model, dtype, device, FAMILY.tokens)
    assert [(other.func, other.args) for other in others] == [(other.func, other.args) for other in expected]
    quantized(loader.load_model(flux_file, dtype), "data-free")
    assert taken[-1] == (entries, dtype, device)
