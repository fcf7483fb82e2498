"""The one thread in which models run: it admits texts, lets their batches step, and hands out what is written.

Other threads submit texts and cancel them. What is written is handed to each text's ``deliver``, in the thread of the
engine: it must return at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from calmlm.errors import CalmError
from calmlm.serving.admission import together
from calmlm.serving.batching import Batch
from calmlm.serving.lanes import Lane, Speaking
from calmlm.serving.metrics import Metrics
from calmlm.serving.next_token import Drawn, choose
from calmlm.serving.repetition import Lookup
from calmlm.serving.writing import Piece, Writing

PREFILL = 2048  # columns times rows that are read between two steps, so that running texts do not wait for long
log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """There is no place for more texts."""


class DrainingError(Exception):
    """The engine finishes what it has accepted and takes nothing new."""


class Engine:
    """Writes texts, many at a time.

    Args:
        max_batch: texts that are written at a time.
        max_queue: texts that may wait besides.
        max_length: tokens of the longest text; tells what a full cache is.
        drafts: tokens that are drafted at a time for a text that is written alone; 0 for none.
    """

    def __init__(self, max_batch: int, max_queue: int, max_length: int, drafts: int = 8) -> None:
        self.max_batch, self.max_queue, self.max_length, self.drafts = max_batch, max_queue, max_length, drafts
        self.metrics = Metrics()
        self.idle = threading.Event()
        self.idle.set()
        self._change = threading.Condition()
        self._waiting: list[Writing] = []
        self._running = 0  # written by the engine's thread alone
        self._draining = self._closing = False
        self._readings: list[tuple[Batch, list[Writing]]] = []
        self._batches: list[tuple[Batch, list[Writing]]] = []
        self._thread = threading.Thread(target=self._run, name="calmlm-engine", daemon=True)

    # For other threads

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining

    @property
    def full(self) -> bool:
        """Whether there is no place for one more text."""
        return self._running + len(self._waiting) >= self.max_batch + self.max_queue

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def submit(self, writings: Sequence[Writing]) -> None:
        """Take on texts, all of them or none.

        Raises:
            DrainingError: nothing new is taken.
            QueueFullError: there is no place for them.
        """
        with self._change:
            if self._draining or self._closing:
                raise DrainingError
            if self._running + len(self._waiting) + len(writings) > self.max_batch + self.max_queue:
                raise QueueFullError
            self._waiting += writings
            self.idle.clear()
            self.metrics.waiting.set(len(self._waiting))
            self._change.notify()

    def cancel(self, writings: Sequence[Writing]) -> None:
        """Give up texts that nobody waits for any more; their places are free with the next step."""
        with self._change:
            for writing in writings:
                writing.cancelled = True
            self._waiting = [writing for writing in self._waiting if not writing.cancelled]
            self.metrics.waiting.set(len(self._waiting))
            self._change.notify()

    def drain(self) -> None:
        """Take nothing new; ``idle`` is set when all that was accepted is written."""
        self._draining = True  # one assignment: a signal handler may not wait for a lock
        threading.Thread(target=self._wake, daemon=True).start()

    def close(self) -> None:
        """End the thread; texts that are not finished get an error."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    # The engine's own thread

    def _wake(self) -> None:
        with self._change:
            self._change.notify()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            arrived: list[Writing] = []
            try:
                with self._change:
                    while not (self._waiting or self._readings or self._batches or self._closing):
                        self.idle.set()
                        self._change.wait()
                    if self._closing:
                        break
                    arrived = [] if self._readings else self._admitted()
                if arrived:
                    self._begin(arrived)
                if self._readings:
                    self._read_on(*self._readings[0])
                for entry in list(self._batches):
                    self._step(*entry)
            except Exception as error:  # a fault of ours must not end the thread that all requests wait for
                log.exception("The engine failed; its texts are given up.")
                self._give_up(arrived, error)
            self._count()
        self._give_up([], DrainingError())
        self._count()
        self.idle.set()

    def _give_up(self, arrived: list[Writing], error: Exception) -> None:
        """End all texts with an error, those that wait included."""
        with self._change:
            left = [*arrived, *self._waiting, *self._taken()]
            self._waiting, self._readings, self._batches = [], [], []
        self._fail(list(dict.fromkeys(left)), error)

    def _taken(self) -> list[Writing]:
        """The texts that are read or written."""
        return [writing for _, writings in (*self._readings, *self._batches) for writing in writings]

    def _admitted(self) -> list[Writing]:
        """The next texts of one lane that there is room for, in the order in which they came."""
        room = self.max_batch - self._running
        if room <= 0 or not self._waiting:  # which is so in most steps of a busy engine, where many may wait
            return []
        asked = {writing.lane for writing in (*self._waiting, *self._taken()) if writing.of_several}
        running = {batch.lane for batch, _ in self._batches}
        found = [self._place(writing, running, len(asked) > 1) for writing in self._waiting]
        places = together([(*one, w.text.ids) for one, w in zip(found, self._waiting, strict=True)], room, PREFILL)
        chosen, taken = [self._waiting[place] for place in places], set(places)
        for place, writing in zip(places, chosen, strict=True):
            writing.place, writing.text.composed = found[place]
        self._waiting = [writing for place, writing in enumerate(self._waiting) if place not in taken]
        self._running += len(chosen)
        return chosen

    @staticmethod
    def _place(writing: Writing, running: set[Lane], several: bool) -> tuple[Lane, Speaking]:
        """The lane that writes a text, and who speaks in it.

        A text of the anchor's joins a composition's batch where there is one: they share a step. So do texts of several
        compositions while more than one of them is asked.
        """
        for lane, speaking in writing.beside:
            if several if writing.of_several else lane in running:
                return lane, speaking
        return writing.lane, True

    def _begin(self, writings: list[Writing]) -> None:
        """Take on texts of one lane, whose prompts are read from now on."""
        now = time.monotonic()
        lane = writings[0].place
        for writing in writings:
            writing.lookup = Lookup(self.drafts) if self.drafts and lane.drafts else None
            self.metrics.queued.labels(writing.name).observe(now - writing.arrived)
            self.metrics.prompt_tokens.labels(writing.name).inc(writing.text.given)
        self._readings.append((Batch(lane, [writing.text for writing in writings]), writings))

    def _read_on(self, batch: Batch, writings: list[Writing]) -> None:
        """Read a piece of texts, each alone where they fail together; behind the last one, take their first tokens and
        let them join their lane's batch."""
        lane = batch.lane
        if all(writing.cancelled for writing in writings):
            self._readings.pop(0)
            return
        try:
            logits = batch.read(PREFILL)
        except Exception as error:
            self._readings.pop(0)
            if len(writings) == 1 and lane is writings[0].lane:
                self._fail(writings, error)
            else:
                self._read_apart(writings)
            return
        if logits is None:
            return
        self._readings.pop(0)
        self._batches.append((batch, writings))
        self._take(batch, writings, logits)
        if not batch.texts:
            return
        entries = self._batches if batch.joins and lane.joins else []
        joining = (e for e in entries if e[0].lane is lane and e[0].joins and e[0] is not batch)
        other, others = next(joining, (None, []))
        if other is None:
            return
        self._batches = [entry for entry in self._batches if entry[0] is not batch]
        try:
            other.join(batch)
            others += writings
        except Exception as error:
            log.warning("A batch could not be joined (%s); its texts are written apart.", type(error).__name__)
            self._batches = [entry for entry in self._batches if entry[0] is not other]
            self._read_apart([*others, *writings])

    def _read_apart(self, writings: list[Writing]) -> None:
        """Have texts read from their beginning, each alone in its own lane and without drafts, where something was too
        much."""
        for writing in writings:
            writing.lookup, writing.place, writing.text.composed = None, writing.lane, True
        self._readings[:0] = [(Batch(w.lane, [w.text], joins=False), [w]) for w in writings]

    def _step(self, batch: Batch, writings: list[Writing]) -> None:
        """One token more for each text of a batch; several for a text that is written alone and says what it said."""
        self._leave(batch, writings, [place for place, writing in enumerate(writings) if writing.cancelled])
        if not writings:
            return
        draft: list[int] = []
        try:
            draft = self._draft(batch, writings)
            logits = batch.check(draft) if draft else batch.step()
        except Exception as error:
            log.warning("A step failed (%s); its texts are read again, each alone.", type(error).__name__)
            self._batches = [entry for entry in self._batches if entry[0] is not batch]
            self._read_apart(writings)
            return
        if draft:
            self._take_draft(batch, writings, draft, logits)
        else:
            self._take(batch, writings, logits)

    def _draft(self, batch: Batch, writings: list[Writing]) -> list[int]:
        """What may follow in a text that is written alone while nothing waits."""
        first = writings[0]
        if len(writings) > 1 or first.lookup is None or self._waiting or self._readings:
            return []
        room = first.room - (len(first.text.ids) - first.text.given) - 1  # one token is taken behind a draft
        return batch.readable(first.lookup.propose(first.text.ids, room))

    def _take_draft(self, batch: Batch, writings: list[Writing], draft: list[int], logits: torch.Tensor) -> None:
        """Take the next tokens of a text as without a draft, as long as it goes on as the draft does."""
        writing = writings[0]
        ids, before, accepted = writing.text.ids, len(writing.text.ids), 0
        for place in range(len(draft) + 1):
            self._take(batch, writings, logits[place : place + 1])
            same = ids[before:] == draft[: place + 1]
            accepted += same
            if not same or not writings:
                break
        assert writing.lookup is not None
        writing.lookup.learn(len(draft), accepted)
        self.metrics.drafted.labels(writing.name).inc(len(draft))
        self.metrics.accepted.labels(writing.name).inc(accepted)
        if writings:
            batch.take_back(len(draft) - accepted)

    def _take(self, batch: Batch, writings: list[Writing], logits: torch.Tensor) -> None:
        """Take the next token of each text, hand out what it adds, and let those leave that end."""
        ids = [writing.text.ids for writing in writings]
        drawn = choose([writing.chooser for writing in writings], ids, logits)
        now, ended = time.monotonic(), []
        for place, (writing, found) in enumerate(zip(writings, drawn, strict=True)):
            try:
                if isinstance(found, Exception):
                    raise found
                if self._add(writing, found, now):
                    ended.append(place)
            except Exception as error:  # what one text fails with is no other's concern
                self._fail([writing], error)
                ended.append(place)
        self._leave(batch, writings, ended)

    def _add(self, writing: Writing, drawn: Drawn, now: float) -> bool:
        """Add a token to a text; returns whether it ends there."""
        self.metrics.new_tokens.labels(writing.name).inc()
        since = self.metrics.first_token if writing.latest is None else self.metrics.between
        since.labels(writing.name).observe(now - (writing.arrived if writing.latest is None else writing.latest))
        writing.latest = now
        text = writing.text
        text.ids.append(drawn.token)
        place, fresh, finish = writing.transcript.length, "", None
        if drawn.token in writing.ends:
            finish = "stop"
        else:
            fresh = writing.transcript.add(drawn.token)
            grammar: Any = writing.chooser.grammar
            if writing.transcript.stopped or (grammar is not None and grammar.ended):
                finish = "stop"
            elif len(text.ids) - text.given >= writing.room or (
                writing.context is not None and bool(writing.context(torch.tensor([text.ids]), None)[0])
            ):
                finish = "length"
        if finish is not None:
            fresh += writing.transcript.finish()
            finish = "stop" if writing.transcript.stopped else finish
            self.metrics.whole.labels(writing.name).observe(now - writing.arrived)
        self._tell(writing, Piece(fresh, drawn, place, finish))
        return finish is not None

    def _leave(self, batch: Batch, writings: list[Writing], places: Sequence[int]) -> None:
        if not places:
            return
        gone = set(places)
        kept = [place for place in range(len(writings)) if place not in gone]
        batch.keep(kept)
        writings[:] = [writings[place] for place in kept]
        if not writings:
            self._batches = [entry for entry in self._batches if entry[0] is not batch]

    def _fail(self, writings: Sequence[Writing], error: Exception) -> None:
        if not isinstance(error, (CalmError, DrainingError)):
            log.error("A text failed: %s.", type(error).__name__, exc_info=error)
        for writing in writings:
            self._tell(writing, Piece(error=error))

    @staticmethod
    def _tell(writing: Writing, piece: Piece) -> None:
        try:
            writing.deliver(piece)
        except Exception:  # whoever waited is gone
            writing.cancelled = True

    def _count(self) -> None:
        with self._change:
            self._running = len(self._taken())
            self.metrics.running.set(self._running)
            self.metrics.waiting.set(len(self._waiting))
        cached = sum(len(writing.text.ids) for _, writings in self._batches for writing in writings)
        cached += sum(batch.columns * len(writings) for batch, writings in self._readings)
        self.metrics.cache.set(cached / (self.max_batch * self.max_length))
