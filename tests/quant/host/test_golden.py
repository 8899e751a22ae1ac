"""Files of every format version that was ever written, kept in tests/data/golden, load to the same bits; and the same model draws the same
latent, however it was loaded, in every run and in every process."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import inspection, native
from comfyui_svdquant.quant.checkpoint.header import read_header
from comfyui_svdquant.quant.host import build, loader

from .. import golden_model
from ..comfy_models import prompts, sample, save

DATA = Path(__file__).resolve().parents[2] / "data" / "golden"
DRAW = Path(__file__).with_name("draw_golden.py")

pytestmark = pytest.mark.usefixtures("inference_mode")


def unpacked(name, folder):
    path = folder / f"{name}.safetensors"
    path.write_bytes(gzip.decompress((DATA / f"{name}.safetensors.gz").read_bytes()))
    return path


def state(patcher):
    return {build.stored_name(patcher.model, name): tensor for name, tensor in patcher.model.diffusion_model.state_dict().items()}


def test_there_is_a_file_of_each_version():
    assert {path.name.removesuffix(".safetensors.gz") for path in DATA.iterdir()} == golden_model.FILES.keys()
    versions = {version for _, version, _ in golden_model.FILES.values() if version}
    assert versions == {str(number) for number in range(1, native.VERSION + 1)}
    assert str(native.MINOR) in {minor for _, _, minor in golden_model.FILES.values()}, "write a file of this version: golden_model.py"


@pytest.mark.parametrize("name", golden_model.FILES)
def test_a_file_of_each_version_loads_to_the_same_bits(tmp_path, name):
    path = unpacked(name, tmp_path)
    _, version, minor = golden_model.FILES[name]
    metadata = read_header(str(path)).metadata
    assert (metadata.get("svdquant.version"), metadata.get("svdquant.minor")) == (version, minor)
    found, expected = state(loader.load_model(str(path))), golden_model.tensors("nvfp4" in name, "int8_branch" in name)
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key].dtype != expected[key].dtype or not torch.equal(bits(found[key]), bits(expected[key]))] == []
    info = inspection.inspect_body(read_header(str(path)))
    assert bool(info["intact"]) is ("svdquant.checksums" in metadata) and info["newer"] == ""
    assert info["recipe"]["preset"] == "data-free" and info["source"] == "golden"


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize(("name", "form"), [("native_2_1", "native"), ("native_3_int8_branch", "native_int8_branch")])
def test_this_version_writes_the_last_file_of_its_kind(tmp_path, name, form):
    """But for the date, and for the file's name in its title."""
    kept = unpacked(name, tmp_path)
    golden_model.main(str(Path(__file__).resolve().parents[3]), form, str(tmp_path / "new" / f"{name}.safetensors"))
    whole, new = kept.read_bytes(), (tmp_path / "new" / f"{name}.safetensors").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    assert new[size:] == whole[size:]
    ours, theirs = (json.loads(raw[8:size]) for raw in (new, whole))
    for header in (ours, theirs):
        del header["__metadata__"]["modelspec.date"]
    assert ours == theirs


# --- latents -------------------------------------------------------------------------------------------------------

# The sums of the 16 channels of the latent. Another PyTorch or CPU adds up in another order, so they hold within TOLERANCE of the largest;
# on one machine the bits are equal in each run and in each process with as many threads.
GOLDEN = [606.93, -794.58, 859.92, 1602.95, 1885.83, -2809.97, -1925.88, 1108.69, -884.61, -1029.6, 2139.57, 1077.55, -1660.58, -2087.51,
          1294.85, 1501.22]
TOLERANCE = 2e-2


def draw(patcher):
    return sample(patcher, cond=prompts(1, golden_model.CONTEXT))


def digest(latent):
    return hashlib.sha256(latent.numpy().tobytes()).hexdigest()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the golden latent is the CPU's")
def test_the_latent_is_the_golden_one_and_has_the_same_bits_in_each_run(tmp_path):
    paths = [unpacked(name, tmp_path) for name in ("native_2_1", "native_1", "nunchaku_2")]
    patcher = loader.load_model(str(paths[0]))
    latent = draw(patcher)
    found, golden = latent.double().sum((0, 2, 3)), torch.tensor(GOLDEN, dtype=torch.float64)
    assert (found - golden).abs().max() <= TOLERANCE * golden.abs().max(), str(found.tolist())
    patcher.detach()
    again = {"again": patcher, "saved": loader.load_model(save(patcher, tmp_path / "saved.safetensors")),
             "version 1": loader.load_model(str(paths[1])), "Nunchaku's layout": loader.load_model(str(paths[2]))}
    assert {name: digest(draw(model)) for name, model in again.items()} == dict.fromkeys(again, digest(latent))
    command = [sys.executable, str(DRAW), str(tmp_path), str(torch.get_num_threads()), str(paths[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [digest(latent)], "another process draws other bits"
