"""What a download says about a Hub that refuses, is silent, sends in circles or lies, and that nothing is left behind."""

import os
import threading
import time

import huggingface_hub.constants
import pytest
from comfyui_svdquant.quant.download import hub

from .test_hub import DATA, FILE, fetch, refusal, server, use  # noqa: F401 (fixtures)

REFUSALS = [(401, "log in again with `hf auth login`"), (403, "accept its licence"), (404, "has no file"), (410, "no longer"),
            (429, "too many requests"), (451, "for legal reasons"), (500, "try again later"), (503, "try again later"),
            (418, "check the names")]


@pytest.mark.parametrize(("status", "says"), REFUSALS)
def test_each_refusal_has_its_own_remedy(server, tmp_path, monkeypatch, status, says):  # noqa: F811
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between its tries
    server.status, server.error_code = status, "Other"
    message = refusal(tmp_path)
    assert says in message and ("try again later" in message) is (status >= 500) and FILE in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 416, 500])
def test_a_file_that_is_listed_but_not_given_leaves_nothing(server, tmp_path, monkeypatch, status):  # noqa: F811
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.get_status, server.error_code = status, "Other"
    assert FILE in refusal(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_circle_of_redirects_is_named(server, tmp_path):  # noqa: F811
    server.redirect = server.url
    assert "redirects in a circle" in refusal(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("size", "says"), [
    (-5, "does not answer like a Hugging Face Hub"), (60 * 10**9, "has 60.00 GB, and this node downloads at most 50.00 GB"),
])
def test_impossible_sizes_are_refused_before_the_download(server, tmp_path, size, says):  # noqa: F811
    server.size = size
    assert says in refusal(tmp_path)
    assert server.gets == [] and os.listdir(tmp_path) == []


def test_a_silent_server_has_a_limit(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    server.silence, before = threading.Event(), time.monotonic()
    assert "does not answer" in refusal(tmp_path)
    assert time.monotonic() - before < 5
    server.silence.set()


def test_a_trickle_has_a_limit(server, tmp_path, monkeypatch):  # noqa: F811
    """Every byte restarts the client's own time limit, so that a server that sends one now and then would never be left."""
    monkeypatch.setattr(hub, "STALL_SECONDS", 1.0)
    server.trickle, before = (1, 0.1), time.monotonic()
    message = refusal(tmp_path)
    assert "has sent almost nothing" in message and "resumes where it stopped" in message
    assert time.monotonic() - before < 10


def test_a_slow_but_steady_server_is_waited_for(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub, "STALL_SECONDS", 1.0)
    server.trickle = (len(DATA) // 10, 0.2)
    fetch(tmp_path)
    assert (tmp_path / "flux.safetensors").read_bytes() == DATA
