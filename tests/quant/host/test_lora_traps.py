"""LoRAs that other loaders of 4-bit FLUX handle wrongly, and the distance to the 16-bit model with the same LoRA."""

import itertools

import comfy.hooks
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, CreateHookLoraModelOnly, SetHookKeyframes
from comfyui_svdquant.quant.host import loader, quantize
from comfyui_svdquant.quant.quantizer import presets
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from nodes import LoraLoader, LoraLoaderModelOnly
from safetensors.torch import save_file

from ..comfy_models import HIDDEN, Progress, prompts, sample
from ..lora_tensors import (
    FC1,
    LINEAR1,
    LINEAR2,
    MARGIN,
    MOD,
    QKV,
    ROUNDING,
    change,
    factors,
    generic,
    layer_of,
    load_lora,
    loaded,
    named,
    output,
    random,
    rounding,
    shapes,
    without_gelu,
)

pytestmark = pytest.mark.usefixtures("inference_mode")


# --- ComfyUI's own nodes -------------------------------------------------------------------------------------------


@pytest.fixture
def lora_file(quantized_model, tmp_path):
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    tensors = generic(*shapes(quantized_model).items(), alpha=2)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "style.safetensors")
    yield "style.safetensors"
    folder_paths.folder_names_and_paths["loras"][0].remove(str(tmp_path))
    folder_paths.filename_list_cache.clear()


def test_the_nodes_that_load_loras(plain, quantized_model, drift, lora_file):
    before = sample(quantized_model)
    (first,) = LoraLoaderModelOnly().load_lora_model_only(quantized_model, lora_file, -0.8)
    second, _ = LoraLoader().load_lora(first, None, lora_file, 2.3, 1.0)
    (exact,) = LoraLoaderModelOnly().load_lora_model_only(plain, lora_file, 1.5)
    assert relative_error(sample(second), sample(exact)) < MARGIN * drift
    assert relative_error(sample(second), before) > drift
    assert torch.equal(sample(quantized_model), before)


def test_the_nodes_that_make_hooks(plain, quantized_model, drift, lora_file):
    (hooks,) = CreateHookLoraModelOnly().create_hook_model_only(lora_file, 2.0)
    (keyframes,) = CreateHookKeyframe().create_hook_keyframe(1.0, 0.0)
    (keyframes,) = CreateHookKeyframe().create_hook_keyframe(0.3, 0.5, keyframes)
    (hooks,) = SetHookKeyframes().set_hook_keyframes(hooks, keyframes)
    cond = comfy.hooks.set_hooks_for_conditioning(prompts(1), hooks)
    before, exact = sample(quantized_model), sample(plain, cond=cond)
    assert relative_error(sample(plain), exact) > drift
    assert relative_error(sample(quantized_model, cond=cond), exact) < MARGIN * drift
    assert torch.equal(sample(quantized_model), before)


# --- traps ---------------------------------------------------------------------------------------------------------


def wide(width, seed):
    """A LoRA that widens img_in, as FLUX-tools' do, in ComfyUI's naming."""
    name = "diffusion_model.img_in"
    return named(name, HIDDEN, width, seed) | {f"{name}.reshape_weight": torch.tensor([HIDDEN, width])}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_loras_of_different_widths_of_img_in_in_any_order(quantized_model, caplog, order):
    """Nunchaku's loader raises. ComfyUI's skips a narrow LoRA after a wide one, and raises at a second width."""
    weight = quantized_model.model.diffusion_model.img_in.weight.cpu().clone()
    loras = [wide(64, 0), wide(128, 10), wide(384, 20), named("diffusion_model.img_in", HIDDEN, 64, 30)]
    del loras[0]["diffusion_model.img_in.reshape_weight"]
    expected = torch.nn.functional.pad(weight.float(), (0, 384 - 64))
    patched = quantized_model
    for i in order:
        patched = load_lora(patched, loras[i], 0.5 + i)
        up, down = factors(HIDDEN, (64, 128, 384, 64)[i], 10 * i)
        expected[:, :down.shape[1]] += (0.5 + i) * up @ down
    found = loaded(patched).model.diffusion_model.img_in.weight.cpu().float()
    assert found.shape == (HIDDEN, 384) and relative_error(found, expected) < 0.005
    assert "ERROR" not in caplog.text
    patched.unpatch_model(patched.offload_device)
    assert torch.equal(quantized_model.model.diffusion_model.img_in.weight.cpu(), weight)


@pytest.mark.parametrize(("on_model", "in_hook"), [((1,), (3,)), ((2,), (1, 3)), ((3, 1), (1,))])
def test_hooks_and_loras_of_different_widths_of_img_in(quantized_model, caplog, on_model, in_hook):
    """LoRAs on the MODEL and in a hook give the same as all of them on the MODEL."""
    loras = [None, wide(128, 10), wide(384, 20), named("diffusion_model.img_in", HIDDEN, 64, 30)]
    together, patched, before = quantized_model, quantized_model, sample(quantized_model)
    for i in on_model:
        together, patched = load_lora(together, loras[i]), load_lora(patched, loras[i])
    hooks = comfy.hooks.HookGroup()
    for i in in_hook:
        together = load_lora(together, loras[i])
        hooks = hooks.clone_and_combine(comfy.hooks.create_hook_lora(loras[i], 1.0, 0))
    cond = comfy.hooks.set_hooks_for_conditioning(prompts(1), hooks)
    # A hook rounds the weight to 16 bits once more, which changes a few 4-bit codes.
    expected = sample(together)
    assert relative_error(sample(patched, cond=cond), expected) < 0.5 * relative_error(sample(patched), expected)
    assert "ERROR" not in caplog.text
    assert torch.equal(sample(quantized_model), before)
    widening = comfy.hooks.set_hooks_for_conditioning(prompts(1), comfy.hooks.create_hook_lora(wide(512, 40), 1.0, 0))
    with pytest.raises(ValueError, match="put that LoRA on the MODEL with Load LoRA."):
        sample(patched, cond=widening)
    assert torch.equal(sample(quantized_model), before)


def test_two_loras_with_norms(plain, quantized_model):
    """Nunchaku's loader fails at the second LoRA; ComfyUI uses the last LoRA's norms, regardless of its strength."""
    name = "single_blocks.0.norm.query_norm"
    key = next(key for key in quantized_model.model.diffusion_model.state_dict() if key.startswith(name))
    stored = f"diffusion_model.{key.removesuffix('.weight')}.set_weight"
    first, second = ({stored: 1 + 0.1 * random(128, seed=seed)} for seed in (1, 2))
    weights = [loaded(load_lora(load_lora(patcher, first, 1.0), second, 0.3)).model.diffusion_model.get_parameter(key).cpu()
               for patcher in (plain, quantized_model)]
    assert torch.equal(weights[0].bfloat16(), weights[1].bfloat16())
    assert relative_error(weights[1].float(), second[stored]) < 0.005


@pytest.mark.parametrize("name", [LINEAR1, LINEAR2, QKV, FC1, MOD])
def test_a_rank_of_more_than_a_thousand(quantized_model, name):
    """Nunchaku's kernels support 1024 ranks, without a check."""
    n, k = shapes(quantized_model)[name]
    patched = load_lora(load_lora(quantized_model, generic((name, (n, k)), rank=1100)), generic((name, (n, k)), rank=300, alpha=5), -0.5)
    assert change(loaded(patched), name)[0] < ROUNDING
    assert layer_of(patched, name).lora_branch.lora.ranks == (1400,)


@pytest.mark.parametrize("rank", [16, 64, 128])
def test_a_strength_never_reaches_the_models_own_branch(pair_files, rank):
    """Nunchaku's loader scales all ranks after the 32nd, which belong to the model in its files of rank 128."""
    plain, recipe = loader.load_model(pair_files[0]), presets.make_recipe("data-free", rank)
    quantized_model, _ = quantize.quantize(plain, recipe, None, None, 2, 0, Progress())
    x = random(5, HIDDEN)
    own = {part: layer_of(quantized_model, QKV).get_parameter(f"weight_proj_{part}").cpu().clone() for part in ("up", "down")}
    before = output(loaded(quantized_model), QKV, x)
    n, k = shapes(quantized_model)[QKV]
    up, down = factors(n, k)
    for strength in (0.3, -1.5):
        patched = loaded(load_lora(quantized_model, generic((QKV, (n, k))), strength))
        added, exact = output(patched, QKV, x) - before, strength * x @ down.t() @ up.t()
        assert relative_error(added, exact) < ROUNDING + rounding(before) / exact.norm()
        assert all(torch.equal(layer_of(patched, QKV).get_parameter(f"weight_proj_{part}").cpu(), t) for part, t in own.items())


# --- the distance to 16 bits ---------------------------------------------------------------------------------------


def test_in_a_layer_a_lora_adds_no_error(plain, quantized_model):
    """The error of 4 bits in a layer's output is the same with a LoRA and without; only the LoRA's own rounding is added."""
    tensors = generic(*shapes(quantized_model).items())

    def errors(*patchers):
        exact, quantized = (loaded(patcher).model.diffusion_model for patcher in patchers)
        found = {}
        for name, (_, k) in shapes(quantized_model).items():
            x = random(64, k)
            if name.endswith(("_mlp.2", ".linear2")):
                x[:, -4 * HIDDEN:] = torch.nn.functional.gelu(x[:, -4 * HIDDEN:], approximate="tanh")
            x = x.to(plain.load_device, quantized_model.model.get_dtype())
            found[name] = float((quantized.get_submodule(name)(x).float() - exact.get_submodule(name)(x).float()).norm())
        return found

    alone = errors(plain, without_gelu(quantized_model))
    together = errors(load_lora(plain, tensors), load_lora(quantized_model, tensors))
    worst = max(alone, key=lambda name: together[name] / alone[name])
    assert together[worst] < 1.01 * alone[worst], f"{worst}: {together[worst] / alone[worst]:.3f}"


def test_in_pictures_a_lora_adds_no_error(plain, quantized_model):
    """The distance of 4 bits from 16 bits with a LoRA relative to that without it, over LoRAs a tenth as large as the weights, both signs
    and several seeds. One picture varies by some percent either way, the mean of eight by about one."""
    tensors, seeds = generic(*shapes(quantized_model).items(), size=0.1), range(4)

    def drift(patchers):
        return sum(relative_error(sample(patchers[1], seed), sample(patchers[0], seed)) for seed in seeds) / len(seeds)

    alone = drift((plain, quantized_model))
    ratios = [drift([load_lora(patcher, tensors, strength) for patcher in (plain, quantized_model)]) / alone for strength in (1.0, -1.0)]
    assert sum(ratios) / 2 < 1.04, f"{ratios[0]:.3f} and {ratios[1]:.3f} times as far apart as without a LoRA"
