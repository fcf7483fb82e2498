"""A text on its way through the engine, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from calmlm.data.context import EndOfContext
from calmlm.serving.batching import Text
from calmlm.serving.lanes import CompositionLane, Lane, Speaking
from calmlm.serving.next_token import Chooser, Drawn
from calmlm.serving.repetition import Lookup
from calmlm.tokens.transcript import Transcript

__all__ = ["Piece", "Writing"]


@dataclass(frozen=True)
class Piece:
    """What one token adds to a text.

    Attributes:
        text: what it settles; often nothing.
        drawn: the token; None where none was taken.
        place: how many characters stood before it.
        finish: ``"stop"`` or ``"length"`` where the text ends with it.
        error: what ended the text instead.
    """

    text: str = ""
    drawn: Drawn | None = None
    place: int = 0
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Writing:
    """One text on its way through the engine.

    Attributes:
        text: its tokens.
        lane: that writes it.
        beside: other lanes in whose batch it may stand, and who speaks in its row there.
        chooser: takes its tokens.
        transcript: makes them text.
        ends: tokens that end it.
        room: how many tokens may be written.
        deliver: takes each piece.
        name: of the model, for metrics.
        context: ends it where a context of an augmenting model's own tokens does, or None.
        lookup: drafts what may follow, or None.
        place: the lane in whose batch it stands.
    """

    text: Text
    lane: Lane
    chooser: Chooser
    transcript: Transcript
    ends: frozenset[int]
    room: int
    deliver: Callable[[Piece], None]
    name: str
    beside: Sequence[tuple[CompositionLane, Speaking]] = ()
    context: EndOfContext | None = None
    lookup: Lookup | None = None
    place: Lane = field(init=False)
    arrived: float = field(default_factory=time.monotonic)
    latest: float | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.place = self.lane

    @property
    def of_several(self) -> bool:
        """Whether it may stand beside texts of other compositions, and its own composition speaks in it."""
        return any(isinstance(speaking, tuple) and any(speaking) for _, speaking in self.beside)
