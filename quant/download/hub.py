"""Model files from the Hugging Face Hub: interrupted downloads resume, and each file is checked against the Hub's SHA-256.

huggingface_hub (0.26 to 2.x) finds the user's login, queries the Hub and transfers the data. Its hf_hub_download is not used: it can't
be cancelled, and since its partial files belong to a single process it starts over after every interruption.
"""

import errno
import hashlib
import inspect
import os
import re
import shutil
import threading
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

from ..checkpoint.header import EXTENSIONS, CheckpointError, read_header
from ..checkpoint.write import check_target, disk_trouble, publish, size_text
from ..text import bounded
from . import answers

if os.name == "nt":
    import msvcrt
else:
    import fcntl

POLL_SECONDS = 0.2  # A cancelled download stops within this time.
ANSWER_SECONDS = 30  # the Hub has to answer within this time, or three times huggingface_hub's own limit of one try
STALL_SECONDS = 300  # for one block of huggingface_hub's, 10 MB: slower than 35 kB/s, a model takes days
MAX_BYTES = 50 * 10**9  # that come over plain HTTP, where huggingface_hub does not name its own limit
SPARE_BYTES = 1 << 20
# The byte that is locked on Windows. It lies past the end of every file, since a locked byte can't be read by other processes.
LOCKED_BYTE = 1 << 62
BLOCK_BYTES = 1 << 24  # read at a time while a file is hashed
# The address of a repository's page on the Hub, or of the page of one of its files at a revision.
PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)"
                  r"(?:/(?:tree/([^/?#]+)[^?#]*|(?:blob|resolve|raw)/([^/?#]+)/([^?#]+)))?/?(?:[?#].*)?")


class HubError(ValueError):
    """A file can't be downloaded. The message is one sentence that gives the file, the reason and the remedy."""

    __module__ = "builtins"  # as CheckpointError's

    def __init__(self, message):
        super().__init__(bounded(message))


@dataclass(frozen=True)
class RemoteFile:
    """The Hub's record of one file. size: bytes; url: the file at `commit`, so later changes to the branch don't affect it."""

    repository: str
    file: str
    commit: str
    size: int
    sha256: str
    url: str


def names(repository, file, revision):
    """(repository, file, revision) from the user's inputs. `repository` and `file` may each be the address of a page on the Hub, which
    can name the other two as well. Raises HubError if one is missing or if the inputs contradict each other. check_names checks them."""
    repository, file, revision = repository.strip(), file.strip(), revision.strip()
    named = (_address(repository) or (repository, "", ""), _address(file) or ("", "", file), ("", revision, ""))
    repositories, revisions, files = (sorted(set(values) - {""}) for values in zip(*named))
    revisions = [value for value in revisions if value != "main"] or ["main"]  # the default, so it never contradicts an address
    for what, values in (("repositories", repositories), ("files", files), ("revisions", revisions)):
        if len(values) > 1:
            raise HubError(f"There are two {what}, {values[0]!r} and {values[1]!r}; an address already names them, so leave the other "
                           "inputs at their defaults.")
    if not repositories or not files:
        raise HubError("A custom download needs both a repository, as owner/name, and a file in it; fill in both, or paste "
                       "the address of the file's page on the Hub.")
    return repositories[0], files[0], revisions[0]


def _address(text):
    """(repository, revision, file) named by the address of a page on the Hub, with "" for each that it leaves out; None if `text` is not
    such an address."""
    if not (page := PAGE.fullmatch(text)):
        return None
    repository, tree, blob, file = (unquote(part or "") for part in page.groups())
    return repository, tree or blob, file


def check_names(repository, file, revision):
    """Raise HubError unless the three name a safetensors file of a repository and are safe to put into an address."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII) or ".." in repository:
        raise HubError(f"{repository!r} is not the name of a repository on the Hub; write it as owner/name.")
    # HTTP clients resolve "..", so the address would leave the repository, and the user's login would be sent there.
    parts = file.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in file or not file.isprintable():
        raise HubError(f"{file!r} is not the path of a file within a repository; write it as the repository's page shows it.")
    if not file.lower().endswith(EXTENSIONS):
        raise HubError(f"{file} is not a .safetensors or .sft file, and other kinds are not downloaded: they can hold code; "
                       "choose the safetensors version of the model.")
    if not re.fullmatch(r"[\w./-]+", revision, re.ASCII) or any(part in ("", ".", "..") for part in revision.split("/")):
        raise HubError(f"{revision!r} is not a revision; write a branch such as main, a tag or a commit.")


def look_up(repository, file, revision, progress):
    """The RemoteFile of a file on the Hub. progress: .check() raises to cancel. Raises HubError."""
    check_names(repository, file, revision)
    hub = _huggingface_hub()
    url = partial(hub.hf_hub_url, repository, file)
    limit, start = max(ANSWER_SECONDS, 3 * hub.constants.HF_HUB_ETAG_TIMEOUT), time.monotonic()

    def check():
        progress.check()
        if time.monotonic() - start > limit:
            raise HubError(answers.silent(limit, file))

    try:
        found = _result(_in_background(lambda: hub.get_hf_file_metadata(url(revision=revision))), check)
    except _Failed as failed:
        raise HubError(answers.sentence(_huggingface_hub(), failed.error, repository, file, revision)) from failed.error
    if not re.fullmatch("[0-9a-f]{40}", found.commit_hash or "") or (found.size or 0) <= 0:
        raise HubError(f"{hub.constants.ENDPOINT} does not answer like a Hugging Face Hub for {file}; check HF_ENDPOINT.")
    most = getattr(hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", MAX_BYTES)
    if found.size > most:
        raise HubError(f"{file} of {repository} has {size_text(found.size)}, and this node downloads at most {size_text(most)}; "
                       "download it with `hf download` into models/diffusion_models.")
    if not re.fullmatch("[0-9a-f]{64}", found.etag or ""):
        raise HubError(f"The Hub has no SHA-256 for {file} of {repository}, so it can't be checked; choose a file that is stored "
                       "as a large file (LFS or Xet).")
    return RemoteFile(repository, file, found.commit_hash, found.size, found.etag, url(revision=found.commit_hash))


def download(remote, path, progress):
    """Download `remote` to `path` and check it. An identical file that already exists there is used.

    An interrupted download leaves a partial file beside `path`, and the next download resumes from it. progress: .check() raises to
    cancel, .say(text) shows a message and .at(done, total, text) shows progress in bytes. Raises HubError, or CheckpointError if the
    file is not a safetensors file or if `path` is a folder.
    """
    name = os.path.basename(path)
    try:
        _download(remote, path, name, progress)
    except OSError as error:  # An error of the disk: _fetch turns errors of the connection into HubError.
        raise HubError(f"Downloading {name} failed: {disk_trouble(error, path)}.") from error


def _download(remote, path, name, progress):
    if _is_here(remote, path, name, progress):
        return
    part = f"{path}.{remote.sha256[:16]}.part"  # Model lists leave it out, since it does not end in .safetensors.
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with _claimed(part, name, progress) as claim:
        if _is_here(remote, path, name, progress):  # Another process that held the lock may have finished it.
            return
        _check_room(remote, part, name, progress)
        _fetch(remote, part, name, progress)
        if os.path.getsize(part) != remote.size or _sha256(part, name, progress) != remote.sha256:
            os.remove(part)
            raise HubError(f"The SHA-256 of {name} differs from the Hub's, so the file was deleted; run the node again.")
        if os.name == "nt":
            claim.close()  # Windows can't rename an open file.
        try:
            publish(part, path)
        except CheckpointError:  # A file of that name has appeared meanwhile.
            if not _is_here(remote, path, name, progress):
                raise
        with suppress(FileNotFoundError):
            os.remove(part)
    try:
        read_header(path)
    except CheckpointError:
        os.remove(path)
        raise
    progress.say(f"{name} is downloaded: {size_text(remote.size)}, and its SHA-256 matches the Hub's")


def _is_here(remote, path, name, progress):
    """Whether the file at `path` is the Hub's. Raises HubError if it is a different file, and CheckpointError if it is a folder."""
    check_target(path, overwrite=True)
    if not os.path.exists(path):
        return False
    if os.path.getsize(path) == remote.size and _sha256(path, name, progress) == remote.sha256:
        progress.say(f"{name} is already downloaded: {size_text(remote.size)}, and its SHA-256 matches the Hub's")
        return True
    raise HubError(f"{name} already exists in {os.path.dirname(path)} and differs from {remote.file} of {remote.repository}; choose "
                   "another filename, or move the file away.")


# --- one process at a time -----------------------------------------------------------------------------------------


@contextmanager
def _claimed(part, name, progress):
    """A context in which this process holds the lock on the file `part`, opened to append; waits while another process holds it.

    Two processes that append to one file would damage it, even after one of them has checked it.
    """
    while (claim := _claim(part)) is None:
        progress.check()
        progress.say(f"{name}: another ComfyUI is downloading it")
        time.sleep(POLL_SECONDS)
    try:
        yield claim
    finally:
        claim.close()
        with suppress(OSError):
            if not os.path.getsize(part):
                os.remove(part)


def _claim(part):
    """`part`, opened and locked; None if another process holds the lock."""
    file = open(part, "ab")
    with suppress(FileNotFoundError):
        # Another process may have renamed the file after it was opened and before it was locked.
        if _lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
            return file
    file.close()
    return None


def _lock(file):
    """Lock an open file until it is closed. Returns whether that succeeded; also True on a file system without locks."""
    try:
        if os.name == "nt":
            os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


# --- fetching ------------------------------------------------------------------------------------------------------


def _huggingface_hub():
    # Imported only for a download: the import takes a second, and the rest of the pack works without the package.
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise HubError(f"Downloading needs the Python package huggingface_hub, 0.26 or newer ({error}); install it with pip into "
                       "the Python that runs ComfyUI.") from None
    return huggingface_hub


def _check_room(remote, part, name, progress):
    """Show the size of the download, and raise HubError if the disk has too little free space for it."""
    there = _size(part)
    free = shutil.disk_usage(os.path.dirname(part)).free
    progress.say(f"{name}: {size_text(remote.size)} from {remote.repository} at {remote.commit[:8]}"
              + (f", {size_text(there)} of it already downloaded" if there else "") + f"; the disk has {size_text(free)} free")
    if remote.size - there + SPARE_BYTES > free:
        raise HubError(f"There is no room to download {name}: it needs {size_text(remote.size - there)} and the disk has "
                       f"{size_text(free)} free; free some space.")


def _fetch(remote, part, name, progress):
    """Append to the file `part` until it has remote.size bytes, and resume after a lost connection."""
    if _size(part) > remote.size:
        os.truncate(part, 0)

    last = [_size(part), time.monotonic()]  # the size, and since when

    def report():
        done = _size(part)
        if done != last[0]:
            last[:] = done, time.monotonic()
        elif time.monotonic() - last[1] > STALL_SECONDS:
            raise HubError(answers.stalled(STALL_SECONDS, name))
        if done > remote.size:
            raise HubError(f"The Hub sends more for {name} than the {size_text(remote.size)} that it stated; try again later.")
        progress.at(done, remote.size, f"{name}: {size_text(done)} of {size_text(remote.size)}")

    while (before := _size(part)) < remote.size:
        # A cancelled download closes the file, so the next write of the background thread fails and ends the thread.
        with open(part, "ab") as file:
            try:
                _result(_in_background(partial(_get, remote, file, before)), report)
            except _Failed as failed:
                file.flush()
                if _size(part) == before or getattr(failed.error, "errno", None) == errno.ENOSPC:
                    what = answers.sentence(_huggingface_hub(), failed.error, remote.repository, remote.file, remote.commit)
                    raise HubError(what) from failed.error
    report()


def _get(remote, file, resume_size):
    hub = _huggingface_hub()
    get = hub.file_download.http_get
    # Before version 1.0, HF_HUB_ENABLE_HF_TRANSFER can neither resume nor be cancelled; passing proxies, even an empty dict, turns it off.
    options = {"proxies": {}} if "proxies" in inspect.signature(get).parameters else {}
    # The client follows redirects, and drops the login when a redirect leads to another host.
    get(remote.url, file, resume_size=resume_size, headers=hub.utils.build_hf_headers(), expected_size=remote.size,
        displayed_filename=remote.file, **options)


def _sha256(path, name, progress):
    """The SHA-256 of a file, in hexadecimal. name: the file's name in progress messages."""
    digest, total = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            progress.at(file.tell(), total, f"{name}: checking the SHA-256 of {size_text(total)}")
    return digest.hexdigest()


def _size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


# --- threads and errors --------------------------------------------------------------------------------------------


class _Failed(Exception):
    """Wraps an error of a background call, so that it isn't mistaken for a cancellation."""

    def __init__(self, error):
        super().__init__(str(error))
        self.error = error


def _in_background(function):
    """Future of function(), which runs in a daemon thread, so that a server that doesn't answer can't keep ComfyUI from exiting."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="svdquant hub", daemon=True).start()
    return future


def _result(future, poll):
    """The result of a future. Calls poll() every POLL_SECONDS until it is done. Raises _Failed if the future failed; errors that poll
    raises pass through."""
    while not future.done():
        poll()
        wait((future,), POLL_SECONDS)
    if error := future.exception():
        raise _Failed(error)
    return future.result()

