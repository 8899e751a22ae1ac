"""quantize.py, alone and under torchrun: real processes on the CPU, with gloo."""

import importlib.util
import os
import signal
import time
from types import SimpleNamespace

import comfy.sd
import comfyui_svdquant
import pytest
import torch
from comfyui_svdquant.nodes import quantize_model, save_model
from comfyui_svdquant.quant import families
from comfyui_svdquant.quant.batch import options
from comfyui_svdquant.quant.batch.terminal import Terminal
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import conditioning, loader, offline
from safetensors.torch import save_file

from ..comfy_models import sample
from .commands import OPTIONS, ROOT, quantize, started, torchrun, write_conditioning, write_model

DATE = "1000000000"  # of SOURCE_DATE_EPOCH


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return SimpleNamespace(folder=folder, model=write_model(folder / "flux.safetensors"), cond=write_conditioning(folder / "c.safetensors"))


@pytest.fixture(scope="module")
def one_process(files):
    """The bytes that one process writes to a file called model.safetensors."""
    target = files.folder / "one" / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", DATE)
        offline.run(options.parsed([files.model, str(target), "--conditioning", files.cond, *OPTIONS, "--progress", "off"]),
                    Terminal(shown=False))
    return target.read_bytes()


def test_the_settings_are_those_of_the_nodes():
    parser = options.new_parser()
    for node, names in ((quantize_model.SVDQuantQuantizeModel, ("preset", "rank", "exceptions", "tokens", "steps", "seed")),
                        (save_model.SVDQuantSaveModel, ("layout", "overwrite"))):
        inputs = {each.id: each for each in node.define_schema().inputs}
        for name in names:
            assert parser.get_default(name) == inputs[name].default, name
    choices = {action.dest: action.choices for action in parser._actions}
    inputs = {each.id: each for each in quantize_model.SVDQuantQuantizeModel.define_schema().inputs}
    assert choices["preset"] == inputs["preset"].options
    assert sorted(map(str, choices["branch_bits"])) == sorted(inputs["branch_bits"].options)
    assert str(parser.get_default("branch_bits")) == inputs["branch_bits"].default


def test_a_killed_process_ends_the_run_and_the_next_one_goes_on_to_the_same_bytes(files, one_process, tmp_path):
    """Two processes write what one process writes, also after one of two was killed in the middle."""
    target, kept = files.folder / "two" / "model.safetensors", files.folder / "kept"
    arguments = (files.model, target, "--conditioning", files.cond, *OPTIONS, "--progress", kept)
    # Messages: one with the recorded calls, one with the outputs, and for two blocks at a time three with statistics and one with codes.
    killed = quantize(*arguments, launcher=torchrun(tmp_path), KILLED_AT="8", SOURCE_DATE_EPOCH=DATE)
    assert killed.returncode and "another process" in killed.stderr, killed.stderr
    assert not target.parent.exists() or not os.listdir(target.parent)
    assert {path.stem for path in kept.rglob("*.safetensors")} == {"trajectory", "double_blocks.0", "single_blocks.0"}, "finished parts"
    again = quantize(*arguments, launcher=torchrun(tmp_path), SOURCE_DATE_EPOCH=DATE)
    assert again.returncode == 0, again.stderr
    assert target.read_bytes() == one_process and not kept.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send Ctrl-C to one process")
def test_ctrl_c_leaves_the_finished_blocks_and_no_file(files, one_process):
    target, kept = files.folder / "interrupted" / "model.safetensors", files.folder / "kept after Ctrl-C"
    arguments = (files.model, target, "--conditioning", files.cond, *OPTIONS, "--progress", kept)
    with started(*arguments, SOURCE_DATE_EPOCH=DATE) as process:
        until = time.monotonic() + 150
        while not list(kept.rglob("*blocks.0.safetensors")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on" in errors and "Traceback" not in errors, errors
    assert not target.parent.exists() and list(kept.rglob("*blocks.0.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", DATE)
        texts = []
        shown = Terminal(shown=False)
        shown.step = texts.append
        offline.run(options.parsed(list(map(str, arguments))), shown)
    assert any("done before" in text for text in texts) and target.read_bytes() == one_process


def test_one_process_runs_without_a_server(files, tmp_path):
    target = tmp_path / "model.safetensors"
    done = quantize(files.model, target, "--preset", "data-free", "--report", tmp_path / "report.json", "--progress", tmp_path / "kept")
    assert done.returncode == 0 and target.is_file() and not (tmp_path / "kept").exists(), done.stderr
    assert "layers" in done.stderr and (tmp_path / "report.json").read_text(encoding="utf-8").startswith("{")
    again = quantize(files.model, target, "--preset", "data-free")
    assert again.returncode == 1 and again.stderr.strip().endswith("choose another filename, or switch overwrite on.")


def test_a_lora_is_baked_in(files, tmp_path):
    g, key = torch.Generator().manual_seed(0), "lora_unet_single_blocks_0_linear1"
    save_file({f"{key}.lora_{part}.weight": torch.randn(shape, generator=g) for part, shape in (("down", (4, 128)), ("up", (7 * 128, 4)))},
              tmp_path / "lora.safetensors")
    made = {}
    for name, more in (("plain", ()), ("with", ("--lora", str(tmp_path / "lora.safetensors"), "0.5"))):
        offline.run(options.parsed([files.model, str(tmp_path / f"{name}.safetensors"), "--preset", "data-free", "--rank", "16", *more,
                                    "--progress", "off"]), Terminal(shown=False))
        made[name] = loader.load_model(str(tmp_path / f"{name}.safetensors")).model.diffusion_model
    layers = {name: [found.get_submodule(f"single_blocks.{i}.linear1").weight for i in (0, 1)] for name, found in made.items()}
    assert not torch.equal(layers["plain"][0], layers["with"][0]) and torch.equal(layers["plain"][1], layers["with"][1])
    save_file({"lora_unet_of_another_model.lora_down.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no LoRA for this model"):
        offline.with_lora(loader.load_model(files.model), str(tmp_path / "other.safetensors"), 1.0)


def test_a_conditioning_is_written_and_read(tmp_path):
    path = str(tmp_path / "c.safetensors")
    entries = [[torch.randn(1, 3, 8), {"pooled_output": torch.randn(1, 4), "guidance": 2.5, "hooks": None}] for _ in range(11)]
    conditioning.write(path, entries)
    read = conditioning.read(path)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1]["pooled_output"], b[1]["pooled_output"]) for a, b in zip(entries, read))
    assert [extras["guidance"] for _, extras in read] == [2.5] * 11 and "hooks" not in read[0][1]
    assert conditioning.with_guidance(read, 4.0)[3][1]["guidance"] == 4.0 and read[3][1]["guidance"] == 2.5
    with pytest.raises(CheckpointError, match="no conditioning"):
        conditioning.read(write_model(tmp_path / "flux.safetensors"))


def test_prompts_are_encoded_by_the_familys_text_encoders(monkeypatch):
    asked = []

    class Encoder:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, text):
            return [[text, {}]]

    monkeypatch.setattr(comfy.sd, "load_clip", lambda **options: asked.append(options) or Encoder())
    prompts = conditioning.prompts_of("a cat\n\n# not this\n  a dog  \n")
    for family in families.FAMILIES:
        assert conditioning.encode(family, ["x"], prompts) == [["a cat", {}], ["a dog", {}]]
    named = [family.clip_type if hasattr(comfy.sd.CLIPType, family.clip_type) else "STABLE_DIFFUSION" for family in families.FAMILIES]
    assert [each["clip_type"].name for each in asked] == named and "FLUX" in named


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "name the model"), (("a",), "name the model"), (("a", "b"), "choose --preset data-free"),
    (("a", "b", "--prompts", "p"), "go together"), (("a", "b", "--conditioning", "c", "--prompts", "p"), "one or the other"),
    (("a", "b", "--preset", "naive", "--size", "9x9"), "no size"),
    (("a", "b", "--preset", "naive", "--lora", "x", "y"), "a file and a number"),
    (("a", "b", "--preset", "naive", "--rank", "17"), "Rank 17 is not possible"),
    (("a", "b", "--preset", "naive", "--steps", "0"), "at least 1"),
    (("a", "--write-conditioning", "c"), "needs --prompts")])
def test_options_that_start_no_run(arguments, message, capsys):
    with pytest.raises(SystemExit):
        options.parsed(arguments)
    assert message in capsys.readouterr().err


def test_a_comfyui_without_a_name_that_it_needs_is_one_sentence(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    spec = importlib.util.spec_from_file_location("quantize_program", ROOT / "quantize.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "PACK", comfyui_svdquant.__name__)
    monkeypatch.delattr(comfy.sd, "load_lora_for_models")
    with pytest.raises(SystemExit) as end:
        program._run(None, None)
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.startswith("quantize: ComfyUI ")
    assert "comfy.sd.load_lora_for_models, which quantize.py of this" in message


def test_a_comfyui_whose_options_have_changed_is_one_sentence(files, tmp_path):
    for name in ("sd", "options"):
        (tmp_path / "comfy" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "comfy" / f"{name}.py").touch()
    done = quantize("a", "b", "--preset", "naive", "--comfyui", tmp_path)
    assert done.returncode == 1 and "enable_args_parsing, which quantize needs; update" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_folder_or_file_is_one_sentence(files, tmp_path):
    done = quantize("a", "b", "--preset", "naive", "--comfyui", tmp_path)
    assert done.returncode == 1 and "is not ComfyUI's folder" in done.stderr and "Traceback" not in done.stderr
    done = quantize(tmp_path / "none.safetensors", tmp_path / "b.safetensors", "--preset", "naive")
    assert done.returncode == 1 and "none.safetensors can't be read (No such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.usefixtures("inference_mode")
def test_the_file_is_a_model(files, one_process, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(one_process)
    assert "seconds" not in str(read_header(str(tmp_path / "m.safetensors")).metadata)
    latent = sample(loader.load_model(str(tmp_path / "m.safetensors")))
    assert torch.isfinite(latent).all() and latent.std() > 0.1
