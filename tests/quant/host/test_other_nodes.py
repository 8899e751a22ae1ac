"""ComfyUI's own model nodes on a MODEL in 4 bits, compared with the same model in 16 bits: they work, or the error gives the reason."""

import importlib

import comfy.model_management
import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from comfyui_svdquant.nodes.save_model import SVDQuantSaveModel
from comfyui_svdquant.quant.host import checks
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import HIDDEN, prompts
from ..conftest import load
from ..lora_tensors import FC1, generic, layer_of, load_lora, random, shapes
from .test_bypass_lora import by_hand

pytestmark = pytest.mark.usefixtures("inference_mode")
newer = pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="of newer ComfyUI")


def node(module, name, **inputs):
    """The first output of a node, if it has one; inputs that have a default may be left out."""
    cls = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
    asked = cls.INPUT_TYPES()
    inputs = {key: entry[1]["default"] for part in ("required", "optional") for key, entry in asked.get(part, {}).items()
              if len(entry) > 1 and "default" in entry[1]} | inputs
    if getattr(cls, "INPUT_IS_LIST", False):
        inputs = {key: [value] for key, value in inputs.items()}
    output = (cls.execute if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION))(**inputs)
    outputs = output if isinstance(output, tuple) else output.args
    return outputs[0] if outputs else None


def draw(patcher, cfg=3.0, steps=3, size=8, mask=None, hooks=None):
    positive, negative = ([cond] for cond in prompts(2))
    if hooks is not None:
        positive = [[positive[0][0], positive[0][1] | {"hooks": hooks}]]
    latent = torch.zeros(1, 16, size, 8)
    return comfy.sample.sample(patcher, comfy.sample.prepare_noise(latent, 5), steps, cfg, "euler", "simple", positive, negative, latent,
                               noise_mask=mask, disable_pbar=True, seed=5)


# --- nodes that leave weights alone --------------------------------------------------------------------------------


def of(module, name, sampling=None, **options):
    return pytest.param(lambda patcher: node(module, name, model=patcher, **options), sampling or {}, id=name)


@pytest.mark.parametrize(("apply", "sampling"), [
    of("slg", "SkipLayerGuidanceDiT", double_layers="0", single_layers="0", start_percent=0.0, end_percent=1.0),
    of("fresca", "FreSca", scale_low=0.5, freq_cutoff=2),
    of("easycache", "EasyCacheNode", {"steps": 6}, reuse_threshold=0.9),
    of("easycache", "LazyCacheNode", {"steps": 6}, reuse_threshold=0.9),
    of("context_windows", "ContextWindowsManualNode", {"size": 12}, dim=2, context_length=4, context_overlap=2,
       context_schedule="standard_static"),
    of("differential_diffusion", "DifferentialDiffusion", {"mask": torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)}),
    of("rope", "ScaleROPE", scale_x=1.5, shift_y=2.0),
    of("model_advanced", "ModelSamplingFlux", max_shift=2.0),
    of("model_advanced", "ModelComputeDtype", dtype="bf16"),
    of("model_advanced", "RescaleCFG"),
    of("perpneg", "PerpNeg", empty_conditioning=prompts(3)[2:]),
    pytest.param(lambda patcher: node("nag", "NAGuidance", model=patcher), {"cfg": 1.0}, id="NAGuidance", marks=newer),
])
def test_a_node_has_the_effect_that_it_has_in_16_bits(plain, quantized_model, apply, sampling):
    before, exact_before = draw(quantized_model, **sampling), draw(plain, **sampling)
    after, exact = draw(apply(quantized_model), **sampling), draw(apply(plain), **sampling)
    moved = relative_error(exact, exact_before)
    assert moved > 0.03 and abs(relative_error(after, before) - moved) < 0.1, "the size of the node's effect on the picture"
    assert relative_error(after, exact) < 2 * relative_error(before, exact_before) + 0.02
    assert torch.equal(draw(quantized_model, **sampling), before), "nothing is left on the model that the node was given"


# --- LoRAs beside the layers ---------------------------------------------------------------------------------------


def test_a_model_with_a_bypass_lora_is_not_saved(quantized_model):
    bypassed = by_hand(quantized_model, generic((FC1, shapes(quantized_model)[FC1])))
    with pytest.raises(ValueError, match="LoRAs or other weight patches on this 4-bit MODEL, which its file can't hold"):
        SVDQuantSaveModel.execute(bypassed, "bypassed", False)


def test_hooks_get_the_output_of_the_linear(quantized_model):
    """The model then applies the GELU itself again."""
    layer, between = layer_of(quantized_model, FC1), quantized_model.model.diffusion_model.double_blocks[0].img_mlp[1]
    x, seen = random(5, HIDDEN, seed=7), []
    activated = layer(x)
    handle = layer.register_forward_hook(lambda _module, _inputs, y: seen.append(y.clone()))
    y = between(layer(x))
    handle.remove()
    assert relative_error(y, activated) < 0.01 and float(seen[0].min()) < -1, "a GELU's least value is -0.17"


# --- merging -------------------------------------------------------------------------------------------------------


MERGES = {"ModelMergeSimple": {"ratio": 0.5}, "ModelSubtract": {}, "ModelAdd": {}, "ModelMergeBlocks": {"input": 0.5}}


def other(path):
    """The model of a file, its input layers twice as large."""
    patcher = load(path)
    for name in ("img_in", "txt_in"):
        getattr(patcher.model.diffusion_model, name).weight.data.mul_(2)
    return patcher


@pytest.mark.parametrize("second", [0, 1], ids=["16 bits", "4 bits"])
def test_layers_in_16_bits_can_be_merged(pair_files, plain, quantized_model, second):
    """As in ModelMergeFlux1, layers that stay have ratio 1, which is the only ratio for packed layers."""
    ratios = {"": 1.0, "img_in.": 0.3, "txt_in.": 0.4}
    merged, exact = (node("model_merging", "ModelMergeBlocks", model1=model, model2=other(path), **ratios)
                     for model, path in ((quantized_model, pair_files[second]), (plain, pair_files[0])))
    before, moved = draw(quantized_model), relative_error(draw(exact), draw(plain))
    assert moved > 0.1 and abs(relative_error(draw(merged), before) - moved) < 0.1
    assert not any(merged.packed_at(key) for key in merged.patches) and torch.equal(draw(quantized_model), before)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("second", [0, 1], ids=["16 bits", "4 bits"])
def test_merging_into_packed_layers_is_refused(pair_files, quantized_model, name, second):
    before = draw(quantized_model)
    with pytest.raises(ValueError, match="^[^.\n]+[^\n]+ merge the 16-bit models, then quantize the result\\.$"):
        node("model_merging", name, model1=quantized_model, model2=load(pair_files[second]), **MERGES[name])
    assert torch.equal(draw(quantized_model), before)


# --- reading and training weights ----------------------------------------------------------------------------------


def test_a_lora_is_extracted_from_differences_only(pair_files, plain, quantized_model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="^The weights of this MODEL are packed in 4 bits, [^\n]+ ModelMergeSubtract [^\n]+\\.$"):
        node("lora_extract", "LoraSave", filename_prefix="x", rank=8, lora_type="standard", model_diff=quantized_model)
    assert not list(tmp_path.rglob("*.safetensors"))
    difference = node("model_merging", "ModelSubtract", model1=other(pair_files[0]), model2=quantized_model, multiplier=1.0)
    node("lora_extract", "LoraSave", filename_prefix="x", rank=8, lora_type="standard", model_diff=difference)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("bypass", [False, pytest.param(True, marks=newer)])
def test_training_is_refused(quantized_model, bypass):
    before = draw(quantized_model)
    options = {"bypass_mode": True} if bypass else {}
    with pytest.raises(ValueError, match="^A node, as those that train LoRAs do, [^\n]+; train on the 16-bit model, [^\n]+\\.$"):
        node("train", "TrainLoraNode", model=quantized_model, latents={"samples": torch.zeros(1, 16, 8, 8)}, positive=prompts(1), **options)
    assert torch.equal(draw(quantized_model), before)


# --- a copy of the model for another device ------------------------------------------------------------------------


@newer
def test_a_copy_for_another_device_is_complete_and_shares_no_memory(quantized_model):
    lora = load_lora(quantized_model, generic((FC1, shapes(quantized_model)[FC1]), ("img_in", (HIDDEN, 64))))
    layer_of(quantized_model, FC1).act_bits = 8
    before, with_lora = draw(quantized_model), draw(lora)
    for copied in (lora.clone(force_deepcopy=True), lora.deepclone_multigpu(torch.device("cpu"))):
        assert not {p.data_ptr() for p in copied.model.parameters()} & {p.data_ptr() for p in quantized_model.model.parameters()}
        assert torch.equal(draw(copied), with_lora) and layer_of(copied, FC1).act_bits == 8
        assert torch.equal(draw(quantized_model), before) and not torch.equal(with_lora, before)


@pytest.fixture
def two_devices(monkeypatch):
    """The CPU serves as both devices."""
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)


@newer
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.usefixtures("two_devices")
def test_two_devices_share_the_work(quantized_model, hooked):
    """A prompt with a hook's LoRA uses it on either device."""
    import comfy.hooks

    tensors = generic((FC1, shapes(quantized_model)[FC1]), ("img_in", (HIDDEN, 64)), size=1.0)

    def drawn(patcher):
        return draw(patcher, hooks=comfy.hooks.create_hook_lora(dict(tensors), 1.0, 0.0) if hooked else None)

    before, alone = draw(quantized_model), drawn(quantized_model)
    split = node("multigpu", "MultiGPUCFGSplitNode", model=quantized_model)
    (clone,) = split.get_additional_models_with_key("multigpu")
    assert clone.model is not quantized_model.model
    shared = drawn(split)  # positive and negative prompts run separately, which changes roundings, and so some codes
    assert relative_error(shared, alone) < 0.1 and (relative_error(alone, before) > 0.3) is hooked
    assert torch.equal(drawn(split), shared) and torch.equal(draw(quantized_model), before)


@newer
@pytest.mark.usefixtures("two_devices")
def test_a_model_on_two_devices_is_not_quantized(plain):
    """The clone for the other device would stay in 16 bits, and would not be calibrated."""
    with pytest.raises(ValueError, match="^This MODEL goes through MultiGPU CFG Split, [^\n]+ behind SVDQuant Quantize Model\\.$"):
        checks.check_extras(node("multigpu", "MultiGPUCFGSplitNode", model=plain))
    checks.check_extras(plain)
