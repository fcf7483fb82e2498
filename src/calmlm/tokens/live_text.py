"""A text in an augmenting model's own tokens, at every point of it: what its tokenizer makes of the text so far.

The end of a text may be written in other tokens once the text goes on. So a text has two parts here: tokens that are
settled, and the text behind them, which is written anew whenever somebody asks. Text that was given as a whole (a
prompt) is settled where the first generated token follows it, and stays as it was read.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from calmlm.tokens.alignment import Alignment
from calmlm.tokens.boundaries import class_of
from calmlm.tokens.parts import literal, parts_of, read_backend
from calmlm.tokens.respelling import Respelling
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import flat, in_word, token_bytes
from calmlm.tokens.stream import CONTEXT, KEPT, Rewriter, Run, TextStream, split_bytes
from calmlm.tokens.transcoding import Transcoder

LONG = 128  # characters behind the settled ones from which on some are settled
GIVEN = 64  # texts that come in several calls, whose tokens are kept
RECENT = 48  # of these, so many stay open at least

Token = tuple[int, int, float]
"""An augmenting token: its id, the anchor's token in which its text ends (counted in its row without padding), and
which part of that token's bytes follows it."""

End = tuple[int, float]
"""Where a character ends: the last two parts of a ``Token``."""


def encoder(backend: Tokenizer, *, begins: bool) -> Any:
    """From a text to (id, end) pairs, ends counted in characters; what looks like a special token is text.

    Args:
        backend: a tokenizer.
        begins: whether the text is the beginning of one, before which some tokenizers put a space of their own.
    """
    data = parts_of(backend)
    for place, part in enumerate(flat(data["pre_tokenizer"], "pretokenizers")):
        if part["type"] == "ByteLevel":
            part["trim_offsets"] = False
            part["add_prefix_space"] = bool(part["add_prefix_space"]) and begins
        # What was cut into words before (T5) begins each of them so, and not the text alone.
        if part["type"] == "Metaspace" and not begins and (place == 0 or part["prepend_scheme"] == "first"):
            part["prepend_scheme"] = "never"
    if not begins and data["normalizer"] is not None:
        left = [part for part in flat(data["normalizer"], "normalizers") if part["type"] != "Prepend"]
        data["normalizer"] = {"type": "Sequence", "normalizers": left}
    reader = literal(backend, normalizer=data["normalizer"], pre_tokenizer=data["pre_tokenizer"])

    def encode(text: str) -> list[tuple[int, int]]:
        found = reader.encode(text, add_special_tokens=False)
        highest, pairs = 1, []
        for index, (_, end) in zip(found.ids, found.offsets, strict=True):
            highest = max(highest, end)
            pairs.append((index, highest))
        return pairs

    return encode


class OwnWriter(Rewriter):
    """A ``Rewriting`` whose method is ``"own"``, at work."""

    def _prepare(self) -> None:
        super()._prepare()
        backend = read_backend(self.alignment.tokenizer)
        self.at_beginning, self.inside = (encoder(backend, begins=begins) for begins in (True, False))
        self.lead = lru_cache(KEPT)(self.inside)
        self._given: dict[bytes, list[Token]] = {}

    def __getstate__(self) -> dict[str, Any]:
        made = ("at_beginning", "inside", "lead", "_given", "spelled", "respelling")
        return {key: value for key, value in super().__getstate__().items() if key not in made}

    @cached_property
    def spelled(self) -> list[bytes | None]:
        """The bytes of each augmenting token inside a text, None for special ones."""
        return token_bytes(self.writer.tokenizer, "augmenting model")  # type: ignore[arg-type]

    @cached_property
    def respelling(self) -> Respelling:
        """Writes what the augmenting model says in the anchor's tokens."""
        return Respelling(self.alignment.pieces)

    def resume(self, ids: np.ndarray, told: np.ndarray, *, branches: bool = True) -> OwnStream:
        """The stream behind the anchor tokens ``ids`` (n,) of one text; ``told`` (n,) bool marks those that were given.

        What was read lately is remembered, so that going on costs nothing.
        """
        with self._lock:
            found = self._places.get(_key(ids, told))
        if isinstance(found, OwnStream):
            return copy.copy(found)
        stream = OwnStream(self, branches=branches)
        for index, given in zip(ids.tolist(), told.tolist(), strict=True):
            stream.read(index, given)
        return stream

    def remember(self, ids: np.ndarray, told: np.ndarray, stream: OwnStream, most: int) -> None:
        """Keep where a text is, for ``resume``."""
        self._keep(_key(ids, told), copy.copy(stream), most)  # type: ignore[arg-type]

    def given(self, ids: np.ndarray, told: np.ndarray, *, branches: bool = True) -> list[Token]:
        """All tokens of a text (n,) whose end was given, which is read in several calls."""
        key = _key(ids, told)
        with self._lock:
            found = self._given.get(key)
        if found is None:
            stream = OwnStream(self, branches=branches)
            found = [token for row in zip(ids.tolist(), told.tolist(), strict=True) for token in stream.read(*row)]
            found += stream.pending()
            with self._lock:
                if len(self._given) >= GIVEN:
                    self._given.clear()
                self._given[key] = found
        return found

    def write(self, ids: Any) -> list[tuple[int, int]]:
        """The augmenting tokens of one text that was given as a whole, each with the anchor token that it ends in."""
        stream = OwnStream(self)
        settled = [token for index in ids for token in stream.read(index, True)]
        return [(index, owner) for index, owner, _ in (*settled, *stream.pending())]

    def continued(self, before: str, text: str, begins: bool) -> list[tuple[int, int]]:
        """The tokens of ``text`` behind ``before``, whose tokens stay: (id, end) pairs, ends counted in ``text``."""
        if begins:
            return self.at_beginning(text)
        before = before[-CONTEXT:]
        if not before:
            return self.inside(text)
        found = self._behind(before, text)
        if found is not None:
            return found
        # Its tokenizer would write one token over the end of the settled text: the rest of that word in pieces.
        stable = self.stable
        places = (k for k in range(1, len(text)) if (class_of(text[k - 1]), class_of(text[k])) in stable)
        end = next(places, len(text))
        head, tail = text[:end], text[end:]
        pieces = self.write_piece(head.encode(), self.writer.spelling.kind == "wordpiece" and not in_word(before[-1:]))
        written = [(index, end) for index in (self.alignment.alignment.unknown if pieces is None else pieces)]
        if not tail:
            return written
        rest = self._behind(head, tail)
        return written + [(index, end + place) for index, place in (self.inside(tail) if rest is None else rest)]

    def _behind(self, before: str, text: str) -> list[tuple[int, int]] | None:
        whole, lead = self.inside(before + text), self.lead(before)
        if [index for index, _ in whole[: len(lead)]] != [index for index, _ in lead]:
            return None
        return [(index, max(1, end - len(before))) for index, end in whole[len(lead) :]]


def writer_of(alignment: Alignment | Rewriting | Transcoder | Rewriter) -> Transcoder | Rewriter:
    """What writes a text by an alignment; one that was made before stays."""
    if isinstance(alignment, (Transcoder, Rewriter)):
        return alignment
    if not isinstance(alignment, Rewriting):
        return Transcoder(alignment)
    return (OwnWriter if alignment.method == "own" else Rewriter)(alignment)


def _key(ids: np.ndarray, told: np.ndarray) -> bytes:
    return hashlib.blake2b((ids.astype(np.int64) * 2 + told.astype(np.int64)).tobytes(), digest_size=16).digest()


class OwnStream(TextStream):
    """One text as far as it has come.

    Args:
        writer: what writes it.
        branches: whether its model can read what may still change; else generated text is written in the anchor's
            pieces, which never change.
    """

    run: OwnRun  # type: ignore[assignment]

    def __init__(self, writer: OwnWriter, *, branches: bool = True) -> None:
        super().__init__(writer)
        self.beginning = writer.alignment.beginning
        self.run = OwnRun(writer)
        self.branches = branches
        self.settled = 0

    def read(self, token: int, told: bool) -> list[Token]:
        """One more token of the anchor, which was given or generated; returns the tokens that are settled by it."""
        run = self.run
        run.out = []
        if run.told and not told:
            run.settle()
        run.told, run.place, run.literal = told, self.taken, not (told or self.branches)
        settled: list[Token] = [*run.out, *self.take(token)]  # type: ignore[list-item]
        if self.settled == 0 and settled:
            ids = [index for index, _, _ in settled[: len(self.beginning)]]
            if ids and ids == self.beginning:  # the text brings its beginning itself
                del settled[: len(ids)]
                self.beginning = []
        self.settled += len(settled)
        return settled

    def pending(self) -> list[Token]:
        """The tokens of the text behind the settled ones, up to its last whole character."""
        return self.run.pending()


class OwnRun(Run):
    """A ``Run`` whose latest characters may still be written otherwise."""

    rewriter: OwnWriter
    out: list[Token]  # type: ignore[assignment]

    def __init__(self, writer: OwnWriter) -> None:
        super().__init__(writer)
        self.ends: list[End] = []  # where each of the characters ends that are not settled
        self.told = False  # whether the latest token was given
        self.literal = False  # whether it is written in the anchor's pieces
        self.place = 0  # the latest token

    def __copy__(self) -> OwnRun:
        new = object.__new__(OwnRun)
        vars(new).update(vars(self), ends=list(self.ends))
        return new

    def add(self, ids: Sequence[int]) -> None:
        """Tokens that are no text."""
        self.out += [(index, self.place, 0.0) for index in ids]

    def feed(self, text: bytes) -> None:
        """Bytes of the text."""
        text = text if self.fed else self._undummied(text)
        self.fed = True
        if self.literal:
            self.settle()
            if self.rewriter.raw or self._whole(text):
                self.write(text)
                return
        left, size = len(self.raw) + len(text), max(1, len(text))
        whole, self.raw = split_bytes(self.raw + text)
        for part, is_text in whole:
            if not is_text:
                left -= len(part)
                self.settle()
                self.write(part)
                continue
            for character in part.decode():
                left -= len(character.encode())
                self.text += character
                self.ends.append((self.place, left / size))
        if self.literal:
            self.settle()
        elif not self.told and len(self.text) > LONG:
            self._settle_some()

    def pending(self) -> list[Token]:
        """The tokens of the characters that are not settled."""
        return self._placed(self.text, self.ends)

    def _cut(self) -> None:
        self.settle()

    def settle(self) -> None:
        """The tokens of all characters up to here stay."""
        self._settle(len(self.text))

    def _placed(self, text: str, ends: list[End]) -> list[Token]:
        if not text:
            return []
        begins = not self.started and self.segment
        return [(index, *ends[end - 1]) for index, end in self.rewriter.continued(self.before, text, begins)]

    def _settle(self, count: int) -> None:
        if not count:
            return
        text, ends = self.text[:count], self.ends[:count]
        self.out += self._placed(text, ends)
        self.started = True
        self.before = (self.before + text)[-CONTEXT:]
        self.text, self.ends = self.text[count:], self.ends[count:]

    def _settle_some(self) -> None:
        """Settle the text up to the last place, not too near its end, where no token reaches across."""
        text, stable = self.text, self.rewriter.stable
        for place in range(len(text) - RECENT, 0, -1):
            if (class_of(text[place - 1]), class_of(text[place])) in stable:
                self._settle(place)
                return
