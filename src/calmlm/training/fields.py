"""From a mapping, as YAML gives it, to a dataclass: every fault is collected, none stops the reading."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from calmlm.errors import ConfigError

T = TypeVar("T")

NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


def read_fields(cls: type[T], values: Any, faults: list[str], where: str = "") -> T | None:
    """An instance of the dataclass `cls` from `values`; None, with the reasons added to `faults`, where that fails.

    A field whose metadata say ``made`` is no key: it is filled in later.

    Annotations may be str, int, float, bool, None, Literal, lists, dicts, other dataclasses and unions of these;
    ``Annotated[hint, function]`` is read as ``hint`` and passed through the function.

    Args:
        cls: a dataclass.
        values: what stands in the file.
        faults: one sentence for each fault is appended.
        where: dotted path of `values` within the file.
    """
    if not isinstance(values, Mapping):
        faults.append(f"{where or 'the file'}: expected a mapping, but got {show(values)}.")
        return None
    before = len(faults)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("made")}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            faults.append(unknown_key(key, fields, where))
    arguments = {}
    for name, field in fields.items():
        path = f"{where}.{name}" if where else name
        if name in values:
            arguments[name] = read_value(hints[name], values[name], faults, path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f"{path}: expected {describe(hints[name])}, but it is missing.")
    return cls(**arguments) if len(faults) == before else None


def read_what_fits(cls: type[T], values: Any) -> T | None:
    """As `read_fields`, with keys left out that have faults of their own; None where a required one is among them."""
    if not isinstance(values, Mapping):
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    fitting: dict[str, Any] = {}
    for name in hints.keys() & values.keys():
        faults: list[str] = []
        read_value(hints[name], values[name], faults, name)
        if not faults:
            fitting[name] = values[name]
    return read_fields(cls, fitting, [])


def unknown_key(key: Any, known: Collection[str], where: str) -> str:
    """The fault of a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    place = f"in '{where}'" if where else "at the top of the file"
    if near:
        return f"'{key}' is no key {place}; did you mean '{near[0]}'?"
    choice = f"there is {', '.join(sorted(known))}" if len(known) <= 20 else "remove it"
    return f"'{key}' is no key {place}; {choice}."


def describe(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in arguments if part is not type(None)))
    if origin is typing.Literal:
        return " or ".join(f"'{choice}'" for choice in arguments)
    if origin is list:
        return f"a list of {describe(arguments[0])}" if arguments else "a list"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    return NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))


def show(value: Any) -> str:
    """A value as it arrived, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_value(hint: Any, value: Any, faults: list[str], path: str) -> Any:
    """`value` as the annotation `hint` asks for it; a fault is added to `faults` where it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read_fields(hint, value, faults, path)
    if origin is typing.Annotated:
        before = len(faults)
        inner = read_value(arguments[0], value, faults, path)
        if len(faults) > before:
            return value
        try:
            return functools.reduce(lambda found, then: then(found), arguments[1:], inner)
        except ConfigError as error:
            faults.append(f"{path}: {str(error)[0].lower()}{str(error)[1:]}")
            return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(hint, value, faults, path)
    if origin is list and isinstance(value, list):
        return [read_value(arguments[0], item, faults, f"{path}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: read_value(arguments[1], item, faults, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not _fits(hint, value):
        faults.append(f"{path}: expected {describe(hint)}, but got {show(value)}.")
    return value


def _read_union(hint: Any, value: Any, faults: list[str], path: str) -> Any:
    """The first member that fits; where none does, the faults of the one that comes nearest."""
    attempts = []
    for member in typing.get_args(hint):
        found: list[str] = []
        result = read_value(member, value, found, path)
        if not found:
            return result
        same_kind = isinstance(value, Mapping) and dataclasses.is_dataclass(member)
        same_kind = same_kind or any(
            isinstance(value, kind) and typing.get_origin(member) is kind for kind in (list, dict)
        )
        if same_kind:
            attempts.append(found)
    attempts.sort(key=len)
    nearest = attempts and (len(attempts) == 1 or len(attempts[0]) < len(attempts[1]))
    faults += attempts[0] if nearest else [f"{path}: expected {describe(hint)}, but got {show(value)}."]
    return value


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is type(None) or hint is None:
        return value is None
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
