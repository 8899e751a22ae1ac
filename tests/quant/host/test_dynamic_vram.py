"""Models under ComfyUI's Dynamic VRAM, with which the host's own linears and embeddings have no parameters until they are loaded."""

import logging
import sys
from types import SimpleNamespace

import comfy.ops
import pytest
import torch
from comfyui_svdquant.quant.host import build, loader, patcher, quantize
from comfyui_svdquant.quant.host.operations import Operations
from comfyui_svdquant.quant.quantizer import presets

from ..comfy_models import Progress, sample, saved_and_loaded

pytestmark = pytest.mark.usefixtures("inference_mode")

try:
    from comfy import memory_management
except ImportError:  # older ComfyUIs have no Dynamic VRAM
    memory_management = None


def lazy(host_class):
    """A stand-in for ComfyUI's constructor under Dynamic VRAM, which leaves out the parameters of every class that loads as host_class."""
    create, load = host_class.__init__, host_class._load_from_state_dict

    def init(self, *args, **kwargs):
        create(self, *args, **kwargs)
        if type(self)._load_from_state_dict is load:
            self._parameters.update(dict.fromkeys(self._parameters))

    return init


@pytest.fixture
def dynamic(monkeypatch):
    """Layers are created as ComfyUI creates them at its start on NVIDIA GPUs; the rest of Dynamic VRAM needs a GPU."""
    for name in ("Linear", "Embedding"):
        host_class = getattr(comfy.ops.disable_weight_init, name)
        monkeypatch.setattr(host_class, "__init__", lazy(host_class))


@pytest.mark.skipif(not hasattr(memory_management, "aimdo_enabled"), reason="this ComfyUI has no Dynamic VRAM")
def test_the_host_does_what_the_stand_in_does(monkeypatch):
    monkeypatch.setattr(memory_management, "aimdo_enabled", True)
    assert comfy.ops.manual_cast.Linear(4, 4).weight is None
    assert Operations.Linear(4, 6, device="meta").weight.is_meta and Operations.Embedding(4, 6, device="meta").weight.is_meta


@pytest.mark.parametrize("layer", [lambda: Operations.Linear(4, 6, device="meta"), lambda: Operations.Embedding(4, 6, device="meta")])
def test_this_packs_models_have_them(dynamic, layer):
    assert layer().weight.is_meta and layer().weight.numel() == 24


def test_a_file_draws_what_it_draws_without(pair_files, request):
    expected = sample(loader.load_model(pair_files[1]))
    request.getfixturevalue("dynamic")
    model = loader.load_model(pair_files[1])
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(build.copied(model.model, model.backup)), expected)


def test_what_is_quantized_is_saved_and_loaded(pair_files, request, tmp_path):
    source = loader.load_model(pair_files[0])
    request.getfixturevalue("dynamic")
    quantized, _ = quantize.quantize(source, presets.make_recipe("data-free", 16), None, None, 2, 0, Progress())
    path, loaded = saved_and_loaded(quantized, tmp_path / "quantized.safetensors")
    assert torch.equal(sample(loaded), sample(quantized))


@pytest.mark.parametrize("module", [loader, patcher])
@pytest.mark.parametrize(("enabled", "level", "beside"), [(True, logging.DEBUG, False), (True, logging.INFO, True),
                                                          (False, logging.DEBUG, True)])
def test_no_thread_compiles_while_allocations_are_logged(pair_files, monkeypatch, caplog, module, enabled, level, beside):
    model, warmed = loader.load_model(pair_files[1]), []
    monkeypatch.setattr(module, "warm_up", lambda *_: warmed.append(True))
    caplog.set_level(level)
    monkeypatch.setitem(sys.modules, "comfy.memory_management", SimpleNamespace(aimdo_enabled=enabled))
    if module is loader:
        loader.load_model(pair_files[1])
    else:
        model._warm_up()
    assert bool(warmed) is beside
