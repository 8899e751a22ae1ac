"""Models of no declared family: their layers are found by calibration."""

from dataclasses import dataclass

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfyui_svdquant.quant.checkpoint import inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer
from comfyui_svdquant.quant.families.discovered import discovered
from comfyui_svdquant.quant.host import build, discovery, loader
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer import calibration
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import Progress, save, saved_and_loaded
from ..lora_tensors import generic, load_lora
from ..undeclared_models import LUMINA2, MODELS, WAN

pytestmark = pytest.mark.usefixtures("inference_mode")

# {title: ({block: blocks whose outputs it reads}, {ending of a layer's name: format}, ending of the first reader of each group, ending of
# layers with unsigned codes)}
FOUND = {
    "WAN21_T2V": ({"blocks.0": (), "blocks.1": ("blocks.0",)}, {}, {"self_attn.v": "self_attn.q", "cross_attn.v": "cross_attn.k"},
                  ("ffn.2",)),
    "Lumina2": ({"context_refiner.0": (), "context_refiner.1": ("context_refiner.0",), "noise_refiner.0": (),
                 "noise_refiner.1": ("noise_refiner.0",), "layers.0": ("context_refiner.1", "noise_refiner.1"), "layers.1": ("layers.0",)},
                {"adaLN_modulation.1": layout.AWQ}, {"feed_forward.w3": "feed_forward.w1"}, ()),
    "Krea2": ({"txtfusion.layerwise_blocks.0": (), "txtfusion.layerwise_blocks.1": ("txtfusion.layerwise_blocks.0",),
               "txtfusion.refiner_blocks.0": ("txtfusion.layerwise_blocks.1",),
               "txtfusion.refiner_blocks.1": ("txtfusion.refiner_blocks.0",), "blocks.0": ("txtfusion.refiner_blocks.1",),
               "blocks.1": ("blocks.0",)},
              {}, {"attn.wv": "attn.wq", "attn.gate": "attn.wq", "mlp.up": "mlp.gate"}, ()),
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def plain(case, tmp_path_factory):
    with torch.inference_mode():
        return case.load(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pair(case, plain):
    """(the model in 16 bits, quantized)."""
    with torch.inference_mode():
        return plain, case.quantized(plain)[0]


def test_4_bits_stay_close(case, pair):
    exact, estimate = map(case.sample, pair)
    error = relative_error(estimate, exact)
    assert 0.001 < error < 0.3, f"relative error of the latent {error:.3f}"


def test_blocks_layers_and_formats_are_those_of_the_architecture(case, pair):
    reads, formats, groups, unsigned = FOUND[case.title]
    model = pair[1]
    family, layers = model.model.svdquant_family, model.packed_layers()
    assert dict(family.reads) == reads and list(family.reads) == list(reads), "in running order"
    inside = {name for name in discovery.linears(pair[0].model.diffusion_model) if family.block_of(name)}
    assert set(layers) == inside, "every linear of a block is packed"
    for name, layer in layers.items():
        block, inner = family.block_of(name), name.removeprefix(f"{family.block_of(name)}.")
        expected = formats.get(inner, layout.SVDQUANT)
        assert layer.spec.format == expected and (layer.spec.unsigned_from == 0) is (inner in unsigned), name
        first = layers[f"{block}.{groups.get(inner, inner)}"]
        if expected == layout.SVDQUANT:
            assert torch.equal(first.weight_smooth_factor, layer.weight_smooth_factor), name


def test_the_report_says_that_it_was_not_measured_and_what_stays_in_16_bits(case, pair):
    first, *others = pair[1].recipe["notes"]
    assert first.startswith(f"{case.title} is not a family that SVDQuant was measured on (FLUX.1, FLUX.2, ")
    outside = next(note for note in others if note.startswith("These layers outside its blocks stay in 16 bits: "))
    assert {"WAN21_T2V": "head.head", "Lumina2": "x_embedder", "Krea2": "tproj.1"}[case.title] in outside


def test_saved_and_loaded_it_has_the_same_bits(case, pair, tmp_path):
    _, model = pair
    path, loaded = saved_and_loaded(model, tmp_path / "model_4bit.safetensors")
    assert type(loaded.model.diffusion_model) is type(pair[0].model.diffusion_model)
    assert torch.equal(case.sample(model), case.sample(loaded))
    again = save(loaded, tmp_path / "again.safetensors")
    assert read_header(again).metadata["svdquant.config"] == read_header(path).metadata["svdquant.config"]
    lines = inspection.text(inspection.inspect(read_header(path))).splitlines()
    assert lines[0] == f"4-bit {case.title}, opens with SVDQuant Load Model"
    blocks = len(FOUND[case.title][0])
    assert f"{case.title}: {blocks} blocks and {len(model.packed_layers())} layers, found by calibration" in lines


def test_a_lora_has_its_effect_and_is_removed_completely(case, pair):
    before, exact_before = case.sample(pair[1]), case.sample(pair[0])
    names = [name for name, layer in pair[1].packed_layers().items() if layer.spec.format == layout.SVDQUANT][-2:]
    lora = generic(*((name, (layer.out_features, layer.in_features)) for name, layer in pair[1].packed_layers().items() if name in names),
                   size=1.0)
    exact, estimate = (case.sample(load_lora(model, lora)) for model in pair)
    assert relative_error(exact_before, exact) > 0.02 and relative_error(estimate, exact) < 0.35
    assert torch.equal(case.sample(pair[1]), before)


def test_what_can_not_be_is_refused_in_a_sentence(case, pair, tmp_path, monkeypatch):
    plain, model = pair
    with pytest.raises(ValueError, match=rf"^This MODEL is {case.title}, none of the families .* are found by calibration, so choose"):
        case.quantized(plain, preset="data-free")
    specs = {name: layer.spec for name, layer in model.packed_layers().items()}
    with pytest.raises(CheckpointError, match=f"^Nunchaku's layout has no place for {case.title} models; choose layout native.$"):
        tensors = model.model.diffusion_model.state_dict()
        writer.save(str(tmp_path / "x.safetensors"), tensors, specs, build.stored_config(model.model), {}, "")
    monkeypatch.setattr(discovery.comfy.model_detection, "detect_unet_config", lambda *_: None)
    with pytest.raises(ValueError, match=rf"^ComfyUI does not recognize this MODEL \({case.title}\) by its tensors' shapes"):
        case.quantized(plain)


def test_large_layers_outside_the_blocks_that_see_a_row_are_w4a16(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "OUTSIDE_LEAST", 6 * 256 * 256)
    plain = WAN.load(tmp_path)
    model, records = WAN.quantized(plain)
    outside = {name for name in model.packed_layers() if not name.startswith("blocks.")}
    assert outside == {"time_projection.1"}, "the text's layers see tokens, and the time's others are smaller"
    [record] = (record for record in records if record.name == "time_projection.1")
    assert record.format == layout.AWQ and record.measured_on == "outputs" and 0 < record.error < 0.05
    loaded = loader.load_model(save(model, tmp_path / "model_4bit.safetensors"))
    assert torch.equal(WAN.sample(model), WAN.sample(loaded))


def test_a_relative_of_a_family_has_its_own_name(tmp_path):
    plain = LUMINA2.load(tmp_path)
    plain.model.model_config.unet_config["siglip_feat_dim"] = 1152
    assert discovery.title(plain) == "Z-Image-Omni"


def test_an_interrupted_run_resumes(tmp_path):
    plain = LUMINA2.load(tmp_path)
    whole, _ = LUMINA2.quantized(plain)
    with pytest.raises(KeyboardInterrupt):
        LUMINA2.quantized(plain, progress=Progress(cancel_at=20), folder=tmp_path / "progress")
    resumed = Progress()
    model, _ = LUMINA2.quantized(plain, progress=resumed, folder=tmp_path / "progress")
    assert any("done before" in text for text in resumed.texts)
    first, second = (m.model.diffusion_model.state_dict() for m in (whole, model))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_between_which_the_model_does_more_are_refused(tmp_path, monkeypatch):
    """Here a block leaves something beside its output, which the next one reads."""
    plain, left = WAN.load(tmp_path), {}
    first, second = plain.model.diffusion_model.blocks
    forward = first.forward

    def leaving(x, **kwargs):
        left["x"] = x
        return forward(x, **kwargs)

    monkeypatch.setattr(first, "forward", leaving)
    second.register_forward_pre_hook(lambda _module, args: (args[0] + left["x"] if left else args[0],))
    plain.model.diffusion_model.register_forward_pre_hook(lambda *_: left.clear())
    with pytest.raises(ValueError, match=r"^The block blocks.1 of this MODEL \(WAN21_T2V\) can't be calibrated on its own"):
        WAN.quantized(plain)


@dataclass
class Modulation:
    scale: torch.Tensor


class Part(torch.nn.Module):
    def __init__(self, width=64, outputs=64):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(width, outputs), torch.nn.Linear(width, width)

    def forward(self, x, modulation=None):
        return self.used(x if modulation is None else x * modulation.scale)


class Modulated(torch.nn.Module):
    """A model whose first block computes the modulation of the others, and whose layer of the last block has 24 outputs."""

    def __init__(self):
        super().__init__()
        self.network, self.blocks = torch.nn.ModuleList([Part()]), torch.nn.ModuleList([Part(), Part(outputs=24)])

    def forward(self, x, t):
        modulation = Modulation(self.network[0](t)[:, None])
        buffer = torch.zeros_like(x)
        buffer[:, 4:] = self.blocks[0](x, modulation)[:, 4:]
        return self.blocks[1](buffer, modulation=modulation)


def test_blocks_are_followed_through_dataclasses_and_assignments_and_other_layers_are_named():
    torch.manual_seed(0)
    model, call = Modulated(), ((torch.randn(1, 32, 64), torch.randn(1, 64)), {})
    seen = discovery.observed(model, call, "cpu")
    blocks = discovery.chosen_blocks(model, [seen])
    assert blocks == ["network.0", "blocks.0", "blocks.1"]
    layers = discovery.chosen_layers(model, [seen], blocks)
    reads = discovery.lineage(model, call, "cpu", blocks, layers)
    assert reads.pop("outside") == []
    assert reads == {"network.0": [], "blocks.0": ["network.0"], "blocks.1": ["network.0", "blocks.0"]}
    assert {name: entry["w4a16"] for name, entry in layers.items()} == {"network.0.used": True, "blocks.0.used": False}
    family = discovered({"title": "Toy", "model_class": "comfy.Toy", "image_model": None, "host": {}, "blocks": reads, "outside": [],
                         "layers": layers, "tensors": {}, "tokens": discovery.usual_tokens([seen], layers)})
    _, odd, unseen = discovery.notes(family, model, blocks)
    assert odd == "These layers stay in 16 bits, since their outputs are not a multiple of 16: blocks.1.used."
    assert unseen == ("These layers of its blocks stay in 16 bits, since calibration did not see them: network.0.unused, blocks.0.unused, "
                      "blocks.1.unused.")


def test_the_transformers_of_a_unet_are_found_in_running_order():
    """Each reads what the convolutions make of the ones before it; those on the way up also what the ones on the way down left."""
    torch.manual_seed(0)
    model = UNetModel(image_size=32, in_channels=4, out_channels=4, model_channels=64, num_res_blocks=[1, 1], channel_mult=[1, 2],
                      transformer_depth=[1, 2], transformer_depth_output=[1, 1, 2, 2], transformer_depth_middle=1, context_dim=128,
                      num_head_channels=64, use_spatial_transformer=True, legacy=False, dtype=torch.float32, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    call = (torch.randn(1, 4, 16, 16), torch.tensor([500.0])), {"context": torch.randn(1, 24, 128)}
    seen = discovery.observed(model, call, "cpu")
    blocks = discovery.chosen_blocks(model, [seen])
    layers = discovery.chosen_layers(model, [seen], blocks)
    reads = discovery.lineage(model, call, "cpu", blocks, layers)
    down, up = ([name for name in blocks if name.startswith(way)] for way in ("input", "output"))
    middle = "middle_block.1.transformer_blocks.0"
    assert blocks == [*down, middle, *up] and len(down) == 3 and len(up) == 6
    # A transformer's own input goes around it, too.
    assert [reads[name] for name in (*down, middle, up[0])] == [[], down[:1], down[1:2], [down[0], down[2]], [down[0], down[2], middle]]
    stream = calibration.stream_blocks(
        model, [call], calibration.Memory("cpu"), [(name, model.get_submodule(name)) for name in blocks],
        lambda name, block: {layer: model.get_submodule(layer) for layer in layers if layer.startswith(f"{name}.")}, None,
        sources={name: tuple(found) for name, found in reads.items()})
    found = {name: float(stats.spans()["absmax"].max()) for _, of_block in stream for name, stats in of_block.items()}
    assert found == {name: max(-low, high) for name, (_, low, high, _) in seen.inputs.items() if name in layers} and found
