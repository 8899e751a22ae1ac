"""Downloading, loading, drawing and inspecting in a real server, with a Hub on the loopback."""

import threading
import time

import pytest

from host import setup
from host.client import Interrupted, NodeFailed, PromptRejected
from host.server import ROOT, TINY, Server

from ..quant.hub_server import FakeHub
from .test_server import base_prompt, pictures

pytestmark = pytest.mark.server

NAME = "downloaded.safetensors"
DATA = (ROOT / "demo" / "tiny_flux" / TINY["diffusion_models"]).read_bytes()


@pytest.fixture(scope="module")
def hub():
    with FakeHub({f"owner/flux/sub/{NAME}": DATA}) as running:
        yield running


@pytest.fixture(scope="module")
def own_server(hub, tmp_path_factory):
    """A separate server, since HF_ENDPOINT is read once, at the first use of the Hub."""
    base = tmp_path_factory.mktemp("hub-server")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(base / "hf"), "HF_TOKEN": "hf_secret"}.items():
            patch.setenv(name, value)
        with Server(setup.locate(), base) as running:
            yield running


@pytest.fixture
def client(own_server, hub):
    hub.gets.clear()
    yield own_server.client
    for path in (own_server.base / "models" / "diffusion_models").glob(f"*{NAME}*"):
        path.unlink()


def download(filename="", **changes):
    inputs = {"model": "repository and file below", "repository": "owner/flux", "file": f"sub/{NAME}", "revision": "main"}
    return {"class_type": "SVDQuantDownloadModel", "inputs": {**inputs, "filename": filename, **changes}}


def test_the_ports_have_tooltips(client):
    info = client.object_info()
    for name in ("SVDQuantDownloadModel", "SVDQuantInspect"):
        assert all(spec[1]["tooltip"] for spec in info[name]["input"]["required"].values()) and all(info[name]["output_tooltips"])


def test_a_downloaded_model_draws_and_is_inspected(client, own_server, hub):
    prompt = base_prompt() | pictures("model", "downloaded") | {"download": download()}
    prompt["model"]["inputs"]["model_name"] = ["download", 0]
    prompt["inspect"] = {"class_type": "SVDQuantInspect", "inputs": {"model_name": ["download", 0]}}
    del prompt["quantized"]
    seen = []
    outputs = client.post(prompt, lambda node, value, total: seen.append((node, value, total)))
    assert len(outputs["downloaded"]["images"]) == 2
    first, second = outputs["inspect"]["text"][0].splitlines()[:2]
    assert first == "16-bit FLUX.1, opens with SVDQuant Load Model"
    assert second.startswith(f"{NAME}: {len(DATA) / 1e6:.2f} MB, a FLUX.1 that is not quantized")
    assert ("download", len(DATA), len(DATA)) in seen
    assert (own_server.base / "models" / "diffusion_models" / NAME).read_bytes() == DATA
    assert [token for _, _, token in hub.gets] == ["Bearer hf_secret"]


def test_cancel_keeps_the_downloaded_part_and_the_next_run_resumes(client, own_server, hub):
    hub.hold, result = threading.Event(), []
    hub.halfway.clear()

    def run():
        try:
            result.append(client.post({"download": download("cancelled_" + NAME)}))
        except Interrupted as interrupted:
            result.append(interrupted)

    thread = threading.Thread(target=run)
    thread.start()
    assert hub.halfway.wait(30)
    folder = own_server.base / "models" / "diffusion_models"
    while not any(path.stat().st_size for path in folder.glob("*.part")):  # 10 MB are written at once
        time.sleep(0.05)
    before = time.monotonic()
    client.interrupt()
    thread.join(30)
    assert time.monotonic() - before < 2 and isinstance(result[0], Interrupted)
    hub.hold.set()
    hub.hold = None
    part, = folder.glob("*.part")
    client.post({"download": download("cancelled_" + NAME)})
    assert not part.exists() and (folder / ("cancelled_" + NAME)).read_bytes() == DATA
    assert hub.gets[-1][1] == f"bytes={10 * 1024 * 1024}-"


def test_a_deleted_download_is_downloaded_again(client, own_server, hub):
    """For an unchanged workflow ComfyUI runs these nodes once, and again if their file is missing."""
    prompt = base_prompt() | pictures("model", "again") | {"download": download("again_" + NAME)}
    prompt["model"]["inputs"]["model_name"] = ["download", 0]
    del prompt["quantized"]
    path = own_server.base / "models" / "diffusion_models" / ("again_" + NAME)
    for times in (1, 2):
        for ran in (True, False):
            started = set()
            client.post(prompt, lambda node, value, total, started=started: started.add(node))
            assert ("download" in started) == ("model" in started) == ran and path.read_bytes() == DATA and len(hub.gets) == times
        path.unlink()


@pytest.mark.parametrize(("changes", "says"), [
    ({"file": "other.safetensors"}, "has no file other.safetensors"), ({"repository": "owner/none"}, "no repository owner/none"),
    ({"file": "../x.safetensors"}, "is not the path of a file"), ({"filename": "../x"}, "within models/diffusion_models"),
    ({"filename": TINY["diffusion_models"], "file": f"sub/{NAME}"}, None),
])
def test_one_sentence_or_a_file_that_is_there(client, hub, changes, says):
    """In the last case the same file exists under another name, and is used."""
    if says is None:
        client.post({"download": download(**changes)})
        assert hub.gets == []
        return
    with pytest.raises((NodeFailed, PromptRejected), match=says) as failure:
        client.post({"download": download(**changes)})
    assert "\n" not in str(failure.value)
