"""LoRAs on a quantized FLUX, through what ComfyUI's own LoRA and hook nodes call."""

import copy
import logging

import comfy.hooks
import comfy.lora
import comfy.sd
import pytest
import torch
from comfyui_svdquant.quant import flux, layout, quantizer
from comfyui_svdquant.quant.host import build, lora, quantize
from comfyui_svdquant.quant.host.ops import Operations
from comfyui_svdquant.quant.linear import PackedLinear
from comfyui_svdquant.quant.metrics import relative_error
from comfyui_svdquant.quant.side import Dense, Kronecker, LowRank

from .comfy_models import HIDDEN, Progress, prompts, sample, save, write_flux

RANK = 4
LINEAR1, LINEAR2, QKV, FC1, FC2, MOD = ("single_blocks.0.linear1", "single_blocks.0.linear2", "double_blocks.0.img_attn.qkv",
                                        "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.2", "double_blocks.0.img_mod.lin")
ROUNDING = 0.005  # of two bf16 factors
MARGIN = 1.15

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("models") / "flux.safetensors", depth_single=1)


@pytest.fixture(scope="module")
def native_file(flux_file, tmp_path_factory):
    with torch.inference_mode():
        twin, _ = quantize.quantize(build.load_model(flux_file), quantizer.recipe("data-free", 16), None, None, 2, 0, Progress())
        return save(twin, tmp_path_factory.mktemp("models") / "flux_4bit.safetensors")


@pytest.fixture
def plain(flux_file):
    return build.load_model(flux_file)


@pytest.fixture
def twin(native_file):
    return build.load_model(native_file)


@pytest.fixture(scope="module")
def drift(flux_file, native_file):
    """How far 4 bits are from 16 bits without a LoRA; with one they are allowed MARGIN times that."""
    with torch.inference_mode():
        return relative_error(sample(build.load_model(native_file)), sample(build.load_model(flux_file)))


def shapes(patcher):
    """{layer name: (N, K)} of the layers that are packed in a quantized model."""
    return {name: (layer.out_features, layer.in_features) for name, layer in patcher.packed_layers().items()}


def random(*shape, seed=0):
    # A seed for each shape and place, so that no two factors of a LoRA are alike.
    g = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=g)


def factors(n, k, seed=0, rank=RANK, size=0.25):
    """(up, down) whose product is `size` times as large as the weights of flux_tensors."""
    return random(n, rank, seed=seed) * size / rank**0.5, random(rank, k, seed=seed + 1) / k**0.5


def named(prefix, n, k, seed=0, up="lora_up.weight", down="lora_down.weight", alpha=None, **options):
    tensors = dict(zip((f"{prefix}.{up}", f"{prefix}.{down}"), (t.contiguous() for t in factors(n, k, seed, **options))))
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return tensors


def generic(*layers, alpha=None, **options):
    """A LoRA in ComfyUI's plain naming; layers: (name, (n, k))."""
    tensors = {}
    for seed, (name, (n, k)) in enumerate(layers):
        tensors |= named(f"diffusion_model.{name}", n, k, 10 * seed, alpha=alpha, **options)
    return tensors


def load_lora(patcher, tensors, strength=1.0):
    """What LoraLoader and LoraLoaderModelOnly do."""
    return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]


def loaded(patcher):
    """The patcher, with its patches on the model."""
    patcher.unpatch_model(patcher.offload_device)
    patcher.patch_model(patcher.load_device)
    return patcher


def layer_of(patcher, name):
    return patcher.packed_layers()[name]


def effective(layer):
    """(N, K) float32: the weight that a layer computes with, its side branch included."""
    weight = layer.dense("cpu")
    if layer.side is None:
        return weight
    if layer.side.gain is not None:
        weight = weight * layer.side.gain[:, None]
    for term in layer.side.terms:
        weight[slice(*term.rows), slice(*term.cols)] += copy.deepcopy(term).float().dense()
    return weight


def change(patcher, name):
    """(‖what the layer's weight changed by, against ComfyUI's own dense arithmetic‖ / ‖that‖, the dense change)."""
    layer, key = layer_of(patcher, name), f"diffusion_model.{name}.weight"
    dense = layer.dense("cpu")
    exact = comfy.lora.calculate_weight(patcher.patches[key], dense.clone(), key) - dense
    return relative_error(effective(layer) - dense, exact), exact


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
    """As XLabs and USO write them; ComfyUI knows them by the last blocks of a full-size model."""
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
def test_a_lora_in_every_naming_works_as_on_the_16_bit_model(plain, twin, drift, style, strength):
    tensors, count = STYLES[style](shapes(twin))
    with_lora = load_lora(twin, tensors, strength)
    assert sum(map(len, with_lora.patches.values())) == count
    assert with_lora.patches.keys() == load_lora(plain, tensors, strength).patches.keys()
    exact = sample(load_lora(plain, tensors, strength))
    error = relative_error(sample(with_lora), exact)
    assert relative_error(sample(plain), exact) > drift / 2, "the LoRA does next to nothing here"
    assert error < MARGIN * drift, f"4 bits against 16 bits: {error:.3f} with the LoRA, {drift:.3f} without it"
    loaded(with_lora)
    for name in with_lora.packed_layers():
        if f"diffusion_model.{name}.weight" in with_lora.patches:
            assert change(with_lora, name)[0] < ROUNDING


@pytest.mark.parametrize("name", [LINEAR1, LINEAR2, QKV, FC1, FC2, MOD])
def test_each_layer_adds_what_float64_says(twin, name):
    n, k = shapes(twin)[name]
    patched = load_lora(twin, generic((name, (n, k)), alpha=3), 0.8)
    x = random(5, k)
    before = layer_of(loaded(twin), name)(x)
    after = layer_of(loaded(patched), name)(x)
    up, down = (t.double() for t in factors(n, k))
    assert relative_error((after - before).double(), 0.8 * 3 / RANK * x.double() @ down.t() @ up.t()) < ROUNDING


# --- strength, removal, stacks -------------------------------------------------------------------------------------


def test_strength_0_and_removal_restore_the_picture_to_the_bit(twin):
    before, state = sample(twin), {name: t.clone() for name, t in twin.model.state_dict().items()}
    tensors = generic(*shapes(twin).items())
    assert torch.equal(sample(load_lora(twin, tensors, 0.0)), before)
    patched = load_lora(twin, tensors)
    assert relative_error(sample(patched), before) > 0.1
    packed = {f"diffusion_model.{name}" for name in twin.packed_layers()}
    assert all(torch.equal(t, state[name]) for name, t in twin.model.state_dict().items() if name.rpartition(".")[0] in packed)
    assert torch.equal(sample(twin), before)
    assert all(torch.equal(t, state[name]) for name, t in twin.model.state_dict().items())
    assert not any(layer.side for layer in twin.packed_layers().values())


def test_stacks(twin):
    tensors, other = generic(*shapes(twin).items()), generic(*shapes(twin).items(), rank=2, alpha=1)
    before = sample(twin)
    assert relative_error(sample(load_lora(load_lora(twin, tensors, 1.0), tensors, -1.0)), before) < 0.02
    both = loaded(load_lora(load_lora(twin, tensors, 1.0), other, -0.5))
    for name in both.packed_layers():
        assert change(both, name)[0] < ROUNDING
        (term,) = layer_of(both, name).side.terms  # all of a layer's ranks in one product
        assert term.up.shape[1] == RANK + 2


def test_fp16_scales_keep_small_factors_out_of_the_subnormals(twin):
    layer = Operations.packed(layout.svdquant_spec(HIDDEN, HIDDEN, 16, HIDDEN, True, torch.float16)).to_empty(device="cpu")
    up, down = factors(HIDDEN, HIDDEN)
    adapter = comfy.lora.weight_adapter.LoRAAdapter(set(), (up * 1e-4, down * 10, 1e-3, None, None, None))
    side, _ = lora.build("x", layer, [(1.0, adapter, 1.0, None, None)], torch.device("cpu"), {})
    assert side.terms[0].up.dtype == torch.float16
    exact = (up.double() * 1e-4) @ (down.double() * 10) * 1e-3 / RANK
    assert relative_error(side.terms[0].up.double() @ side.terms[0].down.double(), exact) < 0.001


# --- parts of layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("to_k",), ("to_q", "to_v"), ("to_q", "to_k", "to_v")])
@pytest.mark.parametrize(("prefix", "name"), [("transformer.transformer_blocks.0.attn", QKV),
                                              ("transformer.single_transformer_blocks.0.attn", LINEAR1)])
def test_some_of_q_k_v(twin, parts, prefix, name):
    tensors = {}
    for i, part in enumerate(parts):
        tensors |= named(f"{prefix}.{part}", HIDDEN, HIDDEN, i, rank=RANK + 2 * i)
    patched = load_lora(twin, tensors)
    x = random(3, HIDDEN)
    before, after = (layer_of(loaded(p), name)(x).split(HIDDEN, dim=-1) for p in (twin, patched))
    assert change(patched, name)[0] < ROUNDING
    touched = {("to_q", "to_k", "to_v").index(part) for part in parts}
    assert {i for i, (a, b) in enumerate(zip(after, before)) if not torch.equal(a, b)} == touched
    # A LoRA on k alone costs the memory of k alone.
    assert layer_of(patched, name).side.nbytes() == sum(2 * (RANK + 2 * i) * 2 * HIDDEN for i in range(len(parts)))


def test_columns_of_linear2(twin):
    key = f"diffusion_model.{LINEAR2}.weight"
    up, down = factors(HIDDEN, 4 * HIDDEN)
    adapter = comfy.lora.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))
    patched = twin.clone()
    assert patched.add_patches({(key, (1, HIDDEN, 4 * HIDDEN)): adapter}) == [(key, (1, HIDDEN, 4 * HIDDEN))]
    assert change(loaded(patched), LINEAR2)[0] < ROUNDING
    assert not change(patched, LINEAR2)[1][:, :HIDDEN].any()


@pytest.mark.parametrize("name", [FC1, FC2, MOD])
def test_one_layer_alone(plain, twin, drift, name):
    tensors = generic((name, shapes(twin)[name]))
    exact = sample(load_lora(plain, tensors))
    assert relative_error(sample(load_lora(twin, tensors)), exact) < MARGIN * drift


# --- other kinds of adapters ---------------------------------------------------------------------------------------


def adapter_tensors(what, n, k):
    up, down = factors(n, k)
    eye = up @ down
    a, c = 8, n // 8
    b, d = 8, k // 8
    return {
        "LoKr": {"lokr_w1": random(a, b) / 8, "lokr_w2": random(c, d, seed=1) / d**0.5},
        "LoKr of low rank": {"lokr_w1": random(a, b) / 8, "lokr_w2_a": random(c, 2) / 2, "lokr_w2_b": random(2, d, seed=1) / d**0.5,
                             "alpha": torch.tensor(1.0)},
        "LoKr with DoRA": {"lokr_w1": random(a, b) / 8, "lokr_w2": random(c, d, seed=1) / d**0.5,
                           "dora_scale": 1 + 0.1 * random(n, 1)},
        "LoHa": {"hada_w1_a": random(n, 2), "hada_w1_b": random(2, k, seed=1) / k**0.5, "hada_w2_a": random(n, 2, seed=2),
                 "hada_w2_b": random(2, k, seed=3) / 4, "alpha": torch.tensor(1.0)},
        "DoRA": {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": 1 + 0.2 * random(n, 1), "alpha": torch.tensor(2.0)},
        "DoRA over inputs": {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": (n / k)**0.5 + 0.2 * random(1, k)},
        "difference": {"diff": eye},
        "full difference": {"diff": random(n, k) / k**0.5},
        "GLoRA": {"a1.weight": random(k, RANK) / k**0.5, "a2.weight": random(RANK, k, seed=1) / k**0.5, "b1.weight": up,
                  "b2.weight": down},
        "OFT": {"oft_blocks": 0.2 * random(n // 32, 32, 32)},
        "BOFT": {"oft_blocks": 0.2 * random(2, n // 32, 32, 32), "alpha": torch.tensor(0.0)},
        "replacement": {"set_weight": random(n, k) / k**0.5},
    }[what]


# {what: (kind as the log calls it, the error allowed)}; an SVD that keeps 99 % of the energy is off by 10 %.
KINDS = {
    "LoKr": ("LoKr", ROUNDING), "LoKr of low rank": ("LoKr", ROUNDING), "DoRA": ("LoRA with DoRA", ROUNDING),
    "LoHa": ("LoHa", 0.1), "LoKr with DoRA": ("LoKr with DoRA", 0.1), "DoRA over inputs": ("LoRA with DoRA", 0.1),
    "difference": ("weight difference", 0.1), "full difference": ("weight difference", ROUNDING), "GLoRA": ("GLoRA", 0.1),
    "OFT": ("OFT", 0.1), "BOFT": ("BOFT", 0.1), "replacement": ("replaced weight", ROUNDING),
}


@pytest.mark.parametrize("name", [LINEAR1, FC2, MOD])
@pytest.mark.parametrize("what", KINDS)
def test_other_adapters(twin, caplog, what, name):
    kind, allowed = KINDS[what]
    n, k = shapes(twin)[name]
    tensors = {f"diffusion_model.{name}.{part}": t.contiguous() for part, t in adapter_tensors(what, n, k).items()}
    patched = load_lora(twin, tensors, 0.7)
    with caplog.at_level(logging.INFO):
        loaded(patched)
    error, exact = change(patched, name)
    assert exact.norm() > 0.01 * layer_of(patched, name).dense("cpu").norm()
    assert error < allowed + ROUNDING, f"{what} on {name} is {error:.3f} off"
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("SVDQuant: "))
    assert line.startswith(f"SVDQuant: {kind} on 1 packed layers, "), line
    terms = layer_of(patched, name).side.terms
    assert {"LoKr": Kronecker, "LoKr of low rank": Kronecker, "DoRA": LowRank, "LoHa": LowRank, "difference": LowRank,
            "full difference": Dense, "replacement": Dense}.get(what, type(terms[0])) is type(terms[0])
    assert torch.isfinite(sample(patched)).all()


@pytest.mark.parametrize("name", [LINEAR1, FC2, LINEAR2, MOD])
def test_a_gain_scales_the_weight_and_nothing_of_the_bias(twin, name):
    """In the layers behind a GELU, the stored bias also holds W times the shift, which has to scale with W."""
    n, k = shapes(twin)[name]
    patched = twin.clone()
    patched.add_patches({f"diffusion_model.{name}.weight": (None,)}, 0.0, 0.5)  # what scales weights and adds nothing
    x = random(64, k)
    spec = layer_of(twin, name).spec
    x[:, spec.unsigned_from:] = torch.nn.functional.gelu(x[:, spec.unsigned_from:], approximate="tanh")
    before = layer_of(loaded(twin), name)(x).double()
    layer = layer_of(loaded(patched), name)
    bias = layer.bias.double() - layer.fold("cpu").double()
    assert relative_error(layer(x).double(), 0.5 * (before - bias) + bias) < ROUNDING


def test_stacks_of_different_kinds(twin):
    """Each patch sees the weight that those before it have made, as ComfyUI's own arithmetic has it."""
    n, k = shapes(twin)[FC1]
    patched = twin
    for what in ("LoKr", "DoRA", "difference", "OFT"):
        tensors = {f"diffusion_model.{FC1}.{part}": t.contiguous() for part, t in adapter_tensors(what, n, k).items()}
        patched = load_lora(patched, tensors, 0.5)
    patched.add_patches({f"diffusion_model.{FC1}.weight": (None,)}, 0.0, 0.9)
    assert change(loaded(patched), FC1)[0] < 0.1


def test_another_strength_needs_no_other_svd(twin, monkeypatch):
    n, k = shapes(twin)[FC1]
    tensors = {f"diffusion_model.{FC1}.{part}": t for part, t in adapter_tensors("LoHa", n, k).items()}
    loaded(load_lora(twin, tensors, 1.0))
    monkeypatch.setattr(lora, "truncated", lambda difference: pytest.fail("decomposed again"))
    assert change(loaded(load_lora(twin, tensors, -0.3)), FC1)[0] < 0.1 + ROUNDING


# --- biases and unpacked layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FC1, FC2, MOD])
@pytest.mark.parametrize("lowvram", [False, True])
def test_bias_differences(twin, name, lowvram):
    n, k = shapes(twin)[name]
    patched = load_lora(twin, {f"diffusion_model.{name}.diff_b": random(n)}, 0.5)
    assert patched.patches.keys() == {f"diffusion_model.{name}.bias"}
    x = random(3, k)
    before = layer_of(loaded(twin), name)(x)
    patched.unpatch_model(patched.offload_device)
    patched.patch_model(patched.load_device, lowvram_model_memory=1 if lowvram else 0)
    layer = layer_of(patched, name)
    assert bool(layer.bias_function) is lowvram
    assert relative_error(layer(x) - before, 0.5 * random(n).expand(3, n)) < 0.02
    assert torch.equal(layer_of(loaded(twin), name)(x), before)


def control_lora(plain):
    """As FLUX-tools have it: every layer's factors, biases too, the norms, and img_in for twice the channels."""
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


def test_flux_tools_loras_widen_img_in(plain, twin, drift):
    tensors = control_lora(plain)
    before = sample(twin)
    exact, y = sample(load_lora(plain, tensors)), sample(load_lora(twin, tensors))
    assert twin.model.diffusion_model.img_in.weight.shape == (HIDDEN, 128)
    assert relative_error(y, exact) < MARGIN * drift
    assert torch.equal(sample(twin), before)
    assert twin.model.diffusion_model.img_in.weight.shape == (HIDDEN, 64)


# --- ComfyUI's model management ------------------------------------------------------------------------------------


def test_clones_share_one_model(twin, native_file):
    first, second = (generic(*shapes(twin).items(), **options) for options in ({}, {"rank": 2, "size": 0.3}))
    patchers = [twin, load_lora(twin, first), load_lora(twin, second), load_lora(load_lora(twin, first), second, -1.0)]
    alone = []
    for loras in ((), ((first, 1.0),), ((second, 1.0),), ((first, 1.0), (second, -1.0))):
        patcher = build.load_model(native_file)
        for tensors, strength in loras:
            patcher = load_lora(patcher, tensors, strength)
        alone.append(sample(patcher))
    for i in (1, 0, 2, 3, 1, 1, 0, 3, 2):
        assert torch.equal(sample(patchers[i]), alone[i]), i


def test_a_lora_survives_offloading(twin):
    tensors = generic(*shapes(twin).items())
    patched = load_lora(twin, tensors | {f"diffusion_model.{FC1}.diff_b": random(4 * HIDDEN)})
    whole = sample(patched)
    patched.unpatch_model(patched.offload_device)
    patched.patch_model(patched.load_device, lowvram_model_memory=patched.model_size() // 2)
    assert patched.model.model_lowvram and torch.equal(sample(patched), whole)
    patched.partially_load(patched.load_device, patched.model_size())
    assert torch.equal(sample(patched), whole)
    assert patched.partially_unload(patched.offload_device, patched.model_size() // 2) > 0
    assert torch.equal(sample(patched), whole)
    patched.detach()
    assert not any(layer.side for layer in patched.packed_layers().values())
    assert torch.equal(sample(patched), whole)


def test_side_branches_are_counted_as_memory(twin):
    size = twin.model_size()
    patched = load_lora(twin, generic(*shapes(twin).items()))
    added = sum(2 * RANK * (n + k) for n, k in shapes(twin).values())
    assert patched.model_size() == patched.clone().model_size() == patched.clone().clone().model_size() == size + added
    loaded(patched)
    assert sum(layer.side.nbytes() for layer in patched.packed_layers().values()) == added
    assert patched.loaded_size() == size + added
    assert twin.model_size() == size
    # Nothing is set aside for patching packed weights in 32 bits.
    offload, = (entry[0] for entry in patched._load_list() if entry[2] == f"diffusion_model.{LINEAR1}")
    twin_offload, = (entry[0] for entry in twin.clone()._load_list() if entry[2] == f"diffusion_model.{LINEAR1}")
    assert offload == twin_offload


def test_a_failing_load_leaves_no_side_branch(twin, monkeypatch):
    before = sample(twin)
    patched = load_lora(twin, generic(*shapes(twin).items()))
    layers = iter(range(5))
    build_side = lora.build

    def fail(*args):
        if next(layers, None) is None:
            raise MemoryError
        return build_side(*args)

    monkeypatch.setattr(lora, "build", fail)
    with pytest.raises(MemoryError):
        sample(patched)
    monkeypatch.undo()
    assert torch.equal(sample(twin), before)


def test_the_side_branch_is_traced_into_one_graph(twin):
    patched = loaded(load_lora(twin, generic((LINEAR1, shapes(twin)[LINEAR1]), (FC1, shapes(twin)[FC1]))))
    for name in (LINEAR1, FC1, QKV):
        layer = layer_of(patched, name)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        x = random(3, layer.in_features)
        assert torch.equal(compiled(x), layer(x))


# --- hooks ---------------------------------------------------------------------------------------------------------


def hooked(tensors, strength=1.0, keyframes=()):
    """prompts(1) with what Create Hook LoRA and Create Hook Keyframe make."""
    hooks = comfy.hooks.create_hook_lora(tensors, strength, 0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for factor, start in keyframes:
            group.add(comfy.hooks.HookKeyframe(factor, start_percent=start))
        hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(prompts(1), hooks)


def test_a_hook_lora_does_what_the_lora_does(twin):
    tensors = generic(*shapes(twin).items()) | {f"diffusion_model.{FC1}.diff_b": random(4 * HIDDEN)}
    before, expected = sample(twin), sample(load_lora(twin, tensors, 0.6))
    assert torch.equal(sample(twin, cond=hooked(tensors, 0.6)), expected)
    assert torch.equal(sample(twin), before)
    # On top of a LoRA on the MODEL.
    other = generic((LINEAR1, shapes(twin)[LINEAR1]))
    both = sample(load_lora(load_lora(twin, other), tensors, 0.6))
    assert torch.equal(sample(load_lora(twin, other), cond=hooked(tensors, 0.6)), both)
    assert torch.equal(sample(twin), before)


def test_hook_schedules(plain, twin):
    tensors = generic(*shapes(twin).items())
    schedule = [(1.0, 0.0), (0.2, 0.5)]
    before, y = sample(twin, steps=4), sample(twin, steps=4, cond=hooked(tensors, 1.0, schedule))
    exact = sample(plain, steps=4, cond=hooked(tensors, 1.0, schedule))
    assert relative_error(y, exact) < MARGIN * relative_error(before, sample(plain, steps=4))
    assert relative_error(y, sample(load_lora(twin, tensors), steps=4)) > 0.01
    assert torch.equal(sample(twin, steps=4), before)


def test_two_prompts_with_hooks_of_their_own(plain, twin, drift):
    """One side branch after the other within a step, kept for the next step."""
    first, second = generic(*shapes(twin).items()), generic(*shapes(twin).items(), rank=2)
    before = sample(twin)
    y, exact = (sample(p, cond=hooked(first) + hooked(second, -0.5) + prompts(1)) for p in (twin, plain))
    assert relative_error(y, exact) < MARGIN * drift
    assert torch.equal(sample(twin), before) and not twin.unhooked


# --- what can't be done --------------------------------------------------------------------------------------------


def test_refusals_say_why(plain, twin):
    def refused(match, act):
        with pytest.raises(ValueError, match=match) as caught:
            act()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")

    refused("belongs to another model", lambda: load_lora(twin, generic((FC1, (512, 512)))))
    refused("belongs to another model", lambda: load_lora(twin, {f"diffusion_model.{FC1}.lokr_w1": random(2, 2),
                                                                 f"diffusion_model.{FC1}.lokr_w2": random(5, 5)}))
    refused("can't run on a model in 4 bits",
            lambda: sample(load_lora(twin, {f"diffusion_model.{FC1}.diff": random(5, 5)})))
    refused("can't run on a model in 4 bits", lambda: sample(load_lora(twin, {
        f"diffusion_model.{FC1}.hada_w1_a": random(7, 2), f"diffusion_model.{FC1}.hada_w1_b": random(2, 9),
        f"diffusion_model.{FC1}.hada_w2_a": random(7, 2), f"diffusion_model.{FC1}.hada_w2_b": random(2, 9)})))
    refused("quantize the result", lambda: twin.clone().add_patches(plain.get_key_patches("diffusion_model."), 0.5, 0.5))
    refused("only be added to", lambda: load_lora(twin, {f"diffusion_model.{FC2}.bias.set_weight": random(HIDDEN)}))
    refused("weight_scale", lambda: twin.clone().add_patches({f"diffusion_model.{FC1}.weight_scale": ("diff", (random(4, 1024),))}))
    refused("wraps the weight", lambda: twin.clone().add_weight_wrapper(f"diffusion_model.{FC1}.weight", lambda w: w))
    assert torch.isfinite(sample(twin)).all()


def test_merging_a_quantized_model_into_a_16_bit_one(plain, twin):
    """Model Merge nodes with the 16-bit model first: the dense form of the packed weights, their LoRA included."""
    source = load_lora(twin, generic((FC2, shapes(twin)[FC2])))
    merged = plain.clone()
    for key, patch in source.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 1.0, 0.0)
    assert relative_error(sample(merged), sample(source)) < 0.2
    for name in flux.quantized_names(plain.model.diffusion_model.state_dict()):
        bias = merged.model.diffusion_model.get_parameter(f"{name}.bias")
        assert relative_error(bias.float(), loaded(plain).model.diffusion_model.get_parameter(f"{name}.bias").float()) < 0.2
        loaded(merged)


def test_every_packed_layer_is_one_of_ours(twin):
    assert all(isinstance(layer, PackedLinear) for layer in twin.packed_layers().values()) and len(shapes(twin)) == 13
