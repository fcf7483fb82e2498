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
from calmlm.serving.lanes import Lane, Speaking
from calmlm.state.concatenation import concatenate, cut
from calmlm.state.taking_back import keep_what_leaves, take_back, takes_back

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2  # of logits, relative to the largest; another mask or position is far off
FAILS = (CalmError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(eq=False)
class Text:
    """A text that is being written.

    Attributes:
        ids: its tokens so far.
        given: how many of them were given.
        composed: whether the composition speaks in it, or which of its augmenting models do.
    """

    ids: list[int]
    given: int
    composed: Speaking = True


@dataclass
class Unread:
    """Texts that are read from their beginning.

    Attributes:
        texts: those that differ, one for each row.
        places: in which row each text of the batch is read.
        ids, mask, given: (rows, longest), as ``Lane.read`` takes them, padded on the left.
        done: how many columns were read.
    """

    texts: list[Text]
    places: list[int]
    ids: Tensor
    mask: Tensor
    given: Tensor
    done: int = 0

    @classmethod
    def of(cls, texts: Sequence[Text], device: torch.device) -> Unread:
        """Those that are equal one after the other are read once."""
        distinct, places = list[Text](), list[int]()
        for text in texts:
            if not distinct or (text.ids, text.composed) != (distinct[-1].ids, distinct[-1].composed):
                distinct.append(text)
            places.append(len(distinct) - 1)
        longest = max(len(text.ids) for text in distinct)
        ids = torch.zeros((len(distinct), longest), dtype=torch.long)
        mask, given = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(distinct):
            begin = longest - len(text.ids)
            ids[row, begin:], mask[row, begin:], given[row, begin : begin + text.given] = (
                torch.tensor(text.ids),
                1,
                True,
            )
        return cls(distinct, places, ids.to(device), mask.to(device), given.to(device))

    @property
    def even(self) -> bool:
        """Whether all texts are of one length, and as much of each was given."""
        return len({(len(text.ids), text.given) for text in self.texts}) == 1


class Batch:
    """The texts that one lane writes together.

    Args:
        lane: that writes them.
        texts: one for each row; ``read`` has to follow.
        joins: whether they may join the lane's other texts.
    """

    def __init__(self, lane: Lane, texts: Sequence[Text], *, joins: bool = True) -> None:
        self.lane, self.texts, self.joins = lane, list(texts), joins
        self._cache: Cache | None = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)
        self._composed: Tensor | None = None
        self._unread: Unread | None = None

    @classmethod
    def begin(cls, lane: Lane, texts: Sequence[Text]) -> tuple[Batch, Tensor]:
        """Read texts at once.

        Returns:
            the batch, and logits (texts, vocabulary) behind each.
        """
        batch = cls(lane, texts)
        return batch, batch._read_all()

    @property
    def columns(self) -> int:
        """How long the longest text is, as far as it was read."""
        return self._mask.shape[1]

    def read(self, cells: int | None = None) -> Tensor | None:
        """Read on from the beginning.

        Args:
            cells: columns times rows that are read now at most, where the lane can read in pieces; None reads all.

        Returns:
            logits (texts, vocabulary) behind each text once all is read, else None.
        """
        if self._unread is None:
            self._unread, self._cache = Unread.of(self.texts, self.lane.device), None
            self._note_composed(self._unread.texts)
        unread, done = self._unread, self._unread.done
        rows, length = unread.ids.shape
        end, whole = length, None
        if cells is not None and rows * length > cells and self.lane.pieces and unread.even:
            end, whole = min(length, done + max(1, cells // rows)), unread.ids[:, : unread.texts[0].given]
        self._mask, unread.done = unread.mask[:, :end], end
        logits, self._cache = self.lane.read(
            unread.ids[:, done:end], self._mask, self._cache, self._composed, unread.given, 1, whole
        )
        if end < length:
            return None
        self._unread = None
        if rows < len(self.texts):
            places = torch.tensor(unread.places, device=logits.device)
            self._select(places)
            logits = logits[places]
        return logits[:, -1]

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
        self._note_composed(self.texts)

    def step(self) -> Tensor:
        """Read the last token of each text, which was added since; returns logits (texts, vocabulary) behind it."""
        length = self.columns
        if self._cache is None or any(length <= turn < length + 1 for turn in self.lane.turns_at):
            return self._read_all()
        ids = torch.tensor([[text.ids[-1]] for text in self.texts], device=self.lane.device)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        logits, self._cache = self.lane.read(ids, self._mask, self._cache, self._composed, None)
        return logits[:, -1]

    def readable(self, draft: Sequence[int]) -> list[int]:
        """What may be read of a draft behind the only text."""
        return list(draft[: self.lane.readable(self.texts[0].ids, draft, self._cache)]) if draft else []

    def check(self, draft: Sequence[int]) -> Tensor:
        """Read the last token of the only text and a draft behind it; ``take_back`` has to follow.

        Returns:
            logits (1 + draft, vocabulary) behind each of these tokens.
        """
        assert self._cache is not None
        ids = torch.tensor([[self.texts[0].ids[-1], *draft]], device=self.lane.device)
        self._mask = nn.functional.pad(self._mask, (0, ids.shape[1]), value=1)
        keep_what_leaves(self._cache)
        logits, self._cache = self.lane.read(ids, self._mask, self._cache, self._composed, None, ids.shape[1])
        return logits[0]

    def take_back(self, count: int) -> None:
        """Forget the last ``count`` tokens of a draft that was checked."""
        assert self._cache is not None
        self._mask = self._mask[:, : self.columns - count]
        take_back(self._cache, count)

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
        """Read all texts from their beginning at once."""
        logits = self.read()
        assert logits is not None
        return logits

    def _select(self, rows: Tensor) -> None:
        self._mask = self._mask[rows]
        self._composed = None if self._composed is None else self._composed[rows]
        if self._cache is not None:
            self._cache.reorder_cache(rows)  # type: ignore[arg-type]
            self._tell_composed()

    def _note_composed(self, texts: Sequence[Text]) -> None:
        rows = [text.composed for text in texts]
        self._composed = None if all(row is True for row in rows) else torch.tensor(rows, device=self.lane.device)
        self._tell_composed()

    def _tell_composed(self) -> None:
        """A cache takes note of the rows that the composition speaks in, and refuses others."""
        if hasattr(self._cache, "composed"):
            self._cache.composed = self._composed  # type: ignore[union-attr]


@torch.no_grad()
def try_out(lane: Lane) -> None:
    """Find out whether a lane may decode texts of different lengths together, read them together and in pieces, check
    drafts, and let rows choose who speaks in them.

    Short texts are decoded alone and in a batch that is joined and left, read in pieces, and decoded with drafts; where
    logits differ, the lane's texts are decoded one by one, read at once, or decoded without drafts.
    """
    lane.joins = lane.pads = lane.pieces = lane.drafts = lane.chooses = False
    if not lane.caches or not lane.even():
        return
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, lane.known_ids, (4, 12), generator=generator).tolist()
    texts = [row[:length] for row, length in zip(draw, (3, 7, 2, 9), strict=True)]
    following = [row[9:] for row in draw]
    try:
        alone = [_alone(lane, ids, new) for ids, new in zip(texts, following, strict=True)]
        _try_pieces(lane, texts[-1], alone[-1])
        _try_drafts(lane, texts[-1], following[-1], alone[-1])
        _try_rows(lane, texts[-1])
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


def _try_pieces(lane: Lane, ids: list[int], alone: list[Tensor]) -> None:
    lane.pieces = True
    try:
        batch = Batch(lane, [Text(list(ids), len(ids))])
        while (logits := batch.read(4)) is None:
            pass
        lane.pieces = _alike(alone[:1], [logits[0]])
    except FAILS:
        lane.pieces = False


def _try_drafts(lane: Lane, ids: list[int], following: list[int], alone: list[Tensor]) -> None:
    """Decode with a draft of which the second token is taken back, and go on behind the first."""
    try:
        batch, logits = Batch.begin(lane, [Text(list(ids), len(ids))])
        assert batch._cache is not None
        if not takes_back(batch._cache):
            return
        text = batch.texts[0]
        text.ids.append(following[0])
        checked = batch.check([following[1], ids[0]])
        text.ids += following[1:]
        batch.take_back(1)
        lane.drafts = _alike(alone, [logits[0], *checked[:2], batch.step()[0]])
    except FAILS:
        return


def _try_rows(lane: Lane, ids: list[int]) -> None:
    """Read a text in which all speak beside one in which nobody does."""
    try:
        Batch.begin(lane, [Text(list(ids), len(ids), said) for said in (True, False)])
        lane.chooses = True
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
