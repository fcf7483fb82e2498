"""Texts that are written together: a batch that others join, and that each leaves when it ends.

Every text has one row, and all rows end in the same column. A row that is shorter than the longest is padded on the
left. A text is what it would be alone: rows do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from calmlm.errors import CalmError
from calmlm.serving.lanes import Lane
from calmlm.state.concatenation import concatenate, cut

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2  # of logits, relative to the largest; another mask or position is far off
FAILS = (CalmError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(eq=False)
class Text:
    """A text that is being written.

    Attributes:
        ids: its tokens so far.
        given: how many of them were given.
        composed: whether the composition speaks in it.
    """

    ids: list[int]
    given: int
    composed: bool = True


class Batch:
    """The texts that one lane writes together.

    Attributes:
        texts: one for each row.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.texts: list[Text] = []
        self._cache: Cache | None = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)
        self._composed: Tensor | None = None

    @classmethod
    def begin(cls, lane: Lane, texts: Sequence[Text]) -> tuple[Batch, Tensor]:
        """Read texts; those that are equal one after the other are read once.

        Returns:
            the batch, and logits (texts, vocabulary) behind each.
        """
        batch, distinct, places = cls(lane), list[Text](), list[int]()
        for text in texts:
            if not distinct or (text.ids, text.composed) != (distinct[-1].ids, distinct[-1].composed):
                distinct.append(text)
            places.append(len(distinct) - 1)
        batch.texts = distinct
        logits = batch._read_all()
        if len(distinct) < len(texts):
            rows = torch.tensor(places, device=logits.device)
            batch._select(rows)
            logits = logits[rows]
        batch.texts = list(texts)
        return batch, logits

    @property
    def columns(self) -> int:
        """How long the longest text is."""
        return self._mask.shape[1]

    def join(self, other: Batch) -> None:
        """Take in the texts of another batch of this lane, which may not be used any more."""
        assert self._cache is not None
        assert other._cache is not None
        batches = (self, other)
        self._cache = concatenate(
            [batch._cache for batch in batches],  # type: ignore[misc]
            [batch.columns for batch in batches],
            [len(batch.texts) for batch in batches],
        )
        longest = max(batch.columns for batch in batches)
        self._mask = torch.cat([nn.functional.pad(b._mask, (longest - b.columns, 0)) for b in batches])
        self.texts += other.texts
        self._note_composed()

    def step(self) -> Tensor:
        """Read the last token of each text, which was added since; returns logits (texts, vocabulary) behind it."""
        length = self.columns
        if self._cache is None or any(length <= turn < length + 1 for turn in self.lane.turns_at):
            return self._read_all()
        ids = torch.tensor([[text.ids[-1]] for text in self.texts], device=self.lane.device)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        logits, self._cache = self.lane.read(ids, self._mask, self._cache, self._composed, None)
        return logits

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the texts at these places alone."""
        self.texts = [self.texts[place] for place in places]
        if not places:
            self._cache = None
            return
        self._select(torch.tensor(places, device=self._mask.device))
        if self._cache is None:
            return
        empty = int((self._mask.sum(0) == 0).long().cumprod(0).sum())
        if empty:
            cut(self._cache, empty)
            self._mask = self._mask[:, empty:]

    def _read_all(self) -> Tensor:
        """Read all texts from their beginning."""
        longest, device = max(len(text.ids) for text in self.texts), self.lane.device
        ids = torch.zeros((len(self.texts), longest), dtype=torch.long)
        mask, given = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(self.texts):
            begin = longest - len(text.ids)
            ids[row, begin:], mask[row, begin:], given[row, begin : begin + text.given] = (
                torch.tensor(text.ids),
                1,
                True,
            )
        self._mask = mask.to(device)
        self._cache = None
        self._note_composed()
        logits, self._cache = self.lane.read(ids.to(device), self._mask, None, self._composed, given.to(device))
        return logits

    def _select(self, rows: Tensor) -> None:
        self._mask = self._mask[rows]
        self._composed = None if self._composed is None else self._composed[rows]
        if self._cache is not None:
            self._cache.reorder_cache(rows)  # type: ignore[arg-type]
            self._tell_composed()

    def _note_composed(self) -> None:
        rows = [text.composed for text in self.texts]
        self._composed = None if all(rows) else torch.tensor(rows, device=self.lane.device)
        self._tell_composed()

    def _tell_composed(self) -> None:
        """A cache takes note of the rows that the composition speaks in, and refuses others."""
        if hasattr(self._cache, "composed"):
            self._cache.composed = self._composed  # type: ignore[union-attr]


@torch.no_grad()
def try_out(lane: Lane) -> None:
    """Find out whether a lane may decode texts of different lengths together, and read them together.

    Short texts are decoded alone and in a batch that is joined and left; where logits differ, the lane's texts are
    decoded one by one.
    """
    lane.joins = lane.pads = False
    if not lane.caches or not lane.even():
        return
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, lane.known_ids, (4, 12), generator=generator).tolist()
    texts = [row[:length] for row, length in zip(draw, (3, 7, 2, 9), strict=True)]
    following = [row[9:] for row in draw]
    try:
        alone = [_alone(lane, ids, new) for ids, new in zip(texts, following, strict=True)]
        for pads in (True, False):
            try:
                together = _together(lane, texts, following, pads)
            except FAILS:
                continue
            if all(_alike(one, other) for one, other in zip(alone, together, strict=True)):
                lane.joins, lane.pads = True, pads
                return
    except FAILS:
        return


def _alone(lane: Lane, ids: list[int], following: list[int]) -> list[Tensor]:
    batch, logits = Batch.begin(lane, [Text(list(ids), len(ids))])
    found = [logits[0]]
    for token in following:
        batch.texts[0].ids.append(token)
        found.append(batch.step()[0])
    return found


def _together(lane: Lane, texts: list[list[int]], following: list[list[int]], pads: bool) -> list[list[Tensor]]:
    """The same logits, where the second and third join after one step and the fourth after two, and leave in turn."""
    made = [Text(list(ids), len(ids)) for ids in texts]
    found: list[list[Tensor]] = [[] for _ in texts]

    def note(batch: Batch, logits: Tensor) -> None:
        for text, row in zip(batch.texts, logits, strict=True):
            found[made.index(text)].append(row)

    def begin(*places: int) -> Batch:
        new, logits = Batch.begin(lane, [made[place] for place in places])
        note(new, logits)
        return new

    batch = begin(0)
    arriving = {1: [(1, 2)] if pads else [(1,), (2,)], 2: [(3,)]}
    for step in range(1, 6):
        batch.keep([row for row, text in enumerate(batch.texts) if len(found[made.index(text)]) <= len(following[0])])
        for text in batch.texts:
            place = made.index(text)
            text.ids.append(following[place][len(found[place]) - 1])
        note(batch, batch.step())
        for places in arriving.get(step, ()):
            batch.join(begin(*places))
    return found


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    if len(one) != len(other):
        return False
    first, second = torch.stack(one).float(), torch.stack(other).float()
    tolerance = TOLERANCE if one[0].dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    return bool((first - second).abs().max() <= tolerance * first.abs().max().clamp(min=1e-6))
