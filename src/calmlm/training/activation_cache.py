"""What frozen augmenting models make of the training data, read once and kept for later epochs and runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmlm.bases.embeddings import embedding_size
from calmlm.bases.fingerprint import SAMPLE, fingerprint
from calmlm.bases.sharding import is_absent, is_spread
from calmlm.config import opening_of
from calmlm.connectors import CONNECTORS
from calmlm.errors import ConfigError, DataError
from calmlm.modeling.shortcut import ANCHOR, Shortcut
from calmlm.readers import Inputs, given_of, prompt_of
from calmlm.readers.kept_states import Reading, States
from calmlm.state.past import Past
from calmlm.training.cache_settings import UNITS, CacheConfig, bytes_of, number_bytes
from calmlm.training.state_shards import SHARD_BYTES, Shards, size_of

__all__ = ["ActivationCache", "bytes_needed"]

SCALE, WHOLE = ".scale", ".whole"
ANCHOR_FOLDER = "anchor.stream"  # no augmenting model has a dot in its name


class ActivationCache:
    """Keeps states of augmenting models by what these read; see ``calmlm.readers.kept_states``.

    A text is known by the model's own tokens and all else that decides on its states. So another tokenizer, template or
    alignment finds nothing here rather than something wrong; another model or other layers are refused.

    Args:
        config: how much is kept, where and in which form.
        model: the composition that trains.
        folder: on disk, where.
        report: takes lines of progress.
        precision: what autocasts numbers in training, such as "bf16"; states of another one are refused.

    Attributes:
        keeps_anchor: whether the anchor's stream is kept as well.
        shortcuts: see ``calmlm.modeling.shortcut``.

    Raises:
        CheckpointError: the folder holds states of other models.
        ConfigError: it cannot be written to.
    """

    def __init__(
        self, config: CacheConfig, model: Any, folder: Path, report: Any = print, precision: str = "none"
    ) -> None:
        self.config, self.folder, self.report = config, folder, report
        self.model = model.model
        self.budget = None if config.budget is None else bytes_of(config.budget)
        self.keeps_anchor = config.keeps_anchor(self.model.untouched(), len(self.model.backbone().layers))
        self.shortcuts: dict[int, Shortcut] = {}
        names = [*self.model.augmenting, *([ANCHOR] if self.keeps_anchor else [])]
        self.dtypes = {name: self.model.backbone(name).dtype for name in names}
        self.stores: dict[str, Shards | Memory] = {
            name: Shards(
                folder / (name or ANCHOR_FOLDER), about(model, name, config, precision), _shard_bytes(self.budget)
            )
            if config.mode == "disk"
            else Memory()
            for name in names
        }
        self.counts = Counts()
        if self.budget is not None:  # of all processes, and with what earlier runs have kept
            there = sum(store.size for store in self.stores.values())
            self.budget = max(0, self.budget - there) // int(os.environ.get("WORLD_SIZE", "1"))
        self._said: set[str] = set()

    @contextmanager
    def recording(self) -> Iterator[ActivationCache]:
        """Within this context the composition takes known states from here; what is new is written at its end."""
        before, self.model.slot.recorder = self.model.slot.recorder, self
        try:
            yield self
        except BaseException:
            self.model.slot.recorder = before
            with suppress(ConfigError):  # what ended the run says more
                self.flush()
            raise
        self.model.slot.recorder = before
        self.flush()

    def flush(self) -> None:
        """Write what has not been written yet; where that cannot be, what was trained is worth more."""
        for store in self.stores.values():
            try:
                store.flush()
            except ConfigError as error:
                self._say(f"{error} The training goes on without what it has just read.")

    # What readers ask for

    def recall(self, name: str, rows: Sequence[Reading]) -> list[States] | None:
        """The states of all these rows, or None where some of them are not there."""
        start = time.perf_counter()
        found: list[States] = []
        for row in rows:
            record = self.stores[name].get(row.key)
            if record is None:
                break
            found.append(_decoded(record, self.dtypes[name]))
        whole = len(found) == len(rows)
        if not whole and name != ANCHOR and self.config.on_missing == "warn":
            self._say(f"The activation cache lacks states of {name!r}: they are generated.")
        if torch.distributed.is_initialized() and is_spread(self.model):  # it runs in all processes or in none
            flag = torch.tensor(int(whole), device=self.model.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
            whole = bool(flag)
        if not whole:
            return None
        self.counts.texts += len(rows) if name != ANCHOR else 0
        self.counts.tokens += sum(row.length for row in rows)
        self.counts.seconds += time.perf_counter() - start
        return found

    def record(self, name: str, rows: Sequence[Reading], states: Sequence[States]) -> list[States] | None:
        """Take what the model ``name`` has made of these rows.

        Returns:
            the states to go on with, where those of some rows were there already.

        Raises:
            DataError: for numbers that are not finite.
        """
        held = False
        self.counts.generated += len(rows) if name != ANCHOR else 0
        for row, own in zip(rows, states, strict=True):
            if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
                raise DataError(
                    f"Expected finite states of the {_role(name)}, but got NaN or infinity for a text of "
                    f"{row.length} tokens: leave that example out, or load the model in float32."
                )
            held = held or row.key in self.stores[name]
            if self.config.on_generate == "delete" or row.key in self.stores[name]:
                continue
            record = _encoded(own, self.config.dtype)
            size = size_of(record)
            if self.budget is not None and self.counts.bytes + size > self.budget:
                self._say(f"The activation cache is full ({self.config.budget}): other texts are read each time.")
                continue
            self.counts.bytes += size
            self.stores[name].put(row.key, record)
        if not held or is_spread(self.model):  # whose processes do the same, whatever each of them knows
            return None
        kept = [self.stores[name].get(row.key) for row in rows]
        return [_decoded(record, self.dtypes[name]) for record in kept if record is not None] if all(kept) else None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.report(line)

    # Before the first step

    def known(self, rows: Sequence[dict[str, Any]]) -> list[bool]:
        """Whether the states of each example are there."""
        looking = Looking(self.stores)
        found = []
        for row in rows:
            looking.whole = True
            _read(self.model, row, looking)
            found.append(looking.whole)
        return found

    def check_room(self, rows: Sequence[dict[str, Any]]) -> int:
        """How many bytes the states of these texts take beside what is there, estimated from some of them.

        Raises:
            ConfigError: there is less room on the disk.
        """
        needed = bytes_needed(self.model, rows, self.config.dtype, anchor=self.keeps_anchor)
        some = rows[:: max(1, len(rows) // SAMPLED)]
        needed = round(needed * (1 - sum(self.known(some)) / max(1, len(some))))
        if self.budget is not None:
            needed = min(needed, self.budget)
        if self.config.mode == "disk" and self.config.on_generate == "cache":
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise ConfigError(
                    f"The activation cache needs {needed:,} bytes in {self.folder}, but its disk has {free:,} left: "
                    f"name a folder elsewhere, set a lower activation_cache.budget, or dtype: int8."
                )
        return needed

    def summary(self) -> str:
        """One sentence about what was read and made."""
        found = self.counts
        speed = f" at {found.tokens / found.seconds:,.0f} tokens a second" if found.seconds else ""
        return (
            f"Activation cache: {found.texts:,} texts ({found.tokens:,} tokens) were read{speed}, {found.generated:,} "
            f"were generated, {found.bytes / UNITS['MiB']:,.1f} MiB of them kept."
        )


@dataclass
class Counts:
    """What a cache has done."""

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    generated: int = 0
    bytes: int = 0


@dataclass
class Memory:
    """Records in memory, as ``Shards`` keeps them on disk."""

    records: dict[bytes, dict[str, Tensor]] = field(default_factory=dict)
    size: int = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self.records

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of a record, or None."""
        return self.records.get(key)

    def put(self, key: bytes, record: dict[str, Tensor]) -> None:
        """Take a record."""
        self.records[key] = record

    def flush(self) -> None:
        """Nothing: all is there."""


@dataclass
class Looking:
    """A recorder that counts tokens and asks whether their states are there, and lets no model run."""

    stores: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    tokens: dict[str, int] = field(default_factory=dict)

    def recall(self, name: str, rows: Sequence[Reading]) -> list[States]:
        """Nothing, for as many rows."""
        self.whole &= all(row.key in self.stores.get(name, ()) for row in rows)
        self.tokens[name] = self.tokens.get(name, 0) + sum(row.length for row in rows)
        return [{} for _ in rows]

    def record(self, name: str, rows: Sequence[Reading], states: Sequence[States]) -> None:
        """Not called."""


def about(model: Any, name: str, config: CacheConfig, precision: str) -> dict[str, Any]:
    """What states of a model belong to, beside what it has read."""
    if name == ANCHOR:
        return {
            "format": 1,
            "model": identity(model.anchor),
            "dtype": str(model.model.backbone().dtype).removeprefix("torch."),
            "precision": precision,
            "kept_as": config.dtype,
            "layers": [model.model.untouched()],
        }
    entry = model.config.augmenting[name]
    connector = entry["connector"]
    return {
        "format": 1,
        "model": identity(model.augmenting[name]),
        "dtype": str(model.model.backbone(name).dtype).removeprefix("torch."),
        "precision": precision,
        "kept_as": config.dtype,
        "layers": sorted({i for i, _ in entry["connections"]}),
        "words": bool(entry.get("words")),
        "opening": list(opening_of(entry)),
        "connector": [connector.get("kind"), connector.get("ingestor"), connector.get("top_k")],
        "anchor": identity(model.anchor) if connector.get("ingestor") == "anchor" else None,
    }


def identity(model: Any) -> dict[str, Any]:
    """What tells a model as it is loaded now: its weights, quantised or not, and its configuration."""
    settings = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "name"))}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    found = fingerprint(model)
    if found["values"] is None:
        for _, tensor in model.named_parameters():
            for part in _parts(tensor.detach()):
                some = part.reshape(-1)[:: max(1, part.numel() // SAMPLE)][:SAMPLE].cpu().contiguous()
                digest.update(some.view(torch.uint8).numpy().tobytes())
    return {**found, "configuration": digest.hexdigest()}


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantiser's tensor is made of; none of what other processes hold."""
    if is_absent(tensor):
        return
    if type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor.data
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


SAMPLED = 200  # examples by which the room is estimated


def bytes_needed(model: Any, rows: Sequence[dict[str, Any]], dtype: str | None, *, anchor: bool = False) -> int:
    """How many bytes the states of these examples take, from some of them; encoders are left out.

    Args:
        model: the composed model.
        rows: examples with ``input_ids`` and ``labels``, and texts with ``input_ids`` alone.
        dtype: in which states are kept; None for the models' own.
        anchor: whether the anchor's stream is kept as well.
    """
    step = max(1, len(rows) // SAMPLED)
    chosen = rows[::step]
    looking = Looking()
    for row in chosen:
        _read(model, row, looking)
    total = 0.0
    if anchor and model.untouched():
        measured = sum(len(row["input_ids"]) for row in chosen)
        each = number_bytes(dtype, model.backbone().dtype.itemsize)
        total += measured * (model.backbone().size * each + (4 if dtype == "int8" else 0))
    for name, tokens in looking.tokens.items():
        entry, backbone = model.config.augmenting[name], model.backbone(name)
        connector, words = entry["connector"], bool(entry.get("words"))
        layers, width, own = len({i for i, _ in entry["connections"]}), backbone.size, backbone.dtype.itemsize
        if CONNECTORS[connector["kind"]].reads_distribution:  # all connections take the same
            vectors = connector.get("ingestor") == "anchor"
            layers, width = 1, embedding_size(model.anchor) if vectors else backbone.vocab_size
            own = own if vectors else 4  # distributions are in float32
        scales = 4 * (layers + words) if dtype == "int8" else 0
        spoken = words * backbone.size * number_bytes(dtype, backbone.dtype.itemsize)
        total += tokens * (layers * width * number_bytes(dtype, own) + spoken + scales)
    return int(total * len(rows) / max(1, len(chosen)))


def _read(model: Any, row: dict[str, Any], recorder: Any) -> None:
    """Let a recorder see what the augmenting models would read of an example, or of a text without labels."""
    ids, prompt, told = torch.tensor([row["input_ids"]]), None, None
    names = [name for name in model.augmenting if model.config.augmenting[name]["reads"] != "inputs"]
    if "labels" in row:
        labels = torch.tensor([row["labels"]])
        prompt, told = (made.to(model.device) for made in (prompt_of(labels), given_of(labels, None)))
    inputs = Inputs(ids.to(model.device), None, None, prompt, None, told=told)
    before, model.slot.recorder = model.slot.recorder, recorder
    try:
        for name in names:
            model.reader(name).read(inputs, Past())
    finally:
        model.slot.recorder = before


def _role(name: str) -> str:
    return f"augmenting model {name!r}" if name else "anchor"


def _shard_bytes(budget: int | None) -> int:
    return SHARD_BYTES if budget is None else max(1, min(SHARD_BYTES, budget // 4))


def _encoded(states: States, dtype: str | None) -> dict[str, Tensor]:
    """States as they are kept: (n, D) each, one state of a whole text as (1, D)."""
    found = {}
    for layer, tensor in states.items():
        name = f"{layer}" if tensor.ndim > 1 else f"{layer}{WHOLE}"
        tensor = tensor if tensor.ndim > 1 else tensor[None]
        if dtype == "int8":
            scale = tensor.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            found[name + SCALE] = scale
            found[name] = (tensor.float() / scale).round().to(torch.int8)
        else:
            found[name] = (tensor.to(torch.bfloat16) if dtype == "bfloat16" else tensor).clone()
    return found


def _decoded(record: dict[str, Tensor], dtype: torch.dtype) -> States:
    """The inverse of ``_encoded``."""
    found = {}
    for name, tensor in record.items():
        if name.endswith(SCALE):
            continue
        scale = record.get(name + SCALE)
        tensor = (tensor if scale is None else tensor.float() * scale).to(dtype)
        found[int(name.removesuffix(WHOLE))] = tensor[0] if name.endswith(WHOLE) else tensor
    return found
