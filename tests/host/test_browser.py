"""The templates in a real browser, as a user opens, runs and saves them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.server import Server

from . import browser
from .test_templates import DEMO, GRAPHS

# A page without a GPU takes some seconds a template; on a busy machine many more.
pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.timeout(900)]

TEMPLATES = {**GRAPHS, "SVDQuant_demo": DEMO}
SMALL = {"width": 64, "height": 64, "steps": 1, "preset": "naive", "text": "large blue star on white"}


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[browser.Page]:
    with browser.page(server.client.url, {"Comfy.VueNodes.Enabled": False}) as opened:
        yield opened


def look(page: browser.Page, name: str) -> None:
    """Keep a screenshot in the folder SVDQUANT_SCREENSHOTS, for a developer to look at."""
    if folder := os.environ.get("SVDQUANT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=str(Path(folder) / f"{name}.png"))


def content(graph: dict) -> dict:
    """Nodes by id with their place and values, links and groups' titles. Pages add widgets' values that a file need not have."""
    nodes = {int(node["id"]): (node["type"], node["pos"], node.get("widgets_values", [])) for node in graph["nodes"]}
    return {"nodes": nodes, "links": sorted(graph["links"]), "groups": [group["title"] for group in graph["groups"]]}


def check_opening(page: browser.Page, name: str) -> None:
    """Open a template from the list: at the view that test_templates.py checks, with no dialog but the one that offers downloads, no
    error of this pack, and the graph of the file."""
    opened, dialogs = page.open_template(name), page.dialogs()
    page.close_dialogs()
    look(page, name)
    assert [text for text in dialogs if "Missing Models" not in text] == []
    assert page.complaints == []
    assert page.view() == TEMPLATES[name]["extra"]["ds"]
    assert content(opened) == content(TEMPLATES[name])
    assert "svdquant_restore_view" not in opened["extra"], "undo and tabs would restore the view again"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_template_opens_readable_from_the_list(page, name):
    check_opening(page, name)


def test_the_demo_runs_and_is_saved_and_reopened_unchanged(page):
    check_opening(page, "SVDQuant_demo")
    page.set_widgets(SMALL)
    before = page.graph()  # a run adds the texts that nodes show, which are not saved
    assert page.run() > 0, "the page heard of no step"
    look(page, "SVDQuant_demo after its run")
    page.fit_view()
    look(page, "SVDQuant_demo's pictures")
    assert page.markdown_switches() in ([True, True], []), "older pages have no switch"
    assert page.tables() == 2, "the reports are shown as plain text"
    page.save("saved by a test")
    after = page.reopen("saved by a test")
    look(page, "SVDQuant_demo reopened")
    assert content(after) == content(before)
    assert page.complaints == []
