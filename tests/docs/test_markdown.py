"""What a machine can check of the texts: links, anchors, commands, names, environment variables, messages, the table of GPUs."""

import ast
import re
from pathlib import Path

import pytest
from comfyui_svdquant.cuda import targets

from .markdown import ROOT, anchors, code, files, links, prose, rows

FILES = files(".md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [path for path in files(".py") if path.relative_to(ROOT).parts[0] != "tests"]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# --- Links ------------------------------------------------------------------------------------------------------------


@every_file
def test_links_lead_to_files_and_headings(path):
    for target in links(read(path)):
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), target
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(read(found)), f"{target} leads to no heading"


def test_the_check_of_links_sees_broken_ones():
    text = "# A `b` c\n\n## A b c\n\n[one](x.md#a-b) ![two](y.png) [`three` (3)](https://a.b/c_(d)) `[four](z)`\n\n    [five](z)\n"
    assert links(text) == ["x.md#a-b", "y.png", "https://a.b/c_(d)"]
    assert anchors(text) == {"a-b-c", "a-b-c-1"}


# --- Commands ---------------------------------------------------------------------------------------------------------


OPTIONS = {"demo/run.py": ["demo/show.py"], "quantize.py": ["quant/batch/options.py"]}  # where scripts have more


def commands(path: Path) -> list[str]:
    found = code(read(path))
    lines = [line.strip() for block in found.blocks for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in [*lines, *found.spans] if re.match(r"(\w+=\S+ )*(python|make|pip|git) ", line)]


@every_file
def test_commands_exist(path):
    """Each script is there and has the options, each target is in the Makefile."""
    for command in commands(path):
        words = [word for word in command.split() if "=" not in word or word.startswith("-")]
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", read(ROOT / "Makefile"), re.MULTILINE), command
        elif words[0] == "python":
            check_script(command, words[1:])


def check_script(command: str, words: list[str]) -> None:
    name = words[0]
    if name == "-m":
        name, words = words[1].replace(".", "/") + ".py", words[1:]
        if words[0] == "pytest":
            return
    name = name.removeprefix("ComfyUI-SVDQuant/")
    script = ROOT / name
    assert script.is_file(), f"{command}: there is no {name}"
    text = read(script) + "".join(read(ROOT / other) for other in OPTIONS.get(name, ()))
    for option in words[1:]:
        assert not option.startswith("--") or f'"{option}"' in text, f"{command}: {name} has no option {option}"


def test_the_readme_has_commands_to_check():
    assert {"python doctor.py", "make demo", "make serve", "make test", "pip install cupy-cuda12x"} <= set(commands(ROOT / "README.md"))


# --- Names ------------------------------------------------------------------------------------------------------------


def strings() -> list[str]:
    """Every text in the pack's code; a field of an f-string or a %s is \\0."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "\0"))
    return found


STRINGS = strings()


def test_the_readme_names_every_node_and_no_other():
    names = {match for path in (ROOT / "nodes").glob("*.py") for match in re.findall(r'display_name="(SVDQuant [^"]+)"', read(path))}
    assert {cells[0] for cells in rows(README, "node")} == names


def test_the_readme_names_every_template_and_no_other():
    assert {cells[0] for cells in rows(README, "template")} == {path.stem for path in (ROOT / "workflows").glob("*.json")}


@every_file
def test_environment_variables_are_read_somewhere(path):
    known = set(STRINGS) | set(re.findall(r"\w+", read(ROOT / "Makefile") + read(ROOT / ".ci" / "run")))
    for name in re.findall(r"\b(?:SVDQUANT|COMFYUI)_[A-Z_]+\b", read(path)):
        assert name in known, name


def test_the_rooms_of_the_code_exist():
    block = next(block for block in code(README).blocks if "families/" in block)
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        assert (ROOT / name).is_dir() or (ROOT / "quant" / name).is_dir(), name


# --- Messages ---------------------------------------------------------------------------------------------------------


def says(message: str) -> bool:
    """Whether some text of the code contains the message, in which ... stands for anything."""
    parts = [re.escape(part.strip()) for part in message.split("...")]
    pattern = re.compile(r"[^.]*?".join(part for part in parts if part), re.DOTALL)
    return any(pattern.search(text) for text in STRINGS)


@pytest.mark.parametrize("message", [cells[0].strip("`") for cells in rows(README, "message")])
def test_a_message_of_the_readme_is_said_by_the_code(message):
    assert says(message)


def test_a_message_that_nobody_says_is_seen():
    assert not says("The CUDA kernels need CuPy, which is installed.") and says("CuPy ... does not fit this PyTorch")


# --- The table of GPUs ------------------------------------------------------------------------------------------------


def test_the_table_of_gpus_is_that_of_the_code():
    found = {}
    for _, capability, bits, tried in rows(README, "GPU"):
        if capability:
            found[int(capability.replace(".", ""))] = (int(bits[0]), "speed measured" in tried, "fp16 only" in tried)
    assert found == {number: (target.default_act_bits, target.measured, not target.bf16) for number, target in targets.TARGETS.items()}


def test_w4a4_is_explained_before_it_is_used():
    text = prose(README)
    assert "W4A8 stands for" in text and text.index("W4A8") == text.index("W4A8 stands for")
    assert text.index("W4A4") == text.index("W4A4, as the paper")
