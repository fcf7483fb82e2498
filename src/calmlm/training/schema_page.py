"""The configuration's keys as a page of help, read from the source of its dataclasses.

The source is parsed and not imported: help answers at once, and importing the schema takes torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Key", "Section", "sections", "show_schema"]

ROOM = Path(__file__).parent
FILES = (
    ROOM / "schema.py",
    ROOM / "cache_settings.py",
    ROOM.parent / "data/sources.py",
    ROOM.parent / "data/labels.py",
)
PARTS = {
    "": "TrainingConfig",
    "model": "ModelConfig",
    "model.anchor, model.augmenting": "BaseConfig",
    "data": "DataConfig",
    "data.train, data.eval": "HubDataset",
    "align": "AlignConfig",
    "retain": "RetainConfig",
    "activation_cache": "CacheConfig",
}
"""The dataclass of each part of a file."""
WORDS = {
    "str": "text",
    "Place": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "dict": "mapping",
    "list": "list",
    "Any": "anything",
}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: of the key.
        kind: what it may be.
        default: when left out; None where it may not be.
        meaning: one sentence.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Section:
    """A mapping of the configuration, by its dotted place, with what it is for."""

    place: str
    purpose: str
    keys: list[Key]


def sections() -> Iterator[Section]:
    """All parts of a file, in its order."""
    nodes = [node for file in FILES for node in ast.parse(file.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    aliases = {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for place, name in PARTS.items():
        purpose, meanings = _documented(ast.get_docstring(classes[name]) or "")
        fields = [node for node in classes[name].body if isinstance(node, ast.AnnAssign)]
        keys = [
            Key(field.target.id, _kind(field.annotation, aliases), _default(field.value), meanings[field.target.id])
            for field in fields
            if isinstance(field.target, ast.Name)
        ]
        yield Section(place, purpose, keys)


def show_schema(console: Any) -> None:
    """Print all keys.

    Args:
        console: rich's.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for section in sections():
        title = section.place or "The configuration"
        console.print(Text(f"\n{title}: {section.purpose}", style="bold"))
        table = Table(box=box.SIMPLE, pad_edge=False, expand=True)
        table.add_column("key", no_wrap=True, style="cyan")
        table.add_column("type", ratio=2)
        table.add_column("default", ratio=1)
        table.add_column("", ratio=4)
        for key in section.keys:
            default = "required" if key.default is None else key.default
            table.add_row(*(Text(part) for part in (key.name, key.kind, default, key.meaning)))
        console.print(table)


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """The first sentence of a class's docstring, and the first one of each of its arguments."""
    head, _, arguments = text.partition("Args:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", arguments.rstrip()):
        names, colon, meaning = " ".join(entry.split()).partition(": ")
        if colon:
            found |= dict.fromkeys(names.split(", "), _sentence(meaning))
    return _sentence(" ".join(head.split())), found


def _sentence(text: str) -> str:
    return re.split(r"(?<=[^.])\.\s", text)[0].replace("`", "").rstrip(".")


def _kind(hint: ast.expr, aliases: dict[str, ast.expr]) -> str:
    """An annotation in words; what may be left out is not said again."""
    return " or ".join(dict.fromkeys(_kinds(hint, aliases)))


def _kinds(hint: ast.expr, aliases: dict[str, ast.expr]) -> Iterator[str]:
    if isinstance(hint, ast.BinOp):
        yield from _kinds(hint.left, aliases)
        yield from _kinds(hint.right, aliases)
    elif isinstance(hint, ast.Subscript) and isinstance(hint.value, ast.Name) and hint.value.id == "Literal":
        choices = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        yield from (str(choice.value) for choice in choices if isinstance(choice, ast.Constant))
    elif isinstance(hint, ast.Subscript):
        yield from _kinds(hint.value, aliases)
    elif isinstance(hint, ast.Name):
        if hint.id in aliases:
            yield from _kinds(aliases[hint.id], aliases)
        else:
            yield WORDS.get(hint.id, "mapping")  # of another dataclass


def _default(value: ast.expr | None) -> str | None:
    if value is None:
        return None
    if isinstance(value, ast.Call):
        return "{}"
    found = ast.literal_eval(value)
    return "-" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
