"""A rewriting at work: the stream of an augmenting model's tokens, written from the whole history of a row.

What a token adds to the stream depends on the tokens up to it alone: it grows at its end and is exactly causal.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from calmlm.tokens.boundaries import class_of
from calmlm.tokens.parts import SavedTokenizer, literal_encoder
from calmlm.tokens.pieces import Writer
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import in_word, token_bytes
from calmlm.tokens.transcoding import Block, block_of
from calmlm.tokens.views import Event, Reading, Template

CONTEXT = 24  # characters before a segment that its tokens may depend on
KEPT = 4096  # how many places are kept from which writing can continue, over all rows; more if there are more rows
LATEST = 16  # such a place is kept after each of the last tokens of a call: a draft may be taken back to any of them
PARTS = 1 << 16  # pieces of text whose tokens are kept
STAND_INS = {"tool": "user", "developer": "system"}  # who says it in a template that does not know a role


class Rewriter(nn.Module):
    """A ``Rewriting`` at work; called like a ``Transcoder``, with the whole history of each row.

    Args:
        rewriting: what to do.
    """

    lookback: int | None = None

    def __init__(self, rewriting: Rewriting) -> None:
        super().__init__()
        self.alignment = rewriting
        self._prepare()

    def _prepare(self) -> None:
        given = self.alignment
        tokenizer = SavedTokenizer(given.tokenizer, given.unknown)
        self.writer = Writer(tokenizer)
        self.encode = literal_encoder(tokenizer.backend_tokenizer)
        self.stable = set(given.stable)
        self.pieces = token_bytes(tokenizer, "augmenting model") if given.own_template is not None else []
        self.raw = self.writer.write(b"\xf0") is not None  # whether it can write parts of characters
        self.write_piece = lru_cache(PARTS)(self.writer.write)
        self._places: dict[bytes, TextStream] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Tokenizers, and what they have written, are made again when the model is copied or unpickled.
        made = ("writer", "encode", "write_piece", "_places", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self, ids: Tensor, real: Tensor, previous: Tensor) -> Block:
        """Write the stream of new tokens.

        Args:
            ids: (B, T) int64 anchor ids.
            real: (B, T) bool, False at padding.
            previous: (B, P) int64, all real anchor ids before these, the latest last; negative where there are none.
        """
        rows = []
        for row, keep, before in zip(ids.tolist(), real.tolist(), previous.cpu(), strict=True):
            past = before[before >= 0].long().numpy()
            key = hashlib.blake2b(past.tobytes(), digest_size=16)
            stream = self._at(key.digest())
            if stream is None:
                stream = TextStream(self)
                for token in past.tolist():
                    stream.take(token)
            columns = [column for column, is_real in enumerate(keep) if is_real]
            written: list[tuple[int, int]] = []
            for place, column in enumerate(columns):
                written += [(token, column) for token in stream.take(row[column])]
                if not self.training:
                    key.update(row[column].to_bytes(8, "little"))
                    if place >= len(columns) - LATEST:
                        self._keep(key.digest(), copy.copy(stream), max(KEPT, 2 * len(ids)))
            rows.append(written)
        return block_of(rows, self.alignment.alignment.fill, ids)

    def _at(self, key: bytes) -> TextStream | None:
        """The stream after a text that ended a call, or nearly ended it: generation continues there."""
        with self._lock:
            found = self._places.get(key)
        return None if found is None else copy.copy(found)

    def _keep(self, key: bytes, stream: TextStream, most: int) -> None:
        with self._lock:
            self._places.pop(key, None)
            self._places[key] = stream
            if len(self._places) > most:
                del self._places[next(iter(self._places))]

    def write(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The augmenting tokens of one text, each with the position of the anchor token that brings it."""
        stream = TextStream(self)
        return [(token, owner) for owner, index in enumerate(ids) for token in stream.take(index)]

    def opening(self, own: Template, role: str, previous: str | None) -> Sequence[int]:
        """What opens a message of ``role`` after one of ``previous``, or as the first message."""
        if previous is not None:
            return own.opening(role, previous)
        if role in own.beginnings:
            return own.beginnings[role]
        # No sample began with this role: take the beginning of another conversation, and the role's own mark.
        for other, beginning in own.beginnings.items():
            mark = self._mark(own, other)
            if mark and beginning[-len(mark) :] == mark:
                return (*beginning[: -len(mark)], *self._mark(own, role))
        return self._mark(own, role)

    def _mark(self, own: Template, role: str) -> tuple[int, ...]:
        """The opening of a role without what follows the message before."""
        opening = tuple(own.openings.get(role, ()))
        special = [place for place, index in enumerate(opening) if self.pieces[index] is None]
        return opening[special[0] :] if special else opening


class TextStream:
    """One text as far as it has come: where it is in the anchor's template, and what is being written."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        template = rewriter.alignment.anchor_template
        self.reading = None if template is None else Reading(template)
        self.run = Run(rewriter)
        self.taken = 0  # tokens so far
        self.opened = False  # whether there was a message with content
        self.speaker: str | None = None  # of the latest message, in the augmenting model's template

    def __copy__(self) -> TextStream:
        new = object.__new__(type(self))
        vars(new).update(vars(self), reading=copy.copy(self.reading), run=copy.copy(self.run))
        return new

    def take(self, token: int) -> list[int]:
        """The augmenting tokens that one more token of the anchor brings."""
        given, run = self.rewriter.alignment, self.run
        run.out = []
        for event in self._events(token):
            if event.kind == "text":
                run.feed(event.text)
            elif event.kind == "special":
                run.end()
                assert event.token is not None
                usual = given.alignment.body[event.token]
                # One token may be both the beginning and the end of a text: its place tells.
                run.add(given.alignment.start.get(event.token, usual) if self.taken == 0 else usual)
            else:
                self._turn(event)
        self.taken += 1
        return run.out

    def _turn(self, event: Event) -> None:
        """Write what the augmenting model reads where a message begins and ends.

        In its own template it is told who speaks before anything is said; of bare content, a message without any is
        passed over. So is a system message without content: a template may open one for a date of its own alone.
        """
        given, run = self.rewriter.alignment, self.run
        own, role = given.own_template, event.role
        if event.kind in ("open", "close"):
            run.flush()
        if own is not None:
            # A template without a role for tools reads their answers as the user's, and so on.
            speaker = role if role in own.closings else STAND_INS.get(role, role)
            begins, ends = ("open", "close") if role == "system" else ("enter", "leave")
            if event.kind == begins:
                run.flush()
                run.enter(self.rewriter.opening(own, speaker, self.speaker))
                self.speaker = speaker
            elif event.kind == ends:
                run.enter(own.closings.get(speaker, ()))
        elif event.kind == "open":
            if self.opened:
                run.write(b"\n")  # keeps the messages apart
            elif given.begin is not None:
                run.add((given.begin,))
            self.opened = True

    def _events(self, token: int) -> Iterator[Event]:
        pieces = self.rewriter.alignment.pieces
        if self.reading is not None:
            yield from self.reading.events(self.taken, token, pieces)
            return
        piece = pieces[token] if token < len(pieces) else b""
        if piece is None:
            yield Event("special", self.taken, token=token)
        elif piece:
            yield Event("text", self.taken, piece)


class Run:
    """One run of text between special tokens or messages, written as it comes."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.out: list[int] = []  # what the latest token has brought
        self.raw = b""  # bytes that are no whole character yet
        self.text = ""  # characters that are not written yet
        self.before = ""  # characters that are, as far as they matter
        self.runs = 0  # that have ended
        self.fed = self.started = False  # whether this one has been given bytes, and has written any
        self.segment = True  # whether its first word stands where the tokenizer puts a space of its own

    def add(self, ids: Sequence[int]) -> None:
        """Tokens that are no text."""
        self.out += ids

    def feed(self, text: bytes) -> None:
        """Bytes of the text."""
        text = text if self.fed else self._undummied(text)
        self.fed = True
        if self.rewriter.alignment.method == "transcode" and (self.rewriter.raw or self._whole(text)):
            self.write(text)
            return
        self.raw += text
        whole, self.raw = split_bytes(self.raw)
        for part, is_text in whole:
            if not is_text:
                self._cut()
                self.write(part)
            elif self.rewriter.alignment.method == "transcode":
                self.write(part)
            else:
                self._characters(part.decode())

    def flush(self) -> None:
        """Write what was held back."""
        self._cut()
        if self.raw:
            self.write(self.raw)
        self.raw = b""

    def end(self) -> None:
        """No more bytes come."""
        self.flush()
        self.runs += self.started
        self.before, self.fed, self.started = "", False, False
        self.segment = self.runs == 0 or self.rewriter.writer.spelling.every_segment

    def enter(self, ids: Sequence[int]) -> None:
        """Tokens of a chat template: special ones, and text, which the text of a message follows."""
        pieces = self.rewriter.pieces
        for index in ids:
            self.add((index,))
            piece = pieces[index]
            if piece is None:
                self.started = True
                self.end()
            else:
                self.started, self.before = True, (self.before + piece.decode(errors="ignore"))[-CONTEXT:]

    def _undummied(self, text: bytes) -> bytes:
        """The first bytes of a run, without the space that the anchor's tokenizer has added."""
        dummy, every = self.rewriter.alignment.dummy
        own = dummy and self.rewriter.alignment.view is None and (every or self.runs == 0)
        return text.removeprefix(b" ") if own else text

    def _whole(self, piece: bytes) -> bool:
        return not self.raw and split_bytes(piece) == ([(piece, True)], b"")

    def _characters(self, text: str) -> None:
        for character in text:
            if self.text and (class_of(self.text[-1]), class_of(character)) in self.rewriter.stable:
                self._cut()
            self.text += character

    def _cut(self) -> None:
        """Write the characters up to here, as the tokenizer does in their place."""
        if not self.text:
            return
        encode = self.rewriter.encode
        if not self.started and not self.segment:  # its tokenizer would begin a text
            self.write(self.text.encode())
            self.text = ""
            return
        whole, lead = encode(self.before + self.text), encode(self.before) if self.before else []
        if whole[: len(lead)] == lead:
            self.add(whole[len(lead) :])
            self.started = True
        else:
            self.write(self.text.encode())
        self.before, self.text = (self.before + self.text)[-CONTEXT:], ""

    def write(self, piece: bytes) -> None:
        """Write bytes by themselves."""
        writer = self.rewriter.writer
        first = not self.started and self.segment
        new_word = writer.spelling.kind == "wordpiece" and not in_word(self.before[-1:])
        ids = self.rewriter.write_piece(piece, first or new_word)
        self.add(self.rewriter.alignment.alignment.unknown if ids is None else ids)
        self.started = True
        self.before = (self.before + piece.decode(errors="ignore"))[-CONTEXT:]


def split_bytes(raw: bytes) -> tuple[list[tuple[bytes, bool]], bytes]:
    """Whole characters (True) and bytes that can be none (False), in order, and an unfinished character at the end."""
    parts: list[tuple[bytes, bool]] = []
    while raw:
        try:
            raw.decode()
            return [*parts, (raw, True)], b""
        except UnicodeDecodeError as error:
            if error.start:
                parts.append((raw[: error.start], True))
            if error.reason == "unexpected end of data":
                return parts, raw[error.start :]
            parts.append((raw[error.start : error.end], False))
            raw = raw[error.end :]
    return parts, b""
