"""What nodes and users do to a model, with fused forwards and with the host's: the same latents, and each has its effect."""

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.sd
import nodes
import pytest
import torch
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import CONTEXT
from ..fused_cases import bypass_lora, forward_of_the_class, hook_lora, hook_on, mixed, object_patch
from ..fused_path import DTYPE, FUSED, HALF, PLAIN, compared, draw, lora, options_of, other_attention, overridden, prompt
from ..lora_tensors import LINEAR1, MOD, QKV, load_lora, random
from .test_controlnet import controlled, heads_of_any_width  # noqa: F401
from .test_other_nodes import newer, node

pytestmark = pytest.mark.usefixtures("inference_mode", "activations_without_codes")
older = pytest.mark.skipif(hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="newer ComfyUI's own forwards need the options")
SINGLE = "single_blocks.0"
LEAST_EFFECT = 0.01  # relative, on the latents


@pytest.fixture(scope="module")
def undisturbed(pair_files, activations_without_codes):
    """{steps: the model's latents}"""
    with torch.inference_mode():
        model = loader.load_model(pair_files[1], DTYPE)
        return {steps: draw(model, steps=steps) for steps in (2, 6)}


def replaced_blocks(patcher, _):
    def doubled(args, extra):
        before = args["img"].clone()
        out = extra["original_block"](args)
        return {"img": 2 * out["img"] - before, "txt": out["txt"]}

    def damped(args, extra):
        before = args["img"].clone()
        return {"img": (before + extra["original_block"](args)["img"]) / 2}

    patched = patcher.clone()
    patched.set_model_patch_replace(doubled, "dit", "double_block", 0)
    patched.set_model_patch_replace(damped, "dit", "single_block", 0)
    return patched, {}


def replaced_without_options(patcher, _):
    patched = patcher.clone()
    patched.set_model_patch_replace(lambda args, extra: {"img": mixed(extra["original_block"](args | {"transformer_options": None})[
        "img"])}, "dit", "single_block", 0)
    return patched, {}


def first_block_cache(patcher, _):
    """From the second step on, the blocks after the first add what they added in the first step."""
    added = []

    def single(args, extra):
        before = args["img"].clone()  # the host's forward writes to it
        if not added:
            added.append(extra["original_block"](args)["img"] - before)
        return {"img": before + added[0]}

    patched = patcher.clone()
    patched.set_model_patch_replace(single, "dit", "single_block", 0)
    return patched, {}


def replaced_attention(patcher, patch):
    patch.setattr(comfy.ldm.flux.math, "optimized_attention", other_attention)
    return patcher, {}


def replaced_rope(patcher, patch):
    patch.setattr(comfy.ldm.flux.math, "apply_rope", lambda q, k, pe: (q, k))
    return patcher, {}


def couple(patcher, _):
    """As attention couple: half of the image's tokens see the first half of the text, the others the second half."""
    mask = torch.ones(28, 28, dtype=torch.bool)
    mask[12:20, 6:12] = mask[20:, :6] = False

    def masked(func, q, k, v, heads, **kwargs):
        return func(q, k, v, heads, **kwargs | {"mask": mask.to(q.device)})

    return options_of(patcher, optimized_attention_override=masked), {}


def regional_mask(patcher, _):
    """A block patch that gives the block a mask."""
    mask = torch.ones(28, 28, dtype=torch.bool)
    mask[12:20, :12] = False
    patched = patcher.clone()
    for kind in ("double", "single"):
        patched.set_model_patch_replace(lambda args, extra: extra["original_block"](
            args | {"attn_mask": mask.to(args["img"].device)}), "dit", f"{kind}_block", 0)
    return patched, {}


def redux(patcher, _):
    class Style:
        def get_cond(self, _):
            return random(1, 4, CONTEXT)

    return patcher, {"positive": nodes.StyleModelApply().apply_stylemodel(prompt(8), Style(), None, 0.3, "attn_bias")[0]}


def post_input(patcher, _):
    patched = patcher.clone()
    patched.set_model_patch(lambda args: args | {"txt": args["txt"][:, :8], "txt_ids": args["txt_ids"][:, :8]}, "post_input")
    return patched, {}


def attention_patch(patcher, _):
    patched = patcher.clone()
    patched.set_model_patch(lambda q, k, v, **_: {"q": 2 * q}, "attn1_patch")
    return patched, {}


def attention_output_patch(patcher, _):
    patched = patcher.clone()
    patched.set_model_patch(lambda attn, extra: attn.flip(1), "attn1_output_patch")
    return patched, {}


def guidance_of_attention(patcher, _):
    return node("nag", "NAGuidance", model=patcher), {}


def reference_latents(method):
    def case(patcher, _):
        extras = {} if method is None else {"reference_latents_method": method}
        return patcher, {"positive": prompt(reference_latents=[random(1, 16, 6, 8), random(1, 16, 4, 6, seed=1)], **extras)}
    return case


def control(form):
    return lambda patcher, _: (patcher, {"positive": controlled(form)})


def inpaint(patcher, _):
    return patcher, {"mask": torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).round()}


def area(patcher, _):
    return patcher, {"positive": prompt() + prompt(seed=3, mask=torch.ones(1, 64, 64).tril(), mask_strength=1.0)}


def cache(module, name):
    return lambda patcher, _: (node(module, name, model=patcher, reuse_threshold=0.9), {"steps": 6})


def lora_of_norms(patcher, _):
    state = patcher.model.diffusion_model.state_dict()
    keys = [key for key in state if "query_norm" in key]
    return load_lora(patcher, {f"diffusion_model.{key.removesuffix('.weight')}.set_weight": 1 + 0.5 * random(128) for key in keys}), {}


def forward_of_an_instance(forward):
    return lambda x, *args, **kwargs: mixed(forward(x, *args, **kwargs))


class Norm(torch.nn.Module):
    """Another pack's norm, without the attributes of ComfyUI's."""

    def forward(self, x):
        return x.clamp(-1, 1)


class Scaled(torch.nn.Module):
    """Another pack's modulation. tokens: number of tokens, each with vectors of its own; None for one vector an image."""

    def __init__(self, modulation, tokens=None):
        super().__init__()
        self.modulation = (modulation,)
        self.tokens = tokens

    def forward(self, vec):
        mod, other = self.modulation[0](vec)
        mod.gate = 2 * mod.gate if self.tokens is None else mod.gate * torch.linspace(0, 2, self.tokens, device=vec.device)[:, None]
        return mod, other


def case(run, share=FUSED, name=None, marks=()):
    return pytest.param(run, share, id=name or run.__name__, marks=marks)


@pytest.mark.parametrize(("run", "share"), [
    case(replaced_blocks), case(replaced_without_options, marks=older), case(first_block_cache), case(overridden), case(replaced_attention),
    case(replaced_rope, PLAIN), case(couple), case(regional_mask), case(redux), case(post_input), case(attention_patch, PLAIN, marks=newer),
    case(attention_output_patch, PLAIN, marks=newer),
    *(case(reference_latents(method), name=f"reference latents {method}") for method in (None, "offset", "index", "uxo")),
    *(case(control(form), name=f"ControlNet {form}") for form in ("XLabs", "InstantX")), case(inpaint), case(area),
    case(cache("easycache", "EasyCacheNode"), name="EasyCache"), case(cache("easycache", "LazyCacheNode"), name="LazyCache"), case(lora),
    case(lora_of_norms), case(bypass_lora(QKV, LINEAR1), name="bypass_lora"),
    case(hook_lora(QKV, LINEAR1, MOD, size=1.0), name="hook_lora"), case(hook_on(SINGLE, mixed), name="hook on a block"),
    case(hook_on(f"{SINGLE}.norm.query_norm", lambda x: 2 * x), HALF, "hook on a norm"),
    case(hook_on(LINEAR1, mixed), name="hook on a linear"),
    case(object_patch(f"{SINGLE}.forward", forward_of_an_instance), name="forward of an instance"),
    case(forward_of_the_class(comfy.ldm.flux.layers.SingleStreamBlock), HALF, "forward of the class"),
    case(object_patch(f"{SINGLE}.norm.query_norm", lambda _: Norm()), HALF, "another norm of q"),
    case(object_patch(f"{SINGLE}.pre_norm", lambda _: Norm()), HALF, "another norm of x"),
    case(object_patch(f"{SINGLE}.modulation", Scaled), name="another modulation"),
    case(object_patch(f"{SINGLE}.modulation", lambda modulation: Scaled(modulation, 28)), HALF, "a modulation of each token"),
    case(object_patch(f"{SINGLE}.linear1", lambda linear: torch.nn.Sequential(linear, torch.nn.Tanh())), name="another linear"),
])
def test_has_the_effect_that_it_has_on_the_plain_path(path, model, undisturbed, monkeypatch, run, share):
    exact, steps = compared(path, model, monkeypatch, run, share)
    assert relative_error(exact, undisturbed[steps]) > LEAST_EFFECT


@newer
def test_guidance_between_two_prompts_has_its_effect(path, model, undisturbed, monkeypatch):
    """NAGuidance changes attention's output where both prompts run at once."""
    exact, steps = compared(path, model, monkeypatch, guidance_of_attention, PLAIN)
    assert relative_error(exact, undisturbed[steps]) > LEAST_EFFECT
