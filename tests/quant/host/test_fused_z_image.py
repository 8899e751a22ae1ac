"""Z-Image with fused forwards and with the host's: the same latents, whatever nodes and users do to the model."""

import comfy.ldm.lumina.model as host
import pytest
import torch
from comfyui_svdquant.quant.host import fused_blocks, loader
from comfyui_svdquant.quant.layers import preparation, shared_input
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from ..comfy_models import save
from ..family_cases import Z_IMAGE
from ..fused_cases import bypass_lora, forward_of_the_class, hook_lora, hook_on, mixed, object_patch
from ..fused_path import DTYPE, FUSED, PLAIN, Path, compared, draw, lora, other_attention, overridden, prompt
from ..lora_tensors import random

pytestmark = pytest.mark.usefixtures("inference_mode", "activations_without_codes")
BLOCK = "layers.0"
QKV, W3 = f"{BLOCK}.attention.qkv", f"{BLOCK}.feed_forward.w3"
LEAST_EFFECT = 0.002  # relative, on the latents


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_file(Z_IMAGE.tensors(), folder / "z_image.safetensors")
    with torch.inference_mode():
        return save(Z_IMAGE.quantized(loader.load_model(str(folder / "z_image.safetensors")), "data-free")[0], folder / "4bit.safetensors")


@pytest.fixture
def z_image(file, activations_without_codes):
    return loader.load_model(file, DTYPE)


@pytest.fixture
def z_path(monkeypatch, z_image):
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    return Path(monkeypatch, z_image)


@pytest.fixture(scope="module")
def undisturbed(file, activations_without_codes):
    with torch.inference_mode():
        return draw(loader.load_model(file, DTYPE))


def block_of(patcher):
    return patcher.model.diffusion_model.layers[0]


def blocks_of(patcher):
    return [block for block in patcher.model.diffusion_model.modules() if isinstance(block, host.JointTransformerBlock)]


def replaced_attention(patcher, patch):
    patch.setattr(host, "optimized_attention_masked", other_attention)
    return patcher, {}


def replaced_rope(patcher, patch):
    patch.setattr(host, "apply_rope", lambda q, k, pe: (q, k))
    patch.setattr(host.JointAttention, "forward", lambda self, x, *args, **kwargs: self.out(self.qkv(x)[..., :x.shape[-1]]))
    return patcher, {}


def rope_options(patcher, _):
    patched = patcher.clone()
    patched.model_options["transformer_options"] |= {"rope_options": {"scale_x": 3.0, "scale_y": 0.5, "shift_x": 2.0}}
    return patched, {}


ONE = 5 / 6  # one of the six blocks runs the host's forward


def case(run, share=FUSED, name=None, marks=()):
    return pytest.param(run, share, id=name or run.__name__, marks=marks)


@pytest.mark.parametrize(("run", "share"), [
    case(replaced_attention), case(overridden), case(replaced_rope, PLAIN), case(rope_options), case(lora),
    case(bypass_lora(QKV, W3, size=8.0), name="bypass_lora"), case(hook_lora(QKV, W3, size=8.0), name="hook_lora"),
    case(hook_on(f"{BLOCK}.feed_forward.w3", mixed), name="hook on up"),
    case(hook_on(f"{BLOCK}.attention.q_norm", lambda x: 2 * x), ONE, "hook on a norm of q"),
    case(hook_on(f"{BLOCK}.ffn_norm2", lambda x: 2 * x), ONE, "hook on a norm"),
    case(hook_on(f"{BLOCK}.attention", mixed), ONE, "hook on the attention"),
    case(hook_on(f"{BLOCK}.feed_forward", mixed), name="hook on the MLP"),
    case(hook_on(f"{BLOCK}.adaLN_modulation", lambda x: 2 * x), name="modulation"),
    case(forward_of_the_class(host.JointTransformerBlock), PLAIN, "forward of the class"),
    case(object_patch(f"{BLOCK}.attention.qkv", lambda layer: torch.nn.Sequential(layer, torch.nn.Tanh())), name="another linear"),
    case(object_patch(f"{BLOCK}.attention_norm1", lambda _: torch.nn.Tanh()), ONE, "another norm"),
])
def test_has_the_effect_that_it_has_on_the_plain_path(z_path, z_image, undisturbed, monkeypatch, run, share):
    # A hook on q's norm has no effect in newer hosts, which read its weight alone.
    exact, _ = compared(z_path, z_image, monkeypatch, run, pytest.approx(share))
    assert relative_error(exact, undisturbed) > LEAST_EFFECT or run.__qualname__.startswith("hook_on") and hasattr(host, "clamp_fp16")


@pytest.mark.parametrize("options", [
    {}, {"batch": 3}, {"cfg": 3.0}, {"cfg": 3.0, "negative": prompt(20, seed=2)}, {"size": (7, 11)},
    {"positive": prompt(attention_mask=torch.ones(1, 12), num_tokens=12)}],
    ids=["one", "three pictures", "two prompts", "texts of two lengths", "odd size", "all of a text"])
def test_batches_and_sizes(z_path, z_image, monkeypatch, options):
    compared(z_path, z_image, monkeypatch, lambda patcher, _: (patcher, options), FUSED)


def test_gate_and_up_share_an_input(z_path, z_image, monkeypatch):
    preparation.set_act_bits(z_image.model, 8)
    shared, svdquant_linears = [], shared_input.shared_input.svdquant_linears
    monkeypatch.setattr(shared_input.shared_input, "svdquant_linears",
                        lambda x, layers: shared.append(tuple(id(layer.weight) for layer in layers)) or svdquant_linears(x, layers))
    assert z_path.share(True, lambda: draw(z_image, steps=1))[1] == FUSED
    assert set(shared) == {(id(block.feed_forward.w1.weight), id(block.feed_forward.w3.weight)) for block in blocks_of(z_image)}


def test_blocks_with_modulations_for_parts_of_the_image_run_the_hosts_forward(z_path, z_image):
    block = block_of(z_image)
    z_image.model.to(z_image.load_device)
    x, pe, vec = (random(*shape).to(z_image.load_device) for shape in ((1, 8, 256), (1, 8, 1, 64, 2, 2), (2, 256)))
    x, vec = x.bfloat16(), vec.bfloat16()  # the fused passes of a GPU take 16-bit states
    z_path.on, z_path.fused = True, 0
    block(x.clone(), None, pe, vec[:1])
    assert z_path.fused == 1
    if hasattr(host, "apply_gate"):
        block(x.clone(), None, pe, vec, timestep_zero_index=[(2, 5)])
    assert z_path.fused == 1
