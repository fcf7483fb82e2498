"""The pages of documentation as tests read them: their blocks of code, commands, links and headings."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from typer.main import get_command

from calmlm.cli import app

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """All pages of the repository, those that experiments write included."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    found = [ROOT / line for line in listed.stdout.splitlines()]
    return [page for page in found if page.exists()] or sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md"))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead, within the repository."""
    return [link for link in _LINK.findall(prose(text)) if "://" not in link]


def anchors(text: str) -> set[str]:
    """What a link's part behind `#` may name: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def console(text: str) -> list[list[str]]:
    """The commands of a page's console blocks, in words, without comments."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline(text: str) -> list[list[str]]:
    """The `calmlm` commands that stand within sentences."""
    found = re.findall(r"`(calmlm [^`\n]+)`", prose(text))
    return [shlex.split(command) for command in found]


def check_command(words: list[str]) -> None:
    """Raise unless the command line takes these words: the command, its options and what they hold."""
    parent, command, rest = _command_of(words)
    command.make_context(words[0], rest, parent=parent)


def check_options(words: list[str]) -> None:
    """Raise unless the command has these options; a sentence may leave out what else it needs."""
    _, command, rest = _command_of(words)
    known = {"--help"} | {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in rest if word.startswith("-") and word not in known]
    assert not unknown, f"{' '.join(words)}: there is no {', '.join(unknown)}"


def _command_of(words: list[str]) -> tuple[Any, Any, list[str]]:
    """The innermost command that the words name, its parent's context, and the words that are left for it."""
    command, rest = get_command(app), list(words[1:])
    parent = command.make_context(words[0], list(rest))
    while hasattr(command, "commands") and rest:
        name, command, rest = command.resolve_command(parent, rest)
        if hasattr(command, "commands") and rest:
            parent = command.make_context(name, list(rest), parent=parent)
    return parent, command, rest
