"""Which augmenting positions an anchor position may see, where the two streams do not advance token by token.

Every augmenting position has an *owner*: the anchor position whose token it stands for. An anchor position sees the
augmenting positions whose owner is not later than itself. For a monotone stream that is the frontier of the method:
the number of augmenting tokens whose bytes end at or before the end of the anchor's token. Positions of an encoded
prompt, image or sound have owner 0 and are seen by all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calmlm.connectors.cross_attention import Rotation, rotary_angles

NOBODY = -1


class Frontier:
    """The record of both streams so far: it moves with the caches through beams, crops and resets.

    Attributes:
        ids: (B, L) int64, the anchor's tokens; ``NOBODY`` at padding.
        owner: (B, S) int64, the anchor position that owns each augmenting position; ``NOBODY`` where a row is filled.
        tokens: (B, S) int64, the augmenting tokens of a model that reads the text in tokens of its own, else None. Rows
            are filled on the left, so that distances between columns are distances between tokens in every row.
        left: (B, S) float32, which part of its owner's bytes follows each augmenting token; None where nobody knows.
        told: (B, L) bool, which of the anchor's tokens were given and not generated; None where that does not matter.
        chosen: (B, S) int64, during a call that reads branches the columns that stay when it ends; else None.
        given: the inputs of an encoder that has run.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.owner: Tensor | None = None
        self.tokens: Tensor | None = None
        self.left: Tensor | None = None
        self.told: Tensor | None = None
        self.chosen: Tensor | None = None
        self.given: Any = None

    @property
    def length(self) -> int:
        """Anchor positions so far."""
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def width(self) -> int:
        """Augmenting positions so far."""
        return 0 if self.owner is None else self.owner.shape[1]

    def previous(self, count: int, like: Tensor) -> Tensor:
        """The last ``count`` real anchor ids of each row, (B, count), ``NOBODY`` where there are fewer."""
        missing = like.new_full((like.shape[0], count), NOBODY)
        if self.ids is None:
            return missing
        real = self.ids != NOBODY
        if real.shape[1] >= count and bool(real[:, -count:].all()):
            return self.ids[:, self.length - count :]
        # A stable sort moves padding to the front and keeps the order of real tokens.
        order = real.long().argsort(dim=1, stable=True)
        return torch.cat((missing, self.ids.gather(1, order)), dim=1)[:, -count:]

    def extend(self, ids: Tensor, real: Tensor, owner: Tensor | None = None, told: Tensor | None = None) -> None:
        """Append new anchor tokens (B, T) and, unless ``append`` did, the owners (B, S) of theirs.

        Owners are counted from the first new token.
        """
        if told is not None:
            self.told = told if self.told is None else torch.cat((self.told, told), dim=1)
        if owner is not None:
            owner = owner.where(owner == NOBODY, owner + self.length)
            self.owner = owner if self.owner is None else torch.cat((self.owner, owner), dim=1)
        ids = ids.where(real, torch.full_like(ids, NOBODY))
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)

    def append(self, tokens: Tensor, owner: Tensor) -> Shift:
        """Append new augmenting tokens (B, n), rows filled on the right, with their owners counted as in ``extend``.

        Returns:
            by how many columns each row has moved; the caches have to follow.
        """
        return self.go_on(tokens, owner.where(owner == NOBODY, owner + self.length))

    def go_on(self, tokens: Tensor, owner: Tensor, left: Tensor | None = None) -> Shift:
        """Append new augmenting tokens (B, n), rows filled on the right, with the columns that own them.

        Where rows have different numbers of new tokens, each row moves right until it ends in the last column, and the
        n columns that have to be run begin with tokens that were run before.

        Returns:
            by how many columns each row has moved; the caches have to follow.
        """
        missing = (owner == NOBODY).sum(1)
        if self.tokens is not None and self.owner is not None:
            tokens, owner = torch.cat((self.tokens, tokens), dim=1), torch.cat((self.owner, owner), dim=1)
        if left is not None and self.left is not None:
            left = torch.cat((self.left, left), dim=1)
        shift = Shift.of(missing, tokens.shape[1])
        tokens, owner = shift.move(tokens, 0), shift.move(owner, NOBODY)
        left = None if left is None else shift.move(left, 0.0)
        if shift.source is not None:  # rows that have moved may all begin with empty columns
            lead = int((owner == NOBODY).long().cumprod(1).sum(1).min())
            tokens, owner, shift = tokens[:, lead:], owner[:, lead:], Shift(shift.source, lead)
            left = None if left is None else left[:, lead:]
        self.tokens, self.owner, self.left = tokens, owner, left
        return shift

    def drop(self, gone: Tensor) -> tuple[int, Shift]:
        """Take back the last ``gone`` (B,) augmenting tokens of each row.

        Returns:
            how many columns go at the end of all rows, and how rows of which more go have moved then.
        """
        assert self.owner is not None
        assert self.tokens is not None
        count = int(gone.min())
        keep = self.width - count
        self._columns(lambda part: part[:, :keep])
        more = gone - count
        place = torch.arange(keep, device=more.device)
        self.owner = self.owner.masked_fill(place >= keep - more[:, None], NOBODY)
        shift = Shift.of(more, keep)
        self._shift(shift)
        return count, shift

    def hang(self, tokens: Tensor, owner: Tensor, left: Tensor) -> None:
        """Append augmenting tokens (B, n) that branch, rows filled on the right; ``choose`` ends that."""
        if self.tokens is not None and self.owner is not None and self.left is not None:
            tokens = torch.cat((self.tokens, tokens), dim=1)
            owner, left = torch.cat((self.owner, owner), dim=1), torch.cat((self.left, left), dim=1)
        self.tokens, self.owner, self.left = tokens, owner, left

    def choose(self, source: Tensor) -> None:
        """Keep of each row the columns ``source`` (B, S), negative where a row is filled."""
        self._shift(Shift(source))

    def _columns(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tokens, self.owner, self.left = (
            None if part is None else change(part) for part in (self.tokens, self.owner, self.left)
        )

    def _shift(self, shift: Shift) -> None:
        assert self.owner is not None
        self.owner = shift.move(self.owner, NOBODY)
        self.tokens = None if self.tokens is None else shift.move(self.tokens, 0)
        self.left = None if self.left is None else shift.move(self.left, 0.0)

    def mask(self, queries: int) -> Tensor:
        """What the last ``queries`` anchor positions may see: (B, 1, queries, S) bool."""
        assert self.owner is not None
        position = torch.arange(self.length - queries, self.length, device=self.owner.device)
        owner = self.owner[:, None, None]
        return (owner != NOBODY) & (owner <= position[:, None])

    def rotations(self, queries: int, keys: int, head_dim: int) -> tuple[Rotation, Rotation]:
        """Rotary angles of the last ``queries`` anchor positions and the last ``keys`` augmenting positions.

        Distances are counted in anchor tokens. An encoded item stands where its owner stands; of several augmenting
        tokens that share an owner, the last one does, and those before it at equal steps since the anchor token before.
        """
        assert self.ids is not None
        assert self.owner is not None
        counted = ((self.ids != NOBODY).long().cumsum(1) - 1).clamp(min=0)
        owner = self.owner.clamp(min=0)
        last = self.length - 1  # an encoded item may belong to a token that is still to come
        of_keys = (counted.gather(1, owner.clamp(max=last)) + (owner - last).clamp(min=0)).float()
        if self.left is not None:
            of_keys = of_keys - self.left
        elif self.tokens is not None:
            of_keys = of_keys - self._unfinished()
        of_queries = counted[:, self.length - queries :]
        return rotary_angles(of_queries, head_dim), rotary_angles(of_keys[:, self.width - keys :], head_dim)

    def _unfinished(self) -> Tensor:
        """Which part of its anchor token follows each augmenting token, (B, S) float32, from 0 to below 1."""
        assert self.owner is not None
        group = self.owner + 1  # columns are in the order of their owners, empty ones first
        sizes = group.new_zeros((group.shape[0], self.length + 1)).scatter_add_(1, group, torch.ones_like(group))
        starts = sizes.cumsum(1) - sizes
        rank = torch.arange(self.width, device=group.device) - starts.gather(1, group)
        size = sizes.gather(1, group)
        return (size - 1 - rank).float() / size

    # Changes of the record

    def forget(self, columns: Tensor) -> tuple[Shift, bool]:
        """Take anchor tokens for padding that were read as text: those in which generation has filled up ended rows.

        Args:
            columns: (B, L) bool, which ones.

        Returns:
            how rows have moved whose last augmenting tokens stood for such columns, and whether nothing but these had
            to go; what was read after any other one has seen it.
        """
        assert self.ids is not None
        assert self.owner is not None
        if self.tokens is None:
            self.ids = self.ids.masked_fill(columns, NOBODY)
            return Shift(None), True
        gone = columns.gather(1, self.owner.clamp(min=0)) & (self.owner != NOBODY)
        last = gone.flip(1).long().cumprod(1).sum(1)  # how many at the end of each row
        if bool((gone.sum(1) > last).any()):
            return Shift(None), False
        self.ids = self.ids.masked_fill(columns, NOBODY)
        self.owner = self.owner.masked_fill(gone, NOBODY)
        shift = Shift.of(last, self.width)
        self._shift(shift)
        return shift, True

    def crop(self, tokens: int) -> tuple[int, Shift | None]:
        """Forget the last ``tokens`` anchor positions.

        Returns:
            how many augmenting positions go with them in every row, and how rows of which more go have moved then.
        """
        if self.ids is None or self.owner is None:
            return 0, None
        self.ids = self.ids[:, : self.length - tokens]
        self.told = None if self.told is None else self.told[:, : self.length]
        if self.tokens is None and self.length:
            return 0, None  # an encoded item belongs to tokens that may come again
        self.owner = self.owner.where(self.owner < self.length, torch.full_like(self.owner, NOBODY))
        used = (self.owner != NOBODY).any(0).nonzero()
        keep = int(used[-1]) + 1 if len(used) else 0
        gone = self.width - keep
        self.owner = self.owner[:, :keep]
        if self.tokens is None:
            return gone, None
        self.tokens = self.tokens[:, :keep]
        self.left = None if self.left is None else self.left[:, :keep]
        # How many columns at the end of each row are empty now.
        missing = (self.owner != NOBODY).flip(1).long().cumsum(1).eq(0).sum(1)
        shift = Shift.of(missing, keep)
        self._shift(shift)
        return gone, shift

    def select(self, rows: Tensor) -> None:
        """Keep and reorder rows."""
        self._each(lambda part: part[rows.to(part.device)])

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        self._each(lambda part: part.repeat_interleave(times, 0))

    def reset(self) -> None:
        """Forget everything."""
        self.ids = self.owner = self.tokens = self.left = self.told = self.chosen = self.given = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.ids, self.told = (None if part is None else change(part) for part in (self.ids, self.told))
        self._columns(change)


@dataclass(frozen=True)
class Shift:
    """By how many columns each row of a cache has moved to the right; what leaves at the end is dropped.

    Attributes:
        source: (B, S) int64, from which column each one is taken, negative where there is none; None where no row
            has moved.
        lead: how many columns are empty in all rows then, and dropped.
    """

    source: Tensor | None
    lead: int = 0

    @classmethod
    def of(cls, columns: Tensor, width: int) -> Shift:
        """Move each row of ``width`` columns by ``columns`` (B,)."""
        if not bool(columns.any()):
            return cls(None)
        return cls(torch.arange(width, device=columns.device) - columns[:, None])

    def move(self, part: Tensor, fill: Any) -> Tensor:
        """Move the columns of ``part`` (B, S)."""
        if self.source is None:
            return part
        moved = part.gather(1, self.source.clamp(min=0))
        return moved.masked_fill(self.source < 0, fill)

    def move_states(self, states: Tensor, opening: int = 0) -> Tensor:
        """Move the columns of keys or values (B, heads, S' <= S, width); what moves in is never looked at.

        Args:
            states: in the order of the columns, behind ``opening`` others that stay.
        """
        if opening:
            return torch.cat((states[:, :, :opening], self.move_states(states[:, :, opening:])), dim=2)
        if self.source is None or states.shape[-2] == 0:
            return states
        source = self.source[:, : states.shape[-2]].clamp(min=0).to(states.device)
        moved = states.gather(2, source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
        return moved[:, :, self.lead :]
