"""Model files from the Hugging Face Hub: fetched where they stopped, checked against the Hub's own SHA-256.

huggingface_hub (0.30 to 2.x) finds the user's login, asks the Hub and fetches. Its hf_hub_download is left out: it can't
be cancelled, and since it took to files of one process alone it begins again after every interruption.
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

if os.name == "nt":
    import msvcrt
else:
    import fcntl

POLL_SECONDS = 0.2  # how soon a cancelled download stops
SPARE_BYTES = 1 << 20
LOCKED_BYTE = 1 << 62  # on Windows, where nobody can read a byte that another process has locked
BLOCK_BYTES = 1 << 24  # read at once while a file is hashed
# A page of the Hub: of a repository, or of a file of it at a revision.
PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)"
                  r"(?:/(?:tree/([^/?#]+)[^?#]*|(?:blob|resolve|raw)/([^/?#]+)/([^?#]+)))?/?(?:[?#].*)?")


class HubError(ValueError):
    """A file that can't be had. The message is one sentence: what, why, remedy."""

    __module__ = "builtins"  # as CheckpointError's


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of one file. url: of this very content, whatever becomes of the branch."""

    repository: str
    file: str
    commit: str
    size: int
    sha256: str
    url: str


def names(repository, file, revision):
    """(repository, file, revision) from what a user gives for them, where the address of a page of the Hub may stand for the first
    two, and may include the revision. Raises HubError where something is missing, or they contradict each other; see check_names."""
    repository, file, revision = repository.strip(), file.strip(), revision.strip()
    given = (_address(repository) or (repository, "", ""), _address(file) or ("", "", file), ("", revision, ""))
    repositories, revisions, files = (sorted(set(values) - {""}) for values in zip(*given))
    revisions = [value for value in revisions if value != "main"] or ["main"]  # which the input and most addresses say
    for what, values in (("repositories", repositories), ("files", files), ("revisions", revisions)):
        if len(values) > 1:
            raise HubError(f"There are two {what}, {values[0]!r} and {values[1]!r}; an address includes them already, so leave the other "
                           "inputs as they were.")
    if not repositories or not files:
        raise HubError("A download of your own choice needs both a repository, as owner/name, and a file in it; fill in both, or paste "
                       "the address of the file's page on the Hub.")
    return repositories[0], files[0], revisions[0]


def _address(text):
    """(repository, revision, file) of a page of the Hub, "" for each that the address lacks; None where `text` is no such address."""
    if not (page := PAGE.fullmatch(text)):
        return None
    repository, tree, blob, file = (unquote(part or "") for part in page.groups())
    return repository, tree or blob, file


def check_names(repository, file, revision):
    """Raise HubError unless they name a safetensors file of a repository and can do no harm in an address."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII) or ".." in repository:
        raise HubError(f"{repository!r} is not the name of a repository on the Hub; write it as owner/name.")
    # The HTTP clients resolve "..", so that it would lead out of the repository, and the login would go along.
    parts = file.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in file or not file.isprintable():
        raise HubError(f"{file!r} is not the path of a file within a repository; write it as the repository's page shows it.")
    if not file.lower().endswith(EXTENSIONS):
        raise HubError(f"{file} is not a .safetensors or .sft file, and other kinds are not downloaded: they can hold code; "
                       "choose the safetensors version of the model.")
    if not re.fullmatch(r"[\w./-]+", revision, re.ASCII) or any(part in ("", ".", "..") for part in revision.split("/")):
        raise HubError(f"{revision!r} is not a revision; write a branch such as main, a tag or a commit.")


def look_up(repository, file, revision, watch):
    """RemoteFile of a file on the Hub. watch: .check() raises to cancel. Raises HubError, one sentence."""
    check_names(repository, file, revision)
    hub = _huggingface_hub()
    url = partial(hub.hf_hub_url, repository, file)
    try:
        found = _result(_in_background(lambda: hub.get_hf_file_metadata(url(revision=revision))), watch.check)
    except _Failed as failed:
        raise HubError(_sentence(failed.error, repository, file, revision)) from failed.error
    if not re.fullmatch("[0-9a-f]{40}", found.commit_hash or "") or not found.size:
        raise HubError(f"{hub.constants.ENDPOINT} does not answer as a Hugging Face Hub does; check HF_ENDPOINT.")
    if not re.fullmatch("[0-9a-f]{64}", found.etag or ""):
        raise HubError(f"The Hub has no SHA-256 for {file} of {repository}, so it can't be checked; choose a file that is stored "
                       "as a large file (LFS or Xet).")
    return RemoteFile(repository, file, found.commit_hash, found.size, found.etag, url(revision=found.commit_hash))


def download(remote, path, watch):
    """Have `remote` at `path`, whole and checked; a file that is there already is used if it is the same.

    What has arrived of an interrupted download stays beside it and is gone on with. watch: .check() raises to cancel,
    .say(text) and .at(done, total, text) tell. Raises HubError, or CheckpointError where it is no safetensors file or a
    folder is in the way.
    """
    name = os.path.basename(path)
    try:
        _download(remote, path, name, watch)
    except OSError as error:  # of the disk: what the connection raises has become a HubError
        raise HubError(f"Downloading {name} failed: {disk_trouble(error)}.") from error


def _download(remote, path, name, watch):
    if _is_here(remote, path, name, watch):
        return
    part = f"{path}.{remote.sha256[:16]}.part"  # no model list shows it: it does not end in .safetensors
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with _claimed(part, name, watch) as claim:
        if _is_here(remote, path, name, watch):  # now, from another process that had the claim
            return
        _check_room(remote, part, name, watch)
        _fetch(remote, part, name, watch)
        if os.path.getsize(part) != remote.size or _sha256(part, name, watch) != remote.sha256:
            os.remove(part)
            raise HubError(f"{name} arrived with another SHA-256 than the Hub states, so it was deleted; run the node again.")
        if os.name == "nt":
            claim.close()  # Windows renames no file that is open
        try:
            publish(part, path)
        except CheckpointError:  # a file of that name has appeared
            if not _is_here(remote, path, name, watch):
                raise
        with suppress(FileNotFoundError):
            os.remove(part)
    try:
        read_header(path)
    except CheckpointError:
        os.remove(path)
        raise
    watch.say(f"{name} is here: {size_text(remote.size)}, SHA-256 as on the Hub")


def _is_here(remote, path, name, watch):
    """Whether the file at `path` is the Hub's. Raises HubError where it is another one, and CheckpointError where it is a folder."""
    check_target(path, overwrite=True)
    if not os.path.exists(path):
        return False
    if os.path.getsize(path) == remote.size and _sha256(path, name, watch) == remote.sha256:
        watch.say(f"{name} was here already: {size_text(remote.size)}, SHA-256 as on the Hub")
        return True
    raise HubError(f"{name} exists already and is another file than {remote.file} of {remote.repository}; it lies in "
                   f"{os.path.dirname(path)}: choose another filename, or move it away.")


# --- one process at a time -----------------------------------------------------------------------------------------


@contextmanager
def _claimed(part, name, watch):
    """The file `part`, open, which no other process claims until the end; one that does is waited for.

    Two that append to one file would damage it, also after one of them has found it whole.
    """
    while (claim := _claim(part)) is None:
        watch.check()
        watch.say(f"{name}: another ComfyUI is downloading it")
        time.sleep(POLL_SECONDS)
    try:
        yield claim
    finally:
        claim.close()
        with suppress(OSError):
            if not os.path.getsize(part):
                os.remove(part)


def _claim(part):
    """`part`, opened and locked; None where another process has the lock."""
    file = open(part, "ab")
    with suppress(FileNotFoundError):
        if _lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(part)):  # it may have been renamed before it was locked
            return file
    file.close()
    return None


def _lock(file):
    """Lock an open file until it is closed. Whether that succeeded; True, too, on a file system without locks."""
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
    # Imported when a download is asked for: it takes a second, and everything else works without it.
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise HubError(f"Downloading needs the Python package huggingface_hub, 0.30 or newer ({error}); install it with pip into "
                       "the Python that runs ComfyUI.") from None
    return huggingface_hub


def _check_room(remote, part, name, watch):
    """Say what is to come, and raise HubError where the disk has no room for it."""
    there = _size(part)
    free = shutil.disk_usage(os.path.dirname(part)).free
    watch.say(f"{name}: {size_text(remote.size)} from {remote.repository} at {remote.commit[:8]}"
              + (f", {size_text(there)} of it here already" if there else "") + f"; the disk has {size_text(free)} free")
    if remote.size - there + SPARE_BYTES > free:
        raise HubError(f"There is no room to download {name}: it needs {size_text(remote.size - there)} and the disk has "
                       f"{size_text(free)} free; free some space.")


def _fetch(remote, part, name, watch):
    """Fill file `part` up to the size, going on where it ends, and where the connection was cut."""
    if _size(part) > remote.size:
        os.truncate(part, 0)

    def tell():
        done = _size(part)
        if done > remote.size:
            raise HubError(f"The Hub sends more for {name} than the {size_text(remote.size)} that it stated; try again later.")
        watch.at(done, remote.size, f"{name}: {size_text(done)} of {size_text(remote.size)}")

    while (before := _size(part)) < remote.size:
        # Closed when this is cancelled: the next write of the thread fails and ends it.
        with open(part, "ab") as file:
            try:
                _result(_in_background(partial(_get, remote, file, before)), tell)
            except _Failed as failed:
                file.flush()
                if _size(part) == before or getattr(failed.error, "errno", None) == errno.ENOSPC:
                    raise HubError(_sentence(failed.error, remote.repository, remote.file, remote.commit)) from failed.error
    tell()


def _get(remote, file, resume_size):
    hub = _huggingface_hub()
    get = hub.file_download.http_get
    # HF_HUB_ENABLE_HF_TRANSFER of versions before 1.0 neither resumes nor stops; given proxies, even none, it stays out.
    options = {"proxies": {}} if "proxies" in inspect.signature(get).parameters else {}
    # The client follows redirects, and leaves the login out of those to another host.
    get(remote.url, file, resume_size=resume_size, headers=hub.utils.build_hf_headers(), expected_size=remote.size,
        displayed_filename=remote.file, **options)


def _sha256(path, name, watch):
    """The SHA-256 of a file, in hexadecimal; name: what the user knows it as."""
    digest, total = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            watch.at(file.tell(), total, f"{name}: checking the SHA-256 of {size_text(total)}")
    return digest.hexdigest()


def _size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


# --- threads and errors --------------------------------------------------------------------------------------------


class _Failed(Exception):
    """What a background call raised, to be told apart from a cancellation."""

    def __init__(self, error):
        super().__init__(str(error))
        self.error = error


def _in_background(function):
    """Future of function(), which runs in a thread that keeps nobody waiting: a silent server is not waited for."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="svdquant hub", daemon=True).start()
    return future


def _result(future, tell):
    """The result of a future, with tell() called while it is awaited. Raises _Failed; what tell raises passes through."""
    while not future.done():
        tell()
        wait((future,), POLL_SECONDS)
    if error := future.exception():
        raise _Failed(error)
    return future.result()


def _sentence(error, repository, file, revision):
    """What an error of huggingface_hub or of the HTTP client under it (three, over the versions) means to the user."""
    hub = _huggingface_hub()
    login = "log in with `hf auth login`"
    if isinstance(error, hub.errors.GatedRepoError):
        return f"{repository} is gated: accept its licence on its page on the Hub, {login}, and run the node again."
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return f"The Hub has no repository {repository} that your login may see; check the name, or {login}."
    if isinstance(error, hub.errors.RevisionNotFoundError):
        return f"The repository {repository} has no revision {revision}; main is the usual one."
    if isinstance(error, hub.errors.EntryNotFoundError):
        return f"The repository {repository} has no file {file} at revision {revision}; check its path on the repository's page."
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids to download {file}; unset it, or choose a file that you have in SVDQuant Load Model."
    if (answer := getattr(error, "response", None)) is not None:
        return f"The Hub answered {answer.status_code} for {file} of {repository}; try again later."
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"The disk is full before {file} is whole; free some space and run the node again to go on."
    return (f"The Hub can't be reached for {file} ({type(error).__name__}); check the internet connection and run the node "
            "again: what has arrived is kept.")
