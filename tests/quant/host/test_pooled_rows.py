"""Further rows of pooled texts in a calibration: they reach the layers of one row a picture, and nothing else."""

import comfy.sample
import pytest
import torch
from comfyui_svdquant.quant.families import chroma
from comfyui_svdquant.quant.families.family import OUTSIDE, Packing
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import calibrate, loader, quantize
from comfyui_svdquant.quant.parallel.alone import ALONE
from comfyui_svdquant.quant.quantizer import calibration, presets
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from comfyui_svdquant.quant.quantizer.pooled_rows import FURTHER, PooledRows

from ..comfy_models import LATENT, POOLED, Progress, prompts, sample, write_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
ROWS = 1 + FURTHER


@pytest.fixture
def patcher(tmp_path):
    return loader.load_model(write_flux(tmp_path / "flux.safetensors"))


def calls_of(patcher, conditioning, latent=LATENT):
    return calibrate.record_trajectory(patcher, conditioning, latent, 2, 0, Progress())


def rows_of(patcher, calls):
    return PooledRows.of(FAMILY, patcher.model.diffusion_model, calls, ALONE)


def of_one_row(name):
    """Whether a layer sees one row a picture."""
    layer = FAMILY.layer(name)
    return layer is not None and layer.packing is Packing.W4A16


def statistics(patcher, calls, rows):
    """{layer: InputStats}"""
    model, found = patcher.model.diffusion_model, {}
    blocks = calibrate.stages(FAMILY, model)

    def layers_of(name, block):
        return FAMILY.outer_layers(block) if name == OUTSIDE else FAMILY.block_layers(name, block)

    for _, stats in calibration.stream_blocks(model, list(calls), calibration.Memory("cpu"), blocks, layers_of, FAMILY.pass_through, True,
                                              rows=rows):
        found |= stats
    return found


def test_the_further_texts_have_the_mean_and_the_deviation_of_the_prompts(patcher):
    conditioning = prompts(5)
    calls = calls_of(patcher, conditioning)
    rows = rows_of(patcher, calls)
    texts = torch.cat([extras["pooled_output"] for _, extras in conditioning]).to(calls[0][1]["y"].dtype).float()
    torch.testing.assert_close(rows.mean, texts.mean(0))
    torch.testing.assert_close(rows.deviation, texts.std(0), msg="each prompt counts once, though it has two calls")
    call = (torch.zeros(2, 16, 8, 8), torch.tensor([0.3, 0.9])), {"context": torch.zeros(2, 5, 128), "y": texts[:2], "guidance": None}
    (args, kwargs), own = rows.more(3, call)
    given = rows.signature.bind(*args, **kwargs).arguments
    assert own == 2 and given["y"].shape == (2 * ROWS, POOLED) and torch.equal(given["y"][:2], texts[:2])
    assert torch.equal(given["timestep"], call[0][1].repeat(ROWS)) and given["guidance"] is None and given["x"] is call[0][0]
    drawn = torch.cat([rows.more(number, call)[0][0][3][2:] for number in range(200)])
    assert relative_error(drawn.mean(0), rows.mean) < 0.05 and relative_error(drawn.std(0), rows.deviation) < 0.05
    again, other = (rows.more(number, call)[0][0][3] for number in (3, 4))
    assert torch.equal(again, given["y"]) and not torch.equal(other, again)


def test_they_reach_only_the_layers_of_one_row_a_picture(patcher):
    calls = calls_of(patcher, prompts(3), {"samples": torch.zeros(2, 16, 8, 8)})
    without, found = (statistics(patcher, calls, rows) for rows in (None, rows_of(patcher, calls)))
    assert without.keys() == found.keys() and sum(map(of_one_row, found)) == 8
    for name, stats in found.items():
        assert stats.tokens == without[name].tokens * (ROWS if of_one_row(name) else 1), name
        if not of_one_row(name):
            error = relative_error(stats.gram(), without[name].gram())
            assert error < 1e-5, f"the picture is the same; relative error of the Gram matrix of {name}: {error:.1e}"


def errors_for_other_prompts(patcher, packed):
    """{layer of one row a picture: relative error of its outputs for prompts that no calibration has seen}"""
    model, inputs = patcher.model.diffusion_model, {}
    layers = {name: layer for name, layer in model.named_modules() if of_one_row(name)}
    with calibration.observed(layers, lambda name, x: inputs.setdefault(name, []).append(x.flatten(0, -2).clone())):
        for i, entry in enumerate(prompts(24)[8:]):
            noise = comfy.sample.prepare_noise(LATENT["samples"], i)
            comfy.sample.sample(patcher, noise, 1, 1.0, "euler", "simple", [entry], [entry], LATENT["samples"], disable_pbar=True, seed=i)
    return {name: relative_error(packed.get_submodule(name)(torch.cat(x)), layers[name](torch.cat(x))) for name, x in inputs.items()}


def test_other_prompts_lose_less(patcher, monkeypatch):
    def errors():
        quantized_model, _ = quantize.quantize(patcher, presets.make_recipe("best", 16), prompts(8), LATENT, 4, 0, Progress())
        return errors_for_other_prompts(patcher, quantized_model.model.diffusion_model)

    found = errors()
    monkeypatch.setattr(PooledRows, "of", lambda *_: None)
    without = errors()
    for name, error in found.items():
        # Those two see no pooled text, and lose no more than the rounding of 16-bit numbers.
        limit = without[name] + 0.0005 if name.startswith(("time_in", "guidance_in")) else 0.9 * without[name]
        assert error < limit, f"{name}: {error:.3%}, without further rows {without[name]:.3%}"


@pytest.mark.parametrize("count", [0, 1])
def test_less_than_two_texts_have_no_deviation(patcher, count):
    calls = calls_of(patcher, prompts(1))[:2 * count]
    assert rows_of(patcher, calls) is None


def test_a_family_without_pooled_text_has_no_further_rows(patcher):
    assert PooledRows.of(chroma.FAMILY, patcher.model.diffusion_model, calls_of(patcher, prompts(2)), ALONE) is None


def test_a_call_of_other_rows_stays_as_it_is(patcher):
    calls = calls_of(patcher, prompts(2))
    rows, (args, kwargs) = rows_of(patcher, calls), calls[0]
    reference = args, kwargs | {"ref_latents_method": "index_timestep_zero"}
    assert rows.more(0, reference) == (reference, None)
    unpooled = args, {key: value for key, value in kwargs.items() if key != "y"}
    assert rows.more(0, unpooled) == (unpooled, None)
    shared = args, kwargs | {"y": torch.cat(2 * [kwargs["y"]])}
    assert rows.more(0, shared) == (shared, None), "as many pooled texts as noise levels, or none"


def test_the_quantized_model_draws(patcher):
    quantized_model, records = quantize.quantize(patcher, presets.make_recipe("best", 16), prompts(2), LATENT, 2, 0, Progress())
    assert {record.tokens for record in records if of_one_row(record.name)} == {4 * ROWS}
    assert torch.isfinite(sample(quantized_model)).all()
