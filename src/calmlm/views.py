"""Different views of one conversation: the anchor reads its chat template, the augmenting model the content alone.

A chat template wraps each message: something opens its content, something closes it. What these are is read off the
template itself, by rendering conversations of known messages. A conversation that arrives token by token is then cut
into content and template as it comes; bytes that may turn out to be the start of a closing are held back until that is
settled, so that nothing is ever taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError

VIEWS = ("bare", "template")
BYTES = 256
"""Symbols below this are bytes; a special token is this and its id."""
Symbols: TypeAlias = tuple[int, ...]
Pieces: TypeAlias = Sequence[bytes | None]

_SPACES = frozenset(b" ")
_BLANK = frozenset(b" \t\r\n")
_MESSAGES = {"system": ("qxasystem",), "user": ("qxbfirst", "qxbsecond"), "assistant": ("qxcfirst", "qxcsecond")}


@dataclass(frozen=True)
class Event:
    """One thing that a token of a conversation brings.

    Attributes:
        kind: ``"text"`` (bytes of content), ``"special"`` (a special token within content), ``"open"`` or ``"close"``.
        owner: the position of the token that settles it.
        text: of ``"text"``.
        token: of ``"special"``, or the token that a text is exactly.
        role: of ``"open"`` and ``"close"``.
    """

    kind: Literal["text", "special", "open", "close"]
    owner: int
    text: bytes = b""
    token: int | None = None
    role: str = ""


@dataclass(frozen=True)
class Template:
    """What opens and closes the content of each role: symbols of the anchor, token ids of an augmenting model.

    Attributes:
        openings, closings: by role; those of the anchor without the spaces at their end, which a tokenizer may drop.
        padding: how many spaces the content of a role may have before it that belong to its opening.
        beginnings: what stands before the first content of a conversation that begins with this role.
    """

    openings: dict[str, Symbols]
    closings: dict[str, Symbols]
    beginnings: dict[str, Symbols]
    padding: dict[str, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, pieces: Pieces, role: str, *, ids: bool = False) -> Template:
        """Read a chat template.

        Args:
            tokenizer: has the template.
            pieces: the bytes of its tokens, None for special ones.
            role: of the model, for messages.
            ids: whether in token ids instead of symbols.

        Raises:
            ModelError: when there is no template, or it does not say where a message begins and ends.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"augmenting_view needs a chat template of the {role}, but its tokenizer has none: pass a tokenizer "
                f"with a template, or leave augmenting_view out."
            )
        before: dict[str, list[Symbols]] = {}
        after: dict[str, list[Symbols]] = {}
        beginnings: dict[str, Symbols] = {}
        for conversation, prompted in _conversations():
            gaps = _gaps(tokenizer, pieces, conversation, prompted, ids)
            if gaps is None:
                continue
            for index, message in enumerate(conversation):
                name = message["role"]
                before.setdefault(name, []).append(gaps[index])
                if gaps[index + 1]:
                    after.setdefault(name, []).append(gaps[index + 1])
                if index == 0:
                    beginnings.setdefault(name, gaps[0])
        special = (lambda symbol: pieces[symbol] is None) if ids else (lambda symbol: symbol >= BYTES)
        closings = {name: _closing(_common(found), special) for name, found in after.items()}
        openings, padding = {}, {}
        for name, found in before.items():
            opening = _common([gap[::-1] for gap in found])[::-1]
            padding[name] = 0 if ids else len(opening) - len(_stripped(opening))
            openings[name] = _opening(opening, list(closings.values()), ids)
        if not ids:
            closings = {name: _stripped(closing) for name, closing in closings.items()}
        usable = {name for name in openings if openings[name] and closings.get(name)}
        if not {"user", "assistant"} <= usable:
            raise ModelError(
                f"augmenting_view needs a chat template that says where a message begins and ends, but that of the "
                f"{role} does not: leave augmenting_view out."
            )
        return cls(
            {name: openings[name] for name in usable},
            {name: closings[name] for name in usable},
            {name: beginnings[name] for name in usable & set(beginnings)},
            {name: padding[name] for name in usable},
        )

    def events(self, ids: Sequence[int], pieces: Pieces) -> Iterator[Event]:
        """Cut a conversation into content and template.

        Args:
            ids: its token ids; what a token brings depends on it and on those before it alone.
            pieces: the bytes of the tokens, None for special ones.
        """
        role: str | None = None
        seen: list[int] = []  # of the template since content last ended
        held: list[int] = []  # of content, may be the start of a closing
        padding = 0  # spaces that may come before the content and are none of it
        longest = max(len(opening) for opening in self.openings.values())
        for owner, token in enumerate(ids):
            piece = pieces[token] if 0 <= token < len(pieces) else b""
            symbols = (BYTES + token,) if piece is None else tuple(piece)
            free: list[int] = []  # of content, settled by this token
            for symbol in symbols:
                if role is None:
                    seen = [*seen, symbol][-longest:]
                    role = self._opened(seen)
                    if role is not None:
                        yield Event("open", owner, role=role)
                        held, padding = [], self.padding[role]
                    continue
                if padding and symbol in _SPACES:
                    padding -= 1
                    continue
                padding, closing = 0, self.closings[role]
                held.append(symbol)
                while held and tuple(held) != closing[: len(held)]:
                    free.append(held.pop(0))
                if len(held) == len(closing):
                    yield from _content(free, owner, None)
                    yield Event("close", owner, role=role)
                    free, seen, role = [], list(held)[-longest:], None
                    held = []
                    role = self._opened(seen)
                    if role is not None:
                        yield Event("open", owner, role=role)
                        padding = self.padding[role]
            whole = len(free) == len(symbols) and piece is not None and bytes(free) == piece
            yield from _content(free, owner, token if whole else None)

    def _opened(self, seen: list[int]) -> str | None:
        found = [
            (len(opening), role) for role, opening in self.openings.items() if tuple(seen[-len(opening) :]) == opening
        ]
        return max(found)[1] if found else None


def _content(symbols: list[int], owner: int, token: int | None) -> Iterator[Event]:
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
        yield Event("text", owner, bytes(run), token)


def _conversations() -> Iterator[tuple[list[dict[str, str]], bool]]:
    """Conversations of messages that occur nowhere else, and whether the assistant is to speak next."""
    turns = [{"role": role, "content": _MESSAGES[role][index]} for index in (0, 1) for role in ("user", "assistant")]
    system = {"role": "system", "content": _MESSAGES["system"][0]}
    yield turns, False
    yield turns[:1], True
    yield turns[:3], True
    yield [system, *turns], False


def _gaps(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Pieces,
    conversation: list[dict[str, str]],
    prompted: bool,
    as_ids: bool,
) -> list[Symbols] | None:
    """What stands before, between and after the messages of a rendered conversation; None where it is not rendered."""
    try:
        ids = list(
            tokenizer.apply_chat_template(
                conversation, tokenize=True, return_dict=True, add_generation_prompt=prompted
            )["input_ids"]
        )
    except Exception:  # a template is a program of its own, in Jinja, and refuses what it likes
        return None
    symbols: list[int] = []
    ends: list[int] = []
    for token in ids:
        piece = pieces[token]
        symbols += (BYTES + token,) if piece is None else tuple(piece)
        ends.append(len(symbols))
    gaps, start = [], 0
    for message in conversation:
        place = _find(symbols, message["content"].encode(), start)
        if place is None:
            return None
        gaps.append(_slice(ids, symbols, ends, start, place, as_ids))
        start = place + len(message["content"])
    return [*gaps, _slice(ids, symbols, ends, start, len(symbols), as_ids)]


def _slice(ids: list[int], symbols: list[int], ends: list[int], start: int, stop: int, as_ids: bool) -> Symbols:
    if not as_ids:
        return tuple(symbols[start:stop])
    starts = [0, *ends[:-1]]
    return tuple(i for i, a, b in zip(ids, starts, ends, strict=True) if a >= start and b <= stop)


def _find(symbols: list[int], text: bytes, start: int) -> int | None:
    wanted = list(text)
    for place in range(start, len(symbols) - len(wanted) + 1):
        if symbols[place : place + len(wanted)] == wanted:
            return place
    return None


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


def _opening(common: Symbols, closings: list[Symbols], as_ids: bool) -> Symbols:
    """Without what closes the message before, and without white space at either end that the tokenizer may add."""
    rest = common
    for closing in closings:
        if closing and common[: len(closing)] == closing and len(common) - len(closing) < len(rest):
            rest = common[len(closing) :]
    if as_ids:
        return rest or common
    rest = _stripped(rest)
    start = next((index for index, symbol in enumerate(rest) if symbol not in _BLANK), len(rest))
    return rest[start:] or _stripped(common)


def _stripped(symbols: Symbols) -> Symbols:
    """Without spaces at the end."""
    stop = len(symbols)
    while stop and symbols[stop - 1] in _SPACES:
        stop -= 1
    return symbols[:stop]
