"""The switch that names the first layer with a NaN or an infinity."""

import comfy.model_management
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.host import build, find_nan, loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import sample
from ..packed_flux import packed_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
LAYER = "single_blocks.0.linear1"


@pytest.fixture(autouse=True)
def hook_removed():
    """With a hook on all modules, the MLPs of the tests that follow in this process would not be one op."""
    yield
    if find_nan._install.cache_info().currsize:
        find_nan._install().remove()
        find_nan._install.cache_clear()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "flux.safetensors")
    native.save(path, *packed_flux(), {"preset": "data-free"}, "flux")
    return path


@pytest.fixture
def broken(file, monkeypatch):
    """A function: a quantized model whose layer has a NaN in its branch, loaded with the switch at a value."""
    def load(switch):
        monkeypatch.setenv(find_nan.SWITCH, switch)
        patcher = loader.load_model(file)
        branch = patcher.model.diffusion_model.get_submodule(LAYER).weight_proj_up
        branch.data = branch.data.clone()
        branch.data[3, 0] = float("nan")
        return patcher
    return load


def test_the_first_layer_with_a_nan_is_named(broken):
    with pytest.raises(FloatingPointError, match=rf"^{LAYER} \(.*Linear\) is the first layer whose output has NaN or infinity \("):
        sample(broken("1"))


def test_a_nan_between_layers_is_named(monkeypatch):
    monkeypatch.setenv(find_nan.SWITCH, "1")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    find_nan.watch(model)
    model(torch.ones(1, 2))
    with pytest.raises(FloatingPointError, match=r"^The input of 0 \(Linear\) has NaN or infinity already, and no layer before it had"):
        model(torch.tensor([[1.0, float("inf")]]))


@pytest.mark.parametrize("switch", ["", "0"])
def test_without_the_switch_nothing_is_checked(broken, switch):
    assert sample(broken(switch)).isnan().any()


def test_the_switch_changes_only_that_layers_run_one_by_one(file, monkeypatch):
    """A sound model draws the bits of a model whose layers are not fused. On a GPU a fused op rounds less often, which is all that tells
    the two from the model without the switch: the CPU fuses nothing, and draws the same bits."""
    whole = sample(loader.load_model(file))
    with monkeypatch.context() as patch:
        patch.setattr(build, "fuse", lambda *_: False)
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            one_by_one = sample(loader.load_model(file))
        finally:
            hook.remove()
    monkeypatch.setenv(find_nan.SWITCH, "1")
    found = sample(loader.load_model(file))
    assert torch.equal(found, one_by_one)
    assert relative_error(found, whole) <= (0.05 if comfy.model_management.get_torch_device().type == "cuda" else 0)
