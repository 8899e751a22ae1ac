"""Z-Image's own: models without padding tokens, a parameter that no forward reads, its relative Lumina 2."""

import comfy.model_detection
import pytest
import torch
from comfyui_svdquant.quant.checkpoint.header import read_header
from comfyui_svdquant.quant.host import checks, loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import save
from ..family_cases import Z_IMAGE

pytestmark = pytest.mark.usefixtures("inference_mode")


def file_of(path, **changes):
    save_file(Z_IMAGE.tensors(depth=1, refiners=1, **changes), path)
    return str(path)


def test_a_norm_that_no_forward_reads_is_left_out(tmp_path):
    """Some hosts' models have it, and ComfyUI leaves it uninitialized where a file lacks it."""
    first, second = (loader.load_model(file_of(tmp_path / f"{unused}.safetensors", unused=unused)) for unused in (False, True))
    assert torch.equal(Z_IMAGE.sample(first), Z_IMAGE.sample(second))
    if hasattr(first.model.diffusion_model, "norm_final"):
        first.model.diffusion_model.norm_final.weight.fill_(float("nan"))
    quantized_model, _ = Z_IMAGE.quantized(first, preset="data-free")
    path = save(quantized_model, tmp_path / "z_4bit.safetensors")
    assert not any(name.startswith("norm_final") for name in read_header(path).tensors)
    assert torch.equal(Z_IMAGE.sample(loader.load_model(path)), Z_IMAGE.sample(quantized_model))


def test_a_model_without_padding_tokens(tmp_path):
    plain = loader.load_model(file_of(tmp_path / "z.safetensors", pad_tokens=False))
    quantized_model, _ = Z_IMAGE.quantized(plain, preset="data-free")
    assert quantized_model.model.diffusion_model.pad_tokens_multiple is None
    assert relative_error(Z_IMAGE.sample(quantized_model), Z_IMAGE.sample(plain)) < 0.3


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_host_sees_the_norm_by_which_it_tells_whether_fp16_fits(tmp_path, monkeypatch, prefix):
    """Everything else is detected from shapes."""
    path, tensors, seen = tmp_path / "z.safetensors", Z_IMAGE.tensors(depth=3, refiners=1), []
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    detect = comfy.model_detection.detect_unet_config
    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda given, *args: seen.append(given) or detect(given, *args))
    loader.check_file(read_header(str(path)))
    [(name, tensor)] = [(name, tensor) for name, tensor in seen[0].items() if not tensor.is_meta]
    assert name == "layers.1.ffn_norm1.weight" and torch.equal(tensor, tensors[name])


@pytest.mark.parametrize(("key", "value"), [("z_image_modulation", False), ("siglip_feat_dim", 1152), ("clip_text_dim", 1024)])
def test_relatives_on_the_same_class_are_of_no_declared_family(tmp_path, key, value):
    """Lumina 2, Z-Image-Omni and NewBie."""
    plain = loader.load_model(file_of(tmp_path / "z.safetensors"))
    plain.model.model_config.unet_config[key] = value
    assert checks.check_model(plain) is None
