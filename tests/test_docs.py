"""The documentation: its links lead somewhere, its code runs, its commands exist."""

from __future__ import annotations

import ast
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
