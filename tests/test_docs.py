"""The documentation: its links lead somewhere, its code runs, its commands exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from documents import ROOT, anchors, blocks, check_command, check_options, console, inline, links, pages

PAGES = pages()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, part = link.partition("#")
        target = page if not path else page.parent / path
        headings = anchors(target.read_text(encoding="utf-8")) if target.suffix == ".md" and target.exists() else set()
        if not target.exists() or (part and part not in headings):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in console(text):
        if words[0] == "calmlm":
            check_command(words)
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).is_file()
            assert (ROOT / words[0]).stat().st_mode & 0o111, f"{words[0]} cannot be run"
    for words in inline(text):
        check_options(words)


def test_what_is_wrong_is_found() -> None:
    for words in (["calmlm", "trian", "x.yaml"], ["calmlm", "train", "x.yaml", "--resum"], ["calmlm", "repro", "x"]):
        with pytest.raises(Exception, match="No such"):
            check_command(words)
    with pytest.raises(AssertionError, match="there is no --resum"):
        check_options(["calmlm", "train", "--resum"])
    text = "## What it costs\n\n[a](b.md#c) and ![d](e.svg)\n\n```python\n[f](g)\n```\n"
    assert links(text) == ["b.md#c", "e.svg"]
    assert anchors(text) == {"what-it-costs"}


EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_every_file_that_extending_names_exists() -> None:
    named = re.findall(r"`((?:src|tests|docs|configs|experiments|scripts)/[\w/.]+)(?:::[\w:]+)?`", EXTENDING)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_test_that_extending_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)::([\w:]+)`", EXTENDING)
    assert len(named) >= 7
    missing = []
    for path, name in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        *classes, function = name.split("::")
        if f"def {function}(" not in text or any(f"class {each}" not in text for each in classes):
            missing.append(f"{path}::{name}")
    assert missing == []


RECIPES = dict(part.split("\n", 1) for part in re.split(r"^## ", EXTENDING, flags=re.MULTILINE)[1:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_names_files_in_order_and_a_test(recipe: str) -> None:
    steps = re.findall(r"^(\d)\. ", RECIPES[recipe], re.MULTILINE)
    assert steps == [str(number) for number in range(1, len(steps) + 1)]
    assert 2 <= len(steps) <= 5
    assert re.search(r"^Start from\s", RECIPES[recipe], re.MULTILINE), "the test to start from"


def test_every_name_that_extending_gives_is_in_its_file() -> None:
    """A step such as "`src/x.py`: add it to `NAMES`" must hold: the file has that name."""
    missing = []
    for step in re.split(r"^(?:\d\.| +-) |\n\n", EXTENDING, flags=re.MULTILINE):
        files = re.findall(r"`((?:src|tests)/[\w/.]+\.py)`", step)
        texts = "".join((ROOT / path).read_text(encoding="utf-8") for path in files)
        names = re.findall(r"`(_?[A-Z][A-Z_]{3,}|_?[A-Z]\w+\.\w+)`", step)
        missing += [name for name in names if files and name.split(".")[-1] not in texts]
    assert missing == []
