"""The help pages and the translations match the nodes' inputs and outputs."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from comfyui_svdquant import WEB_DIRECTORY, comfy_entrypoint

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / WEB_DIRECTORY / "docs"
LOCALES = ROOT / "locales"
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA()
           for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())}
PAGES = {f"{node}-{locale}": (SCHEMAS[node], DOCS / node / f"{locale}.md" if locale != "en" else DOCS / f"{node}.md")
         for node in SCHEMAS for locale in ("en", "zh")}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("schema", "page"), PAGES.values(), ids=PAGES)
def test_a_help_page_explains_every_input_output_and_choice(schema, page):
    text = page.read_text(encoding="utf-8")
    names = [entry.id for entry in schema.inputs] + [output.display_name for output in schema.outputs]
    assert [name for name in names if not re.search(rf"\*\*{name}\*\*|（{name}[，）]", text)] == []
    choices = [option for entry in schema.inputs for option in getattr(entry, "options", None) or []
               if entry.id != "model_name"]
    assert [choice for choice in choices if f"`{choice}`" not in text] == []


@pytest.mark.parametrize(("schema", "page"), PAGES.values(), ids=PAGES)
def test_a_help_page_gives_the_right_defaults(schema, page):
    text = page.read_text(encoding="utf-8")
    for entry in schema.inputs:
        if isinstance(getattr(entry, "default", None), int) and not isinstance(entry.default, bool):
            assert re.search(rf"{entry.id}(\*\* \(|，){entry.default}[)）]", text), entry.id


def test_there_is_no_help_page_without_a_node():
    assert {path.stem if path.parent == DOCS else path.parent.name for path in DOCS.rglob("*.md")} == SCHEMAS.keys()


def test_every_tooltip_and_name_is_translated():
    translated = read(LOCALES / "zh" / "nodeDefs.json")
    assert translated.keys() == SCHEMAS.keys()
    for node, schema in SCHEMAS.items():
        entry = translated[node]
        assert entry.keys() == {"display_name", "description", "inputs", "outputs"}
        assert list(entry["inputs"]) == [given.id for given in schema.inputs]
        assert list(entry["outputs"]) == [str(index) for index in range(len(schema.outputs))]
        for words in [*entry["inputs"].values(), *entry["outputs"].values()]:
            assert words.keys() == {"name", "tooltip"} and all(words.values())


@pytest.mark.parametrize("locale", [path.name for path in sorted(LOCALES.iterdir())])
def test_every_locale_names_the_menu_category(locale):
    categories = {name for schema in SCHEMAS.values() for name in schema.category.split("/")}
    assert read(LOCALES / locale / "main.json")["nodeCategories"].keys() == {name for name in categories if "SVDQuant" in name}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_the_messages_that_a_page_explains_are_in_the_code(page):
    code = " ".join(re.sub(r'["\']\s*\n\s*f?["\']', "", path.read_text(encoding="utf-8"))
                    for room in ("nodes", "quant") for path in (ROOT / room).rglob("*.py"))
    _, table = re.split(r"^\| (?:Message|提示) .*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = re.findall(r"^\| (?!---)(.+?) \|", table, re.MULTILINE)
    assert rows
    parts = [part.strip() for row in rows for part in re.split(r"…|, |、| 等", row) if part.strip()]
    flat = re.sub(r"\{recipe\.preset\}", "fast", code)
    assert [part for part in parts if part not in flat and part.removeprefix("is ") not in flat] == []
