"""The switch that names the first layer with a NaN or an infinity."""

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.host import find_nan, loader

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


def test_the_switch_does_not_change_what_a_sound_model_draws(file, monkeypatch):
    expected = sample(loader.load_model(file))
    monkeypatch.setenv(find_nan.SWITCH, "1")
    assert torch.equal(sample(loader.load_model(file)), expected)
