"""What the Hub's answers mean, and what to do about each: one sentence."""

import errno

LOGIN = "log in with `hf auth login`"
RESUMES = "run the node again: the download resumes where it stopped"
# {HTTP status: (what the Hub says about {file} of {repository}, the remedy)}
STATUSES = {
    401: ("does not accept the login for {file} of {repository}", "log in again with `hf auth login`, or remove HF_TOKEN"),
    403: ("forbids {file} of {repository}", f"accept its licence on the repository's page, or {LOGIN} and a token that may read it"),
    404: ("has no file {file} in {repository}", "check its path on the repository's page"),
    408: ("took too long to answer for {file} of {repository}", RESUMES),
    410: ("no longer has {file} of {repository}", "choose another file of the repository's page"),
    416: ("can't continue {file} of {repository} where it stopped", "delete its .part file beside your models and run the node again"),
    429: ("has got too many requests to give {file} of {repository}", f"wait some minutes, or {LOGIN}, and {RESUMES}"),
    451: ("may not give {file} of {repository} to you for legal reasons", "choose another model"),
}


def sentence(hub, error, repository, file, revision):
    """The message for an error of huggingface_hub, or of the HTTP client that its version uses. hub: the package."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: accept its licence on its page on the Hub, {LOGIN}, and run the node again."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The Hub has no repository {repository} that your login may see; check the name, or {LOGIN}, for {file}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The repository {repository} has no revision {revision}; main is the usual one."
    if isinstance(error, errors.EntryNotFoundError):
        return f"The repository {repository} has no file {file} at revision {revision}; check its path on the repository's page."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids the download of {file}; unset it, or choose a file that you have in SVDQuant Load Model."
    if (answer := getattr(error, "response", None)) is not None:
        return _refused(answer.status_code, repository, file)
    if type(error).__name__ == "TooManyRedirects":  # the class of either HTTP client
        return (f"The Hub redirects in a circle for {file} of {repository}; check HF_ENDPOINT and the proxy, or download the file from "
                "its page in a browser.")
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"The disk was full before {file} was complete; free some space and run the node again to resume."
    return f"The Hub can't be reached for {file} ({type(error).__name__}); check the internet connection and {RESUMES}."


def _refused(status, repository, file):
    """The message for an HTTP status of 400 or higher."""
    usual = "answered {status}, a failure of its own, for {file} of {repository}", "try again later"
    if status < 500:
        usual = "refused {file} of {repository} with status {status}", "check the names, or download the file from its page in a browser"
    what, remedy = STATUSES.get(status, usual)
    return f"The Hub {what.format(status=status, file=file, repository=repository)}; {remedy}."


def silent(seconds, file):
    """The message for a Hub that has not answered for so many seconds."""
    return f"The Hub does not answer for {file} within {seconds:.0f} s; check the internet connection, or try again later."


def stalled(seconds, file):
    """The message for a Hub that has sent no block of data for so many seconds."""
    return f"The Hub has sent almost nothing of {file} for {seconds:.0f} s; check the internet connection and {RESUMES}."
