"""pyproject.toml and requirements.txt: what the registry and ComfyUI-Manager read."""

import importlib.metadata
import re

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from host import setup

from .markdown import ROOT, files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMFY = PROJECT["tool"]["comfy"]
REQUIREMENTS = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def installed_closure(requirements: list[str]) -> set[str]:
    """The names of these requirements and of all that their installed versions require in turn."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, importlib.metadata.requires(name) or ())
    return found


def test_the_manager_and_the_registry_install_the_same():
    assert REQUIREMENTS == PROJECT["project"]["dependencies"]


def test_nothing_replaces_torch_or_cupy():
    names = installed_closure(REQUIREMENTS)
    assert {"numpy", "huggingface-hub", "tqdm"} <= names, "the closure sees requirements of requirements"
    assert [name for name in names if name.startswith(("torch", "cupy", "nvidia", "triton"))] == []


@pytest.mark.parametrize("line", [line for line in REQUIREMENTS if line != "matplotlib"])
def test_comfyuis_own_requirements_bring_it(line):
    """So that the Manager changes nothing in a user's environment; matplotlib is the only package that it adds."""
    requirement, present = Requirement(line), {canonicalize_name(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    own = [text for text in setup.checkout_requirements(setup.locate().comfy) if canonicalize_name(Requirement(text).name) in present]
    assert canonicalize_name(requirement.name) in installed_closure(own)
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def test_the_urls_lead_to_one_repository():
    repository = PROJECT["project"]["urls"]["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w-]+/ComfyUI-SVDQuant", repository)
    assert PROJECT["project"]["urls"].keys() >= {"Repository", "Documentation", "Bug Tracker"}
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    assert all(url.startswith(repository) for url in PROJECT["project"]["urls"].values())
    assert COMFY["Icon"].startswith(raw) and COMFY["Banner"].startswith(raw)


def test_the_icon_is_square_and_the_banner_21_to_9():
    icon, banner = (Image.open(ROOT / COMFY[key].split("/main/")[1]) for key in ("Icon", "Banner"))
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21


def test_the_oldest_comfyui_is_the_one_that_the_tests_run_on():
    version = (setup.TREE / "comfyui_version.py").read_text(encoding="utf-8")
    assert COMFY["requires-comfyui"] == f">={re.search(r'[0-9.]{5,}', version)[0]}"
    assert f"ComfyUI {COMFY['requires-comfyui'][2:]} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_classifiers_name_what_the_registry_filters_by():
    classifiers = PROJECT["project"]["classifiers"]
    for wanted in ("Operating System :: Microsoft :: Windows", "Operating System :: POSIX :: Linux", "Environment :: GPU :: NVIDIA CUDA"):
        assert wanted in classifiers
    assert PROJECT["project"]["requires-python"] == ">=3.10" and "Programming Language :: Python :: 3.10" in classifiers


def test_every_placeholder_is_listed_for_the_owner():
    """The table in CONTRIBUTING.md names each file with a placeholder, so that none is left in a release."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(OWNER|PUBLISHER)` \| (.*?) \|", text, re.MULTILINE))
    found = {}
    for path in files(".md", ".toml", ".txt", ".py", ".json", ".yml", ".svg"):
        name = path.relative_to(ROOT).as_posix()
        if name == "CONTRIBUTING.md" or name.startswith("tests/"):
            continue
        for placeholder in set(re.findall(r"\b(?:OWNER|PUBLISHER)\b", path.read_text(encoding="utf-8"))):
            found.setdefault(placeholder, []).append(f"`{name}`")
    assert listed == {placeholder: ", ".join(names) for placeholder, names in found.items()}


def test_developers_files_are_kept_out_of_the_archive():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert {"tests/", "benchmarks/", "demo/", "pictures/", "requirements/"} <= set(ignored)
    assert all((ROOT / name).exists() for name in ignored if not name.startswith("#"))
