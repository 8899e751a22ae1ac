"""A 16-bit FLUX.1 in diffusers' naming, with separate q, k and v, is the same model as in ComfyUI's naming, or is refused."""

import comfy.utils
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import save_file

from ..comfy_models import sample, write_flux
from ..random_flux import flux_shapes, flux_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")

HIDDEN = 256


def diffusers_tensors(**changes):
    """flux_tensors under diffusers' names, by ComfyUI's own table of names. Newer tables also have names of LyCORIS and of FLUX.2."""
    plain = flux_tensors(hidden=HIDDEN, **changes)
    names = comfy.utils.flux_to_diffusers({"depth": 1, "depth_single_blocks": 2, "hidden_size": HIDDEN})
    found = {}
    for stored, target in names.items():
        name, offset, *function = (target, None) if isinstance(target, str) else target
        name = name.replace("_norm.weight", "_norm.scale")
        others = stored.startswith("single") and (".to_qkv_mlp" in stored or ".to_out." in stored)
        others |= "linear_" in stored.replace("embedder.linear_", "")
        if name in plain and not others:
            tensor = plain[name] if offset is None else plain[name].narrow(*offset)
            for swap in function:  # shift and scale, which is its own inverse
                tensor = swap(tensor)
            found[stored] = tensor.contiguous().clone()
    return found


@pytest.mark.parametrize("guidance", [True, False])
def test_the_declared_tensors_are_those_of_comfyuis_conversion(guidance):
    shapes = {name: tuple(tensor.shape) for name, tensor in diffusers_tensors(guidance=guidance).items()}
    assert FAMILY.diffusers.tensors(FAMILY.configuration.of(flux_shapes(hidden=HIDDEN, guidance=guidance))) == shapes


def refusal(path, tensors):
    """The message with which loading refuses the tensors, as inspection does in its own words or the same."""
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    with pytest.raises(CheckpointError):
        inspection.inspect(read_header(str(path)))
    assert path.name in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"guidance": False}])
def test_it_is_the_same_model_as_in_comfyuis_naming(tmp_path, changes):
    save_file(diffusers_tensors(**changes), tmp_path / "diffusers.safetensors")
    path = write_flux(tmp_path / "comfyui.safetensors", hidden=HIDDEN, **changes)
    theirs, ours = (loader.load_model(str(file)) for file in (tmp_path / "diffusers.safetensors", path))
    assert torch.equal(sample(theirs), sample(ours))


@pytest.mark.parametrize("missing", [
    "transformer_blocks.0.attn.to_k.weight", "single_transformer_blocks.1.attn.to_v.bias", "x_embedder.bias", "norm_out.linear.weight",
    "single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.ff.net.2.bias",
])
def test_a_missing_tensor_is_named(tmp_path, missing):
    """ComfyUI would load the other tensors, with uninitialized memory in place of the missing one."""
    tensors = diffusers_tensors()
    del tensors[missing]
    assert f"lacks tensor {missing};" in refusal(tmp_path / "model.safetensors", tensors)


@pytest.mark.parametrize(("name", "shape"), [
    ("transformer_blocks.0.attn.to_k.weight", (HIDDEN, 64)), ("transformer_blocks.0.attn.to_out.0.weight", (2 * HIDDEN, HIDDEN)),
    ("norm_out.linear.bias", ()), ("single_transformer_blocks.0.attn.to_q.weight", (HIDDEN,)), ("x_embedder.weight", ()),
])
def test_a_wrong_shape_is_refused(tmp_path, name, shape):
    refusal(tmp_path / "model.safetensors", diffusers_tensors() | {name: torch.zeros(shape, dtype=torch.bfloat16)})


def test_a_missing_block_is_refused(tmp_path):
    tensors = {name: t for name, t in diffusers_tensors().items() if not name.startswith("single_transformer_blocks.0.")}
    assert "single_transformer_blocks.0." in refusal(tmp_path / "model.safetensors", tensors)


QKV = "transformer_blocks.0.attn.to_q"
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def coded(dtype, **beside):
    """A change that stores a weight in 8 bits, with tensors beside it."""
    def change(tensors):
        tensors[f"{QKV}.weight"] = (tensors[f"{QKV}.weight"].float() * 100).to(dtype)
        return tensors | {f"{QKV}.{leaf}": tensor for leaf, tensor in beside.items()}
    return change


@pytest.mark.parametrize(("change", "named"), [
    (coded(FP8, scale_weight=torch.tensor(0.01)), f"{QKV}.scale_weight"),
    (coded(FP8, weight_scale=torch.tensor(0.01)), f"{QKV}.weight_scale"),
    (coded(FP8, weight_scale=torch.tensor(0.01), comfy_quant=layout.encode_conf({"format": "float8_e4m3fn"})), QKV),
    (coded(INT8, weight_scale=torch.tensor(0.01)), QKV), (coded(INT8), f"{QKV}.weight"),
    (coded(INT8, SCB=torch.ones(HIDDEN)), "(LLM.int8)"),
    (lambda tensors: tensors | {"scaled_fp8": torch.zeros(2, dtype=FP8)}, "scaled_fp8"),
    (lambda tensors: tensors | {f"{QKV}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, "(NF4 or FP4)"),
    (lambda tensors: tensors | {"transformer_blocks.0.attn.to_gate.weight": torch.zeros(4, 4)}, "transformer_blocks.0.attn.to_gate.weight"),
])
def test_what_the_conversion_would_drop_is_refused(tmp_path, change, named):
    """ComfyUI's conversion keeps only names that it knows: without their scales, 8-bit weights would silently be another model."""
    assert named in refusal(tmp_path / "model.safetensors", change(diffusers_tensors()))


def test_plain_fp8_is_the_model(tmp_path):
    """fp8 codes without a scale are the weights themselves."""
    tensors = diffusers_tensors()
    tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"].to(FP8)
    save_file(tensors, tmp_path / "fp8.safetensors")
    save_file(diffusers_tensors(), tmp_path / "bf16.safetensors")
    fp8, bf16 = (sample(loader.load_model(str(tmp_path / f"{name}.safetensors"))) for name in ("fp8", "bf16"))
    assert 0 < float((fp8 - bf16).norm() / bf16.norm()) < 0.1


@pytest.mark.parametrize(("fp8", "large"), [("to_v", "to_q"), ("to_k", "to_q"), ("to_q", "to_v")])
def test_parts_of_several_types_are_joined_without_loss(tmp_path, fp8, large):
    """ComfyUI's conversion stores q, k and v in the type of one of them, which may be too small for values of the others."""
    attention, tensors = "transformer_blocks.0.attn", diffusers_tensors()
    tensors[f"{attention}.{fp8}.weight"] = tensors[f"{attention}.{fp8}.weight"].to(FP8)
    tensors[f"{attention}.{large}.weight"] *= 4000
    save_file(tensors, tmp_path / "mixed.safetensors")
    save_file(tensors | {f"{attention}.{fp8}.weight": tensors[f"{attention}.{fp8}.weight"].bfloat16()}, tmp_path / "bf16.safetensors")
    mixed, bf16 = (sample(loader.load_model(str(tmp_path / f"{name}.safetensors"))) for name in ("mixed", "bf16"))
    assert torch.equal(mixed, bf16)
