"""Models in a real ComfyUI, in this process: build, quantize, save, load, sample."""

import os
from dataclasses import replace

import comfy.cli_args
import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelSave
from comfyui_svdquant.quant.checkpoint import checksums, native, write
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import loader, quantize, weights
from comfyui_svdquant.quant.host.patcher import SVDQuantModelPatcher
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import presets, report, smoothing
from safetensors.torch import load_file, save_file

from ..comfy_models import HIDDEN, LATENT, Progress, prompts, quantized, sample, save, write_flux
from ..random_flux import flux_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")


# --- loading and quantizing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "hidden", "changes"), [
    ("", 256, {}), ("model.diffusion_model.", 256, {}), ("", 384, {}), ("", 128, {"guidance": False}),
    ("", 256, {"in_channels": 96}), ("", 256, {"dtype": torch.float16}),
])
def test_a_flux_of_any_width_loads_and_samples(tmp_path, prefix, hidden, changes):
    patcher = loader.load_model(write_flux(tmp_path / "flux.safetensors", prefix, hidden=hidden, **changes))
    params = patcher.model.diffusion_model.params
    assert (params.hidden_size, params.num_heads, params.depth, params.depth_single_blocks) == (hidden, hidden // 128, 1, 2)
    assert params.guidance_embed is changes.get("guidance", True)
    assert torch.isfinite(sample(patcher)).all()


def test_fp8_files_load_and_quantize(tmp_path):
    tensors = flux_tensors()
    path = tmp_path / "flux_fp8.safetensors"
    save_file({name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in tensors.items()}, path)
    patcher = loader.load_model(str(path))
    y, (quantized_model, _) = sample(patcher), quantized(patcher)
    error = float((sample(quantized_model) - y).norm() / y.norm())
    assert error < 0.3, f"4 bits against fp8: relative error {error:.3f}"


def test_the_user_selects_the_compute_dtype(flux_file, native_file):
    for path in (flux_file, native_file):
        patcher = loader.load_model(path, torch.bfloat16)
        seen = []
        hook = patcher.model.diffusion_model.single_blocks[0].linear1.register_forward_pre_hook(lambda _m, a: seen.append(a[0].dtype))
        sample(patcher)
        hook.remove()
        assert set(seen) == {torch.bfloat16}


def test_quantizing_does_not_change_the_model_and_the_result_is_close(flux_file):
    patcher = loader.load_model(flux_file)
    before, weights = sample(patcher), {name: t.clone() for name, t in patcher.model.state_dict().items()}
    progress = Progress()
    quantized_model, records = quantized(patcher, progress=progress)
    assert torch.equal(sample(patcher), before)
    assert all(torch.equal(weights[name], t) for name, t in patcher.model.state_dict().items())
    assert len(records) == 20 and len(progress.texts) == progress.steps == 20 + 2 * 2
    # The model keeps FLUX's own classes: the same transformer, with 4-bit layers in place of 16-bit ones.
    assert type(quantized_model.model) is type(patcher.model)
    assert isinstance(quantized_model.model.diffusion_model, type(patcher.model.diffusion_model))
    error = float((sample(quantized_model) - before).norm() / before.norm())
    assert 0.001 < error < 0.3, f"relative error of the latent {error:.3f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_parameters_are_neither_learned_from_nor_shared(tmp_path, monkeypatch, dtype):
    """No step copies float32 weights before the quantizer, or bf16 weights before the quantized model."""
    monkeypatch.setattr(smoothing, "EXPONENTS", (0.5,))
    # Newer ComfyUI would hold every file in float32 on the CPU, and in bf16 on a GPU.
    monkeypatch.setattr(comfy.cli_args.args, {torch.float32: "fp32_unet", torch.bfloat16: "bf16_unet"}[dtype], True)
    patcher = loader.load_model(write_flux(tmp_path / "flux.safetensors", dtype=dtype, depth_single=1), dtype)
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    assert {p.dtype for p in parameters.values()} == {dtype}
    for p in parameters.values():
        p.requires_grad_()  # as in 0.3.75; in newer ComfyUIs they don't require gradients
    before = {name: (p.requires_grad, p.detach().cpu().clone()) for name, p in parameters.items()}
    recipe = replace(presets.make_recipe("slow", 16), keep=("double_blocks.*", "*modulation.lin", "*_in.*"))
    quantized_model, records = quantize.quantize(patcher, recipe, prompts(), LATENT, 2, 0, Progress())
    assert any(record.rank for record in records), "layers whose factors are learned"
    now = dict(patcher.model.diffusion_model.named_parameters())
    for name, p in parameters.items():
        assert now[name] is p and p.grad is None and p.requires_grad == before[name][0] and torch.equal(p.cpu(), before[name][1]), name
    assert not set(map(id, parameters.values())) & set(map(id, quantized_model.model.diffusion_model.parameters()))


@pytest.mark.parametrize("exceptions", ["*", "*_blocks.*, *_in.*layer\n*.adaLN_modulation.1\n* = 32"])
def test_exceptions_that_keep_all_layers_are_refused_before_the_run(flux_file, exceptions):
    progress = Progress()
    with pytest.raises(ValueError, match="^These exceptions leave no layer to quantize: they keep all 20 in 16 bits; [^.]+\\.$"):
        quantize.quantize(loader.load_model(flux_file), presets.make_recipe("fast", 16, exceptions), prompts(), LATENT, 2, 0, progress)
    assert not progress.texts


def test_a_run_after_which_nothing_is_in_4_bits_has_a_report(flux_file):
    recipe = replace(presets.make_recipe("naive", 16), largest_error=0.0)
    quantized_model, records = quantize.quantize(loader.load_model(flux_file), recipe, None, None, 2, 0, Progress())
    assert not quantized_model.packed_layers() and len(records) == 20
    assert report.text(records, recipe).startswith("SVDQuant, preset naive, rank 0: no layer came out in 4 bits")


def test_naive_rounding_is_worse(flux_file):
    patcher = loader.load_model(flux_file)
    exact = sample(patcher)
    errors = {preset: float((sample(quantized(patcher, preset, 32)[0]) - exact).norm()) for preset in ("fast", "naive")}
    assert errors["fast"] < 0.9 * errors["naive"], errors


def test_quantizing_twice_gives_the_same_bits(flux_file):
    patcher = loader.load_model(flux_file)
    first, second = (quantized(patcher)[0].model.state_dict() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_calibration_sees_the_lora_that_is_on_the_model(flux_file):
    """A LoRA on the MODEL is part of the weights that are quantized."""
    patcher = loader.load_model(flux_file)
    g = torch.Generator().manual_seed(3)
    key = "diffusion_model.single_blocks.0.linear1.weight"
    difference = torch.randn(7 * HIDDEN, 8, generator=g) @ torch.randn(8, HIDDEN, generator=g) / HIDDEN**0.5
    patched = patcher.clone()
    assert patched.add_patches({key: ("diff", (difference,))}, 1.0) == [key]
    exact = sample(patched)
    error = float((sample(quantized(patched)[0]) - exact).norm() / exact.norm())
    without = float((sample(quantized(patcher)[0]) - exact).norm() / exact.norm())
    assert error < 0.3 < without, f"with the LoRA baked in {error:.3f}, without {without:.3f}"


def test_applied_patches_are_not_quantized_twice(flux_file):
    """A LoRA counts once; a hook's patch for a part of the steps doesn't count."""
    patcher, name = loader.load_model(flux_file).clone(), "single_blocks.0.linear1.weight"
    key = f"diffusion_model.{name}"
    assert patcher.add_patches({key: ("diff", (torch.full((7 * HIDDEN, HIDDEN), 0.01),))}, 1.0) == [key]
    before = weights.effective_weight(patcher, name, "cpu").clone()
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    assert key in patcher.backup and torch.equal(weights.effective_weight(patcher, name, "cpu"), before)
    patcher.hook_backup[key] = (patcher.backup[key].weight + 1, torch.device("cpu"))
    assert torch.allclose(weights.effective_weight(patcher, name, "cpu"), before + 1, atol=0.02)
    patcher.hook_backup.clear()


def test_other_nodes_settings_are_carried_over(flux_file):
    patcher = loader.load_model(flux_file)
    patcher.model_options["transformer_options"]["mark"] = 7
    sampling = patcher.get_model_object("model_sampling")
    patcher.add_object_patch("model_sampling", sampling)
    quantized_model, _ = quantized(patcher)
    assert quantized_model.model_options["transformer_options"]["mark"] == 7
    assert quantized_model.get_model_object("model_sampling") is sampling
    assert isinstance(quantized_model.clone(), SVDQuantModelPatcher) and quantized_model.clone().recipe == quantized_model.recipe


def test_cancelling_at_any_point_leaves_the_model_usable(flux_file):
    patcher = loader.load_model(flux_file)
    before = sample(patcher)
    for cancel_at in (1, 3, 5, 12):
        with pytest.raises(KeyboardInterrupt):
            quantized(patcher, progress=Progress(cancel_at))
        assert torch.equal(sample(patcher), before)
    for module in patcher.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


# --- saved files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fast", "naive"])
def test_saved_and_reloaded_gives_the_same_latent_to_the_bit(flux_file, tmp_path, preset):
    quantized_model, _ = quantized(loader.load_model(flux_file), preset)
    path = save(quantized_model, tmp_path / "quantized_model.safetensors")
    assert torch.equal(sample(loader.load_model(path)), sample(quantized_model))
    assert os.path.getsize(path) < 0.45 * os.path.getsize(flux_file)
    assert sorted(os.listdir(tmp_path)) == ["quantized_model.safetensors"]


def test_the_file_holds_the_documented_names(native_file):
    header = read_header(native_file)
    linear2 = {name.removeprefix("single_blocks.0.linear2."): info for name, info in header.tensors.items()
               if name.startswith("single_blocks.0.linear2.")}
    assert linear2.keys() == {"weight", "weight_scale", "weight_scale_2", "weight_proj_down", "weight_proj_up",
                              "weight_proj_scale", "weight_smooth_factor", "bias", "comfy_quant"}
    assert layout.decode_conf(header.read_bytes("single_blocks.0.linear2.comfy_quant"))["act_unsigned_from"] == HIDDEN
    assert header.tensors["double_blocks.0.img_attn.norm.key_norm.scale"].dtype == torch.bfloat16
    assert native.config(header)["num_heads"] == 2 and native.recipe(header)["preset"] == "fast"


def test_an_existing_file_is_kept_unless_overwrite_is_on(native_file, flux_file, tmp_path):
    quantized_model = loader.load_model(native_file)
    path = tmp_path / "taken.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="taken.safetensors exists already"):
        save(quantized_model, path)
    assert path.read_bytes() == b"mine"
    save(quantized_model, path, overwrite=True)
    assert native.matches(read_header(str(path)))


@pytest.mark.parametrize("taken", [True, False])
def test_a_full_disk_leaves_no_incomplete_file(native_file, tmp_path, taken):
    """A file size limit simulates the full disk: the write fails in the middle of the data."""
    resource = pytest.importorskip("resource", reason="Windows has no file size limit to stand for a full disk")
    quantized_model, path = loader.load_model(native_file), tmp_path / "big.safetensors"
    if taken:
        path.write_bytes(b"mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="Saving big.safetensors failed"):
            save(quantized_model, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == (["big.safetensors"] if taken else [])
    assert not taken or path.read_bytes() == b"mine"


def test_comfyuis_own_node_refuses_a_quantized_model(native_file, flux_file, tmp_path):
    """Its file would lack the descriptions of the packed layers. A clone, with or without a LoRA, is refused too."""
    quantized_model, node = loader.load_model(native_file), ModelSave()
    node.output_dir = str(tmp_path)
    patched, key = quantized_model.clone(), "diffusion_model.single_blocks.0.linear1.weight"
    assert patched.add_patches({key: ("diff", (torch.ones(7 * HIDDEN, HIDDEN) / HIDDEN,))}, 1.0) == [key]
    before = sample(patched)
    for model in (quantized_model, quantized_model.clone(), patched):
        with pytest.raises(ValueError, match="[^.]+; save it with SVDQuant Save Model\\.$"):
            node.save(model, "quantized")
    assert not list(tmp_path.rglob("*.safetensors")) and torch.equal(sample(patched), before)
    save(quantized_model, tmp_path / "quantized_model.safetensors")
    node.save(loader.load_model(flux_file), "plain")
    assert len(list(tmp_path.glob("plain*.safetensors"))) == 1
    del quantized_model.model.state_dict_for_saving  # earlier versions of this pack did not have it
    node.save(quantized_model, "bare")
    (bare,) = tmp_path.glob("bare*.safetensors")
    assert "has layers in 4 bits" in refusal(bare)


def test_too_little_disk_space_is_reported_before_writing(native_file, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SPARE_BYTES", 10**18)
    with pytest.raises(CheckpointError, match="There is no room to save"):
        save(loader.load_model(native_file), tmp_path / "big.safetensors")
    assert os.listdir(tmp_path) == []


# --- bad input -----------------------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    message = str(caught.value)
    assert os.path.basename(path) in message and "\n" not in message and message.endswith(".")
    return message


def changed(source, path, change, metadata=None):
    """A copy of a checkpoint with its tensors changed; `metadata` replaces the file's own."""
    tensors = load_file(source)
    change(tensors)
    kept = read_header(source).metadata if metadata is None else metadata
    save_file(tensors, path, metadata={key: text for key, text in kept.items() if key != checksums.KEY})
    return path


FOREIGN = {
    "SDXL": ("model.diffusion_model.input_blocks.0.0.weight", "SDXL UNet"),
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5 text encoder"),
    "CLIP": ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP text encoder"),
    "VAE": ("decoder.conv_in.weight", "VAE"),
    "SD3": ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
    "LoRA": ("lora_unet_double_blocks_0.lora_down.weight", "LoRA"),
    "other": ("layers.0.weight", "not a FLUX.1"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_models_are_named(tmp_path, kind):
    key, what = FOREIGN[kind]
    path = tmp_path / "foreign.safetensors"
    save_file({key: torch.zeros(4, 4)}, path)
    assert what in refusal(path)


@pytest.mark.parametrize("key", ["distilled_guidance_layer.in_proj.weight", "double_stream_modulation_img.lin.weight"])
def test_relatives_of_flux_are_named(tmp_path, key):
    path = tmp_path / "cousin.safetensors"
    save_file(flux_tensors() | {key: torch.zeros(4, 4)}, path)
    assert ("Chroma" if "distilled" in key else "FLUX.2") in refusal(path)


def test_a_whole_checkpoint_with_text_encoders_loads(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in flux_tensors().items()}
    save_file(tensors | {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
                         "vae.decoder.conv_in.weight": torch.zeros(4, 4)}, path)
    assert torch.isfinite(sample(loader.load_model(str(path)))).all()


def test_scaled_fp8_of_an_unusual_width_is_never_read_or_quantized_without_its_scales(tmp_path):
    path = tmp_path / "scaled.safetensors"
    tensors = flux_tensors()
    name = "single_blocks.0.linear1"
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].float() * 100).to(torch.float8_e4m3fn)
    save_file(tensors | {f"{name}.scale_weight": torch.tensor(0.01), "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)
    try:
        patcher = loader.load_model(str(path))
    except CheckpointError as error:
        assert "scaled weights" in str(error)
        return
    # Newer ComfyUI knows every width, and reads the scales.
    exact = sample(loader.load_model(write_flux(tmp_path / "flux.safetensors")))
    for loaded in (patcher, quantized(patcher)[0]):
        assert float((sample(loaded) - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("quantize_first", [False, True])
@pytest.mark.parametrize("damage", ["missing", "shape", "cut", "no norm"])
def test_damaged_flux_files(flux_file, native_file, tmp_path, quantize_first, damage):
    source, path = native_file if quantize_first else flux_file, tmp_path / "damaged.safetensors"
    name = "single_blocks.1.linear2.weight"

    def change(tensors):
        if damage == "missing":
            del tensors[name]
        elif damage == "shape":
            tensors[name] = tensors[name][:, :64].contiguous()
        elif damage == "no norm":
            del tensors["single_blocks.1.norm.key_norm.scale"]

    changed(source, path, change)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(path)
    assert {"missing": f"lacks tensor {name}", "shape": "single_blocks.1.linear2", "cut": "cut off",
            "no norm": "single_blocks.1.norm.key_norm"}[damage] in message


def test_damaged_descriptions_of_layers(native_file, tmp_path):
    path, key = tmp_path / "damaged.safetensors", "single_blocks.0.linear2.comfy_quant"

    def with_conf(**entries):
        def change(tensors):
            conf = layout.decode_conf(bytes(tensors[key])) | entries
            tensors[key] = layout.encode_conf(conf)
        return changed(native_file, path, change)

    assert "format 'int9'" in refusal(with_conf(format="int9"))
    assert "group size 32" in refusal(with_conf(group_size=32))
    assert "weight_proj_down" in refusal(with_conf(rank=48))
    assert "rank" in refusal(with_conf(rank="many"))
    assert "multiple of 64" in refusal(with_conf(act_unsigned_from=100))
    assert "JSON" in refusal(changed(native_file, path, lambda t: t.update({key: torch.zeros(4, dtype=torch.uint8)})))
    left_over = refusal(changed(native_file, path, lambda t: t.update({"single_blocks.9.norm.key_norm.scale": torch.ones(128)})))
    assert "single_blocks" in left_over
    stray = "final_layer.linear.comfy_quant"
    assert "final_layer.linear" in refusal(changed(native_file, path, lambda t: t.update({stray: t[key].clone()})))
    fp32 = "single_blocks.0.linear2.weight_proj_up"
    assert fp32 in refusal(changed(native_file, path, lambda t: t.update({fp32: t[fp32].float()})))


def test_damaged_metadata(native_file, tmp_path):
    path, metadata = tmp_path / "damaged.safetensors", read_header(native_file).metadata

    def with_metadata(**entries):
        return changed(native_file, path, lambda tensors: None, metadata | {f"svdquant.{k}": v for k, v in entries.items()})

    assert "update ComfyUI-SVDQuant" in refusal(with_metadata(version="4"))
    assert "update ComfyUI-SVDQuant" in refusal(with_metadata(version="one"))
    assert "svdquant.config" in refusal(with_metadata(config="{"))
    assert "svdquant.recipe" in refusal(with_metadata(recipe="[]"))
    assert "num_heads" in refusal(with_metadata(config='{"num_heads": 3}'))
    assert "depth" in refusal(with_metadata(config='{"depth": "two"}'))
    assert "hidden_size" in refusal(with_metadata(config='{"hidden_size": 512}'))
    assert "depth_single_blocks" in refusal(with_metadata(config='{"depth_single_blocks": 1000000000}'))
    assert "axes_dim" in refusal(with_metadata(config='{"axes_dim": [16, 56, 57]}'))
    assert "theta" in refusal(with_metadata(config='{"theta": "big"}'))
    assert "mlp_ratio" in refusal(with_metadata(config='{"mlp_ratio": 1e99}'))
    refusal(with_metadata(config='{"mlp_ratio": 5}'))
    refusal(with_metadata(config='{"patch_size": 2.5}'))


def test_a_pickled_model_is_refused(tmp_path):
    path = tmp_path / "flux.pt"
    torch.save({"img_in.weight": torch.zeros(2)}, path)
    assert "pickle" in refusal(path)


def test_nan_in_the_weights_is_named(flux_file, tmp_path):
    name = "double_blocks.0.txt_mlp.0.weight"
    path = changed(flux_file, tmp_path / "nan.safetensors", lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    for preset in ("fast", "data-free"):
        with pytest.raises(ValueError, match=rf"The MODEL's {name} holds NaN"):
            quantized(loader.load_model(str(path)), preset)


def test_quantizing_a_quantized_model_is_refused(native_file):
    with pytest.raises(ValueError, match="quantized already"):
        quantized(loader.load_model(native_file))


def test_a_conditioning_of_the_wrong_width_is_refused(flux_file):
    with pytest.raises(ValueError, match="The conditioning is 96 wide and this FLUX.1 model takes 128"):
        quantized(loader.load_model(flux_file), conditioning=prompts(2, width=96))


def test_calibrating_without_prompts_is_refused(flux_file):
    with pytest.raises(ValueError, match="connect positive and latent"):
        quantize.quantize(loader.load_model(flux_file), presets.make_recipe("fast", 16), None, None, 2, 0, Progress())
    with pytest.raises(ValueError, match="prompt"):
        quantized(loader.load_model(flux_file), conditioning=[])


def test_other_models_are_refused(flux_file):
    patcher = loader.load_model(flux_file)
    patcher.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="SVDQuant quantizes FLUX.1 models"):
        quantized(patcher)


# --- memory --------------------------------------------------------------------------------------------------------


def test_the_patcher_reports_the_packed_size(native_file):
    quantized_model = loader.load_model(native_file)
    stored = sum(t.nbytes for t in quantized_model.model.diffusion_model.state_dict().values())
    sampling = sum(t.nbytes for t in quantized_model.model.model_sampling.state_dict().values())
    assert quantized_model.model_size() == stored + sampling
    packed = native.open_file(read_header(native_file))
    assert stored == sum(torch.Size(shape).numel() * packed.dtypes[name].itemsize for name, shape in packed.shapes.items())


def test_partial_loading_gives_the_same_picture(native_file):
    """In low-VRAM mode some layers stay offloaded, and each call copies their tensors to the device."""
    quantized_model = loader.load_model(native_file)
    whole = sample(quantized_model)
    quantized_model.unpatch_model(quantized_model.offload_device)
    quantized_model.patch_model(quantized_model.load_device, lowvram_model_memory=quantized_model.model_size() // 2)
    assert torch.equal(sample(quantized_model), whole)
    quantized_model.partially_unload(quantized_model.offload_device, quantized_model.model_size() // 2)
    assert torch.equal(sample(quantized_model), whole)
