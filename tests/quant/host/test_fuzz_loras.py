"""LoRA files with any shapes, types and entries on a quantized model: refused in one sentence, or left out by ComfyUI as on a 16-bit model,
or with the effect that ComfyUI's own dense arithmetic has."""

import comfy.lora
import pytest
import torch
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ..conftest import load
from ..lora_tensors import LINEAR1, LINEAR2, QKV, ROUNDING, effective, layer_of, load_lora, loaded, random

pytestmark = pytest.mark.usefixtures("inference_mode")
LAYERS = (LINEAR1, LINEAR2, QKV)
# {kind: the ends of its tensors' names}, in ComfyUI's plain naming and in its others.
KINDS = {
    "LoRA": ("lora_up.weight", "lora_down.weight"), "diffusers": ("lora_B.weight", "lora_A.weight"),
    "mid": ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoKr": ("lokr_w1", "lokr_w2"),
    "LoKr in factors": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"), "difference": ("diff",), "bias": ("diff_b",), "set": ("set_weight",),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool)
EXACT = ("LoRA", "diffusers", "LoKr")
RANK = 4


def fitting(kind, n, k):
    """The shapes of a kind's tensors on a layer (n, k)."""
    return {"LoRA": ((n, RANK), (RANK, k)), "diffusers": ((n, RANK), (RANK, k)), "mid": ((n, RANK), (RANK, k), (RANK, RANK)),
            "LoHa": ((n, RANK), (RANK, k)) * 2, "LoKr": ((2, 2), (n // 2, k // 2)),
            "LoKr in factors": ((2, 2), (n // 2, RANK), (RANK, k // 2)), "difference": ((n, k),), "bias": ((n,),), "set": ((n, k),),
            "GLoRA": ((RANK, k), (k, RANK), (RANK, n), (n, RANK))}[kind]


@st.composite
def files(draw):
    """(kind, layer, tensors of a LoRA, strength): one of a kind, with up to two changes."""
    kind, layer = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(LAYERS))
    return kind, layer, draw(st.lists(st.tuples(
        st.integers(0, 3), st.sampled_from(("shape", "type", "drop", "alpha", "nan", "empty", "none", "dora", "transpose")),
        st.integers(0, 9)), max_size=2)), draw(st.sampled_from((1.0, 0.0, -2.5, 1e30)))


def tensors_of(kind, layer, changes, n, k):
    tensors = {f"diffusion_model.{layer}.{end}": 0.02 * random(*shape, seed=place)
               for place, (end, shape) in enumerate(zip(KINDS[kind], fitting(kind, n, k)))}
    for place, change, number in changes:
        name = list(tensors)[place % len(tensors)] if tensors else ""
        if change == "alpha":
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor((0.0, -1.0, 1e9, float("nan"), 2.0)[number % 5])
        elif change == "dora":
            tensors[f"diffusion_model.{layer}.dora_scale"] = random(*((n, 1), (1, k), (n,), (3, 3))[number % 4]).abs()
        elif not name:
            continue
        elif change == "drop":
            del tensors[name]
        elif change == "shape":
            tensors[name] = random(*((number + 1,), (3, number + 1), (number + 1, 5), (2, 2, number + 1))[number % 4])
        elif change == "type":
            tensors[name] = tensors[name].to(DTYPES[number % len(DTYPES)])
        elif change == "nan":
            tensors[name] = torch.full_like(tensors[name].float(), (float("nan"), float("inf"))[number % 2])
        elif change == "none":  # no ranks are left: no row of the one factor, no column of the other
            tensors |= {key: each[:0] if each.shape[0] == RANK else each[:, :0] for key, each in tensors.items() if each.ndim == 2}
        elif change == "empty":
            tensors[name] = torch.zeros(0, number)
        else:
            tensors[name] = tensors[name].t().contiguous() if tensors[name].ndim == 2 else tensors[name]
    return tensors


@pytest.fixture(scope="module")
def model(pair_files):
    with torch.inference_mode():
        return load(pair_files[1])


def dense_change(patcher, key, dense):
    """The change by ComfyUI's own arithmetic; None where it fails or leaves the weight as it is."""
    exact = comfy.lora.calculate_weight(patcher.patches[key], dense.clone(), key)
    return exact - dense if exact.shape == dense.shape else None


@given(file=files())
@example(file=("LoRA", LINEAR1, [], 1.0)).via("a sound file")
@example(file=("LoRA", LINEAR1, [(0, "nan", 0)], 1.0)).via("silent acceptance")
@example(file=("LoHa", LINEAR2, [(1, "shape", 3)], 1.0)).via("factors that do not fit")
@example(file=("set", LINEAR2, [(1, "nan", 5)], 1.0)).via("no singular values")
@example(file=("LoKr in factors", LINEAR1, [(2, "empty", 3)], -2.5)).via("factors of a factor")
@example(file=("LoKr", QKV, [(1, "empty", 0)], 1.0)).via("no elements")
@example(file=("LoRA", LINEAR1, [(0, "shape", 0)], 1.0)).via("a factor of one dimension")
@example(file=("diffusers", LINEAR1, [(0, "shape", 0)], 1.0)).via("a factor of one dimension")
@example(file=("GLoRA", LINEAR1, [(0, "shape", 1), (0, "alpha", 1)], 1.0)).via("an error of ComfyUI's own")
@example(file=("LoKr", LINEAR1, [(0, "dora", 0), (1, "drop", 0)], 1.0)).via("an error of ComfyUI's own")
@example(file=("LoKr", LINEAR1, [(0, "drop", 0), (0, "dora", 0)], 1.0)).via("an error of ComfyUI's own")
@example(file=("LoHa", LINEAR1, [(1, "empty", 0), (0, "alpha", 1)], 1.0)).via("an error of ComfyUI's own")
@example(file=("bias", LINEAR1, [(0, "alpha", 0), (1, "shape", 1)], 1.0)).via("a file that ComfyUI can't read")
@example(file=("LoKr", LINEAR1, [(0, "drop", 0)], 1.0)).via("a factor is missing")
@example(file=("mid", LINEAR1, [(1, "empty", 0)], 0.0)).via("no ranks")
@example(file=("LoRA", LINEAR1, [(0, "none", 0), (0, "alpha", 4)], 1.0)).via("no ranks")
@example(file=("LoKr", LINEAR2, [(1, "nan", 0)], 1.0)).via("silent acceptance")
@example(file=("LoRA", LINEAR2, [(0, "alpha", 3)], 1.0)).via("silent acceptance")
@example(file=("bias", QKV, [(0, "nan", 1)], 1.0)).via("silent acceptance")
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_any_lora_is_refused_or_has_its_effect(model, file):
    kind, name, changes, strength = file
    layer, key = layer_of(model, name), f"diffusion_model.{name}.weight"
    tensors = tensors_of(kind, name, changes, layer.out_features, layer.in_features)
    try:
        comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    except (RuntimeError, IndexError, KeyError):
        return  # ComfyUI reads the file without this pack, whatever the model is
    try:
        patcher = loaded(load_lora(model, tensors, strength))
    except ValueError as error:
        assert "\n" not in str(error) and name in str(error) and str(error).endswith("."), error
        return
    finally:
        if not model.model.svdquant_attached:
            model.detach()
    dense = layer.dense("cpu")
    found = effective(layer) - dense
    bias = layer.bias
    model.detach()
    assert strength == 1e30 or (torch.isfinite(found).all() and torch.isfinite(bias).all())
    assert layer.lora_branch is None
    if key in patcher.patches and kind in EXACT and not any(change in ("nan", "alpha", "dora") for _, change, _ in changes):
        exact = dense_change(patcher, key, dense)
        assert exact is None or not exact.any() or strength == 1e30 or relative_error(found, exact) < 4 * ROUNDING
