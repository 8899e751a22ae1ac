"""Batches, sizes, layouts, dtypes, copies, Chroma and FLUX.2, with fused forwards and with the host's: the same latents."""

import copy

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.quant_ops
import pytest
import torch
from comfyui_svdquant.quant.host import fused_blocks, loader
from comfyui_svdquant.quant.layers import linear, preparation
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import HIDDEN, quantized, save
from ..family_cases import FLUX2
from ..fused_path import BOUND, DTYPE, FUSED, Path, compared, draw, lora, options_of, other_attention, overridden, prompt, single
from ..lora_tensors import LINEAR1, random
from ..random_chroma import chroma_tensors

pytestmark = pytest.mark.usefixtures("inference_mode", "activations_without_codes")
float64_rope = pytest.mark.skipif(hasattr(comfy.quant_ops, "ck"), reason="newer ComfyUI's own RoPE takes no float64")


@pytest.mark.parametrize("options", [
    {"batch": 3}, {"cfg": 3.0}, {"cfg": 3.0, "batch": 2, "negative": prompt(20, seed=2)}, {"cfg": 3.0, "negative": prompt(24, seed=2)},
    {"size": (7, 11)}, {"size": (1, 3), "batch": 2}],
    ids=["three pictures", "two prompts", "texts of two lengths", "texts of 12 and 24 tokens", "odd size", "tiny"])
def test_batches_and_sizes(path, model, monkeypatch, options):
    latent, _ = compared(path, model, monkeypatch, lambda patcher, _: (patcher, options), FUSED)
    assert latent.shape == (options.get("batch", 1), 16, *options.get("size", (8, 8)))


@pytest.mark.parametrize("form", [
    lambda attn: attn.transpose(1, 2).contiguous().transpose(1, 2), lambda attn: attn.double(),
    lambda attn: torch.cat((attn.new_zeros(3), attn.flatten()))[3:].view(attn.shape)], ids=["transposed", "another dtype", "unaligned"])
def test_attentions_output_in_any_form(path, model, monkeypatch, form):
    compared(path, model, monkeypatch, lambda patcher, _: (options_of(
        patcher, optimized_attention_override=lambda func, *args, **kwargs: form(func(*args, **kwargs))), {}), FUSED)


@pytest.mark.parametrize("name", [
    pytest.param("double_blocks.0.txt_attn.qkv", marks=float64_rope), "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp",
    pytest.param("single_blocks.0.linear1", marks=float64_rope), "single_blocks.0.linear2"])
def test_layers_whose_output_has_another_dtype(path, model, monkeypatch, name):
    def hooked(patcher, patch):
        patch.setitem(patcher.model.diffusion_model.get_submodule(name)._forward_hooks, -1, lambda module, args, output: output.double())
        return patcher, {}

    compared(path, model, monkeypatch, hooked, FUSED)


def test_the_layers_that_are_added_to_the_states(path, model, monkeypatch):
    """Each is one op with the residual, and a warm-up prepares its kernel. (In W4A4 an MLP is an op of its own.)"""
    preparation.set_act_bits(model.model, 8)
    diffusion_model, gated, given = model.model.diffusion_model, linear.gated_linear.gated_linear, []
    monkeypatch.setattr(linear.gated_linear, "gated_linear", lambda x, operands, *added: given.append(operands.weight) or gated(
        x, operands, *added))
    layers = {diffusion_model.get_submodule(f"{kind}_blocks.0.{name}") for kind, name in (
        ("double", "img_attn.proj"), ("double", "txt_attn.proj"), ("double", "img_mlp.2"), ("double", "txt_mlp.2"), ("single", "linear2"))}
    assert {module for module in diffusion_model.modules() if getattr(module, "gated", False)} == layers
    assert path.share(True, lambda: draw(model))[1] == FUSED
    assert {id(weight) for weight in given} == {id(layer.weight) for layer in layers}


@pytest.mark.parametrize("how", ["override", "replaced"])
def test_attention_may_keep_its_operands(path, model, monkeypatch, how):
    """Nodes that edit pictures keep v of a step, and use it in another."""
    kept = []

    def keep(q, k, v, heads, **kwargs):
        kept.extend((x, x.clone()) for x in (q, k, v))
        return other_attention(q, k, v, heads)

    if how == "override":
        patcher = options_of(model, optimized_attention_override=lambda func, *args, **kwargs: keep(*args, **kwargs))
    else:
        patcher = model
        monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", keep)
    _, share = path.share(True, lambda: draw(patcher))
    assert share == FUSED and len(kept) == 2 * 2 * 3 and all(torch.equal(x, before) for x, before in kept)


def test_blocks_in_16_bits_run_fused(path, tmp_path, pair_files, monkeypatch):
    """Layers that stay in 16 bits, as those with a large error do."""
    part = loader.load_model(pair_files[1], DTYPE)
    exact = loader.load_model(pair_files[0], DTYPE)
    for name in (LINEAR1, "double_blocks.0.img_mlp.0"):
        parent, _, leaf = name.rpartition(".")
        setattr(part.model.diffusion_model.get_submodule(parent), leaf, exact.model.diffusion_model.get_submodule(name))
    single(part).mlp_act = torch.nn.GELU(approximate="tanh")
    both = Path(monkeypatch, part)
    compared(both, part, monkeypatch, lambda patcher, _: (patcher, {}), FUSED)


def test_a_batch_that_does_not_fit_is_the_hosts_error(path, model):
    """Three vectors, or three texts, for two images: the kernels would read past their end."""
    img, txt, *vecs = (random(*shape).to(model.load_device, DTYPE) for shape in ((2, 5, HIDDEN), (2, 3, HIDDEN), *(
        (count, HIDDEN) for count in (1, 2, 3))))
    pe = random(1, 1, 8, 64, 2, 2).to(img.device)
    block = model.model.to(img.device).diffusion_model.double_blocks[0]
    block(img, txt, vecs[1], pe)
    assert path.passes
    path.passes = 0
    for arguments in ((img, txt, vecs[2], pe), (img, txt[:1].expand(3, -1, -1), vecs[0], pe)):
        with pytest.raises(RuntimeError):
            block(*arguments)
    assert not path.passes


def test_modulation_of_parts_of_the_image_runs_the_hosts_forward(path, model):
    """ComfyUI gives a block these for reference latents at timestep 0, of FLUX.2. A whole FLUX.1 with them fails in ComfyUI itself."""
    block, (img, txt, vec) = model.model.to(model.load_device).diffusion_model.double_blocks[0], (
        random(*shape).to(model.load_device, DTYPE) for shape in ((1, 5, HIDDEN), (1, 3, HIDDEN), (1, HIDDEN)))
    pe, parts = random(1, 1, 8, 64, 2, 2).to(img.device), {"modulation_dims_img": [(0, 5, 0)], "modulation_dims_txt": [(0, 3, 0)]}
    path.on, path.fused = True, 0
    fused = block(img.clone(), txt.clone(), vec, pe)
    assert path.fused == 1
    for ours, theirs in zip(fused, block(img.clone(), txt.clone(), vec, pe, **parts)):
        assert relative_error(ours, theirs) < BOUND
    single(model)(img.clone(), vec, pe[:, :, :5], modulation_dims=[(0, 5, 0)])
    assert path.fused == 1


# --- copies --------------------------------------------------------------------------------------------------------


def test_a_copy_runs_fused_too(path, model, monkeypatch):
    before, _ = path.share(True, lambda: draw(model))
    copied = copy.deepcopy(model.model.diffusion_model)
    assert type(copied.single_blocks[0]) is type(single(model)) is not comfy.ldm.flux.layers.SingleStreamBlock
    monkeypatch.setattr(model.model, "diffusion_model", copied)
    after, share = path.share(True, lambda: draw(model))
    assert share == FUSED and torch.equal(after, before)


# --- Chroma --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chroma_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_file(chroma_tensors(), folder / "chroma.safetensors")
    with torch.inference_mode():
        return save(quantized(loader.load_model(str(folder / "chroma.safetensors")), "data-free")[0], folder / "4bit.safetensors")


def text_mask(patcher, _):
    return patcher, {"positive": prompt(attention_mask=torch.arange(12)[None] < 6)}


@pytest.mark.parametrize("run", [lambda patcher, _: (patcher, {}), text_mask, overridden, lora], ids=["plain", "mask", "override", "lora"])
def test_chroma(monkeypatch, chroma_file, run):
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    model = loader.load_model(chroma_file, DTYPE)
    compared(Path(monkeypatch, model), model, monkeypatch, run, FUSED)


# --- FLUX.2 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux2_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_file(FLUX2.tensors(depth_single=1), folder / "flux2.safetensors")
    with torch.inference_mode():
        return save(FLUX2.quantized(loader.load_model(str(folder / "flux2.safetensors")), "data-free")[0], folder / "4bit.safetensors")


def edited(patcher, _):
    """With a reference image, which goes into the block as more tokens of the image."""
    return patcher, {"positive": prompt(reference_latents=[random(1, 128, 4, 4)])}


@pytest.mark.parametrize("run", [lambda patcher, _: (patcher, {"batch": 2}), edited, overridden, lora],
                         ids=["plain", "edit", "override", "lora"])
def test_flux2(monkeypatch, flux2_file, run):
    """Its modulations come from outside the blocks, and SwiGLU is in place of the GELU."""
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    model = loader.load_model(flux2_file, DTYPE)

    def case(patcher, patch):
        patched, options = run(patcher, patch)
        return patched, {"channels": 128, "size": (6, 6)} | options

    compared(Path(monkeypatch, model), model, monkeypatch, case, FUSED)
