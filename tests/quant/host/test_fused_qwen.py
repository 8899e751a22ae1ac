"""Qwen-Image with fused forwards and with the host's: the same latents, whatever nodes and users do to the model."""

import comfy.ldm.qwen_image.model as host
import pytest
import torch
from comfyui_svdquant.quant.host import fused_blocks, loader
from comfyui_svdquant.quant.layers import preparation, shared_input
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import save
from ..family_cases import QWEN_IMAGE
from ..fused_cases import bypass_lora, forward_of_the_class, hook_lora, hook_on, mixed, object_patch
from ..fused_path import DTYPE, FUSED, PLAIN, Path, compared, draw, lora, options_of, other_attention, overridden, prompt
from ..lora_tensors import random
from .test_other_nodes import newer
from .test_qwen_image import KNOWS_2511

pytestmark = pytest.mark.usefixtures("inference_mode", "activations_without_codes")
SIZE = {"size": (1, 8, 8)}  # the latent has one frame
BLOCK = "transformer_blocks.0"
Q, ADDED_K = f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.add_k_proj"
LEAST_EFFECT = 0.002  # relative, on the latents


def file_of(folder, **changes):
    save_file(QWEN_IMAGE.tensors(depth=1, **changes), folder / "qwen.safetensors")
    return save(QWEN_IMAGE.quantized(loader.load_model(str(folder / "qwen.safetensors")), "data-free")[0], folder / "4bit.safetensors")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    with torch.inference_mode():
        return file_of(tmp_path_factory.mktemp("models"))


@pytest.fixture
def qwen(file, activations_without_codes):
    return loader.load_model(file, DTYPE)


@pytest.fixture
def qwen_path(monkeypatch, qwen):
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    return Path(monkeypatch, qwen)


@pytest.fixture(scope="module")
def undisturbed(file, activations_without_codes):
    with torch.inference_mode():
        return draw(loader.load_model(file, DTYPE), **SIZE)


def block_of(patcher):
    return patcher.model.diffusion_model.transformer_blocks[0]


def replaced_block(patcher, _):
    def halved(args, extra):
        before = args["img"].clone()
        out = extra["original_block"](args)
        return {"img": (before + out["img"]) / 2, "txt": out["txt"]}

    patched = patcher.clone()
    patched.set_model_patch_replace(halved, "dit", "double_block", 0)
    return patched, {}


def block_patch(patcher, _):
    patched = patcher.clone()
    patched.set_model_patch(lambda args: args | {"img": mixed(args["img"])}, "double_block")
    return patched, {}


def attention_patch(patcher, _):
    patched = patcher.clone()
    patched.set_model_patch(lambda q, k, v, **_: {"q": 2 * q, "k": k, "v": v}, "attn1_patch")
    return patched, {}


def replaced_attention(patcher, patch):
    patch.setattr(host, "optimized_attention_masked", other_attention)
    return patcher, {}


def replaced_rope(patcher, patch):
    patch.setattr(host, "apply_rope1", lambda x, pe: x)
    return patcher, {}


def text_mask(patcher, _):
    return patcher, {"positive": prompt(attention_mask=torch.arange(12)[None] < 6)}


def controlled(patcher, _):
    """As a ControlNet's residuals arrive."""
    forward = type(patcher.model.diffusion_model)._forward

    def with_residual(self, x, *args, control=None, **kwargs):
        return forward(self, x, *args, control={"input": [random(1, 4, 256).to(x)]}, **kwargs)

    patched = patcher.clone()
    patched.add_object_patch("diffusion_model._forward", with_residual.__get__(patcher.model.diffusion_model))
    return patched, {}


def case(run, share=FUSED, name=None, marks=()):
    return pytest.param(run, share, id=name or run.__name__, marks=marks)


@pytest.mark.parametrize(("run", "share"), [
    case(replaced_block), case(block_patch), case(attention_patch, PLAIN, marks=newer), case(replaced_attention), case(overridden),
    case(replaced_rope, PLAIN), case(text_mask, PLAIN, marks=newer), case(controlled), case(lora),
    case(bypass_lora(Q, ADDED_K, size=8.0), name="bypass_lora"), case(hook_lora(Q, ADDED_K, size=8.0), name="hook_lora"),
    case(hook_on(f"{BLOCK}.attn.to_v", mixed), name="hook on v"),
    case(hook_on(f"{BLOCK}.attn.norm_k", lambda x: 2 * x), PLAIN, "hook on a norm"),
    case(hook_on(f"{BLOCK}.attn", lambda pair: (mixed(pair[0]), pair[1])), PLAIN, "hook on the attention"),
    case(hook_on(f"{BLOCK}.attn.to_out.1", mixed), PLAIN, "hook on the attention's dropout"),
    case(hook_on(f"{BLOCK}.img_mlp", mixed), name="hook on an MLP"), case(hook_on(f"{BLOCK}.img_mlp.net.1", mixed), name="hook in an MLP"),
    case(hook_on(f"{BLOCK}.img_mod", lambda x: 2 * x), name="hook on a modulation"),
    case(forward_of_the_class(host.QwenImageTransformerBlock, lambda pair: tuple(map(mixed, pair))), PLAIN, "forward of the class"),
    case(object_patch(f"{BLOCK}.attn.to_k", lambda layer: torch.nn.Sequential(layer, torch.nn.Tanh())), name="another linear"),
    case(object_patch(f"{BLOCK}.txt_norm1", lambda _: torch.nn.Tanh()), PLAIN, "another norm"),
])
def test_has_the_effect_that_it_has_on_the_plain_path(qwen_path, qwen, undisturbed, monkeypatch, run, share):
    def sized(patcher, patch):
        patched, options = run(patcher, patch)
        return patched, SIZE | options

    exact, _ = compared(qwen_path, qwen, monkeypatch, sized, share)
    assert relative_error(exact, undisturbed) > LEAST_EFFECT


@pytest.mark.parametrize("options", [
    {}, {"batch": 3}, {"cfg": 3.0}, {"cfg": 3.0, "batch": 2, "negative": prompt(20, seed=2)}, {"size": (1, 7, 11)},
    {"positive": prompt(reference_latents=[random(1, 16, 1, 6, 8), random(1, 16, 1, 4, 6, seed=1)])}],
    ids=["one", "three pictures", "two prompts", "texts of two lengths", "odd size", "reference images"])
def test_batches_and_sizes(qwen_path, qwen, monkeypatch, options):
    compared(qwen_path, qwen, monkeypatch, lambda patcher, _: (patcher, SIZE | options), FUSED)


@pytest.mark.skipif(not KNOWS_2511, reason="an older ComfyUI, which refuses the model")
def test_references_with_a_modulation_of_their_own_run_the_hosts_forward(tmp_path, monkeypatch, activations_without_codes):
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    model = loader.load_model(file_of(tmp_path, marked=True), DTYPE)
    path = Path(monkeypatch, model)
    edit = SIZE | {"positive": prompt(reference_latents=[random(1, 16, 1, 6, 8)])}
    compared(path, model, monkeypatch, lambda patcher, _: (patcher, edit), PLAIN)
    compared(path, model, monkeypatch, lambda patcher, _: (patcher, SIZE), FUSED)


def test_the_layers_that_share_an_input_and_those_that_are_added_to_the_states(qwen_path, qwen, monkeypatch):
    preparation.set_act_bits(qwen.model, 8)
    block, shared, gated = block_of(qwen), [], []
    svdquant_linears, add_gated = shared_input.shared_input.svdquant_linears, type(block.attn.to_q).add_gated
    monkeypatch.setattr(shared_input.shared_input, "svdquant_linears",
                        lambda x, layers: shared.append(tuple(layer.weight for layer in layers)) or svdquant_linears(x, layers))
    monkeypatch.setattr(type(block.attn.to_q), "add_gated", lambda layer, *args: gated.append(layer) or add_gated(layer, *args))
    assert qwen_path.share(True, lambda: draw(qwen, steps=1, **SIZE))[1] == FUSED
    groups = [[block.attn.get_submodule(name) for name in names] for names in (
        ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))]
    assert {tuple(map(id, weights)) for weights in shared} == {tuple(id(layer.weight) for layer in group) for group in groups}
    ends = {block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]}
    assert set(gated) == ends == {module for module in block.modules() if getattr(module, "gated", False)}


def test_attention_may_keep_its_operands(qwen_path, qwen):
    kept = []

    def keep(func, q, k, v, heads, **kwargs):
        kept.extend((x, x.clone()) for x in (q, k, v))
        return func(q, k, v, heads, **kwargs)

    patcher = options_of(qwen, optimized_attention_override=keep)
    assert qwen_path.share(True, lambda: draw(patcher, **SIZE))[1] == FUSED
    assert kept and all(torch.equal(x, before) for x, before in kept)
