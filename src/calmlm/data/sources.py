"""Where examples come from: JSONL files, and data sets by id or folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calmlm.data.extras import require
from calmlm.data.formats import Example, read_examples
from calmlm.data.jsonl import Record, read_jsonl
from calmlm.data.messages import without_nulls
from calmlm.errors import DataError, first_line
from calmlm.files.paths import Place


@dataclass(frozen=True)
class HubDataset:
    """A data set for `datasets.load_dataset`.

    Args:
        dataset: its id, or a folder of data files.
        split: its split; slices such as "train[:1000]" work.
        name: its configuration, where it has several.
        revision: a commit, branch or tag.
    """

    dataset: Place
    split: str = "train"
    name: str | None = None
    revision: str | None = None


def load_examples(sources: Sequence[str | HubDataset]) -> list[Example]:
    """The examples of all sources, in order, in one format.

    Raises:
        DataError: there is no source, one is missing, empty or malformed, or formats are mixed.
        MissingExtraError: a data set is named and `datasets` is not installed.
    """
    records: list[Record] = []
    for source in sources:
        records += read_hub(source) if isinstance(source, HubDataset) else read_jsonl(source)
    if not records:
        raise DataError("Expected at least one source of data, but the list of them is empty; name a file.")
    return read_examples(records)


def read_lines(path: str) -> list[str]:
    """The lines of a file of plain text that hold anything; a mark of byte order before them is none of it.

    Raises:
        DataError: there is no such file, it is not UTF-8, or it is empty.
    """
    try:
        found = [line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Expected a file of plain text in UTF-8 at {path}, but it cannot be read ({first_line(error)}); check the "
            f"path."
        ) from None
    if not found:
        raise DataError(f"Expected text in {path}, but the file is empty; name another.")
    return found


def read_hub(source: HubDataset) -> list[Record]:
    """The records of a data set, each placed by its row, counted from 1."""
    require("datasets", "train", "Reading a data set by its id")
    import datasets

    if Path(source.dataset).is_file():
        raise DataError(
            f"Expected the id of a data set or a folder in 'dataset', but {source.dataset} is a file; name its folder, "
            f"which holds nothing else, or write JSON lines as a path alone."
        )
    try:
        loaded = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
        rows = list(loaded)  # which decodes them
    except Exception as error:  # the loader raises whatever a data set's files and the network give rise to
        reason = str(error).strip().splitlines()
        raise DataError(
            f"Expected a data set '{source.dataset}' with the split '{source.split}', but it could not be loaded "
            f"({reason[0] if reason else type(error).__name__}); check its id, name, split and revision, and the "
            f"connection to the hub."
        ) from error
    records = [
        Record({key: without_nulls(value) for key, value in row.items()}, f"{source.dataset}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    if not records:
        raise DataError(
            f"Expected at least one row in {source.dataset}, split '{source.split}', but it is empty; name another."
        )
    return records
