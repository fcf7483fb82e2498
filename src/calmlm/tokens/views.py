"""Different views of one conversation: the anchor reads its chat template, the augmenting model the content alone.

A chat template wraps each message: something opens its content, something closes it. What these are is read off the
template itself, by rendering conversations of known messages. A conversation that arrives token by token is then cut
into content and template as it comes; bytes that may turn out to be the start of a closing are held back until that is
settled, so that nothing is ever taken back.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError, warn
from calmlm.tokens.samples import BYTES, KINDS, Pieces, Sample, Symbols, check_template, samples_of

VIEWS = ("bare", "template")
_SPACES = frozenset(b" ")
_BLANK = frozenset(b" \t\r\n")


@dataclass(frozen=True)
class Event:
    """One thing that a token of a conversation brings.

    Attributes:
        kind: ``"text"`` (bytes of content), ``"special"`` (a special token within content), ``"enter"`` and ``"leave"``
            (a message's opening and closing are complete), ``"open"`` and ``"close"`` (the same of a message that has
            content, with its first).
        owner: the position of the token that settles it.
        text: of ``"text"``.
        token: of ``"special"``.
        role: of all but ``"text"`` and ``"special"``.
    """

    kind: Literal["text", "special", "enter", "open", "close", "leave"]
    owner: int
    text: bytes = b""
    token: int | None = None
    role: str = ""


@dataclass(frozen=True)
class Template:
    """What opens and closes the content of each role: symbols of the anchor, token ids of an augmenting model.

    Attributes:
        openings, closings: by role; openings also by the role before and this one, with a space between, where they
            differ with that.
        tails: what may follow the opening of a role and is no content either.
        beginnings: what stands before the first content of a conversation that begins with this role.
    """

    openings: dict[str, Symbols]
    closings: dict[str, Symbols]
    tails: dict[str, list[Symbols]]
    beginnings: dict[str, Symbols]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, pieces: Pieces, role: str) -> Template:
        """Read the anchor's chat template, in symbols.

        Warns where system messages cannot be told from the template around them: they are not read then.

        Raises:
            ModelError: when there is no template, or it does not say where a message begins and ends.
        """
        check_template(tokenizer, role)
        samples = [sample for kind in KINDS for sample in samples_of(tokenizer, pieces, kind)]
        # A system message may stand within the first user message, and what a tool answers within another one: then
        # they are best read as parts of these.
        without: tuple[set[str], ...] = (set(), {"tool"}, {"system"}, {"tool", "system"})
        # A developer's message may look like the system's, and is then read as that.
        tried = [left | more for left in without for more in (set(), {"developer"})]
        for chosen in ([sample for sample in samples if sample.kind not in left] for left in tried):
            found = cls._derived(chosen)
            if found is not None and all(found._reads(sample, pieces) for sample in chosen if not sample.prompted):
                system = [sample for sample in samples if sample.kind == "system" and not sample.prompted]
                if not all(found._mentions(sample, pieces) for sample in system):
                    warn(
                        f"System messages cannot be told from the rest of the chat template of the {role}: the "
                        f"augmenting model will not read them."
                    )
                return found
        raise ModelError(
            f"augmenting_view needs a chat template that says where a message begins and ends, but that of the {role} "
            f"does not: leave augmenting_view out."
        )

    @classmethod
    def in_ids(cls, tokenizer: PreTrainedTokenizerBase, pieces: Pieces, role: str) -> Template:
        """Read an augmenting model's chat template, in its token ids, to write messages in it.

        Raises:
            ModelError: when there is no template, or it cannot be read.
        """
        check_template(tokenizer, role)
        samples = [
            sample for kind in KINDS for sample in samples_of(tokenizer, pieces, kind, ids=True) if not sample.prompted
        ]
        if not samples or samples[0].kind != "plain":
            raise ModelError(
                f"augmenting_view='template' needs a chat template that messages can be written in, but that of the "
                f"{role} refuses or changes them: use augmenting_view='bare'."
            )
        special = lambda index: pieces[index] is None  # noqa: E731
        after: dict[str, list[Symbols]] = {}
        for sample in samples:
            for index, message in enumerate(sample.messages):
                after.setdefault(message["role"], []).append(sample.gaps[index + 1])
        # The closing of a role is the text that follows it in all cases: whoever speaks next, or no one.
        closings = {name: _closing(_common(gaps), special) for name, gaps in after.items()}
        openings: dict[str, Symbols] = {}
        beginnings: dict[str, Symbols] = {}
        for sample in samples:
            beginnings.setdefault(sample.messages[0]["role"], sample.gaps[0])
            for gap, one, other in zip(sample.gaps[1:], sample.messages, sample.messages[1:], strict=False):
                opening = gap[len(closings[one["role"]]) :]
                openings.setdefault(other["role"], opening)
                openings.setdefault(_pair(one["role"], other["role"]), opening)
        return cls(openings, closings, {}, beginnings)

    def opening(self, role: str, previous: str) -> Symbols:
        """What opens a message of ``role`` behind one of ``previous``."""
        return self.openings.get(_pair(previous, role), self.openings.get(role, ()))

    @classmethod
    def _derived(cls, samples: list[Sample]) -> Template | None:
        """What encloses the messages in all samples; None where that cannot be said."""
        if not samples:
            return None
        special = lambda symbol: symbol >= BYTES  # noqa: E731
        after: dict[str, list[Symbols]] = {}
        for sample in samples:
            last = len(sample.messages) - 1
            for index, message in enumerate(sample.messages):
                if index < last or sample.prompted:  # what ends a conversation may be nothing, or white space
                    after.setdefault(message["role"], []).append(sample.gaps[index + 1])
        closings = {role: _stripped(_closing(_common(found), special)) for role, found in after.items()}
        before: dict[str, dict[str, list[Symbols]]] = {}
        for sample in samples:
            for index, message in enumerate(sample.messages):
                previous = sample.messages[index - 1]["role"] if index else None
                header = _header(sample.gaps[index], closings, previous)
                before.setdefault(message["role"], {}).setdefault(previous or "", []).append(header)
        headers: dict[str, list[Symbols]] = {}
        for role, groups in before.items():
            headers[role] = [header for group in groups.values() for header in group]
            if all(symbol in _BLANK for symbol in _common(_shortest(headers[role]))):
                # Without a mark of its own: what closes the message before it opens it, and differs with that.
                del headers[role]
                headers |= {_pair(previous, role): group for previous, group in groups.items()}
        openings, tails = {}, {}
        for role, found in headers.items():
            found = _shortest(found)
            opening = _stripped(_common(found))
            openings[role] = opening
            rest = {header[len(opening) :] for header in found}
            # A tokenizer may drop some of the spaces at the end.
            rest |= {tail[:n] for tail in rest if set(tail) <= _SPACES for n in range(len(tail))}
            tails[role] = sorted((tail for tail in rest if tail), key=len, reverse=True)
        year = str(datetime.date.today().year).encode()
        for role in openings:
            text = bytes(symbol for symbol in openings[role] if symbol < BYTES)
            blank = all(symbol in _BLANK for symbol in openings[role])
            closing = closings.get(speaker_of(role), ())
            closed = not all(symbol in _BLANK for symbol in closing)
            if blank or not closed or year in text:  # an opening that holds a date would change tomorrow
                return None
        return cls(openings, closings, tails, {})

    def _reads(self, sample: Sample, pieces: Pieces) -> bool:
        """Whether exactly the messages of a sample are found in it."""
        wanted = [(message["role"], message["content"].encode()) for message in sample.messages]
        # A message of the template's own may come first.
        return self._messages(sample, pieces)[-len(wanted) :] == wanted

    def _mentions(self, sample: Sample, pieces: Pieces) -> bool:
        """Whether the system message of a sample is found in it, if only as a part of another."""
        text = b"".join(content for _, content in self._messages(sample, pieces))
        return sample.messages[0]["content"].encode() in text

    def _messages(self, sample: Sample, pieces: Pieces) -> list[tuple[str, bytes]]:
        found: list[tuple[str, bytes]] = []
        for event in self.events(sample.ids, pieces):
            if event.kind == "open":
                found.append((event.role, b""))
            elif event.kind == "text" and found:
                found[-1] = (found[-1][0], found[-1][1] + event.text)
        return [(role, text.strip()) for role, text in found]

    def events(self, ids: Sequence[int], pieces: Pieces) -> Iterator[Event]:
        """Cut a conversation into content and template.

        Args:
            ids: its token ids; what a token brings depends on it and on those before it alone.
            pieces: the bytes of the tokens, None for special ones.
        """
        reading = Reading(self)
        for owner, token in enumerate(ids):
            yield from reading.events(owner, token, pieces)


class Reading:
    """Where in a template a conversation is."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.role: str | None = None
        self.opened = False  # whether the message has shown any content
        self.marks: list[Symbols] = []  # of other roles, that may still come in the place of the content
        self.tails: list[Symbols] = []  # that may still stand before the content
        self.seen: list[int] = []  # of the template since content last ended
        self.held: list[int] = []  # of content, may be the start of a closing or of a tail
        self.longest = max(len(opening) for opening in template.openings.values())

    def __copy__(self) -> Reading:
        new = object.__new__(Reading)
        vars(new).update(vars(self), held=list(self.held))
        return new

    def events(self, owner: int, token: int, pieces: Pieces) -> Iterator[Event]:
        """What one more token settles, as in ``Template.events``."""
        piece = pieces[token] if 0 <= token < len(pieces) else b""
        symbols = (BYTES + token,) if piece is None else tuple(piece)
        parts = [part for symbol in symbols for part in self._take(symbol)]
        run: list[int] = []
        for part in parts:
            if isinstance(part, int):
                run.append(part)
                continue
            yield from _content(run, owner)
            run = []
            yield Event(part[0], owner, role=part[1])
        yield from _content(run, owner)

    def _take(self, symbol: int) -> list[Any]:
        """What one more symbol settles: symbols of content, and (kind, role) where a message opens or closes."""
        if self.role is None:
            self.seen = [*self.seen, symbol][-self.longest :]
            return self._enter()
        self.held.append(symbol)
        if self.marks:
            held = tuple(self.held)
            self.marks = [mark for mark in self.marks if mark[: len(held)] == held]
            if held in self.marks:
                left, self.seen, self.held, self.marks = self.role, self.held[-self.longest :], [], []
                self.role = None
                return [("leave", left), *self._enter()]
            if self.marks:
                return []
            self.held = []
            return [part for one in held for part in self._take(one)]
        if self.tails:
            kept = [tail for tail in self.tails if tail[: len(self.held)] == tuple(self.held)]
            if kept:
                if len(kept) == 1 and len(kept[0]) == len(self.held):
                    self.held, self.tails = [], []
                return []
            # What was held is the longest tail that it begins with, and content after that.
            whole = [tail for tail in self.tails if tuple(self.held[: len(tail)]) == tail]
            again = self.held[max(map(len, whole), default=0) :]
            self.held, self.tails = [], []
            return [part for one in again for part in self._take(one)]
        closing = self.template.closings[self.role]
        free: list[Any] = []
        while self.held and tuple(self.held) != closing[: len(self.held)]:
            if not self.opened:
                free.append(("open", self.role))
                self.opened = True
            free.append(self.held.pop(0))
        if len(self.held) == len(closing):
            if self.opened:
                free.append(("close", self.role))
            free.append(("leave", self.role))
            self.seen, self.held, self.role = self.held[-self.longest :], [], None
            free += self._enter()
        return free

    def _enter(self) -> list[Any]:
        """Begin a message where its opening has just been completed; the longest opening counts."""
        found = [
            (len(opening), name)
            for name, opening in self.template.openings.items()
            if tuple(self.seen[-len(opening) :]) == opening
        ]
        if not found:
            return []
        name = max(found)[1]
        self.role, self.opened = speaker_of(name), False
        self.tails = list(self.template.tails.get(name, ()))
        # Who has no mark of its own speaks unless the mark of another comes at once, as of the second of two tools.
        openings = self.template.openings.items() if name != self.role else ()
        self.marks = [mark for other, mark in openings if speaker_of(other) == other]
        return [("enter", self.role)]


def _content(symbols: list[int], owner: int) -> Iterator[Event]:
    """Events of settled content: runs of bytes and single special tokens."""
    run: list[int] = []
    for symbol in symbols:
        if symbol < BYTES:
            run.append(symbol)
            continue
        if run:
            yield Event("text", owner, bytes(run))
            run = []
        yield Event("special", owner, token=symbol - BYTES)
    if run:
        yield Event("text", owner, bytes(run))


def _pair(previous: str, role: str) -> str:
    return f"{previous} {role}"


def speaker_of(name: str) -> str:
    """The role of an opening, which may be one behind a certain other role alone."""
    return name.rpartition(" ")[2]


def _common(sequences: list[Symbols]) -> Symbols:
    """The longest common beginning."""
    length = 0
    for symbols in zip(*sequences, strict=False):
        if len(set(symbols)) > 1:
            break
        length += 1
    return sequences[0][:length] if sequences else ()


def _closing(common: Symbols, special: Any) -> Symbols:
    """Up to the first special token, where there is one: what follows may differ with the next role."""
    for index, symbol in enumerate(common):
        if special(symbol):
            return common[: index + 1]
    return common


def _header(gap: Symbols, closings: dict[str, Symbols], previous: str | None) -> Symbols:
    """The part of a gap that belongs to the message behind it, without white space in front of it.

    At the beginning of a conversation a message of the template's own may stand before, which is closed in the gap.
    """
    start = 0
    marks = [closings[previous]] if previous is not None else list(closings.values())
    for mark in marks:
        if not mark or all(symbol in _BLANK for symbol in mark):
            continue
        places = [place for place in range(len(gap)) if gap[place : place + len(mark)] == mark]
        if places:
            start = max(start, (places[0] if previous is not None else places[-1]) + len(mark))
    rest = gap[start:]
    blanks = next((index for index, symbol in enumerate(rest) if symbol not in _BLANK), len(rest))
    # Where the closing is all there is, it opens the next message as well.
    return rest[blanks:] or gap


def _shortest(headers: list[Symbols]) -> list[Symbols]:
    """Each header without what only the beginning of a conversation has before it (a beginning token, say)."""
    return [
        min((other for other in headers if header[len(header) - len(other) :] == other), key=len) for header in headers
    ]


def _stripped(symbols: Symbols) -> Symbols:
    """Without spaces at the end."""
    stop = len(symbols)
    while stop and symbols[stop - 1] in _SPACES:
        stop -= 1
    return symbols[:stop]
