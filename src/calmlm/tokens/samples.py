"""Sample conversations of known messages, as a chat template renders them, and what it puts around the messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError
from calmlm.tokens.chat import in_parts, takes_parts

KINDS = ("plain", "system", "developer", "tool")
"""Of conversations that a template is read off from."""
BYTES = 256
"""Symbols below this are bytes; a special token is this and its id."""
Symbols: TypeAlias = tuple[int, ...]
Pieces: TypeAlias = Sequence[bytes | None]

MESSAGES = {
    "system": ("qxasystem",),
    "developer": ("qxedeveloper",),
    "user": ("qxbfirst", "qxbsecond"),
    "assistant": ("qxcfirst", "qxcsecond"),
    "tool": ("qxdfirst",),
}


@dataclass(frozen=True)
class Sample:
    """A rendered conversation of messages that occur nowhere else.

    Attributes:
        kind: one of ``KINDS``: with a message of the system or a developer, with a tool's answer, or neither.
        messages: what was rendered.
        prompted: whether the assistant is to speak next.
        ids: the rendered tokens.
        gaps: what stands before, between and after the messages, in symbols or in ids.
    """

    kind: str
    messages: list[dict[str, str]]
    prompted: bool
    ids: list[int]
    gaps: list[Symbols]


def check_template(tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            f"augmenting_view needs a chat template of the {role}, but its tokenizer has none: pass a tokenizer "
            f"with a template, or leave augmenting_view out."
        )


def samples_of(tokenizer: PreTrainedTokenizerBase, pieces: Pieces, kind: str, *, ids: bool = False) -> Iterator[Sample]:
    """Conversations as a tokenizer renders them, without those that its template refuses or changes."""
    turns = [{"role": role, "content": MESSAGES[role][index]} for index in (0, 1) for role in ("user", "assistant")]
    if kind in ("system", "developer"):
        first = {"role": kind, "content": MESSAGES[kind][0]}
        wanted = [([first, *turns], False), ([first, *turns[:1]], True)]
    elif kind == "tool":
        answer = {"role": "tool", "content": MESSAGES["tool"][0]}
        wanted = [([*turns[:2], answer, turns[3]], False), ([*turns[:2], answer], True)]
    else:
        wanted = [(turns, False), (turns[:1], True), (turns[:3], True)]
    wanted += [(messages, False) for messages, prompted in wanted if ids and prompted]  # which nobody answers
    parts = takes_parts(tokenizer)
    for messages, prompted in wanted:
        try:
            written: Any = in_parts(messages) if parts else messages
            rendered = tokenizer.apply_chat_template(
                written, tokenize=True, return_dict=True, add_generation_prompt=prompted
            )
        except Exception:  # a template is a program of its own, in Jinja, and refuses what it likes
            continue
        found = _gaps(list(rendered["input_ids"]), pieces, messages, ids)
        if found is not None:
            yield Sample(kind, messages, prompted, list(rendered["input_ids"]), found)


def _gaps(ids: list[int], pieces: Pieces, messages: list[dict[str, str]], as_ids: bool) -> list[Symbols] | None:
    """What stands before, between and after the messages of a rendered conversation; None where one is not found."""
    symbols: list[int] = []
    ends: list[int] = []
    for token in ids:
        piece = pieces[token]
        symbols += (BYTES + token,) if piece is None else tuple(piece)
        ends.append(len(symbols))
    gaps, start = [], 0
    for message in messages:
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
