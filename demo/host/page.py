"""Open a page in the user's browser."""

import os
import sys
import webbrowser


def has_screen() -> bool:
    """Whether a graphical browser could show a page here. Without a screen webbrowser starts browsers for the terminal, which would take it
    over."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_page(url: str) -> str:
    """Open `url` in the browser; return a sentence that says whether it opened."""
    if not has_screen():
        return f"No browser opens, since this machine has no screen. Open {url} yourself."
    if not webbrowser.open(url):
        return f"No browser was found here. Open {url} yourself."
    return f"The browser opens {url}"
