"""Writing what took long to make: JSON of whatever values came out, and a second place where the first one fails."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calmlm.errors import CalmError
from calmlm.files.storage import write_text

DEPTH = 64  # of nested values; what lies deeper is written as Python shows it
LONGEST = 1000  # characters of a value that JSON has no form for


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON for any value; see ``plain``."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """A value in JSON's terms, whatever it is.

    Arrays and tensors become lists, what is not a number null, infinities "inf" and "-inf", keys strings, and what JSON
    has no form for is written as Python shows it.
    """
    return _plain(value, frozenset())


def write_result(path: Path, text: str) -> None:
    """Write a result; where that fails, write it to a folder for temporary files, or print it.

    Raises:
        CalmError: it is not where it was meant to be; the message says where it is.
    """
    try:
        write_text(path, text)
        return
    except OSError as error:
        reason = error.strerror or type(error).__name__
    try:
        second = Path(tempfile.mkdtemp(prefix="calmlm-")) / path.name
        second.write_text(text, encoding="utf-8")
    except OSError:
        print(text, flush=True)
        where = "was printed instead: keep it"
    else:
        where = f"lies in {second}: move it"
    raise CalmError(f"Expected to write a result to {path}, but that failed ({reason}), so it {where}.")


def _plain(value: Any, outer: frozenset[int]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, enum.Enum):
        return _plain(value.value, outer)
    if isinstance(value, int):
        return _number(int(value))
    if isinstance(value, float):
        return _number(float(value))
    if id(value) in outer or len(outer) >= DEPTH:
        return _shown(value)
    inner = outer | {id(value)}
    if isinstance(value, Mapping):
        return _mapping(value, inner)
    if isinstance(value, (list, tuple)):
        return [_plain(part, inner) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(part, inner) for part in value), key=lambda part: (type(part).__name__, str(part)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name, None), inner) for field in dataclasses.fields(value)}
    listed = getattr(value, "tolist", None)  # of arrays, tensors and NumPy's numbers
    if callable(listed) and not isinstance(value, type):
        try:
            return _plain(listed(), inner)
        except Exception:  # a tensor without data, or one that is spread over processes
            return _shown(value)
    return _shown(value)


def _mapping(value: Mapping[Any, Any], outer: frozenset[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, part in value.items():
        name = _plain(key, outer) if isinstance(key, (str, enum.Enum)) else key
        name = name if isinstance(name, str) else _shown(name)
        while name in found:  # 1 and "1", say
            name += "'"
        found[name] = _plain(part, outer)
    return found


def _number(value: float) -> Any:
    if isinstance(value, int):
        return value if value.bit_length() < 10_000 else hex(value)  # Python refuses to write longer ones in decimals
    if math.isnan(value):
        return None
    return str(value) if math.isinf(value) else value


def _shown(value: Any) -> str:
    """As Python shows it."""
    try:
        text = str(value) if isinstance(value, Path) else repr(value)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
