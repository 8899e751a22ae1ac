"""A small Hugging Face Hub on the loopback: it has the part of the API that a download needs, and fails on demand."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub.constants
import huggingface_hub.file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors(size=200_000, seed=0):
    """The bytes of a safetensors file with one tensor of `size` bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + hashlib.shake_128(bytes([seed])).digest(size)


def use_endpoint(monkeypatch, url):
    """Make huggingface_hub, which reads HF_ENDPOINT when it is imported, ask the server at `url`."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # before 1.0 the second has a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", raising=False)


class FakeHub:
    """Serves `files`, {"owner/name/path": bytes}, as a context manager.

    gets: the GET requests that were answered with data, as (path, Range, Authorization). What can be set: cuts, how many bytes
    each of the next answers sends before the connection is cut; hold, an Event that an answer waits for half way; redirect,
    the URL of another server that has the data; etag, size, commit: lies; status: an error to answer with, get_status: to GET alone;
    silence: an Event that every answer waits for; trickle: (bytes, seconds) between which the data are sent.
    """

    def __init__(self, files, host="127.0.0.1"):
        self.files, self.host = files, host
        self.gets, self.cuts, self.asked = [], [], []
        self.hold = self.redirect = self.etag = self.size = self.status = self.error_code = None
        self.get_status = self.silence = self.trickle = None
        self.commit = COMMIT
        self.halfway = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://{self.host}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for event in filter(None, (self.hold, self.silence)):
            event.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub = None

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub = self.hub
        hub.asked.append((self.command, self.path, self.headers["Authorization"]))
        if hub.silence:
            hub.silence.wait(30)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(self.path))
        data = found and hub.files.get(f"{found[1]}/{found[3]}")
        status = hub.status or (hub.get_status if self.command == "GET" else None)
        if status or data is None or found[2] not in ("main", COMMIT):
            return self.refuse(status or 404, hub.error_code or self.missing(found))
        if hub.redirect and self.command == "GET":
            self.send_response(302)
            self.send_header("Location", hub.redirect + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        self.send_response(206 if start else 302 if hub.redirect else 200)
        if hub.redirect:
            self.send_header("Location", hub.redirect + self.path)
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("X-Linked-Etag", f'"{hub.etag or hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(hub.size or len(data)))
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            hub.gets.append((self.path, self.headers["Range"], self.headers["Authorization"]))
            self.send(data[start:])

    def send(self, data):
        hub = self.hub
        if hub.cuts:
            data = data[: hub.cuts.pop(0)]
            self.close_connection = True
        elif hub.hold:
            self.wfile.write(data[: len(data) // 2])
            hub.halfway.set()
            hub.hold.wait(30)
            data = data[len(data) // 2:]
        elif hub.trickle:
            count, seconds = hub.trickle
            while data:
                self.wfile.write(data[:count])
                data = data[count:]
                time.sleep(seconds)
        self.wfile.write(data)

    def missing(self, found):
        if not found or not any(name.startswith(found[1] + "/") for name in self.hub.files):
            return "RepoNotFound"
        return "RevisionNotFound" if found[2] not in ("main", COMMIT) else "EntryNotFound"

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
