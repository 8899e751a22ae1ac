"""`make serve` opens the browser, or says that it does not."""

import webbrowser

import pytest

from host import page

URL = "http://127.0.0.1:8188/?template=SVDQuant_demo"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages that were opened on a machine with a screen."""
    found = []
    monkeypatch.setattr(page.sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda url: found.append(url) or True)
    return found


def test_the_browser_opens(opened):
    assert page.open_page(URL) == f"The browser opens {URL}"
    assert opened == [URL]


def test_a_machine_without_a_browser(opened, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert page.open_page(URL) == f"No browser was found here. Open {URL} yourself."


def test_without_a_screen_no_browser_of_the_terminal_starts(opened, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert page.open_page(URL) == f"No browser opens, since this machine has no screen. Open {URL} yourself."
    assert opened == []


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_windows_and_macos_need_no_display(opened, monkeypatch, platform):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr(page.sys, "platform", platform)
    page.open_page(URL)
    assert opened == [URL]
