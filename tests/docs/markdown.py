"""The parts of a Markdown file that the tests check: links, anchors, code, tables."""

import os
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*?$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n?|\n(?= {4}))+")
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*(?:\([^()]*\)[^()\s]*)*)\)")


class Code(NamedTuple):
    blocks: list[str]
    spans: list[str]


def files(*suffixes: str) -> list[Path]:
    """The repository's files with these suffixes, without what the tests and the demo make and what an installation brings."""
    found = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in ("out", "__pycache__"))
        found += [Path(folder, name) for name in sorted(names) if name.endswith(suffixes)]
    return found


def prose(text: str) -> str:
    """The text without code blocks and code spans."""
    return SPAN.sub("", INDENTED.sub("", FENCE.sub("", text)))


def code(text: str) -> Code:
    blocks = [found[0] for found in FENCE.finditer(text)]
    rest = FENCE.sub("", text)
    blocks += [found[0] for found in INDENTED.finditer(rest)]
    return Code(blocks, [" ".join(found[2].split()) for found in SPAN.finditer(INDENTED.sub("", rest))])


def links(text: str) -> list[str]:
    """The targets of links and pictures. A link's text may have code in it, so that spans are emptied and not removed."""
    return LINK.findall(SPAN.sub("x", INDENTED.sub("", FENCE.sub("", text))))


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", INDENTED.sub("", FENCE.sub("", text)), re.MULTILINE):
        plain = re.sub(r"[*_`]|!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        result.add(slug if count == 0 else f"{slug}-{count}")
    return result


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the rows below the head whose first cell is `first`."""
    lines = text.split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found
