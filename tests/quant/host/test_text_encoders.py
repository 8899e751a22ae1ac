"""Text encoders in 4 bits in a real ComfyUI: quantized from a CLIP, encoding prompts, saved and loaded."""

import comfy.hooks
import comfy.sd
import comfy.text_encoders.llama as llama
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfyui_svdquant.quant.host import clip_loader, clip_modules, clip_quantize, clip_saving, patches
from comfyui_svdquant.quant.host.lora import branch_size
from comfyui_svdquant.quant.host.packed_layers import packed_layers
from comfyui_svdquant.quant.layers import token_linear
from comfyui_svdquant.quant.layers.packed_embedding import PackedEmbedding

from ..comfy_models import Progress
from ..text_encoders import KINDS, encode, load, small, write

pytestmark = pytest.mark.usefixtures("inference_mode")
LIMIT = {"mistral": 0.6, "qwen3_8b": 0.5}  # with 31 and 28 layers; the others have 2 or 3


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    with small(monkeypatch):
        yield


def quantized(clip, every=True, exceptions=""):
    return clip_quantize.quantize(clip, every, exceptions, Progress())[0]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def rounding(clip, kind="t5xxl"):
    """The largest relative difference of a conditioning to that of the dequantized weights. Both compute in float32, but for the packed
    linears on a GPU: they multiply in bf16, which adds about a thirtieth of the error of 4 bits (token_linear.py)."""
    in_bf16 = token_linear.product_dtype(torch.float32, clip.patcher.load_device) == torch.bfloat16
    return LIMIT.get(kind, 0.25) / 20 if in_bf16 else 1e-4


def saved(clip, folder, encoder=None):
    """The path of a file of a CLIP's packed encoder, its only one if none is named."""
    encoder = encoder or next(iter(clip.patcher.recipe))
    clip_saving._write(clip, encoder, str(folder / f"{encoder}.safetensors"), False)
    return str(folder / f"{encoder}.safetensors")


def with_dequantized(clip, packed):
    """`clip`, whose weights are from now on those that the packed layers stand for."""
    for name, layer in packed_layers(packed.cond_stage_model).items():
        module = clip.cond_stage_model.get_submodule(name)
        module.weight.data = layer.dense("cpu")
        if layer.bias is not None:
            module.bias.data = layer.bias.data
    return clip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind, tmp_path):
    """The conditioning is that of the dequantized weights, near that of 16 bits, and the same to the bit after saving and loading."""
    clip = load([write(tmp_path, kind)], KINDS[kind].clip_type)
    packed = quantized(clip)
    exact, found = encode(clip), encode(packed)
    assert 0.01 < relative(found[0], exact[0]) < LIMIT.get(kind, 0.25)
    assert packed.patcher.model_size() < 0.75 * clip.patcher.model_size()
    layers = packed_layers(packed.cond_stage_model)
    assert len(layers) == len(clip_modules.encoders(clip.cond_stage_model)[0].specs) and any(
        isinstance(layer, PackedEmbedding) for layer in layers.values())

    loaded, _ = clip_loader.load([saved(packed, tmp_path)], KINDS[kind].clip_type.lower())
    first, second = (own.cond_stage_model.state_dict() for own in (packed, loaded))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first if "logit_scale" not in name)
    again = encode(loaded)
    assert torch.equal(found[0], again[0]) and (found[1] is None or torch.equal(found[1], again[1]))
    assert type(loaded.tokenizer) is type(clip.tokenizer) and type(loaded.cond_stage_model).__name__ == type(clip.cond_stage_model).__name__

    dense = encode(with_dequantized(clip, packed))
    assert relative(found[0], dense[0]) < rounding(packed, kind)


# --- the CLIP of FLUX.1: T5-XXL in 4 bits beside CLIP-L in 16 -----------------------------------------------------------


@pytest.fixture
def flux(tmp_path):
    """(ComfyUI's CLIP in 16 bits, the same with T5-XXL in 4 bits, the paths of its files in 16 bits)."""
    paths = [write(tmp_path, "clip_l"), write(tmp_path, "t5xxl")]
    clip = load(paths, "FLUX")
    return clip, quantized(clip, exceptions="clip_l.*"), paths


def test_one_file_in_4_bits_beside_one_in_16(flux, tmp_path):
    clip, packed, (clip_l, _) = flux
    assert list(packed.patcher.recipe) == ["t5xxl"]
    loaded, line = clip_loader.load([clip_l, saved(packed, tmp_path)], "flux")
    assert "t5xxl in 4 bits" in line
    for first, second in zip(encode(packed), encode(loaded)):
        assert torch.equal(first, second)
    assert torch.equal(encode(loaded)[1], encode(clip)[1]), "CLIP-L's pooled output is that of 16 bits"


def test_the_clip_that_was_quantized_stays_as_it_was(flux, tmp_path):
    clip, packed, paths = flux
    again = load(paths, "FLUX")
    state, fresh = (own.cond_stage_model.state_dict() for own in (clip, again))
    assert all(torch.equal(state[name], fresh[name]) for name in fresh) and state.keys() == fresh.keys()
    shared = {p.data_ptr() for p in clip.cond_stage_model.parameters()} & {p.data_ptr() for p in packed.cond_stage_model.parameters()}
    assert shared == set()


def lora(rank=4, strength=0.4):
    """{name: tensor} of a LoRA on linears of both encoders and on T5's embedding, under names that ComfyUI reads."""
    g, found = torch.Generator().manual_seed(3), {}
    for key, (n, k) in {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v": (128, 128),
                        "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo": (128, 320),
                        "text_encoders.t5xxl.transformer.shared": (32128, 128),
                        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (192, 64)}.items():
        found[f"{key}.lora_up.weight"] = strength * torch.randn(n, rank, generator=g)
        found[f"{key}.lora_down.weight"] = torch.randn(rank, k, generator=g) * k ** -0.5
    return found


def with_lora(clip, strength):
    return comfy.sd.load_lora_for_models(None, clip, lora(), 1.0, strength)[1]


def test_a_lora_changes_the_conditioning_as_in_16_bits(flux):
    """By the stock loader, with its strength; without it all is as before."""
    clip, packed, _ = flux
    plain = encode(packed)
    dense = with_dequantized(clip, packed)
    for strength in (1.0, -0.5):
        for found, expected in zip(encode(with_lora(packed, strength)), encode(with_lora(dense, strength))):
            assert relative(found, expected) < 5e-3 + rounding(packed), "a LoRA's factors are in bf16"
    assert relative(encode(with_lora(packed, 1.0))[0], plain[0]) > 0.05
    assert torch.equal(encode(packed)[0], plain[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loras_size_is_known_on_every_device(flux, device):
    """It is that of its factors: neither W4A16 layers nor the embedding have a low-rank branch of their own."""
    patcher = with_lora(flux[1], 1.0).patcher
    found = {key: (layer, patcher.patches[key]) for key in patcher.patches if (layer := patcher.packed_at(key))}
    assert {type(layer).__name__ for layer, _ in found.values()} == {"TokenLinear", "PackedEmbedding"}
    for key, (layer, entries) in found.items():
        assert branch_size(layer, entries, torch.device(device)) == patches.nbytes(entries), key


def test_a_hooks_lora_is_that_of_load_lora(flux):
    """Create Hook LoRA and Set CLIP Hooks; without the hook the conditioning is as before."""
    _, packed, _ = flux
    plain, expected = encode(packed)[0], encode(with_lora(packed, 1.0))[0]
    hooks = comfy.hooks.create_hook_lora(lora=lora(), strength_model=1.0, strength_clip=1.0)
    [hooked] = SetClipHooks().apply_hooks(packed, schedule_clip=True, apply_to_conds=False, hooks=hooks)
    [[found, _]] = hooked.encode_from_tokens_scheduled(hooked.tokenize("a red fox on the old wall"), show_pbar=False)
    assert relative(found, expected) < rounding(packed) < relative(found, plain)
    assert torch.equal(encode(packed)[0], plain)


def test_a_lora_is_baked_in(flux, tmp_path):
    clip, _, _ = flux
    baked = quantized(with_lora(clip, 1.0), exceptions="clip_l.*")
    expected, without = encode(with_lora(clip, 1.0)), encode(clip)
    found = encode(baked)[0]
    assert relative(found, expected[0]) < 0.3 and relative(found, expected[0]) < 0.7 * relative(found, without[0])
    # Newer ComfyUI adds a LoRA in fp16 on a GPU, where baking it in adds it in float32.
    assert relative(encode(baked)[1], expected[1]) <= (0 if clip.patcher.load_device.type == "cpu" else 5e-3) and not baked.patcher.patches
    assert saved(baked, tmp_path)


def test_prompt_weights_and_clip_skip(flux):
    clip, packed, _ = flux
    dense = with_dequantized(clip, packed)
    text = "a (red fox:1.4) on the (old:0.5) wall"
    weighted, plain = encode(packed, text)[0], encode(packed)[0]
    assert relative(weighted, encode(dense, text)[0]) < rounding(packed) < relative(weighted, plain)
    skipped = [own.clone() for own in (packed, dense)]
    for own in skipped:
        own.clip_layer(-2)
    found, expected = (encode(own)[0] for own in skipped)
    assert relative(found, expected) < rounding(packed) < relative(found, plain)
    assert type(skipped[0]) is type(packed) and skipped[0].patcher.is_clip and packed.layer_idx is None


def test_parts_of_the_model_can_be_offloaded(flux):
    """With a LoRA, in every split that ComfyUI's budget makes. ComfyUI encodes on the embedding's device, which is the CPU if that is
    offloaded, wherever the other layers are."""
    _, packed, _ = flux
    patched = with_lora(packed, 1.0)
    expected = encode(patched)[0]
    patcher = patched.patcher
    for budget in (0, patcher.model_size() // 3):
        patcher.detach()
        patcher.load(patcher.load_device, lowvram_model_memory=budget)
        found = patched.cond_stage_model.encode_token_weights(patched.tokenize("a red fox on the old wall"))[0]
        assert relative(found, expected) < 5e-3 + rounding(packed)
    patcher.detach()
    assert torch.equal(encode(patched)[0], expected)


class OnGPU:
    """A parameter on a GPU, as far as PackedLinear.at knows one."""

    device = torch.device("cuda", 0)

    def to(self, device, non_blocking=False):
        return device, non_blocking


def test_the_cpu_waits_for_parameters_from_a_gpu(flux):
    layer = next(layer for layer in packed_layers(flux[1].cond_stage_model).values() if isinstance(layer, token_linear.TokenLinear))
    layer._parameters = {"weight": OnGPU(), "bias": None}
    assert layer.at(torch.zeros(1)) == {"weight": (torch.device("cpu"), False), "bias": None}


def test_comfyuis_own_nodes_do_not_save_it(flux):
    with pytest.raises(ValueError, match="SVDQuant Save Text Encoder"):
        flux[1].clone().get_sd()
    with pytest.raises(ValueError, match="The weights of this CLIP are packed in 4 bits"):  # LoraSave
        flux[1].patcher.model_state_dict(filter_prefix="")


@pytest.mark.skipif(not hasattr(llama.Qwen3_4B, "logits"), reason="the encoders of this ComfyUI write no text")
@pytest.mark.parametrize("kind", ["qwen3_4b", "gemma2_2b"])
def test_writing_text_reads_the_whole_table(kind, tmp_path):
    """With tied weights, ComfyUI multiplies by the table of embeddings, which has 8 bits."""
    packed = quantized(load([write(tmp_path, kind)], KINDS[kind].clip_type))
    transformer = getattr(packed.cond_stage_model, KINDS[kind].name).transformer
    packed.load_model()
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(2))
    exact = x[:, -1:] @ transformer.get_input_embeddings().dense("cpu").t()
    assert relative(transformer.logits(x.to(packed.patcher.load_device)).cpu(), exact) < 1e-5


# --- sources in other types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_source_in_another_type(tmp_path, dtype):
    path = write(tmp_path, "t5xxl", **{name: tensor.to(dtype) for name, tensor in KINDS["t5xxl"].tensors().items()})
    clip = load([path], "SD3")
    packed = quantized(clip)
    assert relative(encode(packed)[0], encode(clip)[0]) < 0.25
    assert relative(encode(packed)[0], encode(with_dequantized(clip, packed))[0]) < rounding(packed)


def test_a_source_in_scaled_fp8(tmp_path):
    """Its scales are in the weights of the packed layers, and no layer in 16 bits keeps one."""
    own = KINDS["t5xxl"].tensors()
    own["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    for name in [name for name in own if "layer" in name and name.endswith("weight") and own[name].ndim == 2 and "bias" not in name]:
        scale = own[name].float().abs().max() / 448
        own[name], own[name.replace(".weight", ".scale_weight")] = (own[name].float() / scale).to(torch.float8_e4m3fn), scale
    clip = load([write(tmp_path, "t5xxl", 0, **own)], "SD3")
    packed = quantized(clip, exceptions="t5xxl.*.k")
    exact = encode(clip)[0]
    assert 0.01 < relative(encode(packed)[0], exact) < 0.25
    names = packed.cond_stage_model.state_dict().keys()
    assert not [name for name in names if "scale_weight" in name or "scaled_fp8" in name]
    assert packed.cond_stage_model.get_parameter("t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k.weight").dtype.itemsize == 2
    loaded, _ = clip_loader.load([saved(packed, tmp_path)], "sd3")
    assert torch.equal(encode(loaded)[0], encode(packed)[0])

