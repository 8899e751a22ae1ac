"""Quantizing when the MODEL does not fit the device, memory runs out, the user cancels, or the power fails."""

import logging
from dataclasses import replace

import pytest
import torch
from comfyui_svdquant.quant.host import calibrate, loader, quantize, resume
from comfyui_svdquant.quant.quantizer import calibration, pipeline, presets, report, smoothing

from ..comfy_models import HIDDEN, LATENT, Progress, prompts, sample, save, write_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
RECIPE = presets.make_recipe("best", 16)
LAYERS = 20


@pytest.fixture(scope="module", autouse=True)
def few_candidates():
    """A stub of the search for smoothing factors, which takes most of a run's time and isn't tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothing, "EXPONENTS", (0.5,))
        yield


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("models") / "flux.safetensors")


@pytest.fixture
def patcher(flux_file):
    return loader.load_model(flux_file)


def run(patcher, recipe=RECIPE, folder=None, progress=None, conditioning=None, seed=0):
    return quantize.quantize(patcher, recipe, conditioning or prompts(), LATENT, 2, seed, progress or Progress(), folder)


@pytest.fixture(scope="module")
def undisturbed(flux_file):
    """(the quantized model, its records) of an undisturbed run."""
    with torch.inference_mode():
        return run(loader.load_model(flux_file))


@pytest.fixture(scope="module")
def expected(undisturbed):
    """The state dict of an undisturbed run."""
    return undisturbed[0].model.state_dict()


def same(quantized_model, expected):
    state = quantized_model.model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def with_lora(patcher, strength=1.0):
    g = torch.Generator().manual_seed(3)
    key = "diffusion_model.single_blocks.0.linear1.weight"
    difference = torch.randn(7 * HIDDEN, 8, generator=g) @ torch.randn(8, HIDDEN, generator=g) / HIDDEN**0.5
    patched = patcher.clone()
    assert patched.add_patches({key: ("diff", (difference,))}, strength) == [key]
    return patched


# --- a MODEL that does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancel_at", [None, 4, 9, 17])
def test_a_model_streamed_through_the_device_gives_the_same_bytes_and_does_not_change(patcher, monkeypatch, cancel_at):
    """Blocks are streamed with the LoRA applied; afterwards the model has its original parameter objects."""
    patched, before, there = with_lora(patcher), {name: p.clone() for name, p in patcher.model.named_parameters()}, {}
    resident = run(patched)[0].model.state_dict()

    def nothing_loaded(patcher, needed):
        patcher.detach()
        there.update(patcher.model.named_parameters())
        return False

    monkeypatch.setattr(calibrate, "make_room", nothing_loaded)
    if cancel_at is None:
        assert same(run(patched)[0], resident)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(patched, progress=Progress(cancel_at))
    if not there:
        patched.detach()  # cancelled during sampling, when ComfyUI has loaded it with the LoRA
    assert all(torch.equal(p, before[name]) for name, p in patcher.model.named_parameters())
    assert all(p is there[name] for name, p in patcher.model.named_parameters() if there)
    assert not patched.backup


def test_the_device_holds_one_block_at_a_time(patcher, monkeypatch):
    """At any time the device holds the layers outside the blocks, and one block."""
    there, most = [], []
    on_device = calibrate.on_device

    class Counted:
        def __init__(self, patcher, modules):
            self.modules, self.context = modules, on_device(patcher, modules)

        def __enter__(self):
            there.extend(name for name, _ in self.modules)
            most.append({".".join(name.split(".")[:2]) for name in there if "_blocks." in name})
            self.context.__enter__()

        def __exit__(self, *error):
            del there[len(there) - len(self.modules):]
            return self.context.__exit__(*error)

    monkeypatch.setattr(calibrate, "on_device", Counted)
    monkeypatch.setattr(calibrate, "make_room", lambda *_: False)
    run(patcher)
    assert not there and [blocks for blocks in most if blocks] == [
        {"double_blocks.0"}, {"single_blocks.0"}, {"single_blocks.1"}]


# --- out of memory ---------------------------------------------------------------------------------------------------


def steps_down(patcher):
    """The moves to host memory of a run on this MODEL, in their order."""
    return [*([calibration.Memory.UNLOADED] if calibrate.unloadable(patcher) else []), *calibration.Memory.STEPS]


def failing(function, times, error):
    """`function`, whose first `times` calls raise."""
    left = [times]

    def run(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return function(*args, **kwargs)

    return run


OUT_OF_MEMORY = (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"))


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("times", [1, 2])
def test_running_out_of_memory_in_a_replay_steps_down_and_is_recorded(patcher, monkeypatch, caplog, expected, error, times):
    monkeypatch.setattr(calibration, "_replay", failing(calibration._replay, times, error))
    quantized_model, records = run(patcher)
    assert same(quantized_model, expected)
    notes = quantized_model.recipe["notes"]
    assert notes == [f"The GPU ran out of memory at double_blocks.0: {step}." for step in steps_down(patcher)[:times]]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == notes
    assert notes[0] in report.text(records, RECIPE, notes)


def test_running_out_of_memory_in_a_layer_ends_on_the_cpu(patcher, monkeypatch, undisturbed, expected):
    """A GPU adds the terms of a sum in another order than the CPU, so that the layer is as good there, but not the same to the bit."""
    name, steps, devices = "double_blocks.0.img_mod.lin", steps_down(patcher)[:-1], []  # the statistics stay
    quantize_layer = failing(pipeline.quantize_layer, len(steps) + 1, OUT_OF_MEMORY[0])
    monkeypatch.setattr(pipeline, "quantize_layer",
                        lambda name, weight, *args: devices.append(weight.device.type) or quantize_layer(name, weight, *args))
    quantized_model, records = run(patcher)
    assert quantized_model.recipe["notes"] == [
        *(f"The GPU ran out of memory at {name}: {step}." for step in steps),
        f"The GPU has no room for {name}: the CPU quantizes it, which takes longer."]
    own = patcher.load_device.type
    assert devices == [own] * (len(steps) + 1) + ["cpu"] + [own] * (LAYERS - 1)
    assert own != "cpu" or same(quantized_model, expected)
    first, known = (next(record for record in found if record.name == name) for found in (records, undisturbed[1]))
    assert first.error == pytest.approx(known.error, rel=0.05)


@pytest.mark.parametrize("where", ["_replay", "quantize_layer"])
def test_a_model_that_is_on_the_device_as_a_whole_leaves_it_first(patcher, monkeypatch, where):
    """Its blocks are then streamed with the LoRA applied, and the MODEL does not change."""
    patched, before = with_lora(patcher), {name: p.clone() for name, p in patcher.model.named_parameters()}
    resident, streamed, on_device = run(patched)[0].model.state_dict(), [], calibrate.on_device
    monkeypatch.setattr(calibrate, "unloadable", lambda _: True)
    monkeypatch.setattr(calibrate, "on_device", lambda patcher, modules: streamed.append(modules[0][0]) or on_device(patcher, modules))
    owner = calibration if where == "_replay" else pipeline
    monkeypatch.setattr(owner, where, failing(getattr(owner, where), 2, OUT_OF_MEMORY[0]))
    quantized_model, _ = run(patched)
    assert same(quantized_model, resident)
    first, second = quantized_model.recipe["notes"]
    assert calibration.Memory.UNLOADED in first and "the states between the blocks went" in second
    assert streamed[0] == "" and streamed[-1] == "single_blocks.1.", "the modules outside the blocks, then each block"
    assert all(torch.equal(p, before[name]) for name, p in patcher.model.named_parameters()) and not patched.backup


def test_a_resident_model_can_leave_only_for_another_device(patcher, monkeypatch):
    monkeypatch.setattr(patcher, "offload_device", patcher.load_device)  # as on the CPU, and with --highvram
    assert not calibrate.unloadable(patcher)
    monkeypatch.setattr(patcher, "offload_device", torch.device("meta"))
    assert calibrate.unloadable(patcher)
    monkeypatch.setattr(patcher, "is_dynamic", lambda: True, raising=False)
    assert not calibrate.unloadable(patcher)


def test_another_error_is_not_treated_as_a_lack_of_memory(patcher, monkeypatch):
    monkeypatch.setattr(calibration, "_replay", failing(calibration._replay, 1, RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        run(patcher)


def test_states_and_statistics_leave_the_device_step_by_step():
    memory = calibration.Memory("meta")
    memory.states[:] = [(torch.ones(2, device="cpu"), None)]
    assert (memory.states_on.type, memory.statistics_on.type) == ("meta", "meta")
    memory.step_down("x")
    assert (memory.states_on.type, memory.statistics_on.type) == ("cpu", "meta")
    memory.step_down("x")
    assert (memory.states_on.type, memory.statistics_on.type) == ("cpu", "cpu")
    with pytest.raises(torch.OutOfMemoryError):
        memory.attempt("x", failing(lambda: None, 1, OUT_OF_MEMORY[0]))


# --- layers that can't be quantized ----------------------------------------------------------------------------------


def test_a_layer_with_too_large_an_error_stays_in_16_bits_and_is_named(patcher, tmp_path):
    exact = {record.name: record.error for record in run(patcher)[1]}
    limit = sorted(exact.values())[-3]
    quantized_model, records = run(patcher, replace(RECIPE, largest_error=limit))
    worst = {name for name, error in exact.items() if error > limit}
    assert len(worst) == 2 and exact.keys() - quantized_model.packed_layers().keys() == worst
    assert {r.name for r in records if r.format == pipeline.KEPT} == worst
    for name in worst:
        module = quantized_model.model.diffusion_model.get_submodule(name)
        assert torch.equal(module.weight.cpu(), patcher.model.diffusion_model.get_submodule(name).weight.cpu())
        assert any(warning.startswith(f"{name}: It stays in 16 bits: in 4 bits its error would be") for warning in report.warnings(records))
    loaded = loader.load_model(save(quantized_model, tmp_path / "quantized_model.safetensors"))
    assert torch.equal(sample(loaded), sample(quantized_model))


# --- interrupted runs ------------------------------------------------------------------------------------------------


def interrupted(patcher, folder, at, **inputs):
    with pytest.raises(KeyboardInterrupt):
        run(patcher, folder=folder, progress=Progress(at), **inputs)
    return sorted(path.stem for path in folder.rglob("*.safetensors"))


# Sampling takes four steps, then the blocks' layers follow, ten, three and three, and four outside them.
@pytest.mark.parametrize(("at", "kept"), [
    (2, []), (7, ["trajectory"]), (15, ["double_blocks.0", "trajectory"]), (18, ["double_blocks.0", "single_blocks.0", "trajectory"]),
    (22, ["double_blocks.0", "single_blocks.0", "single_blocks.1", "trajectory"])])
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(patcher, tmp_path, monkeypatch, expected, at, kept):
    folder = tmp_path / "progress"
    assert interrupted(patcher, folder, at) == kept
    calls, layers = [], []
    layer = patcher.model.diffusion_model.double_blocks[0].img_attn.qkv
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    quantize_layer = pipeline.quantize_layer
    monkeypatch.setattr(pipeline, "quantize_layer", lambda name, *args: layers.append(name) or quantize_layer(name, *args))
    progress = Progress()
    quantized_model, records = run(patcher, folder=folder, progress=progress)
    hook.remove()
    assert same(quantized_model, expected)
    assert len(records) == LAYERS and len(progress.texts) == progress.steps
    assert not folder.exists(), "a finished run removes its progress"
    done = {"double_blocks.0": 10, "single_blocks.0": 3, "single_blocks.1": 3}
    assert len(layers) == LAYERS - sum(done.get(name, 0) for name in kept)
    assert len(calls) == (4 if "trajectory" in kept else 8), "the recorded sampling is replayed without the model"


def test_other_inputs_do_not_resume_the_progress(patcher, tmp_path):
    folder = tmp_path / "progress"
    interrupted(patcher, folder, 15)
    (conditioning, extras), other = prompts()
    changed = [[conditioning + 1e-3, extras], other]
    runs = [("seed", {"seed": 1}), ("conditioning", {"conditioning": changed}), ("order", {"conditioning": prompts()[::-1]}),
            ("recipe", {"recipe": replace(RECIPE, tokens=3)})]
    for what, inputs in runs:
        before = len(list(folder.iterdir()))
        interrupted(patcher, folder, 7, **inputs)
        assert len(list(folder.iterdir())) == before + 1, what
    for model in (with_lora(patcher, 1.0), with_lora(patcher, 0.5)):
        before = len(list(folder.iterdir()))
        interrupted(model, folder, 7)
        assert len(list(folder.iterdir())) == before + 1, "a LoRA and its strength are part of the key"
    patcher.model.diffusion_model.single_blocks[1].linear2.weight.data[5, 7] += 1e-3
    before = len(list(folder.iterdir()))
    interrupted(patcher, folder, 7)
    assert len(list(folder.iterdir())) == before + 1, "each weight is part of the key"


@pytest.mark.parametrize("source", ["quant/quantizer/gptq.py", "cuda/reference.py", "cuda/kernels/gptq.cu", "cuda/kernels/common.cuh"])
def test_another_version_of_the_pack_does_not_resume_the_progress(patcher, tmp_path, monkeypatch, source):
    monkeypatch.setattr(resume, "PACK", tmp_path)
    path = tmp_path / source
    path.parent.mkdir(parents=True)
    path.write_text("1")
    before = resume.run_digest(patcher, "")
    assert before == resume.run_digest(patcher, "")
    path.write_text("2")
    assert before != resume.run_digest(patcher, "")


@pytest.mark.gpu
def test_tensors_on_the_gpu_are_kept(tmp_path):
    """With ComfyUI's --highvram all tensors stay on the GPU."""
    codes = torch.arange(6, dtype=torch.int8)
    with resume.Checkpoint(tmp_path, "key", 0) as kept:
        kept.save("block", {"codes": codes.cuda()}, [])
    tensors, records = kept.load("block")
    assert torch.equal(tensors["codes"], codes) and records == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_or_foreign_file_is_ignored_with_one_line(patcher, tmp_path, caplog, expected, damage):
    folder = tmp_path / "progress"
    interrupted(patcher, folder, 18)
    path = next(folder.rglob("double_blocks.0.safetensors"))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-1000] ^= 1
    else:
        data = bytearray(next(folder.rglob("single_blocks.0.safetensors")).read_bytes().replace(b"key", b"kex"))
    path.write_bytes(data)
    caplog.clear()
    quantized_model, _ = run(patcher, folder=folder)
    assert same(quantized_model, expected)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "double_blocks.0.safetensors is damaged or belongs to another run; it is not used" in line


def test_a_full_disk_does_not_end_the_run(patcher, tmp_path, monkeypatch, caplog, expected):
    monkeypatch.setattr(resume, "SPARE_BYTES", 1 << 60)
    assert same(run(patcher, folder=tmp_path / "progress")[0], expected)
    assert sum("the disk has too little room" in r.getMessage() for r in caplog.records) == 1


def test_progress_that_cannot_be_written_is_logged_once(tmp_path, monkeypatch, caplog):
    def fails(_tensors):
        raise TypeError("no such bytes")

    monkeypatch.setattr(resume, "_crc32", fails)
    with resume.Checkpoint(tmp_path, "0" * 64, 0) as kept:
        for _ in range(3):
            kept.save("block", {"w": torch.zeros(2)}, [])
    assert not kept.keeps and sum("is not kept" in r.getMessage() for r in caplog.records) == 1


def test_a_model_that_can_not_be_hashed_is_not_resumed(patcher, tmp_path):
    wrapped = patcher.clone()
    wrapped.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    with pytest.raises(KeyboardInterrupt):
        run(wrapped, folder=tmp_path / "progress", progress=Progress(15))
    assert not (tmp_path / "progress").exists()
