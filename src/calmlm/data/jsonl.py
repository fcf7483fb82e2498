"""Strict reading of JSON Lines: one object per line, and a fault names its line."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmlm.errors import DataError

PACKED = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip file",
    b"(\xb5/\xfd": "a zstd file",
}
TABLES = {".csv": "a CSV file", ".tsv": "a TSV file"}


@dataclass(frozen=True)
class Record:
    """One record of a data source and where it stands, for messages: `train.jsonl, line 7`."""

    fields: dict[str, Any]
    place: str


def read_jsonl(path: str | Path) -> list[Record]:
    """All records of a file, packed by gzip or not, in order.

    Blank lines are skipped; anything else that is no JSON object is an error.

    Raises:
        DataError: the file is missing, unreadable, empty or not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"Expected a data file at {path}, but there is none; check the path.") from None
    except OSError as error:
        raise DataError(
            f"Expected a readable file at {path}, but it cannot be read ({error.strerror}); check the path."
        ) from None
    content = _unpacked(content, path)
    records = []
    # Split on the newline alone: JSON strings may hold the other characters that str.splitlines() splits on.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            records.append(Record(_parse(line, place), place))
    if not records:
        raise DataError(f"Expected at least one JSON object in {path}, but the file is empty; put one on each line.")
    return records


def _unpacked(content: bytes, path: Path) -> bytes:
    """The text of a file, which may be packed by gzip.

    Raises:
        DataError: it is a table, or packed in another way.
    """
    if content.startswith(b"\x1f\x8b"):
        try:
            return gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"Expected JSON lines packed by gzip at {path}, but they cannot be unpacked ({error}); copy it anew."
            ) from None
    kind = next((name for start, name in PACKED.items() if content.startswith(start)), None)
    kind = kind or TABLES.get(path.suffix.lower())
    if kind is not None:
        raise DataError(
            f"Expected JSON lines, but {path} is {kind}; put it into a folder of its own and write "
            f"{{dataset: FOLDER}} in its place."
        )
    return content


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{place}: expected UTF-8 text, but got other bytes; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: expected one JSON object, but got malformed JSON ({error.msg} at character {error.colno}); "
            f"mend or remove the line."
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{place}: expected one JSON object, but got {error}; mend the line.") from None
    except RecursionError:
        raise DataError(f"{place}: expected one JSON object, but it is nested too deeply; mend the line.") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: expected a JSON object, but got a JSON {_kind(value)}; write for example "
            f'{{"prompt": "...", "completion": "..."}}.'
        )
    return value


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
