"""SVDQuant Doctor, called as ComfyUI calls it."""

import comfy.model_management
import comfyui_version
import pytest
from comfyui_svdquant.nodes.doctor import SVDQuantDoctor
from comfyui_svdquant.quant.doctor import page

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_the_node_returns_and_shows_the_page():
    output = SVDQuantDoctor.execute(False)
    (report,) = output.result
    assert report.startswith("SVDQuant Doctor: ") and f"ComfyUI {comfyui_version.__version__}" in report
    assert output.ui.as_dict()["text"] == (report,)
    assert SVDQuantDoctor.fingerprint_inputs(False) != SVDQuantDoctor.fingerprint_inputs(False)


@pytest.mark.parametrize("timed", [False, True])
def test_the_checks_get_comfyuis_device_and_memory(monkeypatch, timed):
    seen = []
    monkeypatch.setattr(page, "examine", lambda *args: seen.append(args) or "page")
    assert SVDQuantDoctor.execute(timed).result == ("page",)
    ((host, measure),) = seen
    assert measure is timed and host.version == comfyui_version.__version__
    assert host.device == comfy.model_management.get_torch_device() and host.pinned == comfy.model_management.MAX_PINNED_MEMORY
