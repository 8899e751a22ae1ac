"""A small FLUX in a real ComfyUI, in 16 bits and in 4, for the tests that apply LoRAs and ControlNets to both."""

import pytest
import torch


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory):
    """File of a random FLUX.1 in 16 bits."""
    from .comfy_models import write_flux

    return write_flux(tmp_path_factory.mktemp("models") / "flux.safetensors")


@pytest.fixture(scope="module")
def native_file(flux_file, tmp_path_factory):
    """The same model quantized, in this pack's layout."""
    from .comfy_models import quantized, save

    with torch.inference_mode():
        return save(quantized(load(flux_file))[0], tmp_path_factory.mktemp("models") / "flux_4bit.safetensors")


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory):
    """Files of a random FLUX.1 with a block of each kind: in 16 bits, and quantized."""
    from comfyui_svdquant.quant.host import loader, quantize
    from comfyui_svdquant.quant.quantizer import presets

    from .comfy_models import Progress, save, write_flux

    folder = tmp_path_factory.mktemp("models")
    path = write_flux(folder / "flux.safetensors", depth_single=1)
    with torch.inference_mode():
        quantized_model, _ = quantize.quantize(loader.load_model(path), presets.make_recipe("data-free", 16), None, None, 2, 0, Progress())
        return path, save(quantized_model, folder / "flux_4bit.safetensors")


def load(path):
    from comfyui_svdquant.quant.host import loader

    return loader.load_model(path)


@pytest.fixture
def plain(pair_files):
    return load(pair_files[0])


@pytest.fixture
def quantized_model(pair_files):
    return load(pair_files[1])


@pytest.fixture
def on_cpu(monkeypatch):
    """ComfyUI puts models on the CPU, on a machine with a GPU too: for tests whose stand-ins take a GPU's place. A test must ask for it
    before the fixtures that load its models."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "cpu_state", management.CPUState.CPU)
    yield
    management.unload_all_models()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The type of the device on which ComfyUI puts models: a test that uses this fixture runs on the CPU, and on a GPU."""
    import comfy.model_management as management

    if request.param == "cpu":
        request.getfixturevalue("on_cpu")
    yield request.param
    management.unload_all_models()


@pytest.fixture(scope="session")
def drifts():
    return {}


@pytest.fixture
def drift(pair_files, drifts):
    """The relative error of a 4-bit model's sampled latent to that of the 16-bit model, on the device that ComfyUI uses now."""
    import comfy.model_management
    from comfyui_svdquant.quant.quantizer.metrics import relative_error

    from .comfy_models import sample

    device = comfy.model_management.get_torch_device()
    if device not in drifts:
        with torch.inference_mode():
            exact, quantized = (sample(load(path)) for path in pair_files)
            drifts[device] = relative_error(quantized, exact)
    return drifts[device]


@pytest.fixture
def shared_memory(monkeypatch):
    """LoRA branches share memory with their layers, as they do on a GPU."""
    from comfyui_svdquant.quant.layers import linear

    monkeypatch.setattr(linear, "SHARING", {"cpu", "cuda"})
