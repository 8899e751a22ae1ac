"""What every family beyond FLUX.1 has to do, on a small random model of each in a real ComfyUI."""

import inspect

import comfy.lora
import comfy.sd
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer
from comfyui_svdquant.quant.host import build, calibrate, loader
from comfyui_svdquant.quant.host.checks import check_conditioning, check_model
from comfyui_svdquant.quant.quantizer import calibration
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import load_file, save_file

from ..comfy_models import save, saved_and_loaded
from ..family_cases import CASES

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def file(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save_file(case.tensors(), path)
    return str(path)


@pytest.fixture(scope="module")
def plain(file):
    with torch.inference_mode():
        return loader.load_model(file)


@pytest.fixture(scope="module")
def pair(case, plain):
    """(the model in 16 bits, quantized)."""
    with torch.inference_mode():
        return plain, case.quantized(plain)[0]


def test_it_loads_in_16_bits_on_the_hosts_own_class(case, plain):
    model, (model_class, base_model) = plain.model.diffusion_model, case.model_classes
    assert f"{type(model).__module__}.{type(model).__name__}" == model_class and type(plain.model).__name__ == base_model
    assert check_model(plain) is case.family
    assert torch.isfinite(case.sample(plain)).all()


def test_names_with_a_prefix_are_the_same_model(case, plain, file, tmp_path):
    renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    assert torch.equal(case.sample(plain), case.sample(loader.load_model(str(tmp_path / "renamed.safetensors"))))


def test_the_declared_layers_are_packed(case, pair):
    layers = pair[1].packed_layers()
    assert len(layers) == case.packed and all(case.family.layer(name) for name in layers)
    assert all((layer.bias is not None) is case.family.layer(name).bias for name, layer in layers.items())


def test_4_bits_stay_close(case, pair):
    exact, estimate = map(case.sample, pair)
    error = relative_error(estimate, exact)
    assert 0.001 < error < 0.3, f"relative error of the latent {error:.3f}"


def test_layers_that_read_the_same_tensor_have_one_smoothing_factor(case, pair):
    factors = {}
    for name, layer in pair[1].packed_layers().items():
        if hasattr(layer, "weight_smooth_factor"):
            factors.setdefault(case.family.first_reader(name), []).append(layer.weight_smooth_factor)
    assert all(torch.equal(factor, shared[0]) for shared in factors.values() for factor in shared)
    assert len({tuple(shared[0].tolist()) for shared in factors.values()}) == len(factors), "different inputs have different factors"
    assert any(len(shared) > 1 for shared in factors.values()) is any(blocks.shares_input for blocks in case.family.blocks)


def test_saved_and_loaded_it_has_the_same_bits(case, pair, tmp_path):
    _, model = pair
    path, loaded = saved_and_loaded(model, tmp_path / "model_4bit.safetensors")
    assert torch.equal(case.sample(model), case.sample(loaded))
    metadata = read_header(path).metadata
    assert metadata["modelspec.architecture"] == case.family.architecture
    assert f'"image_model": "{case.family.image_model}"' in metadata["svdquant.config"]


def lora_of(keys, rank=8):
    g, tensors = torch.Generator().manual_seed(3), {}
    for key, (_, (n, k)) in keys.items():
        tensors[f"{key}.lora_up.weight"] = torch.randn(n, rank, generator=g) / rank**0.5
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, k, generator=g) / k**0.5
    return tensors


def test_a_lora_has_its_effect_in_every_style_of_keys_and_is_removed_completely(case, pair):
    plain, model = pair
    before, exact_before = case.sample(model), case.sample(plain)
    mapped = comfy.lora.model_lora_keys_unet(plain.model, {})
    for style, keys in case.loras.items():
        if style in case.newer and not mapped.keys() & keys.keys():
            continue
        changed = [comfy.sd.load_lora_for_models(m, None, lora_of(keys), 1.0, 0.0)[0] for m in pair]
        expected = {f"diffusion_model.{layer}.weight" for layer, _ in keys.values()}
        assert all(set(m.patches) == expected for m in changed), style
        exact, estimate = map(case.sample, changed)
        assert relative_error(exact_before, exact) > 0.02, f"the LoRA with {style} keys changes something"
        error = relative_error(estimate, exact)
        assert error < 0.35, f"relative error of the latent with a LoRA of {style} keys {error:.3f}"
    assert torch.equal(case.sample(model), before)


def test_inspect_knows_it(case, pair, file, tmp_path):
    for path in (file, save(pair[1], tmp_path / "model_4bit.safetensors")):
        facts = inspection.inspect(read_header(path))
        assert facts["family"] == case.family.title and facts["model"] == build.stored_config(pair[1].model)
        lines = inspection.text(facts).splitlines()
        assert case.figures in lines and lines[0].endswith(f"-bit {case.family.title}, opens with SVDQuant Load Model")


def test_streaming_records_the_inputs_of_ordinary_forwards(case, plain):
    """Also if a node adds something between the blocks, as the control nodes of Qwen-Image and Z-Image do."""
    patcher, seen, controlled = plain.clone(), {}, []

    def control(args):
        controlled.append(args["block_index"])
        return {"img": args["img"] + 0.1 * (1 + args["block_index"]), "txt": args["txt"]}

    patcher.set_model_patch(control, "double_block")
    model = patcher.model.diffusion_model
    with calibration.recorded_calls(model, []) as calls:
        case.sample(patcher)

    def layers_of(name, block):
        return case.family.outer_layers(block) if name == calibrate.OUTSIDE else case.family.block_layers(name, block)

    blocks = [*case.family.running_blocks(model), (calibrate.OUTSIDE, model)]
    layers = {name: layer for block_name, block in blocks for name, layer in layers_of(block_name, block).items()}
    hooks = [layer.register_forward_pre_hook(lambda _m, a, name=name: seen.setdefault(name, []).append(a[0].flatten(0, -2).clone()))
             for name, layer in layers.items()]
    for args, kwargs in calls:
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    assert bool(controlled) is ('"double_block" in patches' in inspect.getsource(type(model)._forward)), "whether the host knows them"
    for name in seen:
        assert all(map(torch.equal, seen[name], seen[case.family.first_reader(name)])), f"{name} reads what its group reads"
    sources = case.family.sources(model) | {calibrate.OUTSIDE: (blocks[-2][0],)}
    for last in (None, {name for name, _ in blocks[1::2]}):  # each block on its own, and two in one forward
        left = dict(seen)
        for _, stats in calibration.stream_blocks(model, list(calls), calibration.Memory("cpu"), blocks, layers_of,
                                                  case.family.pass_through, sources=sources, last=last):
            for name, found in stats.items():
                x = torch.cat(left.pop(name))
                assert found.tokens == len(x) and torch.equal(found.spans()["absmax"], x.abs().amax(0).float()), name
        assert not left, "every layer was calibrated"


def test_what_does_not_fit_is_refused_in_a_sentence(case, pair, file, tmp_path):
    plain, model = pair
    title = case.family.title
    with pytest.raises(ValueError, match=rf"^The conditioning is 64 wide and this {title} model takes 128; [^.]+(\.\d[^.]*)*\.$"):
        check_conditioning(case.family, plain, case.prompts(width=64))
    with pytest.raises(ValueError, match="^This MODEL is quantized already"):
        check_model(model)
    tensors = model.model.diffusion_model.state_dict()
    specs = {name: layer.spec for name, layer in model.packed_layers().items()}
    with pytest.raises(CheckpointError, match=f"^Nunchaku's layout has no place for {title} models; choose layout native.$"):
        writer.save(str(tmp_path / "x.safetensors"), tensors, specs, build.stored_config(model.model), {}, "")
    lost = next(name for name in reversed(load_file(file)) if case.family.layer(name.removesuffix(".weight")))
    save_file({name: t for name, t in load_file(file).items() if name != lost}, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=rf"^cut.safetensors lacks tensor {lost}; "):
        loader.load_model(str(tmp_path / "cut.safetensors"))
