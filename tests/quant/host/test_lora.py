"""LoRAs on a quantized FLUX, through the functions of ComfyUI's own LoRA nodes: names, strengths, layers and refusals."""

import comfy.lora
import pytest
import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import lora
from comfyui_svdquant.quant.host.operations import Operations
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.layers.linear import PackedLinear
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import HIDDEN, sample
from ..lora_tensors import (
    FC1,
    FC2,
    LINEAR1,
    LINEAR2,
    MOD,
    QKV,
    RANK,
    ROUNDING,
    change,
    factors,
    generic,
    layer_of,
    load_lora,
    loaded,
    lora_weight,
    margin,
    named,
    output,
    random,
    rounding,
    shapes,
    without_gelu,
)

pytestmark = pytest.mark.usefixtures("inference_mode", "device")


# --- names ---------------------------------------------------------------------------------------------------------

DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (1, 1), "transformer_blocks.0.attn.to_k": (1, 1), "transformer_blocks.0.attn.to_v": (1, 1),
    "transformer_blocks.0.attn.add_k_proj": (1, 1), "transformer_blocks.0.attn.to_out.0": (1, 1),
    "transformer_blocks.0.attn.to_add_out": (1, 1), "transformer_blocks.0.ff.net.0.proj": (4, 1),
    "transformer_blocks.0.ff.net.2": (1, 4), "transformer_blocks.0.ff_context.net.0.proj": (4, 1),
    "transformer_blocks.0.norm1.linear": (6, 1), "single_transformer_blocks.0.attn.to_q": (1, 1),
    "single_transformer_blocks.0.attn.to_v": (1, 1), "single_transformer_blocks.0.proj_mlp": (4, 1),
    "single_transformer_blocks.0.proj_out": (1, 5), "single_transformer_blocks.0.norm.linear": (3, 1),
}


def kohya(sizes):
    return {k: t for i, (name, (n, m)) in enumerate(sizes.items())
            for k, t in named(f"lora_unet_{name.replace('.', '_')}", n, m, 10 * i, alpha=2).items()}, len(sizes)


def bfl(sizes):
    return {k: t for i, (name, (n, m)) in enumerate(sizes.items())
            for k, t in named(f"diffusion_model.{name}", n, m, 10 * i, up="lora_B.weight", down="lora_A.weight").items()}, len(sizes)


def diffusers(prefix, rename=lambda name: name, **suffixes):
    def tensors(_):
        return {k: t for i, (name, (n, m)) in enumerate(DIFFUSERS.items()) for k, t in
                named(prefix + rename(name), n * HIDDEN, m * HIDDEN, 10 * i, **suffixes).items()}, len(DIFFUSERS)
    return tensors


def xlabs(_):
    """XLabs' and USO's naming, which ComfyUI recognizes by the last blocks of a full-size model."""
    sizes = {"double_blocks.0.processor.qkv_lora1": (3, 1), "double_blocks.0.processor.qkv_lora2": (3, 1),
             "double_blocks.0.processor.proj_lora1": (1, 1), "double_blocks.0.processor.proj_lora2": (1, 1),
             "single_blocks.0.processor.qkv_lora": (3, 1), "single_blocks.0.processor.proj_lora": (1, 5)}
    absent = {"double_blocks.18.processor.qkv_lora2": (3, 1), "single_blocks.37.processor.qkv_lora": (3, 1)}
    return {k: t for i, (name, (n, m)) in enumerate((sizes | absent).items()) for k, t in
            named(name, n * HIDDEN, m * HIDDEN, 10 * i, up="up.weight", down="down.weight").items()}, len(sizes)


STYLES = {
    "kohya": kohya, "BFL": bfl, "XLabs": xlabs,
    "PEFT": diffusers("transformer.", up="lora_B.weight", down="lora_A.weight"),
    "diffusers": diffusers("transformer.", up="lora.up.weight", down="lora.down.weight"),
    "OneTrainer": diffusers("lora_transformer_", lambda name: name.replace(".", "_"), alpha=2),
    "SimpleTuner": diffusers("lycoris_", lambda name: name.replace(".", "_"), alpha=2),
}


@pytest.mark.parametrize(("style", "strength"), list(zip(STYLES, (1.0, -1.0, 1.5, -0.7, 0.7, 2.0, -2.0))))
def test_a_lora_in_every_naming_works_as_on_the_16_bit_model(plain, quantized_model, drift, style, strength):
    tensors, count = STYLES[style](shapes(quantized_model))
    with_lora = load_lora(quantized_model, tensors, strength)
    assert sum(map(len, with_lora.patches.values())) == count
    assert with_lora.patches.keys() == load_lora(plain, tensors, strength).patches.keys()
    exact = sample(load_lora(plain, tensors, strength))
    error = relative_error(sample(with_lora), exact)
    assert relative_error(sample(plain), exact) > drift / 2, "the LoRA has too small an effect here"
    assert error < margin() * drift, f"4 bits against 16 bits: {error:.3f} with the LoRA, {drift:.3f} without it"
    loaded(with_lora)
    for name in with_lora.packed_layers():
        if f"diffusion_model.{name}.weight" in with_lora.patches:
            assert change(with_lora, name)[0] < ROUNDING


@pytest.mark.parametrize("name", [LINEAR1, LINEAR2, QKV, FC1, FC2, MOD])
def test_each_layer_matches_float64(quantized_model, name):
    n, k = shapes(quantized_model)[name]
    patched = load_lora(quantized_model, generic((name, (n, k)), alpha=3), 0.8)
    x = random(5, k)
    before, after = output(loaded(without_gelu(quantized_model)), name, x), output(loaded(patched), name, x)
    up, down = (t.double() for t in factors(n, k))
    exact = 0.8 * 3 / RANK * x.double() @ down.t() @ up.t()
    assert relative_error((after - before).double(), exact) < ROUNDING + rounding(after) / exact.norm()


# --- strength, removal, stacks -------------------------------------------------------------------------------------


def test_strength_0_and_removal_restore_the_picture_to_the_bit(quantized_model):
    before, state = sample(quantized_model), {name: t.clone() for name, t in quantized_model.model.state_dict().items()}
    tensors = generic(*shapes(quantized_model).items())
    assert torch.equal(sample(load_lora(quantized_model, tensors, 0.0)), before)
    patched = load_lora(quantized_model, tensors)
    assert relative_error(sample(patched), before) > 0.1
    packed = {f"diffusion_model.{name}" for name in quantized_model.packed_layers()}
    assert all(torch.equal(t, state[name]) for name, t in quantized_model.model.state_dict().items() if name.rpartition(".")[0] in packed)
    assert torch.equal(sample(quantized_model), before)
    assert all(torch.equal(t, state[name]) for name, t in quantized_model.model.state_dict().items())
    assert not any(layer.lora_branch for layer in quantized_model.packed_layers().values())


def test_stacks(quantized_model):
    tensors, other = generic(*shapes(quantized_model).items()), generic(*shapes(quantized_model).items(), rank=2, alpha=1)
    before = sample(quantized_model)
    assert relative_error(sample(load_lora(load_lora(quantized_model, tensors, 1.0), tensors, -1.0)), before) < 0.02
    both = loaded(load_lora(load_lora(quantized_model, tensors, 1.0), other, -0.5))
    for name in both.packed_layers():
        assert change(both, name)[0] < ROUNDING
        branch = layer_of(both, name).lora_branch
        assert not branch.terms and branch.lora.ranks == (-(-(RANK + 2) // 8) * 8,)  # all of a layer's ranks in one pair of factors


def test_fp16_scales_keep_small_factors_out_of_the_subnormals(quantized_model):
    layer = Operations.packed(layout.svdquant_spec(HIDDEN, HIDDEN, 16, HIDDEN, True, torch.float16)).to_empty(device="cpu")
    up, down = factors(HIDDEN, HIDDEN)
    adapter = comfy.lora.weight_adapter.LoRAAdapter(set(), (up * 1e-4, down * 10, 1e-3, None, None, None))
    branch, _ = lora.build("x", layer, [(1.0, adapter, 1.0, None, None)], torch.device("cpu"), {})
    assert branch.lora_up.dtype == torch.float16
    exact = (up.double() * 1e-4) @ (down.double() * 10) * 1e-3 / RANK
    assert relative_error(lora_weight(branch, HIDDEN), exact) < 0.001


# --- parts of layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("to_k",), ("to_q", "to_v"), ("to_q", "to_k", "to_v")])
@pytest.mark.parametrize(("prefix", "name"), [("transformer.transformer_blocks.0.attn", QKV),
                                              ("transformer.single_transformer_blocks.0.attn", LINEAR1)])
def test_some_of_q_k_v(quantized_model, parts, prefix, name):
    tensors = {}
    for i, part in enumerate(parts):
        tensors |= named(f"{prefix}.{part}", HIDDEN, HIDDEN, i, rank=RANK + 2 * i)
    patched = load_lora(quantized_model, tensors)
    x = random(3, HIDDEN)
    before, after = (output(loaded(p), name, x).split(HIDDEN, dim=-1) for p in (quantized_model, patched))
    assert change(patched, name)[0] < ROUNDING
    touched = {("to_q", "to_k", "to_v").index(part) for part in parts}
    for i, (a, b) in enumerate(zip(after, before)):
        error = relative_error(a, b)
        assert error > 0.05 if i in touched else error < 1e-6 + rounding(b) / b.norm(), f"part {i} changed by {error:.1e}"


def test_columns_of_linear2(quantized_model):
    key = f"diffusion_model.{LINEAR2}.weight"
    up, down = factors(HIDDEN, 4 * HIDDEN)
    adapter = comfy.lora.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))
    patched = quantized_model.clone()
    assert patched.add_patches({(key, (1, HIDDEN, 4 * HIDDEN)): adapter}) == [(key, (1, HIDDEN, 4 * HIDDEN))]
    assert change(loaded(patched), LINEAR2)[0] < ROUNDING
    assert not change(patched, LINEAR2)[1][:, :HIDDEN].any()


@pytest.mark.parametrize("name", [FC1, FC2, MOD])
def test_one_layer_alone(plain, quantized_model, drift, name):
    tensors = generic((name, shapes(quantized_model)[name]))
    exact = sample(load_lora(plain, tensors))
    assert relative_error(sample(load_lora(quantized_model, tensors)), exact) < margin() * drift


# --- biases and unpacked layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FC1, FC2, MOD])
@pytest.mark.parametrize("lowvram", [False, True])
def test_bias_differences(quantized_model, name, lowvram):
    n, k = shapes(quantized_model)[name]
    patched = load_lora(quantized_model, {f"diffusion_model.{name}.diff_b": random(n)}, 0.5)
    assert patched.patches.keys() == {f"diffusion_model.{name}.bias"}
    x = random(3, k)
    before = output(loaded(without_gelu(quantized_model)), name, x)
    patched.unpatch_model(patched.offload_device)
    patched.patch_model(patched.load_device, lowvram_model_memory=1 if lowvram else 0)
    layer = layer_of(patched, name)
    assert bool(layer.bias_function) is lowvram
    assert relative_error(output(patched, name, x) - before, 0.5 * random(n).expand(3, n)) < 0.02
    assert torch.equal(output(loaded(quantized_model), name, x), before)


def control_lora(plain):
    """A LoRA like FLUX-tools': factors and biases of every layer, the norms, and img_in with twice the channels."""
    tensors = {}
    for i, (name, t) in enumerate(plain.model.diffusion_model.state_dict().items()):
        if name.endswith(".weight") and t.ndim == 2:
            layer = name.removesuffix(".weight")
            k = 2 * t.shape[1] if layer == "img_in" else t.shape[1]
            tensors |= named(layer, t.shape[0], k, 10 * i, up="lora_B.weight", down="lora_A.weight", size=0.2)
            tensors[f"{layer}.lora_B.bias"] = 0.1 * random(t.shape[0], seed=i)
        elif "_norm." in name:
            tensors[name.replace("_norm.weight", "_norm.scale")] = 1 + 0.1 * random(*t.shape)
    return tensors


def test_flux_tools_loras_widen_img_in(plain, quantized_model, drift):
    tensors = control_lora(plain)
    before = sample(quantized_model)
    exact, y = sample(load_lora(plain, tensors)), sample(load_lora(quantized_model, tensors))
    assert quantized_model.model.diffusion_model.img_in.weight.shape == (HIDDEN, 128)
    assert relative_error(y, exact) < margin() * drift
    assert torch.equal(sample(quantized_model), before)
    assert quantized_model.model.diffusion_model.img_in.weight.shape == (HIDDEN, 64)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refusals_give_the_reason(plain, quantized_model):
    def refused(match, act):
        with pytest.raises(ValueError, match=match) as caught:
            act()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")

    refused("belongs to another model", lambda: load_lora(quantized_model, generic((FC1, (512, 512)))))
    refused("belongs to another model", lambda: load_lora(quantized_model, {f"diffusion_model.{FC1}.lokr_w1": random(2, 2),
                                                                 f"diffusion_model.{FC1}.lokr_w2": random(5, 5)}))
    refused("can't run on a model in 4 bits",
            lambda: sample(load_lora(quantized_model, {f"diffusion_model.{FC1}.diff": random(5, 5)})))
    refused("can't run on a model in 4 bits", lambda: sample(load_lora(quantized_model, {
        f"diffusion_model.{FC1}.hada_w1_a": random(7, 2), f"diffusion_model.{FC1}.hada_w1_b": random(2, 9),
        f"diffusion_model.{FC1}.hada_w2_a": random(7, 2), f"diffusion_model.{FC1}.hada_w2_b": random(2, 9)})))
    refused("quantize the result", lambda: quantized_model.clone().add_patches(plain.get_key_patches("diffusion_model."), 0.5, 0.5))
    refused("can only add to it", lambda: load_lora(quantized_model, {f"diffusion_model.{FC2}.bias.set_weight": random(HIDDEN)}))
    patch = {f"diffusion_model.{FC1}.weight_scale": ("diff", (random(4, 1024),))}
    refused("weight_scale", lambda: quantized_model.clone().add_patches(patch))
    refused("function of its own", lambda: quantized_model.clone().add_weight_wrapper(f"diffusion_model.{FC1}.weight", lambda w: w))
    assert torch.isfinite(sample(quantized_model)).all()


def test_merging_a_quantized_model_into_a_16_bit_one(plain, quantized_model):
    """Model Merge nodes whose first model is the 16-bit one merge the dequantized weights, including their LoRA."""
    source = load_lora(quantized_model, generic((FC2, shapes(quantized_model)[FC2])))
    merged = plain.clone()
    for key, patch in source.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 1.0, 0.0)
    assert relative_error(sample(merged), sample(source)) < 0.2
    for name in FAMILY.packed_names(plain.model.diffusion_model.state_dict()):
        bias = merged.model.diffusion_model.get_parameter(f"{name}.bias")
        assert relative_error(bias.float(), loaded(plain).model.diffusion_model.get_parameter(f"{name}.bias").float()) < 0.2
        loaded(merged)


def test_every_packed_layer_is_of_this_packs_classes(quantized_model):
    assert all(isinstance(layer, PackedLinear) for layer in quantized_model.packed_layers().values()) and len(shapes(quantized_model)) == 17
