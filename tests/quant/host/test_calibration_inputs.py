"""The MODELs, conditionings and latents with which a run can calibrate, and those that it refuses in one sentence."""

import comfy.patcher_extension
import pytest
import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import calibrate, loader, quantize
from comfyui_svdquant.quant.host.attachments import SOURCE
from comfyui_svdquant.quant.quantizer import calibration, presets
from comfyui_svdquant.quant.quantizer.pooled_rows import FURTHER

from ..comfy_models import LATENT, Progress, prompts, quantized, sample, write_flux

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture
def patcher(tmp_path):
    return loader.load_model(write_flux(tmp_path / "flux.safetensors"))


def run(patcher, conditioning=None, latent=LATENT, steps=2, seed=0, preset="best"):
    return quantize.quantize(patcher, presets.make_recipe(preset, 16), conditioning or prompts(), latent, steps, seed, Progress())


def test_batches_lengths_and_large_seeds(patcher):
    mixed = [*prompts(1), [torch.randn(1, 1, 128), {"pooled_output": torch.randn(1, 64)}]]
    quantized_model, records = run(patcher, mixed, {"samples": torch.zeros(2, 16, 6, 10)}, seed=2**64 - 1)
    assert torch.isfinite(sample(quantized_model)).all()
    tokens = {record.name: record.tokens for record in records}
    measured = {record.name: record.measured_on for record in records}
    for name in ("double_blocks.0.img_mod.lin", "vector_in.out_layer", "final_layer.adaLN_modulation.1"):
        assert tokens[name] == 2 * 2 * 2 * (1 + FURTHER) and measured[name] == "outputs", "for each call and picture, further rows too"
    assert tokens["double_blocks.0.txt_attn.qkv"] == 2 * 2 * (12 + 1) and tokens["double_blocks.0.img_attn.qkv"] == 2 * 2 * 2 * 15


def test_streaming_records_the_inputs_of_a_real_flux(patcher):
    """Streaming records the same inputs as hooks on ordinary forwards, with control residuals between the blocks and batch 2."""
    model = patcher.model.diffusion_model
    g = torch.Generator().manual_seed(0)

    def call():
        residual = torch.randn(2, 16, 256, generator=g)
        return ((torch.randn(2, 16, 8, 8, generator=g), torch.tensor([0.3, 0.9])),
                {"context": torch.randn(2, 5, 128, generator=g), "y": torch.randn(2, 64, generator=g),
                 "guidance": torch.full((2,), 3.5), "control": {"input": [residual, None], "output": [None, residual]},
                 "transformer_options": {}})

    calls, seen = [call(), call()], {}
    def layers_of(name, block):
        return FAMILY.outer_layers(block) if name == calibrate.OUTSIDE else FAMILY.block_layers(name, block)

    blocks = [*FAMILY.running_blocks(model), (calibrate.OUTSIDE, model)]
    layers = {name: layer for block_name, block in blocks for name, layer in layers_of(block_name, block).items()}
    hooks = [layer.register_forward_pre_hook(lambda _m, a, name=name: seen.setdefault(name, []).append(a[0].flatten(0, -2).clone()))
             for name, layer in layers.items()]
    for args, kwargs in calls:
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    for _, stats in calibration.stream_blocks(model, calls, calibration.Memory("cpu"), blocks, layers_of, FAMILY.pass_through,
                                                 with_gram=True):
        for name, found in stats.items():
            x = torch.cat(seen.pop(name))
            assert found.tokens == len(x) and torch.equal(found.spans()["absmax"], x.abs().amax(0)), name
            error = float((found.gram() - x.t() @ x / len(x)).norm() / found.gram().norm())
            assert error < 1e-5, f"{name}: relative error of the Gram matrix {error:.1e}"
    assert not seen, "every layer was calibrated"


def test_nodes_that_would_keep_running_the_16_bit_model_are_refused(patcher):
    compiled = patcher.clone()
    compiled.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "torch.compile", lambda *args: None)
    with pytest.raises(ValueError, match="TorchCompileModel"):
        run(compiled)
    replaced = patcher.clone()
    replaced.add_object_patch("diffusion_model.single_blocks.0.linear1", torch.nn.Identity())
    with pytest.raises(ValueError, match="replaces diffusion_model.single_blocks.0.linear1"):
        run(replaced)
    hooked = patcher.clone()
    hooked.set_injections("bypass_lora", [comfy.patcher_extension.PatcherInjection(lambda _p: None, lambda _p: None)])
    with pytest.raises(ValueError, match="bypass LoRA"):
        run(hooked)
    wrapped = patcher.clone()
    wrapped.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "mine", lambda executor, *a, **k: executor(*a, **k))
    quantized_model, _ = run(wrapped)
    assert quantized_model.wrappers[comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL]["mine"]


def test_a_model_in_a_packed_format_is_refused(patcher):
    patcher.model.diffusion_model.single_blocks[0].linear1.weight = torch.nn.Parameter(
        torch.zeros(1792, 256, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="single_blocks.0.linear1.weight is stored as torch.uint8"):
        run(patcher)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 3, 8, 8)])
def test_a_latent_of_another_kind_is_refused(patcher, shape):
    with pytest.raises(ValueError, match=r"The latent has shape \[1, "):
        run(patcher, latent={"samples": torch.ones(shape)})


def test_an_empty_latent_of_four_channels_is_accepted(patcher):
    assert run(patcher, latent={"samples": torch.zeros(1, 4, 8, 8)}, preset="fast")[1]


def test_a_conditioning_without_pooled_output_is_refused(patcher):
    with pytest.raises(ValueError, match="no pooled output"):
        run(patcher, [[torch.randn(1, 4, 128), {}]])


def test_a_conditioning_that_is_never_used_is_refused(patcher):
    (tensor, extras), = prompts(1)
    with pytest.raises(ValueError, match="never called"):
        run(patcher, [[tensor, extras | {"start_percent": 0.999, "end_percent": 1.0}]])


def test_the_source_is_remembered_through_clones(patcher):
    patcher.set_attachments(SOURCE, "my_flux.safetensors")
    assert quantized(patcher.clone(), "naive")[0].source == "my_flux.safetensors"
