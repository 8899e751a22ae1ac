"""The help pages and the translations match the nodes' inputs, outputs and messages."""

import ast
import asyncio
import json
import re
from collections import Counter
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
PAGES = {f"{node}-{locale}": (SCHEMAS[node], DOCS / node / f"{locale}.md") for node in SCHEMAS for locale in ("en", *LANGUAGES)}
TRANSLATED = {name: (DOCS / schema.node_id / "en.md", page) for name, (schema, page) in PAGES.items() if page.stem != "en"}
# The text of all sources, with the parts of a sentence joined and {} for every value in it.
CODE = re.sub(r"\{[^{}]*\}", "{}", " ".join(
    re.sub(r'["\']\s*\n\s*f?["\']', "", path.read_text(encoding="utf-8"))
    for room in ("nodes", "quant", "cuda") for path in sorted((ROOT / room).rglob("*.py"))))


def unique(pairs):
    """{name: value} of a JSON object, in which json would let the later of two equal names win in silence."""
    assert [name for name, count in Counter(name for name, _ in pairs).items() if count > 1] == []
    return dict(pairs)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)


@pytest.mark.parametrize(("schema", "page"), PAGES.values(), ids=PAGES)
def test_a_help_page_explains_every_input_output_and_choice(schema, page):
    text = page.read_text(encoding="utf-8")
    names = [entry.id for entry in schema.inputs] + [output.display_name for output in schema.outputs]
    assert [name for name in names if not re.search(rf"\*\*{name}\*\*|[(（]{name}[,，)）]", text)] == []
    choices = [option for entry in schema.inputs for option in getattr(entry, "options", None) or []
               if entry.id not in ("model_name", "sampler_name", "scheduler", "type")]
    assert [choice for choice in choices if f"`{choice}`" not in text] == []


@pytest.mark.parametrize(("schema", "page"), PAGES.values(), ids=PAGES)
def test_a_help_page_gives_the_right_defaults(schema, page):
    text = page.read_text(encoding="utf-8")
    for entry in schema.inputs:
        if isinstance(getattr(entry, "default", None), (int, float)) and not isinstance(entry.default, bool):
            assert entry.id.startswith("seconds_") or re.search(rf"{entry.id}(\*\* \(|, |，){entry.default}[)）]", text), entry.id


def lines(text: str) -> list[str]:
    """The kind of each of a page's lines: heading, item, item within an item, row of a table, text, or nothing."""
    return [re.match(r"#+ |- |  - |\||", line)[0] or ("text" if line.strip() else "") for line in text.splitlines()]


def tables(text: str) -> list[list[str]]:
    """The rows of a page's tables without their heads, which are translated."""
    return [re.findall(r"^\|.*\|$", block, re.MULTILINE)[1:] for block in text.split("\n\n") if block.startswith("|")]


@pytest.mark.parametrize(("english", "page"), TRANSLATED.values(), ids=TRANSLATED)
def test_a_translated_help_page_says_what_the_english_one_says(english, page):
    """As far as a program sees it: the same paragraphs, items and tables, the same values and commands, no number missing."""
    original, text = (path.read_text(encoding="utf-8") for path in (english, page))
    assert lines(text) == lines(original)
    assert tables(text) == tables(original)
    assert Counter(re.findall("`[^`]+`", text)) == Counter(re.findall("`[^`]+`", original))
    numbers, expected = (Counter(re.findall(r"\d+(?:\.\d+)*", words.replace(",", "."))) for words in (text, original))
    assert not expected - numbers


@pytest.mark.parametrize(("english", "page"), TRANSLATED.values(), ids=TRANSLATED)
def test_a_translated_help_page_calls_nodes_and_inputs_as_the_page_does(english, page):
    """With their names of locales/, since those stand on the nodes."""
    translated = read(LOCALES / page.stem / "nodeDefs.json")
    entry, text = translated[page.parent.name], page.read_text(encoding="utf-8")
    schema = SCHEMAS[page.parent.name]
    for port, words in [*zip(schema.inputs, entry["inputs"].values()), *zip(schema.outputs, entry["outputs"].values())]:
        name = port.display_name or port.id
        assert re.search(rf"\*\*{re.escape(words['name'])}\*\*( ?[(（]{name}[,，)）]|[ :：])", text), words["name"]
    prose = re.sub(r"`[^`]+`|^- \*\*(?:[^*]|\*(?!\*))+\*\* ?[:：]", "", text, flags=re.MULTILINE)
    assert [schema.display_name for schema in SCHEMAS.values() if schema.display_name in prose] == []


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
    """Those that begin with {0} may be the end of a sentence, whose beginning is a message too or stays English."""
    messages = [re.sub(r"\{\d\}", "{}", message) for message in read(MESSAGES / "de.json")]
    assert [message for message in messages if message not in CODE and message.removeprefix("{}") not in CODE] == []


# {file, or file: beginning of a sentence: why its sentences, or some of them, are in English on the node or not on a node at all}
ENGLISH = {
    "batch/": "of the command line",
    "checkpoint/": "names tensors, layers or metadata of a rare or damaged file, for a bug report or for who made the file",
    "download/hub.py": "of a Hub that answers as none should, or of a file that is no model",
    "families/discovered.py": "a part of a sentence about a damaged file",
    "families/family.py": "a part of a sentence about a damaged file",
    "host/build.py": "a part of a sentence about a damaged file",
    "host/clip_loader.py": "names tensors of a rare or damaged file",
    "host/clip_patcher.py": "raised when another node saves the CLIP",
    "host/conditioning.py": "of the command line's --conditioning",
    "host/discovery.py: This MODEL is value, none of the families": "of torchrun's processes; that of one process is translated",
    "host/find_nan.py": "a search for the bug report, which a user asks for",
    "host/loader.py": "names what ComfyUI's version can't read",
    "host/lora.py": "a part of a line in the console",
    "host/mapping.py": "raised when another node runs the model",
    "host/offline.py": "of the command line",
    "host/patcher.py": "raised when another node uses the model",
    "host/quantize.py": "of a model without layers that can be quantized, or a LoRA that changes shapes",
    "host/resume.py": "shown nowhere",
    "host/saving.py": "of another pack that replaces parts of the model",
    "layers/": "a part of a sentence about a damaged file",
    "parallel/ranks.py": "of torchrun's processes",
    "quantizer/text_encoder.py": "a part of a sentence of the host's",
    "quantizer/gptq.py": "of a matrix that no real prompt gives",
}


def raised(path: Path) -> list[str]:
    """The sentences of a file's exceptions, with a word for every value in them."""
    calls = [node.exc for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args]
    texts = [call.args[0] for call in calls if isinstance(call.args[0], (ast.Constant, ast.JoinedStr))]
    return ["".join(part.value if isinstance(part, ast.Constant) else "value" for part in getattr(text, "values", [text]))
            for text in texts]


def test_the_sentences_of_errors_are_translated_or_said_to_stay_english():
    patterns = [re.compile("(.*?)".join(map(re.escape, re.split(r"\{\d\}", message)))) for message in read(MESSAGES / "de.json")]
    untranslated = [f"{path.relative_to(room).as_posix()}: {sentence}"
                    for room in (ROOT / "nodes", ROOT / "quant") for path in sorted(room.rglob("*.py"))
                    for sentence in raised(path) if not any(pattern.fullmatch(sentence) for pattern in patterns)]
    assert [sentence for sentence in untranslated if not sentence.startswith(tuple(ENGLISH))] == []
    unused = [place for place in ENGLISH if not any(sentence.startswith(place) for sentence in untranslated)]
    assert unused == [], "all is translated there now"


@pytest.mark.parametrize("locale", [path.name for path in sorted(LOCALES.iterdir())])
def test_every_locale_names_the_menu_category(locale):
    categories = {name for schema in SCHEMAS.values() for name in schema.category.split("/")}
    assert read(LOCALES / locale / "main.json")["nodeCategories"].keys() == {name for name in categories if "SVDQuant" in name}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_the_messages_that_a_page_explains_are_in_the_code(page):
    _, last = page.read_text(encoding="utf-8").rsplit("\n## ", 1)
    rows = re.findall(r"^- \*\*(.+?)\*\* ?[:：]", last, re.MULTILINE)
    assert rows
    parts = [part.strip() for row in rows for part in re.split(r"…|, |、| 等", row) if part.strip()]
    flat = CODE.replace("{}", " ")
    assert [part for part in parts if part not in flat and part.removeprefix("is ") not in flat and part not in CODE] == []
