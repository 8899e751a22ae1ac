"""The templates in a real browser, as a user opens, runs and saves them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.server import Server

from . import browser, layout
from .test_templates import DEMO, GRAPHS

pytestmark = [pytest.mark.server, pytest.mark.browser]

TEMPLATES = {**GRAPHS, "SVDQuant_demo": DEMO}
# Where a developer looks at what the tests saw.
SCREENSHOTS = os.environ.get("SVDQUANT_SCREENSHOTS")


@pytest.fixture(scope="module", params=["canvas", "Nodes 2.0"])
def renderer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(server: Server, renderer: str) -> Iterator[browser.Page]:
    settings = {"Comfy.VueNodes.Enabled": renderer != "canvas"}
    with browser.page(server, settings) as opened:
        yield opened


def picture(page: browser.Page, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens_readable_from_the_list(page, renderer, name):
    stored = TEMPLATES[name]
    opened = page.open_template(name)
    dialogs = page.dialogs()
    page.close_dialogs()
    picture(page, f"{name} {renderer}")
    assert page.view() == stored["extra"]["ds"], "the view that the templates' own tests check"
    assert [text for text in dialogs if "Missing Models" not in text] == [], "above all no dialog about missing nodes"
    assert page.complaints == []
    assert content(opened) == content(stored)
    assert browser_mark(opened) is None


def browser_mark(graph: dict):
    return graph["extra"].get("svdquant_restore_view")


def content(graph: dict) -> dict:
    """What a user sees of a graph: nodes by id with their place and values, links and groups' titles."""
    nodes = {node["id"]: (node["type"], node["pos"], node.get("widgets_values", [])) for node in graph["nodes"]}
    return {"nodes": nodes, "links": sorted(graph["links"]), "groups": [group["title"] for group in graph["groups"]]}
