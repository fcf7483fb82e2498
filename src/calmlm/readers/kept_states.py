"""What a frozen model made of a text, by what it read: a recorder may keep it, so that the model need not run again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Reading", "Recorder", "States", "gathered", "placed", "reading", "readings", "readings_of"]

States = dict[int, Tensor]
"""One row's states by layer, each (S, D_A)."""


@dataclass(frozen=True)
class Reading:
    """One row of a call, without its padding, or one text of a packed row.

    Attributes:
        key: 32 bytes that stand for all that the model is given: ids, positions, which token stands behind which.
        columns: of the call that hold the row, (S,) int64; None for all of them.
        length: how many there are, or 0 where only the model will tell.
        row: of the call, where several texts share one; None for as many readings as rows.
    """

    key: bytes
    columns: Tensor | None
    length: int
    row: int | None = None


class Recorder(Protocol):
    """Keeps what augmenting models make of texts."""

    def recall(self, name: str, rows: Sequence[Reading]) -> list[States] | None:
        """The states of all these rows, or None where some of them are not there."""
        ...

    def record(self, name: str, rows: Sequence[Reading], states: Sequence[States]) -> list[States] | None:
        """Take what the model ``name`` has made of these rows.

        Returns:
            the states to go on with where some rows were known already, else None. In another batch a text may come out
            with other last bits; with those of its first batch, a run that is resumed reads what this one has read.
        """
        ...


def reading(parts: Sequence[bytes], columns: Tensor | None, length: int) -> Reading:
    """A row that is known by these bytes; what stands in one part is not taken for the end of another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return Reading(digest.digest(), columns, length)


def readings(ids: Tensor, real: Tensor, *more: Tensor) -> list[Reading]:
    """The rows of a call by their tokens, and by where these stand if padding stands between them.

    Args:
        ids: (B, S) int64.
        real: (B, S) bool, which of them are no padding.
        more: further numbers of each token, (B or 1, S) int64.
    """
    ids, real = ids.cpu(), real.cpu().bool()
    others = [part.cpu().expand(ids.shape) for part in more]
    found = []
    for row, kept in enumerate(real):
        parts = [part[row, kept].long().numpy().tobytes() for part in (ids, *others)]
        columns = kept.nonzero()[:, 0]
        if len(columns) and int(columns[-1] - columns[0]) >= len(columns):
            parts.append((columns - columns[0]).numpy().tobytes())
        found.append(reading(parts, columns, len(columns)))
    return found


def readings_of(inputs: Any) -> list[Reading]:
    """The rows of a composition's call by the anchor's tokens, and by the positions that its caller gave.

    With these, several texts may share a row, and each is known as if it had one of its own.
    """
    if inputs.texts is not None:
        return _readings_of_texts(inputs)
    mask, positions = inputs.mask, inputs.positions
    real = torch.ones_like(inputs.ids) if mask is None else mask
    if positions is None:
        return readings(inputs.ids, real)
    positions = positions if positions.ndim == 2 else positions[0]
    return readings(inputs.ids, real, positions, torch.full_like(inputs.ids[:1], int(mask is None)))


def _readings_of_texts(inputs: Any) -> list[Reading]:
    texts, apart = inputs.texts, inputs.texts.apart(inputs)
    found = []
    rows = zip(readings_of(apart), texts.row.tolist(), texts.start.tolist(), texts.length.tolist(), strict=True)
    for known, row, start, length in rows:
        found.append(Reading(known.key, torch.arange(start, start + length), length, row))
    return found


def gathered(hidden: dict[int, Tensor], rows: Sequence[Reading]) -> list[States]:
    """The states of each row, on the CPU, without padding.

    Args:
        hidden: of the call, by layer, each (B, S, D_A), or (B, D_A) for one state of a whole row.
        rows: of the call.
    """
    on_cpu = {layer: states.detach().cpu() for layer, states in hidden.items()}
    places = [index if row.row is None else row.row for index, row in enumerate(rows)]
    return [
        {layer: s[place] if row.columns is None else s[place, row.columns] for layer, s in on_cpu.items()}
        for place, row in zip(places, rows, strict=True)
    ]


def placed(states: Sequence[States], rows: Sequence[Reading], width: int, device: torch.device) -> dict[int, Tensor]:
    """The inverse of ``gathered``; what stands in padding is zero.

    Args:
        states: of each row.
        rows: of the call.
        width: columns of the call.
        device: where the states go.
    """
    found = {}
    for layer, first in states[0].items():
        if rows[0].columns is None:
            found[layer] = torch.stack([row[layer] for row in states]).to(device)
            continue
        places = [index if row.row is None else row.row for index, row in enumerate(rows)]
        made = first.new_zeros((max(places) + 1, width, first.shape[-1]))
        for place, row, own in zip(places, rows, states, strict=True):
            made[place, row.columns] = own[layer]
        found[layer] = made.to(device)
    return found
