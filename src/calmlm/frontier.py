"""Which augmenting positions an anchor position may see, where the two streams do not advance token by token.

Every augmenting position has an *owner*: the anchor position whose token it stands for. An anchor position sees the
augmenting positions whose owner is not later than itself. For a monotone stream that is the frontier of the method:
the number of augmenting tokens whose bytes end at or before the end of the anchor's token. Positions of an encoded
prompt, image or sound have owner 0 and are seen by all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calmlm.connector import Rotation, rotary_angles

NOBODY = -1


class Frontier:
    """The record of both streams so far: it moves with the caches through beams, crops and resets.

    Attributes:
        ids: (B, L) int64, the anchor's tokens; ``NOBODY`` at padding.
        owner: (B, S) int64, the anchor position that owns each augmenting position; ``NOBODY`` where a row is filled.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.owner: Tensor | None = None

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
        # A stable sort moves padding to the front and keeps the order of real tokens.
        order = real.long().argsort(dim=1, stable=True)
        return torch.cat((missing, self.ids.gather(1, order)), dim=1)[:, -count:]

    def extend(self, ids: Tensor, real: Tensor, owner: Tensor) -> None:
        """Append new anchor tokens (B, T) and the owners (B, S) of theirs, counted from the first new one."""
        owner = owner.where(owner == NOBODY, owner + self.length)
        ids = ids.where(real, torch.full_like(ids, NOBODY))
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)
        self.owner = owner if self.owner is None else torch.cat((self.owner, owner), dim=1)

    def mask(self, queries: int) -> Tensor:
        """What the last ``queries`` anchor positions may see: (B, 1, queries, S) bool."""
        assert self.owner is not None
        position = torch.arange(self.length - queries, self.length, device=self.owner.device)
        owner = self.owner[:, None, None]
        return (owner != NOBODY) & (owner <= position[:, None])

    def rotations(self, queries: int, keys: int, head_dim: int) -> tuple[Rotation, Rotation]:
        """Rotary angles of the last ``queries`` anchor positions and the last ``keys`` augmenting positions.

        An augmenting position stands where its owner stands, so that distances are counted in anchor tokens.
        """
        assert self.ids is not None
        assert self.owner is not None
        counted = ((self.ids != NOBODY).long().cumsum(1) - 1).clamp(min=0)
        of_keys = counted.gather(1, self.owner[:, self.width - keys :].clamp(min=0))
        of_queries = counted[:, self.length - queries :]
        return rotary_angles(of_queries, head_dim), rotary_angles(of_keys, head_dim)

    # What generation does to a cache

    def crop(self, tokens: int) -> int:
        """Forget the last ``tokens`` anchor positions; returns how many augmenting positions go with them."""
        if self.ids is None or self.owner is None:
            return 0
        self.ids = self.ids[:, : self.length - tokens]
        self.owner = self.owner.where(self.owner < self.length, torch.full_like(self.owner, NOBODY))
        used = (self.owner != NOBODY).any(0).nonzero()
        keep = int(used[-1]) + 1 if len(used) else 0
        gone = self.width - keep
        self.owner = self.owner[:, :keep]
        return gone

    def select(self, rows: Tensor) -> None:
        """Keep and reorder rows."""
        if self.ids is not None and self.owner is not None:
            self.ids, self.owner = self.ids[rows.to(self.ids.device)], self.owner[rows.to(self.owner.device)]

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        if self.ids is not None and self.owner is not None:
            self.ids, self.owner = self.ids.repeat_interleave(times, 0), self.owner.repeat_interleave(times, 0)

    def reset(self) -> None:
        """Forget everything."""
        self.ids = self.owner = None
