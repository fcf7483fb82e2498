"""A rewriting at work: the stream of an augmenting model's tokens, written from the whole history of a row.

What a token adds to the stream depends on the tokens up to it alone: it grows at its end and is exactly causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from calmlm.boundaries import class_of, literal_encoder
from calmlm.rewriting import Rewriting
from calmlm.spelling import in_word, token_bytes
from calmlm.transcoding import Block, block_of
from calmlm.views import Event, Template
from calmlm.writing import Writer

CONTEXT = 24  # characters before a segment that its tokens may depend on


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
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(given.tokenizer), unk_token=given.unknown
        )
        self.writer = Writer(tokenizer)
        self.encode = literal_encoder(given.tokenizer)
        self.stable = set(given.stable)
        self.pieces = token_bytes(tokenizer, "augmenting model") if given.own_template is not None else []
        self.raw = self.writer.write(b"\xf0") is not None  # whether it can write parts of characters

    def __getstate__(self) -> dict[str, Any]:
        # Tokenizers are made again when the model is copied or unpickled.
        return {key: value for key, value in self.__dict__.items() if key not in ("writer", "encode")}

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
        for row, keep, past in zip(ids.tolist(), real.tolist(), previous.tolist(), strict=True):
            past = [index for index in past if index >= 0]
            columns = [column for column, is_real in enumerate(keep) if is_real]
            written = self.write([*past, *(row[column] for column in columns)])
            rows.append([(token, columns[at - len(past)]) for token, at in written if at >= len(past)])
        return block_of(rows, self.alignment.alignment.fill, ids)

    def write(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The augmenting tokens of one text, each with the position of the anchor token that brings it."""
        given, run, messages = self.alignment, _Run(self), 0
        for event in self._events(ids):
            if event.kind == "text":
                run.feed(event)
            elif event.kind == "special":
                run.end(event.owner)
                assert event.token is not None
                usual = given.alignment.body[event.token]
                # One token may be both the beginning and the end of a text: its place tells.
                run.add(given.alignment.start.get(event.token, usual) if event.owner == 0 else usual, event.owner)
            elif event.kind == "open":
                self._open(run, event, first=messages == 0)
                messages += 1
            else:
                run.flush(event.owner)
                if given.own_template is not None:
                    run.enter(given.own_template.closings.get(event.role, ()), event.owner)
        return run.out

    def _open(self, run: _Run, event: Event, *, first: bool) -> None:
        """Write what the augmenting model reads where a message begins."""
        own, begin = self.alignment.own_template, self.alignment.begin
        run.flush(event.owner)
        if own is not None:
            run.enter(self._opening(own, event.role, first), event.owner)
        elif not first:
            run.write(b"\n", event.owner)  # keeps the messages apart
        elif begin is not None:
            run.add((begin,), event.owner)

    def _opening(self, own: Template, role: str, first: bool) -> Sequence[int]:
        if not first or role in own.beginnings:
            return own.beginnings[role] if first else own.openings.get(role, ())
        # Begun as no sample was: with what conversations begin with, and the role's own mark.
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

    def _events(self, ids: Sequence[int]) -> Any:
        pieces = self.alignment.pieces
        if self.alignment.anchor_template is not None:
            yield from self.alignment.anchor_template.events(ids, pieces)
            return
        for owner, token in enumerate(ids):
            piece = pieces[token] if token < len(pieces) else b""
            if piece is None:
                yield Event("special", owner, token=token)
            elif piece:
                yield Event("text", owner, piece)


class _Run:
    """One run of text between special tokens or messages, written as it comes."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.out: list[tuple[int, int]] = []
        self.raw = b""  # bytes that are no whole character yet
        self.text = ""  # characters that are not written yet
        self.before = ""  # characters that are, as far as they matter
        self.runs = 0  # that have ended
        self.fed = self.started = False  # whether this one has been given bytes, and has written any
        self.segment = True  # whether its first word stands where the tokenizer puts a space of its own

    def add(self, ids: Sequence[int], owner: int) -> None:
        """Tokens that are no text."""
        self.out += [(index, owner) for index in ids]

    def feed(self, event: Event) -> None:
        """Bytes of the text."""
        text = event.text if self.fed else self._undummied(event.text)
        self.fed = True
        if self.rewriter.alignment.method == "transcode" and (self.rewriter.raw or self._whole(text)):
            self.write(text, event.owner)
            return
        self.raw += text
        whole, self.raw = _split(self.raw)
        for part, is_text in whole:
            if not is_text:
                self._cut(event.owner)
                self.write(part, event.owner)
            elif self.rewriter.alignment.method == "transcode":
                self.write(part, event.owner)
            else:
                self._characters(part.decode(), event.owner)

    def flush(self, owner: int) -> None:
        """Write what was put off."""
        self._cut(owner)
        if self.raw:
            self.write(self.raw, owner)
        self.raw = b""

    def end(self, owner: int) -> None:
        """No more bytes come."""
        self.flush(owner)
        self.runs += self.started
        self.before, self.fed, self.started = "", False, False
        self.segment = self.runs == 0 or self.rewriter.writer.spelling.every_segment

    def enter(self, ids: Sequence[int], owner: int) -> None:
        """Tokens of a chat template: special ones, and text, which the text of a message follows."""
        pieces = self.rewriter.pieces
        for index in ids:
            self.add((index,), owner)
            piece = pieces[index]
            if piece is None:
                self.started = True
                self.end(owner)
            else:
                self.started, self.before = True, (self.before + piece.decode(errors="ignore"))[-CONTEXT:]

    def _undummied(self, text: bytes) -> bytes:
        """The first bytes of a run without a space that the anchor's tokenizer has put there."""
        dummy, every = self.rewriter.alignment.dummy
        own = dummy and self.rewriter.alignment.view is None and (every or self.runs == 0)
        return text.removeprefix(b" ") if own else text

    def _whole(self, piece: bytes) -> bool:
        return not self.raw and _split(piece) == ([(piece, True)], b"")

    def _characters(self, text: str, owner: int) -> None:
        for character in text:
            if self.text and (class_of(self.text[-1]), class_of(character)) in self.rewriter.stable:
                self._cut(owner)
            self.text += character

    def _cut(self, owner: int) -> None:
        """Write the characters up to here, as the tokenizer does in their place."""
        if not self.text:
            return
        encode = self.rewriter.encode
        if not self.started and not self.segment:  # its tokenizer would begin a text
            self.write(self.text.encode(), owner)
            self.text = ""
            return
        whole, lead = encode(self.before + self.text), encode(self.before) if self.before else []
        if whole[: len(lead)] == lead:
            self.add(whole[len(lead) :], owner)
            self.started = True
        else:
            self.write(self.text.encode(), owner)
        self.before, self.text = (self.before + self.text)[-CONTEXT:], ""

    def write(self, piece: bytes, owner: int) -> None:
        """Write bytes by themselves."""
        writer = self.rewriter.writer
        first = not self.started and self.segment
        new_word = writer.spelling.kind == "wordpiece" and not in_word(self.before[-1:])
        ids = writer.write(piece, start=first or new_word)
        self.add(self.rewriter.alignment.alignment.unknown if ids is None else ids, owner)
        self.started = True
        self.before = (self.before + piece.decode(errors="ignore"))[-CONTEXT:]


def _split(raw: bytes) -> tuple[list[tuple[bytes, bool]], bytes]:
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
