"""The help pages and the translations match the nodes' inputs, outputs and messages."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from comfyui_svdquant import WEB_DIRECTORY, comfy_entrypoint

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / WEB_DIRECTORY / "docs"
MESSAGES = ROOT / WEB_DIRECTORY / "messages"
LOCALES = ROOT / "locales"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "ru", "zh", "zh-TW")  # beside English, whose texts are the schemas'
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA()
           for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())}
PAGES = {f"{node}-{locale}": (SCHEMAS[node], DOCS / node / f"{locale}.md") for node in SCHEMAS for locale in ("en", "zh")}
# The text of all sources, with the parts of a sentence joined and {} for every value in it.
CODE = re.sub(r"\{[^{}]*\}", "{}", " ".join(
    re.sub(r'["\']\s*\n\s*f?["\']', "", path.read_text(encoding="utf-8"))
    for room in ("nodes", "quant", "cuda") for path in sorted((ROOT / room).rglob("*.py"))))


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("schema", "page"), PAGES.values(), ids=PAGES)
def test_a_help_page_explains_every_input_output_and_choice(schema, page):
    text = page.read_text(encoding="utf-8")
    names = [entry.id for entry in schema.inputs] + [output.display_name for output in schema.outputs]
    assert [name for name in names if not re.search(rf"\*\*{name}\*\*|（{name}[，）]", text)] == []
    choices = [option for entry in schema.inputs for option in getattr(entry, "options", None) or []
               if entry.id not in ("model_name", "sampler_name", "scheduler")]
    assert [choice for choice in choices if f"`{choice}`" not in text] == []


@pytest.mark.parametrize(("schema", "page"), PAGES.values(), ids=PAGES)
def test_a_help_page_gives_the_right_defaults(schema, page):
    text = page.read_text(encoding="utf-8")
    for entry in schema.inputs:
        if isinstance(getattr(entry, "default", None), (int, float)) and not isinstance(entry.default, bool):
            assert entry.id.startswith("seconds_") or re.search(rf"{entry.id}(\*\* \(|，){entry.default}[)）]", text), entry.id


@pytest.mark.parametrize("node", SCHEMAS)
def test_a_node_has_its_help_page_where_both_pages_look_for_it(node):
    """For a language without a help page they ask for the file beside the folder; it is a copy, since Git makes no links on Windows."""
    assert (DOCS / f"{node}.md").read_bytes() == (DOCS / node / "en.md").read_bytes()


def test_there_is_no_help_page_without_a_node():
    assert {path.stem if path.parent == DOCS else path.parent.name for path in DOCS.rglob("*.md")} == SCHEMAS.keys()


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_no_table_is_wider_than_the_side_panel(page):
    """In ComfyUI 0.33 it is 235 pixels wide: three columns of numbers fit, two of sentences with a name in them do not."""
    for row in re.findall(r"^\|.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE):
        cells = row.strip("|").split("|")
        assert len(cells) <= 3 and all(len(word) < 12 for cell in cells for word in cell.split()), row


def test_the_languages_are_those_of_comfyuis_page():
    assert sorted(path.name for path in LOCALES.iterdir()) == sorted((*LANGUAGES, "en"))
    assert sorted(path.stem for path in MESSAGES.iterdir()) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_tooltip_and_name_is_translated(language):
    translated = read(LOCALES / language / "nodeDefs.json")
    assert list(translated) == list(SCHEMAS)
    for node, schema in SCHEMAS.items():
        entry = translated[node]
        assert entry.keys() == {"display_name", "description", "inputs", "outputs"}
        assert entry["display_name"].startswith("SVDQuant ") and entry["description"] != schema.description
        assert list(entry["inputs"]) == [given.id for given in schema.inputs]
        assert list(entry["outputs"]) == [str(index) for index in range(len(schema.outputs))]
        ports = [*zip(schema.inputs, entry["inputs"].values()), *zip(schema.outputs, entry["outputs"].values())]
        for port, words in ports:
            assert words.keys() == {"name", "tooltip"} and all(words.values()) and words["tooltip"] != port.tooltip
            # Values that users type or choose are the same in every language.
            for value in re.findall(r"%\S+%|models/\w+|\*\.\w+ = \d+|\b(?:fp16|int4|int8|nunchaku|data-free|naive|temp|output|off):?",
                                    port.tooltip):
                if ":" in value or not value.isalpha():
                    assert value.rstrip(":") in words["tooltip"], (node, value)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_message_is_translated(language):
    found = read(MESSAGES / f"{language}.json")
    assert list(found) == list(read(MESSAGES / "de.json")), "the first pattern that fits counts, so their order is the same"
    for message, translation in found.items():
        assert sorted(re.findall(r"\{\d\}", message)) == sorted(re.findall(r"\{\d\}", translation)), message
        assert translation != message or message.startswith("a "), message


def test_the_translated_messages_are_in_the_code():
    messages = read(MESSAGES / "de.json")
    assert [message for message in messages if re.sub(r"\{\d\}", "{}", message) not in CODE] == []


@pytest.mark.parametrize("locale", [path.name for path in sorted(LOCALES.iterdir())])
def test_every_locale_names_the_menu_category(locale):
    categories = {name for schema in SCHEMAS.values() for name in schema.category.split("/")}
    assert read(LOCALES / locale / "main.json")["nodeCategories"].keys() == {name for name in categories if "SVDQuant" in name}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_the_messages_that_a_page_explains_are_in_the_code(page):
    _, last = page.read_text(encoding="utf-8").rsplit("\n## ", 1)
    rows = re.findall(r"^- \*\*(.+?)\*\*[:：]", last, re.MULTILINE)
    assert rows
    parts = [part.strip() for row in rows for part in re.split(r"…|, |、| 等", row) if part.strip()]
    flat = CODE.replace("{}", " ")
    assert [part for part in parts if part not in flat and part.removeprefix("is ") not in flat and part not in CODE] == []
