"""What an augmenting model reads where a table from token to token does not do: its own tokens, its own view.

``retokenize`` gives the augmenting model the tokens that its tokenizer gives to the text, but only up to the last
boundary that no continuation can move. A *view* leaves the anchor's chat template out, or puts the augmenting model's
own in its place. Either way the stream is written from the whole history of a row, and what a token adds to it depends
on the tokens up to it alone: it grows at its end and is exactly causal.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calmlm.alignment import Alignment, digest
from calmlm.spelling import Spelling, in_word, token_bytes
from calmlm.transcoding import Block, block_of
from calmlm.views import Event, Template
from calmlm.writing import Writer

METHODS = ("transcode", "retokenize")
CONTEXT = 24  # characters before a segment that its tokens may depend on

# One sample and more of each class of characters, for the search for boundaries.
CLASSES: dict[str, tuple[str, ...]] = {
    "letter": ("a", "the", "Zé", "ß"),
    "script": ("你", "好世", "の", "ไ"),
    "digit": ("1", "42", "1234567"),
    "space": (" ", "  "),
    "tab": ("\t",),
    "line": ("\n", "\r\n", "\n\n"),
    "mark": (".", "--", "'", "'s", "(", "_", "€", "😀"),
    "joiner": ("\u0301", "\u200d", "\ufe0f"),
}

BEYOND_ASCII = tuple(name for name in CLASSES if name != "space")


def class_of(character: str) -> str:
    """The class of a character, a key of ``CLASSES``."""
    if character == " ":
        return "space"
    if character in "\n\r\x0b\x0c\x85\u2028\u2029":
        return "line"
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z":
        return "tab"
    if category[0] == "M" or category == "Cf":
        return "joiner"
    if category[0] == "N":
        return "digit"
    if category[0] == "L":
        # Letters of scripts with case separate words by spaces; others often do not.
        return "letter" if category in ("Lu", "Ll", "Lt") else "script"
    return "mark"


@dataclass(frozen=True)
class Rewriting:
    """Everything that writing the stream needs, as data.

    Attributes:
        alignment: the table from token to token, and the roles of special tokens in it.
        method: ``"transcode"`` or ``"retokenize"``.
        view: None, ``"bare"`` or ``"template"``.
        pieces: the bytes of the anchor's tokens, None for special ones.
        tokenizer: the augmenting tokenizer, as the tokenizers library saves it.
        unknown: its token for what it cannot write, or None.
        stable: pairs of classes of characters between which no token of its reaches across.
        anchor_template: what encloses messages in the anchor's chat template, with a view.
        own_template: the same for the augmenting tokenizer, in its ids, with the view ``"template"``.
        begin: its token for the beginning of a text, or None.
        dummy: whether the anchor's first token of a text carries a space that is not in the text, and whether its first
            token after any special one does so as well.
    """

    alignment: Alignment
    method: str
    view: str | None
    pieces: list[bytes | None]
    tokenizer: str
    unknown: str | None
    stable: list[tuple[str, str]]
    anchor_template: Template | None
    own_template: Template | None
    begin: int | None
    dummy: tuple[bool, bool]

    @classmethod
    def between(
        cls,
        anchor: PreTrainedTokenizerBase,
        augmenting: PreTrainedTokenizerBase,
        method: str,
        view: str | None,
    ) -> Rewriting:
        """Prepare the stream from the anchor's tokenizer to the augmenting model's.

        Raises:
            ModelError: when a tokenizer cannot be read, or a chat template that the view needs is missing.
        """
        alignment = Alignment.between(anchor, augmenting)
        if view is not None:
            alignment = dataclasses.replace(alignment, digest=digest(anchor, augmenting, templates=True))
        pieces = token_bytes(anchor, "anchor")
        ours = theirs = None
        if view is not None:
            ours = Template.of(anchor, pieces, "anchor")
        if view == "template":
            own = token_bytes(augmenting, "augmenting model")
            theirs = Template.in_ids(augmenting, own, "augmenting model")
        stable = sorted(stable_pairs(augmenting)) if method == "retokenize" else []
        spelling = Spelling.of(anchor, "anchor")
        begins = augmenting.bos_token_id is not None and augmenting("a").input_ids[:1] == [augmenting.bos_token_id]
        return cls(
            alignment=alignment,
            method=method,
            view=view,
            pieces=pieces,
            tokenizer=augmenting.backend_tokenizer.to_str(),
            unknown=augmenting.unk_token,
            stable=stable,
            anchor_template=ours,
            own_template=theirs,
            begin=augmenting.bos_token_id if begins else None,
            dummy=(spelling.dummy_space, spelling.every_segment),
        )

    @property
    def highest(self) -> int:
        """The largest augmenting id that a text may need: special tokens come from the table and the template alone."""
        backend = Tokenizer.from_str(self.tokenizer)
        special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        own = self.own_template
        rows = () if own is None else (*own.openings.values(), *own.closings.values(), *own.beginnings.values())
        ids = (set(backend.get_vocab().values()) - special).union(*rows, () if self.begin is None else (self.begin,))
        return max((self.alignment.highest, *ids))

    @property
    def late(self) -> bool:
        """Whether tokens reach across the ends of words, so that hardly anything is read before a text ends."""
        ends = {("letter", "space"), ("space", "letter")}  # a mark at the end of words leaves the second alone
        return self.method == "retokenize" and not ends & set(self.stable)

    def filled(self, vocabulary: int) -> Rewriting:
        """See ``Alignment.filled``."""
        return dataclasses.replace(self, alignment=self.alignment.filled(vocabulary))

    @property
    def digest(self) -> str:
        """sha256 over both tokenizers."""
        return self.alignment.digest

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` is the inverse."""
        return {
            "method": self.method,
            "view": self.view,
            "alignment": self.alignment.to_json(),
            "pieces": [None if piece is None else piece.hex() for piece in self.pieces],
            "tokenizer": json.loads(self.tokenizer),
            "unknown": self.unknown,
            "stable": [list(pair) for pair in self.stable],
            "anchor_template": None if self.anchor_template is None else vars(self.anchor_template),
            "own_template": None if self.own_template is None else vars(self.own_template),
            "begin": self.begin,
            "dummy": list(self.dummy),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Rewriting:
        """What ``to_json`` gave."""
        if data["method"] not in METHODS:
            raise ValueError(f"unknown method {data['method']!r}")
        saved = json.dumps(data["tokenizer"])
        Tokenizer.from_str(saved)
        return cls(
            alignment=Alignment.from_json(data["alignment"]),
            method=data["method"],
            view=data["view"],
            pieces=[None if piece is None else bytes.fromhex(piece) for piece in data["pieces"]],
            tokenizer=saved,
            unknown=data["unknown"],
            stable=[(left, right) for left, right in data["stable"]],
            anchor_template=_template(data["anchor_template"]),
            own_template=_template(data["own_template"]),
            begin=data["begin"],
            dummy=(bool(data["dummy"][0]), bool(data["dummy"][1])),
        )


def _template(data: dict[str, dict[str, Any]] | None) -> Template | None:
    if data is None:
        return None
    symbols = {
        part: {role: tuple(row) for role, row in data[part].items()} for part in ("openings", "closings", "beginnings")
    }
    tails = {role: [tuple(row) for row in rows] for role, rows in data["tails"].items()}
    return Template(**symbols, tails=tails)


def stable_pairs(tokenizer: PreTrainedTokenizerBase) -> set[tuple[str, str]]:
    """Between which classes of characters a text may be cut without changing its tokens, whatever follows.

    A pair counts where no token of the vocabulary reaches across such a place, and where the tokens of all samples that
    end there stay as they are when others follow. A token that was added to the vocabulary does not count: one of two
    words would keep all words back, so it is read as these words instead.
    """
    encode = literal_encoder(tokenizer.backend_tokenizer.to_str())
    pairs = {(left, right) for left in CLASSES for right in CLASSES}
    added = tokenizer.added_tokens_decoder
    for index, piece in enumerate(token_bytes(tokenizer, "augmenting model")):
        if index in added:
            continue
        # A part of a character may be that of any character beyond ASCII.
        classes = [
            BEYOND_ASCII if character == "\ufffd" else (class_of(character),)
            for character in (piece or b"").decode(errors="replace")
        ]
        for left, right in itertools.pairwise(classes):
            pairs -= set(itertools.product(left, right))
    leads = ("", "a ", "12", "\n", "x.", "  ")
    tails = ("", "a", " b", "1", ".", "\n", "  ", "'s", "é")

    def holds(left: str, right: str) -> bool:
        for lead in leads:
            for end in CLASSES[left]:
                alone = encode(lead + end)
                for start in CLASSES[right]:
                    if any(encode(lead + end + start + tail)[: len(alone)] != alone for tail in tails):
                        return False
        return True

    return {pair for pair in pairs if holds(*pair)}


def literal_encoder(saved: str) -> Any:
    """From a text to its ids in a saved tokenizer; what looks like a special token in the text is text."""
    backend = Tokenizer.from_str(saved)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return lambda text: backend.encode(text, add_special_tokens=False).ids


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
