"""Downloads from a Hub on the loopback: a complete, verified file or one sentence; the login is sent to no other host."""

import errno
import os
import socket
import threading
import time
from functools import partial

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
from comfyui_svdquant.quant.checkpoint.header import CheckpointError
from comfyui_svdquant.quant.download import hub
from comfyui_svdquant.quant.download.hub import HubError

from ..hub_server import COMMIT, FakeHub, safetensors, use_endpoint

DATA = safetensors()
REPOSITORY, FILE = "owner/flux", "sub/flux_4bit.safetensors"


class Progress:
    """A node's progress object for a download: it records its calls, and cancels when `stop` is set."""

    def __init__(self):
        self.said, self.points, self.stop = [], [], threading.Event()

    def say(self, text):
        self.said.append(text)

    def at(self, done, total, text):
        self.check()
        self.points.append((done, total))
        self.said.append(text)

    def check(self):
        if self.stop.is_set():
            raise KeyboardInterrupt


@pytest.fixture
def use(monkeypatch):
    """A function that makes huggingface_hub ask the server at a URL, with a login."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # default 10 MB; a chunk is written at once
    forget_sessions()
    return partial(use_endpoint, monkeypatch)


def forget_sessions():
    """huggingface_hub before 1.0 caches whether a session is offline."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


@pytest.fixture
def server(use):
    with FakeHub({f"{REPOSITORY}/{FILE}": DATA, f"{REPOSITORY}/model.ckpt": DATA}) as running:
        use(running.url)
        yield running


def fetch(folder, progress=None, repository=REPOSITORY, file=FILE, revision="main"):
    progress = progress or Progress()
    remote = hub.look_up(repository, file, revision, progress)
    hub.download(remote, str(folder / "flux.safetensors"), progress)
    return progress


def refusal(*args, **kwargs):
    with pytest.raises((HubError, CheckpointError)) as caught:
        fetch(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and "hf_secret" not in message
    return message


def test_a_file_arrives_whole_and_its_size_is_reported_first(server, tmp_path):
    progress = fetch(tmp_path)
    assert os.listdir(tmp_path) == ["flux.safetensors"] and (tmp_path / "flux.safetensors").read_bytes() == DATA
    assert progress.said[0].startswith("flux.safetensors: 0.2 MB from owner/flux at 01234567; the disk has ")
    assert progress.points[-1] == (len(DATA), len(DATA)) and "flux.safetensors: checking the SHA-256 of 0.2 MB" in progress.said
    assert progress.said[-1] == "flux.safetensors is downloaded: 0.2 MB, and its SHA-256 matches the Hub's"
    assert server.gets == [(f"/owner/flux/resolve/{COMMIT}/{FILE}", None, "Bearer hf_secret")]


def test_an_existing_file_is_used_after_its_hash_is_checked(server, tmp_path):
    (tmp_path / "flux.safetensors").write_bytes(DATA)
    progress = fetch(tmp_path)
    assert server.gets == [] and "is already downloaded" in progress.said[-1] and "SHA-256" in progress.said[-1]


@pytest.mark.parametrize("other", [DATA[:-1] + b"?", DATA[:100], b""])
def test_another_file_of_that_name_is_left_alone(server, tmp_path, other):
    (tmp_path / "flux.safetensors").write_bytes(other)
    assert " and differs from " in refusal(tmp_path)
    assert (tmp_path / "flux.safetensors").read_bytes() == other and server.gets == []


def test_a_download_continues_after_a_cut_connection(server, tmp_path):
    server.cuts = [70_000, 50_000]
    fetch(tmp_path)
    assert (tmp_path / "flux.safetensors").read_bytes() == DATA
    starts = [int(byte_range[6:-1]) for _, byte_range, _ in server.gets if byte_range]
    assert len(server.gets) == 3 and starts == [70_000, 120_000]


def test_an_interrupted_download_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between its tries
    server.cuts = [70_000] + [0] * 50
    assert "can't be reached for sub/flux_4bit.safetensors" in refusal(tmp_path)
    part, = os.listdir(tmp_path)
    assert part.endswith(".part") and (tmp_path / part).read_bytes() == DATA[:70_000]
    server.cuts, server.gets = [], []
    progress = fetch(tmp_path)
    assert os.listdir(tmp_path) == ["flux.safetensors"] and (tmp_path / "flux.safetensors").read_bytes() == DATA
    assert [byte_range for _, byte_range, _ in server.gets] == ["bytes=70000-"] and "0.1 MB of it already downloaded" in progress.said[0]


def test_cancel_stops_at_once_and_keeps_the_downloaded_part(server, tmp_path):
    server.hold, progress = threading.Event(), Progress()
    threading.Thread(target=lambda: server.halfway.wait(20) and progress.stop.set(), daemon=True).start()
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, progress)
    assert time.monotonic() - before < 10
    server.hold.set()
    part, = os.listdir(tmp_path)
    time.sleep(0.5)  # data that still arrive are not written
    kept = (tmp_path / part).read_bytes()
    assert part.endswith(".part") and kept == DATA[: len(kept)] and len(kept) < len(DATA)
    server.hold = None
    fetch(tmp_path)
    assert os.listdir(tmp_path) == ["flux.safetensors"] and (tmp_path / "flux.safetensors").read_bytes() == DATA


def test_cancel_does_not_wait_for_a_silent_server(use, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}")
        progress = Progress()
        threading.Timer(0.5, progress.stop.set).start()
        before = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path, progress)
        assert time.monotonic() - before < 2


def test_a_wrong_hash_deletes_the_download(server, tmp_path):
    server.etag = "ab" * 32
    assert "differs from the Hub's, so the file was deleted" in refusal(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_damaged_beginning_of_an_earlier_download_is_found(server, tmp_path):
    server.cuts = [50_000] + [0] * 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        refusal(tmp_path)
    part, = tmp_path.iterdir()
    part.write_bytes(b"?" + part.read_bytes()[1:])
    server.cuts = []
    assert "The SHA-256 of flux.safetensors differs from the Hub's" in refusal(tmp_path)
    fetch(tmp_path)
    assert (tmp_path / "flux.safetensors").read_bytes() == DATA


def test_the_login_does_not_follow_a_redirect_to_another_host(server, tmp_path):
    with FakeHub(server.files, host="localhost") as elsewhere:
        server.redirect = elsewhere.url
        server.cuts = []
        fetch(tmp_path)
        assert (tmp_path / "flux.safetensors").read_bytes() == DATA
        assert len(elsewhere.gets) == 1 and {token for _, _, token in elsewhere.asked} == {None}
        assert {token for _, _, token in server.asked} == {"Bearer hf_secret"}


def test_without_a_login_no_token_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "models").mkdir()
    fetch(tmp_path / "models")
    assert {token for _, _, token in server.asked} == {None}


@pytest.mark.parametrize("file", ["../../api/whoami.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "a//x.safetensors",
                                  "..\\x.safetensors", "./x.safetensors", "x\n.safetensors", "", ".."])
def test_a_path_that_leads_out_of_the_repository_is_not_asked_for(server, tmp_path, file):
    assert "is not the path of a file within a repository" in refusal(tmp_path, file=file)
    assert server.asked == []


@pytest.mark.parametrize("file", ["model.ckpt", "modeling.py", "x.safetensors.py", "flux.SAFETENSORS.bin", "config.json"])
def test_only_safetensors_files_are_asked_for(server, tmp_path, file):
    assert "is not a .safetensors or .sft file" in refusal(tmp_path, file=file)
    assert server.asked == []


@pytest.mark.parametrize("repository", ["flux", "a/b/c", "../b", "a/..", "owner/na me", "https://x/y", "", "owner/a..b", "o/n?x"])
def test_a_repository_has_an_owner_and_a_name(server, tmp_path, repository):
    assert "is not the name of a repository" in refusal(tmp_path, repository=repository)
    assert server.asked == []


PAGE = f"https://huggingface.co/{REPOSITORY}"


@pytest.mark.parametrize(("given", "found"), [
    ((f" {REPOSITORY} ", FILE, "v2"), (REPOSITORY, FILE, "v2")), ((REPOSITORY, FILE, ""), (REPOSITORY, FILE, "main")),
    *(((page, FILE, "main"), (REPOSITORY, FILE, "main")) for page in (PAGE, f"{PAGE}/", PAGE[8:], f"{PAGE}/tree/main", f"{PAGE}?x=y#z")),
    ((f"{PAGE}/tree/v2/sub", FILE, "main"), (REPOSITORY, FILE, "v2")), ((f"{PAGE}/tree/main", FILE, "v2"), (REPOSITORY, FILE, "v2")),
    *(((f"{PAGE}/{kind}/main/{FILE}", "", "main"), (REPOSITORY, FILE, "main")) for kind in ("blob", "resolve", "raw")),
    (("", f"{PAGE}/resolve/refs%2Fpr%2F1/a%20b.sft?download=true", "main"), (REPOSITORY, "a b.sft", "refs/pr/1")),
    ((REPOSITORY, f"{PAGE}/blob/main/{FILE}", "main"), (REPOSITORY, FILE, "main")),
    ((f"http://hf.co/{REPOSITORY}/blob/main/{FILE}", FILE, "main"), (REPOSITORY, FILE, "main")),
])
def test_the_address_of_a_page_gives_the_names(given, found):
    assert hub.names(*given) == found
    hub.check_names(*found)


@pytest.mark.parametrize(("given", "says"), [
    (("", FILE, "main"), "needs both"), ((REPOSITORY, " ", "main"), "needs both"), ((PAGE, "", "main"), "needs both"),
    ((PAGE, f"https://huggingface.co/owner/other/blob/main/{FILE}", "main"), "two repositories, 'owner/flux' and 'owner/other'"),
    ((f"{PAGE}/blob/main/a.sft", "b.sft", "main"), "two files"), ((f"{PAGE}/blob/v1/a.sft", "", "v2"), "two revisions"),
])
def test_missing_or_contradictory_names_are_refused(given, says):
    with pytest.raises(HubError, match=says):
        hub.names(*given)


@pytest.mark.parametrize("page", ["https://example.org/owner/flux", "https://huggingface.co/datasets/owner/flux",
                                  f"{PAGE}/blob/main/../../x.sft", f"{PAGE}/resolve/main/%2e%2e/%2e%2e/x.sft", f"{PAGE}/discussions/1",
                                  "https://huggingface.co.evil/a/b",
                                  "https://huggingface.co/../b/blob/main/x.sft", f"{PAGE}/blob/..%2F..%2Fapi/x.sft"])
def test_other_addresses_are_refused(page):
    with pytest.raises(HubError):
        hub.check_names(*hub.names("", page, "main"))
    with pytest.raises(HubError):
        hub.check_names(*hub.names(page, "" if page.endswith(".sft") else FILE, "main"))


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "x y", "main?", "/main"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(server, tmp_path, revision):
    assert "is not a revision" in refusal(tmp_path, revision=revision)
    assert server.asked == []


def test_a_missing_file_or_repository_is_named(server, tmp_path):
    assert "no file other.safetensors at revision main" in refusal(tmp_path, file="other.safetensors")
    assert "no repository owner/other" in refusal(tmp_path, repository="owner/other")
    assert "no revision v2" in refusal(tmp_path, revision="v2")


def test_a_gated_repository_and_a_failing_server(server, tmp_path):
    server.status, server.error_code = 403, "GatedRepo"
    assert "is gated: accept its licence" in refusal(tmp_path)
    server.status, server.error_code = 500, "Unavailable"
    assert "answered 500" in refusal(tmp_path)


def test_a_server_that_is_not_a_hub_is_refused(server, tmp_path):
    server.etag = "12345"
    assert "no SHA-256 for sub/flux_4bit.safetensors" in refusal(tmp_path)
    server.etag, server.commit = None, "../../api"
    assert "does not answer like a Hugging Face Hub" in refusal(tmp_path)


def test_offline_is_one_sentence(use, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    use(f"http://127.0.0.1:{port}")
    assert "The Hub can't be reached for sub/flux_4bit.safetensors" in refusal(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    assert "HF_HUB_OFFLINE forbids" in refusal(tmp_path)


def test_too_little_disk_space_is_reported_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 10**18)
    server.size = 10**17
    assert "it needs 100000000.00 GB and the disk has" in refusal(tmp_path)
    assert os.listdir(tmp_path) == [] and server.gets == []


def test_a_disk_error_is_one_sentence(server, tmp_path, monkeypatch):
    (tmp_path / "flux.safetensors").mkdir()
    assert refusal(tmp_path) == "flux.safetensors is a folder; choose another filename."
    (tmp_path / "flux.safetensors").rmdir()
    (tmp_path / "taken").write_bytes(b"mine")
    assert "a folder in its path is a file" in refusal(tmp_path / "taken") and server.gets == []

    def rename(source, target):
        raise PermissionError(13, "Permission denied", source, None, target)

    for function in ("link", "rename", "replace"):
        monkeypatch.setattr(os, function, rename)
    message = refusal(tmp_path)
    assert message.startswith("Downloading flux.safetensors failed: its folder can't be written") and ".part" not in message


def test_more_bytes_than_were_stated_are_not_written(server, tmp_path):
    server.size = 1000
    refusal(tmp_path)
    assert not (tmp_path / "flux.safetensors").exists()


def test_a_pickle_under_a_safetensors_name_is_refused(server, tmp_path):
    server.files[f"{REPOSITORY}/{FILE}"] = b"PK\x03\x04" + bytes(1000)
    assert "is a pickle" in refusal(tmp_path)
    assert os.listdir(tmp_path) == []


# --- several processes ---------------------------------------------------------------------------------------------


def in_thread(function, outcomes):
    def run():
        try:
            outcomes.append(function())
        except BaseException as error:
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("other", "says"), [(b"mine", " and differs from "), (DATA, None)])
def test_a_file_that_appears_meanwhile_is_not_replaced(server, tmp_path, other, says):
    server.hold, outcomes, progress = threading.Event(), [], Progress()
    thread = in_thread(lambda: fetch(tmp_path, progress), outcomes)
    assert server.halfway.wait(20)
    (tmp_path / "flux.safetensors").write_bytes(other)
    server.hold.set()
    thread.join(20)
    assert (tmp_path / "flux.safetensors").read_bytes() == other
    if says:
        assert isinstance(outcomes[0], HubError) and says in str(outcomes[0])
        (tmp_path / "flux.safetensors").unlink()
        gets = len(server.gets)
        fetch(tmp_path)
        assert len(server.gets) == gets, "the downloaded file was complete, and is used"
    assert outcomes[0] is progress or says
    assert os.listdir(tmp_path) == ["flux.safetensors"] and (tmp_path / "flux.safetensors").stat().st_size


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_second_download_waits_for_the_first(server, tmp_path, cancelled):
    """Two downloads that append to one file would damage it. The second can be cancelled as fast as the first."""
    server.hold, outcomes, progresses = threading.Event(), [], (Progress(), Progress())
    threads = [in_thread(lambda: fetch(tmp_path, progresses[0]), outcomes)]
    assert server.halfway.wait(20)
    threads.append(in_thread(lambda: fetch(tmp_path, progresses[1]), outcomes))
    while "flux.safetensors: another ComfyUI is downloading it" not in progresses[1].said:
        time.sleep(0.01)
    if cancelled:
        progresses[1].stop.set()
        threads[1].join(5)
        assert isinstance(outcomes[0], KeyboardInterrupt)
    server.hold.set()
    for thread in threads:
        thread.join(20)
    assert len(server.gets) == 1 and os.listdir(tmp_path) == ["flux.safetensors"] and (tmp_path / "flux.safetensors").read_bytes() == DATA
    assert cancelled or outcomes == list(progresses) and "is already downloaded" in progresses[1].said[-1]


def test_a_waiting_download_resumes_the_first_one(server, tmp_path):
    server.hold, outcomes, progresses = threading.Event(), [], (Progress(), Progress())
    first = in_thread(lambda: fetch(tmp_path, progresses[0]), outcomes)
    assert server.halfway.wait(20)
    second = in_thread(lambda: fetch(tmp_path, progresses[1]), outcomes)
    while not progresses[1].said:
        time.sleep(0.01)
    progresses[0].stop.set()
    first.join(20)
    hold, server.hold = server.hold, None
    hold.set()
    second.join(20)
    assert isinstance(outcomes[0], KeyboardInterrupt) and outcomes[1] is progresses[1]
    assert os.listdir(tmp_path) == ["flux.safetensors"] and (tmp_path / "flux.safetensors").read_bytes() == DATA


def test_a_file_system_without_locks(server, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows locks otherwise")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    fetch(tmp_path)
    assert (tmp_path / "flux.safetensors").read_bytes() == DATA
