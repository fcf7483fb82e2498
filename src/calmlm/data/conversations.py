"""Conversations to token ids, through the chat template: the assistant's answers are learned, each with its end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from calmlm.data.formats import Example
from calmlm.data.messages import REASONING
from calmlm.errors import DataError
from calmlm.tokens.chat import in_parts, takes_parts

OPEN = ("chat_template", "documents")
"""Arguments of ``apply_chat_template`` that a record may set; the others say how its result is to come."""


class Conversations:
    """A tokenizer that writes conversations.

    Args:
        tokenizer: with a chat template, or every conversation is refused.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        self.parts = getattr(tokenizer, "chat_template", None) is not None and takes_parts(tokenizer)

    def encode(self, example: Example) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether it is to be learned.

        Raises:
            DataError: the template refuses it, or does not say where an answer begins and ends.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise DataError(
                f"{example.place}: expected a tokenizer with a chat template for 'messages', but this one has none; "
                f"use an instruction-tuned model's tokenizer or write the data as 'prompt' and 'completion'."
            )
        asked = example.fields.get("prompt", [])
        messages = example.fields["messages"] if example.format == "messages" else asked + example.fields["completion"]
        settings = self._settings(example)

        def render(turns: list[dict[str, Any]], **options: Any) -> list[int]:
            return self.render(turns, example.place, **settings, **options)

        ids = render(messages)
        learned = [False] * len(ids)
        last = 0  # where the answer before ends
        for position, message in enumerate(messages):
            if message["role"] != "assistant" or position < len(asked):
                continue
            before = render(messages[:position], add_generation_prompt=True) if position else []
            through, tail = render(messages[: position + 1]), []
            if position and position + 1 < len(messages):  # some templates put an end of text behind any conversation
                asked_alone = render(messages[:position])
                tail = asked_alone[common_prefix(asked_alone, before) :]
                through = _without(tail, through)
            start, end = common_prefix(before, ids), common_prefix(through, ids)
            if start < last:  # the answer before, the last one there, is rendered differently
                opening = before[common_prefix(render(messages[:position]), before) :]
                start = last + common_prefix(opening, ids[last:])
            if end < len(through):
                # Templates may render an earlier turn differently once the conversation goes on (dropping its
                # reasoning, say): the end of the turn is sought before the next one then.
                end = _end_of_turn(messages, position, ids, start, through, tail, render, self.special)
            if start >= end:
                raise DataError(
                    f"{example.place}: expected a chat template that renders message {position + 1} the same way "
                    f"within the conversation and at its end, or ends it with the same mark, but this one does "
                    f"neither; use another template, or 'prompt' and 'completion'."
                )
            learned[start:end] = [True] * (end - start)
            last = end
        return ids, learned

    def render(self, messages: list[dict[str, Any]], place: str, **options: Any) -> list[int]:
        """The ids of messages whose content is text.

        Raises:
            DataError: the template refuses them.
        """
        if self.parts:
            messages = in_parts(messages)
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
            return list(rendered["input_ids"])
        except Exception as error:  # a template is a program of its own, in Jinja, and raises what it likes
            reason = str(error).strip().splitlines()
            raise DataError(
                f"{place}: expected messages that the tokenizer's chat template accepts, but it refused them "
                f"({reason[0] if reason else type(error).__name__}); change the messages or the template."
            ) from error

    def _settings(self, example: Example) -> dict[str, Any]:
        """What the record says beside its messages, as arguments of the template."""
        given = dict(example.fields.get("chat_template_kwargs", {}))
        taken = inspect.signature(self.tokenizer.apply_chat_template).parameters
        wrong = [name for name in given if name in taken and name not in OPEN]
        if wrong:
            raise DataError(
                f"{example.place}: expected variables of the chat template in 'chat_template_kwargs', but got "
                f"{wrong[0]!r}, which calmlm sets itself; leave it out."
            )
        return given | {key: example.fields[key] for key in ("tools",) if key in example.fields}


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _without(tail: list[int], ids: list[int]) -> list[int]:
    """Tokens without those that stand behind any conversation."""
    return ids[: -len(tail)] if tail and ids[-len(tail) :] == tail else ids


def _end_of_turn(
    messages: list[dict[str, Any]],
    position: int,
    ids: list[int],
    start: int,
    through: list[int],
    tail: list[int],
    render: Callable[[list[dict[str, Any]]], list[int]],
    special: set[int],
) -> int:
    """Where an assistant's message that begins at ``start`` ends within the conversation; 0 where it cannot be told.

    Its closing mark is what the message ends with whatever it says; the next message's content begins where another
    content would change the conversation. The message ends with the last closing mark before that; a mark of plain
    text, which may stand in what it says or in the next message's opening, has to stand there once.
    """

    def rendered(turns: list[dict[str, Any]]) -> list[int] | None:
        try:
            return _without(tail, render(turns))
        except DataError:  # a call that is taken away may leave an answer to nothing
            return None

    changed = [rendered([*messages[:position], other]) for other in _others(messages[position])]
    suffixes = [common_prefix(through[::-1], other[::-1]) for other in changed if other is not None]
    following = [
        rendered([*messages[: position + 1], other, *messages[position + 2 :]])
        for other in _others(messages[position + 1])
    ]
    limit = min((common_prefix(other, ids) for other in following if other is not None), default=len(ids))
    if limit == len(ids):  # nothing that the next message says is seen
        return 0
    for length in sorted({suffix for suffix in suffixes if suffix}):
        mark = through[len(through) - length :]
        ends = [end for end in range(start + length + 1, limit + 1) if ids[end - length : end] == mark]
        if ends and (len(ends) == 1 or special & set(mark)):
            return ends[-1]
    return 0


def _others(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message saying something else from its first character to its last: in words, in calls, in words alone."""
    said = message.get("content") or ""
    words = {"content": next(c for c in "xyz" if not said.startswith(c) and not said.endswith(c))}
    yield {**message, **words}
    calls = message.get("tool_calls")
    if calls:
        yield {**message, "tool_calls": [_otherwise(call) for call in calls]}
    if calls or any(message.get(key) for key in REASONING):
        yield {key: value for key, value in message.items() if key not in ("tool_calls", *REASONING)} | words


def _otherwise(call: dict[str, Any]) -> dict[str, Any]:
    """Another call of the same form."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _otherwise(inner)}
    name = str(call.get("name") or "")
    arguments = "{}" if isinstance(call.get("arguments"), str) else {}
    return {**call, "name": "y" if name.startswith("x") else "x", "arguments": arguments}
