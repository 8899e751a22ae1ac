"""The recipes of model_recipes.py on a whole FLUX, and its pictures."""

from argparse import Namespace

import pytest
import torch

pytest.importorskip("comfy", reason="there is no ComfyUI")

import model_recipes
import picture_sources
import pictures
import recipes
from comfyui_svdquant.quant.families.family import Packing
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import calibrate, quantize
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import presets

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def studio():
    args = Namespace(prompts=2, steps=2, batch=2, rank=16, calibration_prompts=1, calibration_steps=1, compute=None, model=pictures.FLUX1)
    with torch.inference_mode():
        return pictures.Studio(args)


def test_a_layer_in_two_parts_is_the_sum_of_its_parts():
    g = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 192, generator=g), torch.randn(256, 192, generator=g).clamp_min(-0.17)
    bias = torch.randn(64, generator=g)
    spec = layout.svdquant_spec(192, 64, 16, 64, True, torch.bfloat16)
    parts = model_recipes.parts("single_blocks.0.linear2", weight, inputs, 64)
    assert [(part.weight.shape[1], part.unsigned) for part in parts] == [(64, False), (128, True)]
    packed = [recipes.svdquant_one_shot(part, 16) for part in parts]
    halves = [recipes.output(part.calibration, tensors, recipes.spec_of(part, 16)) for part, tensors in zip(parts, packed)]
    whole = model_recipes.packed_layer(packed, bias, torch.bfloat16)
    assert whole["weight_proj_up"].shape == (64, 32) and whole["weight_proj_down"].shape == (192, 32)
    estimate = recipes.output(inputs, whole, spec)
    assert (estimate - sum(halves) - bias).norm() < 5e-3 * estimate.norm()  # the bias is in bf16
    assert (estimate - inputs @ weight.t() - bias).norm() < 0.2 * estimate.norm()


def test_naive_rounding_is_our_preset_naive(studio):
    entries, latent = studio.calibration(1)
    calls = calibrate.record_trajectory(studio.patcher, entries, latent, 1, 0, model_recipes.Silent())
    inputs = model_recipes.layer_inputs(studio.patcher, calls)
    assert {tuple(x.shape) for x in inputs.values()} == {(144, 256), (144, 1024), (16, 256), (16, 1024), (160, 256), (160, 1280)}
    (quantized_model, _), = model_recipes.by_recipes([recipes.naive], studio.patcher, inputs, 16)
    preset, _ = quantize.quantize(studio.patcher, presets.make_recipe("naive", 16), None, None, 1, 0, model_recipes.Silent())
    ours, theirs = (model.model.diffusion_model.state_dict() for model in (preset, quantized_model))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_recipes_run_one_after_the_other_on_the_same_part(studio):
    """DeepCompressor's two recipes then search once. One branch of twice the rank replaces two branches; narrow branches have half
    of that."""
    seen = []

    def recipe(layer, rank):
        seen.append((layer, rank))
        return recipes.naive(layer, rank)

    weights = {name: layer for name, layer in studio.patcher.model.diffusion_model.named_modules()
               if (kind := FAMILY.layer(name)) and kind.packing is Packing.W4A4}
    inputs = {name: torch.ones(4, layer.weight.shape[1]) for name, layer in weights.items()}
    model_recipes.by_recipes([recipe, recipe], studio.patcher, inputs, 16)
    assert all(first[0] is second[0] for first, second in zip(seen[::2], seen[1::2]))
    assert {rank for layer, rank in seen if layer.kind.endswith("linear1")} == {32}
    assert {rank for layer, rank in seen if not layer.kind.endswith("linear1")} == {16}
    del seen[:]
    model_recipes.by_recipes([recipe], studio.patcher, inputs, 16, narrow=True)
    assert {rank for layer, rank in seen if layer.kind.endswith("linear2")} == {8}
    assert {rank for layer, rank in seen if not layer.kind.endswith("linear2")} == {16}


def test_four_bits_are_farther_from_bf16_than_bf16_computed_otherwise(studio):
    floor = pictures.noise_floor(studio, *pictures.FLOOR)
    row = pictures.others(studio, "naive rounding")["naive rounding"]
    # The noise of bf16 in two pictures was 39 to 52 dB on different machines; that of naive rounding is ten times as large.
    noise = min(pictures.mean(f["w4a4"]["psnr"]) for f in floor.values())
    assert 5 < pictures.mean(row["w4a4"]["psnr"]) < 32 < noise, f"{row['w4a4']['psnr']} dB, bf16 otherwise {noise} dB"
    assert pictures.mean(row["w4a8"]["latent_error"]) < pictures.mean(row["w4a4"]["latent_error"])
    assert 6 < row["megabytes"] < 8


def test_no_recipe_calibrates_on_the_pictures_captions(studio):
    assert len(set(studio.captions)) == 2 and len(set(studio.known)) == pictures.MOST_CALIBRATION
    assert not set(studio.captions) & set(studio.known)


def test_each_knob_changes_alone():
    jobs = pictures.knob_jobs(Namespace(rank=32, calibration_prompts=8, calibration_steps=8))
    names = [name for _, names, _ in jobs for name in names]
    assert len(set(names)) == len(names) == 3 + sum(len(values) - 1 for values in pictures.KNOBS.values())
    in_16_bits = "rank 32 in 16 bits",
    assert all(len(settings) == (names != ("defaults",)) for _, names, settings in jobs if names != in_16_bits)
    assert dict((names, settings) for _, names, settings in jobs)[in_16_bits] == {"rank": 32, "branch_bits": 16}
    rows = list(pictures.in_order(dict.fromkeys(names)))
    assert rows.index("rank 16") < rows.index("rank 32") < rows.index("rank 32 in 16 bits") < rows.index("rank 128")


def test_the_table_compares_picture_by_picture():
    def row(*psnr):
        figures = {"psnr": list(psnr), "ssim": [1, 1], "latent_error": [0.1, 0.1]}
        return {key: figures for key in pictures.BITS} | {"seconds": 1, "megabytes": 9}

    base, ours, _, last = pictures.table({"ours: best": row(32, 44), pictures.BASE: row(30, 40)}).splitlines()[2:]
    assert base.startswith("| DeepCompressor default | 35.00 | +0.00")
    assert ours.startswith("| ours: best | 38.00 | +3.00 (+2.00 to +4.00) | 1.0000 | 10.00% | 38.00 | +3.00")
    assert last == "Both at W4A8, ours: best is +3.00 (+2.00 to +4.00) dB from DeepCompressor default."


def test_parts_that_run_exactly_lose_nothing_and_parts_in_4_bits_lose_their_own():
    args = Namespace(prompts=1, steps=2, batch=1, rank=16, calibration_prompts=1, calibration_steps=1, compute="float32",
                     model=pictures.FLUX1)
    studio = pictures.Studio(args)
    recipe = presets.make_recipe("naive", 16)
    quantized_model, _ = quantize.quantize(studio.patcher, recipe, None, None, 1, 0, model_recipes.Silent())
    parts, path = picture_sources.Parts(studio, quantized_model), picture_sources.Path16(studio)
    assert abs(sum(path.lengths) - 1) < 0.1 and len(path.calls) == 2
    model, found = quantized_model.model.diffusion_model, {}
    for mode, names in (("none", set()), *((mode, set(parts.layers)) for mode in picture_sources.MODES)):
        with parts.running(names, mode):
            found[mode] = path.errors(model)
    assert found["none"]["velocity"] < 1e-5
    assert found["both"]["velocity"] > found["activations"]["velocity"] > 0.01 and found["weights"]["path"] > 0.01
    with pictures.by_definition():
        assert path.errors(model)["velocity"] == pytest.approx(found["both"]["velocity"], rel=1e-5)  # nothing stays behind
    kinds = parts.selections()[picture_sources.KINDS]
    assert "double attn.qkv" in kinds and len(kinds["double attn.qkv"]) == 4 and len(kinds["single linear1"]) == 6
    record = {"results": {}}
    few = {picture_sources.WHOLE: {picture_sources.WHOLE: list(parts.layers)}, picture_sources.KINDS: {"one": ["single_blocks.0.linear1"]}}
    parts.selections = lambda: few
    picture_sources.measure(parts, path, 4, record, lambda: None)
    lines = picture_sources.table(record["results"]).splitlines()
    assert lines[2].startswith("| everything | 10.94 M") and "100%" in lines[2] and lines[3].startswith("| one | 0.46 M")
