"""Examples to token ids and labels.

Labels are the ids themselves, with -100 where no loss is counted; the model shifts them by one. A prompt and its
completion are tokenized as one text, so that the ids are those that the tokenizer gives to that text; the completion
begins at the first token in which the whole differs from the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from calmlm.data.formats import Example
from calmlm.errors import DataError

IGNORE = -100

LossOn = Literal["completion", "all"]


@dataclass(frozen=True)
class Encoded:
    """All examples as ids and labels, and how many were cut at the context's end."""

    rows: list[dict[str, list[int]]]
    truncated: int


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_length: int | None,
    loss_on: LossOn = "completion",
) -> Encoded:
    """Token ids and labels of each example, at most `max_length` long.

    Args:
        examples: checked examples.
        tokenizer: a Hugging Face tokenizer; its `eos_token` ends each completion or text, a chat template renders
            messages.
        max_length: the context; a prompt must leave room in it for at least one token of its completion. Completions
            and texts that run over it are cut there. None sets no limit.
        loss_on: "completion" counts the completion, or the assistant's messages, only; "all" counts every token.
            A text without a prompt counts in full either way.

    Raises:
        DataError: a prompt that fills the context, an empty encoding, or a chat template that cannot be used.
    """
    rows, truncated = [], 0
    for example in examples:
        ids, learned = _encode(example, tokenizer)
        if sum(learned[1:]) == 0:  # nothing comes before the first token that could predict it
            raise DataError(
                f"{example.place}: expected text of two tokens or more, but got {len(ids)}; remove the record."
            )
        labels = [token if on or loss_on == "all" else IGNORE for token, on in zip(ids, learned, strict=True)]
        if max_length is not None and len(ids) > max_length:
            if not any(learned[1:max_length]):
                raise DataError(
                    f"{example.place}: expected a prompt shorter than the context of {max_length} tokens, but got "
                    f"{learned.index(True)}; shorten it, or raise data.max_length if the models allow it."
                )
            ids, labels = ids[:max_length], labels[:max_length]
            truncated += 1
        rows.append({"input_ids": ids, "labels": labels})
    return Encoded(rows, truncated)


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """The ids that a prompt has in training: as the tokenizer gives them, without an end-of-text token."""
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return ids
    # One that stands in the prompt stays.
    appended = tokenizer("a", verbose=False)["input_ids"][-1] == tokenizer.eos_token_id
    return ids[:-1] if appended else ids


def _encode(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids of an example, and for each whether it is to be learned."""
    if example.format == "messages":
        return _encode_messages(example, tokenizer)
    if example.format == "text":
        ids = _with_end(encode_prompt(example.fields["text"], tokenizer), tokenizer)
        return ids, [True] * len(ids)
    prompt, completion = example.fields["prompt"], example.fields["completion"]
    ids = _with_end(encode_prompt(prompt + completion, tokenizer), tokenizer)
    # An empty prompt still has what the tokenizer puts in front of any text (a beginning-of-text token).
    start = _common_prefix(encode_prompt(prompt, tokenizer), ids)
    if start == len(ids):
        raise DataError(
            f"{example.place}: expected the completion to add tokens, but it adds none to its prompt; "
            f"change it or remove the record."
        )
    return ids, [False] * start + [True] * (len(ids) - start)


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """End with the end-of-text token, so that the model learns to stop."""
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _encode_messages(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A conversation through the chat template; each assistant message is learned, with the end of its turn."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{example.place}: expected a tokenizer with a chat template for 'messages', but this one has none; use "
            f"an instruction-tuned model's tokenizer or write the data as 'prompt' and 'completion'."
        )
    messages, tools = example.fields["messages"], example.fields.get("tools")

    def render(turns: list[dict[str, Any]], **options: Any) -> list[int]:
        return _render(turns, tokenizer, example.place, **options, **({} if tools is None else {"tools": tools}))

    ids = render(messages)
    learned = [False] * len(ids)
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:position], add_generation_prompt=True) if position else []
        through = render(messages[: position + 1])
        start, end = _common_prefix(before, ids), _common_prefix(through, ids)
        if end < len(through):
            # Templates may render an earlier turn differently once the conversation goes on (dropping its reasoning,
            # say): the end of the turn is sought before the next one then.
            end = _end_of_turn(messages, position, ids, start, through, render, set(tokenizer.all_special_ids))
        if start >= end:
            raise DataError(
                f"{example.place}: expected a chat template that renders message {position + 1} the same way within "
                f"the conversation and at its end, or ends it with the same mark, but this one does neither; use "
                f"another template, or 'prompt' and 'completion'."
            )
        learned[start:end] = [True] * (end - start)
    return ids, learned


def _end_of_turn(
    messages: list[dict[str, Any]],
    position: int,
    ids: list[int],
    start: int,
    through: list[int],
    render: Callable[[list[dict[str, Any]]], list[int]],
    special: set[int],
) -> int:
    """Where an assistant's message that begins at ``start`` ends within the conversation; 0 where it cannot be told.

    Its closing mark is what the message ends with whatever it says; the next message's content begins where another
    content would change the conversation. The message ends with the last closing mark before that; a mark of plain
    text, which may stand in what it says or in the next message's opening, has to stand there once.
    """
    changed = render([*messages[:position], _otherwise(messages[position])])
    mark = through[len(through) - _common_prefix(through[::-1], changed[::-1]) :]
    following = [*messages[: position + 1], _otherwise(messages[position + 1]), *messages[position + 2 :]]
    limit = _common_prefix(render(following), ids)
    ends = [end for end in range(start + len(mark) + 1, limit + 1) if ids[end - len(mark) : end] == mark]
    return ends[-1] if mark and ends and (len(ends) == 1 or special & set(mark)) else 0


def _otherwise(message: dict[str, Any]) -> dict[str, Any]:
    """A message that says something else from its first character to its last."""
    said = str(message.get("content") or "")
    return {**message, "content": next(c for c in "xyz" if not said.startswith(c) and not said.endswith(c))}


def _render(messages: list[dict[str, Any]], tokenizer: Any, place: str, **options: Any) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])
    except Exception as error:  # a template is a program of its own, in Jinja, and raises what it likes
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{place}: expected messages that the tokenizer's chat template accepts, but it refused them "
            f"({reason[0] if reason else type(error).__name__}); change the messages or the template."
        ) from error
