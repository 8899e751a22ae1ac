"""The blocks that several processes replay together, and who quantizes which of their layers."""

import pytest
import torch
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import calibrate, loader, quantize, quantize_blocks
from comfyui_svdquant.quant.parallel.alone import ALONE, Alone
from comfyui_svdquant.quant.quantizer import calibration, presets

from ..comfy_models import LATENT, Progress, prompts, write_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
RECIPE = presets.make_recipe("best", 16)


class Two(Alone):
    """Process 0 of two, without the other one."""

    size = 2


@pytest.fixture
def patcher(tmp_path):
    return loader.load_model(write_flux(tmp_path / "flux.safetensors"))


def test_blocks_are_replayed_together_where_the_whole_model_is_on_the_device(patcher, monkeypatch):
    calls = calibrate.record_trajectory(patcher, prompts(), LATENT, 2, 0, Progress())
    model = patcher.model.diffusion_model
    names, forwards = [name for name, _ in calibrate.stages(FAMILY, model)], []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(None))

    def statistics(last):
        forwards.clear()
        stream = calibrate.block_statistics(FAMILY, patcher, list(calls), {}, RECIPE, calibration.Memory("cpu"), {}, set(), last=last)
        found = {layer: (*stats.spans().values(), stats.sample(), stats.gram()) for _, own in stream for layer, stats in own.items()}
        return found, len(forwards) / len(calls)

    expected, alone = statistics(None)
    found, together = statistics(set(names[1::2]))
    assert alone == len(names) and together == -(-len(names) // 2)
    assert list(found) == list(expected) and all(torch.equal(*pair) for name in found for pair in zip(found[name], expected[name]))
    monkeypatch.setattr(calibrate, "make_room", lambda *_: False)
    assert statistics(set(names[1::2]))[1] == len(names), "several blocks of a large model may not fit at once"
    hook.remove()


def test_only_several_processes_replay_the_blocks_of_a_batch_together(patcher, monkeypatch):
    given, (specs, _) = [], quantize.layer_specs(FAMILY, patcher.model.diffusion_model, RECIPE, torch.bfloat16)

    def statistics(*args):
        given.append(args[-1])
        yield from ()

    monkeypatch.setattr(quantize_blocks, "block_statistics", statistics)
    for ranks in (ALONE, Two()):
        quantize_blocks.quantize_blocks(FAMILY, patcher, specs, RECIPE, [], Progress(), calibration.Memory("cpu"), None, ranks)
    names = [name for name, _ in calibrate.stages(FAMILY, patcher.model.diffusion_model)]
    assert given == [None, {*names[1::2], names[-1]}]


def test_two_blocks_layers_of_one_name_go_to_two_processes(patcher):
    """An image has far more tokens than its text, so the process of both blocks' image layers would be the last to be done."""
    specs, _ = quantize.layer_specs(FAMILY, patcher.model.diffusion_model, RECIPE, torch.bfloat16)
    specs |= {name.replace("double_blocks.0", "double_blocks.1"): spec for name, spec in specs.items() if "double_blocks.0" in name}
    plan = quantize_blocks._Plan(FAMILY, ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", calibrate.OUTSIDE],
                                 specs, {}, "exact", 2)
    pairs = [(first, first.replace(".0.", ".1.", 1)) for first in plan.groups["double_blocks.0"]]
    assert len(pairs) > 4 and all(plan.owners[one] != plan.owners[other] for one, other in pairs)
