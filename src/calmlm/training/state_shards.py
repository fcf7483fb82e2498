"""States on disk: shards of safetensors and an Arrow index, which several runs may read and add to.

    about.json                         what the states belong to; others are refused
    shard-<writer>-0000.safetensors    the states of many texts, one after the other
    index-<writer>.arrow               key, shard, offset and length of each text in the writer's shards

A shard is written beside its place and moved there, then the index likewise. So what an interrupted run leaves behind
is whole, or stands in no index and counts as missing. Whoever opens the folder an hour later removes the latter.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calmlm.data.extras import require
from calmlm.errors import CheckpointError, ConfigError, first_line
from calmlm.files.storage import write_atomically, write_text

__all__ = ["SHARD_BYTES", "Shards", "size_of"]

SHARD_BYTES = 1 << 30
ABANDONED = 3600.0
"""Seconds after which a file that stands in no index has no writer any more."""
ABOUT = "about.json"
COLUMNS = ("key", "shard", "offset", "length")
Record = Mapping[str, Tensor]
"""The tensors of one text, by name, each (n, ...) with the same n."""


def size_of(record: Record) -> int:
    """The bytes of a record."""
    return sum(tensor.numel() * tensor.element_size() for tensor in record.values())


class Shards:
    """Records of tensors by key.

    Args:
        folder: made if needed.
        about: what the records belong to, in plain JSON.
        shard_bytes: how large a shard may become before it is written.

    Raises:
        CheckpointError: the folder holds states of something else, or damaged files.
        ConfigError: it cannot be written to.
        MissingExtraError: without pyarrow.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
        require("pyarrow", "train", "An activation cache on disk")
        self.folder, self.shard_bytes = folder, shard_bytes
        self.writer = uuid.uuid4().hex[:8]
        self._check(dict(about))
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._own: list[tuple[bytes, str, int, int]] = []
        self._open: dict[str, Any] = {}
        self._waiting: dict[bytes, Record] = {}
        self._waiting_bytes = self._written = 0
        for path in sorted(folder.glob("index-*.arrow")):
            self._places.update((key, place) for key, *place in self._read(path))  # type: ignore[misc]
        self._sweep()

    def _check(self, about: dict[str, Any]) -> None:
        path = self.folder / ABOUT
        self._about = json.dumps(about, indent=2, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() or not any(self.folder.glob("index-*.arrow")):  # or nothing was ever kept
                write_text(path, self._about)
            found = self._found_about()
        except OSError as error:
            raise ConfigError(
                f"The activation cache must lie in a folder that can be written to, but {self.folder} cannot "
                f"({first_line(error)}): name another."
            ) from None
        if found != json.loads(self._about):
            other = [key for key in about if not isinstance(found, dict) or found.get(key) != about[key]]
            raise CheckpointError(
                f"{self.folder} must hold states of this composition's models and settings, but they were made with "
                f"another {', '.join(other) or 'form'}: name another folder, or remove this one."
            )

    def _found_about(self) -> Any:
        """What the records in the folder belong to; None where that cannot be read."""
        try:
            return json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        except ValueError:
            return None

    def _sweep(self) -> None:
        """Remove what a writer that was killed has left; one that lives takes less time to name its shard."""
        named = {shard for shard, *_ in self._places.values()}
        for path in (*self.folder.glob("shard-*.safetensors"), *self.folder.glob(".*")):
            with suppress(OSError):  # another process sweeps as well
                if path.name not in named and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def _read(self, path: Path) -> list[tuple[bytes, str, int, int]]:
        from pyarrow import feather

        try:
            table = feather.read_table(path, columns=list(COLUMNS))
            return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
        except Exception as error:  # Arrow raises different errors for different damage
            raise CheckpointError(
                f"{path} must be an index of an activation cache, but it cannot be read ({first_line(error)}): remove "
                f"the folder, and it is made anew."
            ) from None

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.safetensors"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._waiting or key in self._places

    def __len__(self) -> int:
        return len(self._waiting) + len(self._places)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of a record, or None.

        Raises:
            CheckpointError: its shard is missing or damaged.
        """
        if key in self._waiting:
            return dict(self._waiting[key])
        if key not in self._places:
            return None
        shard, offset, length = self._places[key]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.folder / shard, framework="pt").__enter__()
            file = self._open[shard]
            return {name: file.get_slice(name)[offset : offset + length] for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises different errors for different damage
            raise CheckpointError(
                f"{self.folder / shard} must be a shard of an activation cache, but it cannot be read "
                f"({first_line(error)}): remove the folder, and it is made anew."
            ) from None

    def put(self, key: bytes, record: Record) -> None:
        """Take a record, which is written with others when they fill a shard, or by ``flush``."""
        if key in self:
            return
        self._waiting[key] = record
        self._waiting_bytes += size_of(record)
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet.

        Raises:
            ConfigError: the disk is full, or cannot be written to, or other models' states lie in the folder by now.
        """
        if not self._waiting:
            return
        keys, shard = list(self._waiting), f"shard-{self.writer}-{self._written:04d}.safetensors"
        records = [self._waiting[key] for key in keys]
        lengths = [len(next(iter(record.values()))) for record in records]
        tensors = {name: torch.cat([record[name] for record in records]).contiguous() for name in records[0]}
        offset, places = 0, []
        with suppress(OSError):  # of which writing says more
            if self._found_about() != json.loads(self._about):
                raise ConfigError(
                    f"The activation cache needs a folder of its own, but {self.folder} has been taken since by a run "
                    f"with other models or settings: name another in activation_cache.folder."
                )
        for key, length in zip(keys, lengths, strict=True):
            places.append((key, shard, offset, length))
            offset += length
        try:
            write_atomically(self.folder / shard, lambda path: save_file(tensors, path))
            self._index([*self._own, *places])
        except (OSError, SafetensorError) as error:
            (self.folder / shard).unlink(missing_ok=True)  # in no index
            raise ConfigError(
                f"The activation cache needs room on the disk of {self.folder}, but writing failed "
                f"({first_line(error)}): free some, lower activation_cache.budget, or set activation_cache: off."
            ) from None
        self._own += places
        self._places.update((key, place) for key, *place in places)  # type: ignore[misc]
        self._written += 1
        self._waiting, self._waiting_bytes = {}, 0

    def _index(self, rows: list[tuple[bytes, str, int, int]]) -> None:
        import pyarrow
        from pyarrow import feather

        table = pyarrow.table(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))
        write_atomically(
            self.folder / f"index-{self.writer}.arrow", lambda path: feather.write_feather(table, str(path))
        )
