"""What nodes and users do to a model, with fused forwards and with the host's: the same latents, and each has its effect.

Path switches the fused forwards on and off, and counts their calls. On the CPU, which has no kernels, they run block_ops' reference. The
models there compute in float32, without the rounding of activations to codes, where another order of a sum can have another code: then the
two paths differ by float32's rounding alone. On a GPU the kernels run, in bf16.
"""

import copy

import comfy.hooks
import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.sample
import comfy.sd
import nodes
import pytest
import torch
from comfyui_svdquant.cuda import reference
from comfyui_svdquant.cuda.int4 import GELU_SHIFT
from comfyui_svdquant.quant.host import fused_blocks, loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import CONTEXT, HIDDEN, POOLED, quantized, save
from ..lora_tensors import LINEAR1, MOD, QKV, generic, load_lora, random, shapes
from ..random_chroma import chroma_tensors
from .test_controlnet import controlled, heads_of_any_width  # noqa: F401
from .test_other_nodes import by_hand, newer, node

pytestmark = pytest.mark.usefixtures("inference_mode")
older = pytest.mark.skipif(hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="newer ComfyUI's own forwards need the options")
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
BOUND = 0.1 if GPU else 2e-5  # relative, of the latents; in bf16 the host rounds after each of some ten passes
LEAST_EFFECT = 0.01
PLAIN, HALF, FUSED = 0.0, 0.5, 1.0  # share of the calls of blocks that run fused; the model has one block of each kind


class Path:
    """on: whether the fused forwards run. fused, calls: calls of blocks so far."""

    def __init__(self, monkeypatch, *patchers):
        self.on, self.fused, self.calls = True, 0, 0
        block_ops = fused_blocks.block_ops
        join, has_kernels = block_ops.qk_norm_rope, block_ops.takes

        def counted(*args):
            self.fused += 1
            return join(*args)

        def count(*_):
            self.calls += 1

        monkeypatch.setattr(block_ops, "takes", lambda dtype, device: self.on and (not GPU or has_kernels(dtype, device)))
        monkeypatch.setattr(block_ops, "qk_norm_rope", counted)
        for patcher in patchers:
            model = patcher.model.diffusion_model
            for block in (*model.double_blocks, *model.single_blocks):
                fused_blocks.agrees(type(block), HIDDEN, 2, bool(block.modulation), DTYPE, patcher.load_device)
                block.register_forward_pre_hook(count)

    def share(self, on, draw):
        """(what draw() returns, the share of the calls of blocks that ran fused)"""
        self.on, self.fused, self.calls = on, 0, 0
        result = draw()
        return result, self.fused / self.calls


@pytest.fixture(scope="module", autouse=True)
def activations_without_codes():
    """In place of reference.quantize_activation."""
    def smoothed(x, smooth, unsigned_from, act_bits=4, dtype=torch.float32):
        shifted = x.to(dtype, copy=True)
        shifted[:, unsigned_from:] += GELU_SHIFT
        return shifted / smooth.to(dtype), torch.ones(x.shape[0], x.shape[1] // reference.GROUP_SIZE, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "quantize_activation", smoothed)
        yield


@pytest.fixture
def model(pair_files):
    return loader.load_model(pair_files[1], DTYPE)


@pytest.fixture(scope="module")
def undisturbed(pair_files):
    """{steps: the model's latents}"""
    with torch.inference_mode():
        model = loader.load_model(pair_files[1], DTYPE)
        return {steps: draw(model, steps=steps) for steps in (2, 6)}


@pytest.fixture
def path(monkeypatch, model):
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    return Path(monkeypatch, model)


def prompt(tokens=12, seed=1, **extras):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, CONTEXT, generator=g), {"pooled_output": torch.randn(1, POOLED, generator=g), **extras}]]


def draw(patcher, positive=None, negative=None, cfg=1.0, steps=2, size=(8, 8), batch=1, mask=None):
    latent = torch.zeros(batch, 16, *size)
    return comfy.sample.sample(patcher, comfy.sample.prepare_noise(latent, 5), steps, cfg, "euler", "simple", positive or prompt(),
                               negative or prompt(seed=2), latent, noise_mask=mask, disable_pbar=True, seed=5)


def compared(path, model, monkeypatch, case, share):
    """The latents of a case, case(patcher, monkeypatch) -> (patcher, options of draw), on the plain path, and their steps."""
    def run():
        with monkeypatch.context() as patch:
            patcher, options = case(model, patch)
            return draw(patcher, **options), options.get("steps", 2)

    (exact, steps), none = path.share(False, run)
    (estimate, _), found = path.share(True, run)
    assert (none, found) == (0, share)
    assert torch.isfinite(exact).all() and relative_error(estimate, exact) < BOUND
    return exact, steps


# --- with an effect on the picture ---------------------------------------------------------------------------------


def mixed(states):
    return states + states.roll(1, -1)


def options_of(patcher, **options):
    patched = patcher.clone()
    patched.model_options["transformer_options"] |= options
    return patched


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
        if not added:
            before = args["img"].clone()
            added.append(extra["original_block"](args)["img"] - before)
        return {"img": args["img"] + added[0]}

    patched = patcher.clone()
    patched.set_model_patch_replace(single, "dit", "single_block", 0)
    return patched, {}


def other_attention(q, k, v, heads, mask=None, **_):
    """As SageAttention: one's own function for (B, heads, L, D), here at another temperature."""
    return torch.nn.functional.scaled_dot_product_attention(2 * q, k, v, mask).transpose(1, 2).flatten(2)


def overridden(patcher, _):
    return options_of(patcher, optimized_attention_override=lambda func, *args, **kwargs: other_attention(*args)), {}


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
        patched.set_model_patch_replace(lambda args, extra: extra["original_block"](args | {"attn_mask": mask.to(args["img"].device)}), "dit", f"{kind}_block", 0)
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


def lora(patcher, _):
    return load_lora(patcher, generic(*shapes(patcher).items()), 0.7), {}


def lora_of_norms(patcher, _):
    state = patcher.model.diffusion_model.state_dict()
    keys = [key for key in state if "query_norm" in key]
    return load_lora(patcher, {f"diffusion_model.{key.removesuffix('.weight')}.set_weight": 1 + 0.5 * random(128) for key in keys}), {}


def bypass_lora(patcher, _):
    tensors = generic(*((name, shapes(patcher)[name]) for name in (QKV, LINEAR1)))
    return by_hand(patcher, {name: tensor.to(patcher.load_device) for name, tensor in tensors.items()}), {}


def hook_lora(patcher, _):
    tensors = generic(*((name, shapes(patcher)[name]) for name in (QKV, LINEAR1, MOD)), size=1.0)
    return patcher, {"positive": prompt(hooks=comfy.hooks.create_hook_lora(tensors, 1.0, 0.0))}


def single(patcher):
    return patcher.model.diffusion_model.single_blocks[0]


def block_hook(patcher, patch):
    patch.setitem(single(patcher)._forward_hooks, -1, lambda module, args, output: mixed(output))
    return patcher, {}


def norm_hook(patcher, patch):
    patch.setitem(single(patcher).norm.query_norm._forward_hooks, -1, lambda module, args, output: 2 * output)
    return patcher, {}


def linear_hook(patcher, patch):
    patch.setitem(single(patcher).linear1._forward_hooks, -1, lambda module, args, output: mixed(output))
    return patcher, {}


def object_patch(name, make):
    def case(patcher, _):
        patched = patcher.clone()
        patched.add_object_patch(f"diffusion_model.single_blocks.0.{name}", make(patcher.get_model_object(
            f"diffusion_model.single_blocks.0.{name}")))
        return patched, {}
    return case


def forward_of_an_instance(forward):
    return lambda x, *args, **kwargs: mixed(forward(x, *args, **kwargs))


def forward_of_the_class(patcher, patch):
    forward = comfy.ldm.flux.layers.SingleStreamBlock.forward
    patch.setattr(comfy.ldm.flux.layers.SingleStreamBlock, "forward", lambda *args, **kwargs: mixed(forward(*args, **kwargs)))
    return patcher, {}


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
    case(replaced_blocks), case(replaced_without_options, marks=older), case(first_block_cache),
    case(overridden), case(replaced_attention), case(replaced_rope, PLAIN), case(couple), case(regional_mask), case(redux),
    case(post_input), case(attention_patch, PLAIN, marks=newer), case(attention_output_patch, PLAIN, marks=newer),
    *(case(reference_latents(method), name=f"reference latents {method}") for method in (None, "offset", "index", "uxo")),
    case(reference_latents("index_timestep_zero"), PLAIN, "reference latents index_timestep_zero", newer),
    *(case(control(form), name=f"ControlNet {form}") for form in ("XLabs", "InstantX")),
    case(inpaint), case(area), case(cache("easycache", "EasyCacheNode"), name="EasyCache"),
    case(cache("easycache", "LazyCacheNode"), name="LazyCache"),
    case(lora), case(lora_of_norms), case(bypass_lora), case(hook_lora),
    case(block_hook), case(norm_hook, HALF), case(linear_hook),
    case(object_patch("forward", forward_of_an_instance), name="forward of an instance"), case(forward_of_the_class, HALF),
    case(object_patch("norm.query_norm", lambda _: Norm()), HALF, "another norm of q"),
    case(object_patch("pre_norm", lambda _: Norm()), HALF, "another norm of x"),
    case(object_patch("modulation", Scaled), name="another modulation"),
    case(object_patch("modulation", lambda modulation: Scaled(modulation, 28)), HALF, "a modulation of each token"),
    case(object_patch("linear1", lambda linear: torch.nn.Sequential(linear, torch.nn.Tanh())), name="another linear"),
])
def test_has_the_effect_that_it_has_on_the_plain_path(path, model, undisturbed, monkeypatch, run, share):
    exact, steps = compared(path, model, monkeypatch, run, share)
    assert relative_error(exact, undisturbed[steps]) > LEAST_EFFECT


@newer
def test_guidance_between_two_prompts_has_its_effect(path, model, undisturbed, monkeypatch):
    """NAGuidance changes attention's output where both prompts run at once."""
    exact, steps = compared(path, model, monkeypatch, guidance_of_attention, PLAIN)
    assert relative_error(exact, undisturbed[steps]) > LEAST_EFFECT


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"batch": 3}, {"cfg": 3.0}, {"cfg": 3.0, "batch": 2, "negative": prompt(20, seed=2)}, {"cfg": 3.0, "negative": prompt(24, seed=2)},
    {"size": (7, 11)}, {"size": (1, 3), "batch": 2}],
    ids=["three pictures", "two prompts", "texts of two lengths", "texts of 12 and 24 tokens", "odd size", "tiny"])
def test_batches_and_sizes(path, model, monkeypatch, options):
    latent, _ = compared(path, model, monkeypatch, lambda patcher, _: (patcher, options), FUSED)
    assert latent.shape == (options.get("batch", 1), 16, *options.get("size", (8, 8)))


@pytest.mark.parametrize("form", [
    lambda attn: attn.transpose(1, 2).contiguous().transpose(1, 2), lambda attn: attn.bfloat16(),
    lambda attn: torch.cat((attn.new_zeros(3), attn.flatten()))[3:].view(attn.shape)], ids=["transposed", "another dtype", "unaligned"])
def test_attentions_output_in_any_form(path, model, monkeypatch, form):
    compared(path, model, monkeypatch, lambda patcher, _: (options_of(
        patcher, optimized_attention_override=lambda func, *args, **kwargs: form(func(*args, **kwargs))), {}), FUSED)


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
    assert path.fused
    path.fused = 0
    for arguments in ((img, txt, vecs[2], pe), (img, txt[:1].expand(3, -1, -1), vecs[0], pe)):
        with pytest.raises(RuntimeError):
            block(*arguments)
    assert not path.fused


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
