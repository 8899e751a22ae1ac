"""Files whose layers are in ComfyUI's own formats: ComfyUI's loader loads them if it reads the format; otherwise the error names it."""

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy import quant_ops
from comfyui_svdquant.quant.checkpoint import core_formats, inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.host.weights import effective_weight
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import load_file, save_file

from ..comfy_models import quantized, sample
from ..random_flux import flux_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")

QKV = "double_blocks.0.img_attn.qkv"
DESCRIBED = hasattr(comfy.utils, "convert_old_quants")  # whether this ComfyUI reads descriptions of layers
FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")


def write(path, name):
    """A FLUX.1 with one layer in ComfyUI's format `name`, as ComfyUI stores it, or with made-up shapes if this ComfyUI lacks the format."""
    tensors = flux_tensors(depth_single=1)
    weight = tensors.pop(f"{QKV}.weight")
    if DESCRIBED and name in quant_ops.QUANT_ALGOS:
        stored = quant_ops.QuantizedTensor.from_float(weight, quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"])
        tensors |= {key: tensor.contiguous() for key, tensor in stored.state_dict(f"{QKV}.weight").items()}
    else:
        stored = core_formats.FORMATS[name]
        tensors[f"{QKV}.weight"] = torch.zeros(core_formats.stored_shape(name, weight.shape)).to(stored.dtype)
        tensors |= {f"{QKV}.{scale}": torch.ones(()) for scale in stored.scales}
    tensors[f"{QKV}.comfy_quant"] = layout.encode_conf({"format": name})
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_comfyui_reads_its_own_formats_and_others_are_named(tmp_path, name):
    path = write(tmp_path / "model.safetensors", name)
    assert inspection.inspect(read_header(path))["format"] == f"a FLUX.1 with layers in ComfyUI's format {name}"
    if DESCRIBED and name in quant_ops.QUANT_ALGOS:
        assert torch.equal(sample(loader.load_model(path)), sample(comfy.sd.load_diffusion_model(path)))
    else:
        with pytest.raises(CheckpointError, match=f"^model.safetensors has layers in the format '{name}' .* update ComfyUI, or choose "):
            loader.load_model(path)


@pytest.mark.skipif(not DESCRIBED, reason="this ComfyUI reads no descriptions")
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_takes_the_weights_that_comfyui_draws_with(tmp_path, name):
    """As well as from a file that has those weights in 16 bits: the codes differ, as the rounding to 16 bits turns the low-rank factors."""
    if name not in quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {name}")
    path, tensors = write(tmp_path / "model.safetensors", name), flux_tensors(depth_single=1)
    stored = quant_ops.QuantizedTensor.from_float(tensors[f"{QKV}.weight"], quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"])
    exact = stored.dequantize().contiguous()
    save_file(tensors | {f"{QKV}.weight": exact}, tmp_path / "plain.safetensors")
    model, plain = loader.load_model(path), loader.load_model(str(tmp_path / "plain.safetensors"))
    assert relative_error(effective_weight(model, f"{QKV}.weight", "cpu").float(), exact.float()) < 2**-8
    found, expected = (quantized(source, "data-free")[0].packed_layers()[QKV] for source in (model, plain))
    ours, best = (relative_error(layer.dense("cpu"), exact.float()) for layer in (found, expected))
    assert found.spec == expected.spec and ours < 1.03 * best < 0.1


@pytest.mark.skipif(not DESCRIBED, reason="this ComfyUI reads no descriptions")
@pytest.mark.parametrize(("changes", "says"), [
    ({"weight_scale": None}, f"lacks tensor {QKV}.weight_scale, a scale of format float8_e4m3fn"),
    ({"weight": torch.zeros(768, 256, dtype=torch.int8)}, "is torch.int8 instead of torch.float8_e4m3fn, the type in format float8_e4m3fn"),
    ({"weight": torch.zeros(768, 64, dtype=torch.float8_e4m3fn)}, r"has shape \[768, 64\] instead of \[768, 256\]"),
])
def test_damaged_layers_are_refused_before_comfyui_draws_with_them(tmp_path, changes, says):
    path = write(tmp_path / "model.safetensors", "float8_e4m3fn")
    tensors = load_file(path) | {f"{QKV}.{leaf}": tensor for leaf, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=says):
        loader.load_model(path)
