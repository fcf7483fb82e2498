"""Examples to token ids and labels.

Labels are the ids themselves, with -100 where no loss is counted; the model shifts them by one. A prompt and its
completion are tokenized as one text, so that the ids are those that the tokenizer gives to that text; the completion
begins at the first token in which the whole differs from the prompt alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calmlm.data.context import OwnContext
from calmlm.data.conversations import Conversations, common_prefix
from calmlm.data.formats import CONVERSATIONS, Example
from calmlm.errors import DataError
from calmlm.tokens.text_ends import end_of, without_appended

IGNORE = -100

LossOn = Literal["completion", "all"]


@dataclass(frozen=True)
class Encoded:
    """All examples as ids and labels.

    Attributes:
        rows: one for each example.
        truncated: how many were cut at `max_length`.
        outgrown: how many were cut where an augmenting model's own context ends, by that model's name.
    """

    rows: list[dict[str, list[int]]]
    truncated: int
    outgrown: dict[str, int]


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    max_length: int | None,
    loss_on: LossOn = "completion",
    prompt_length: int | None = None,
    own: Sequence[OwnContext] = (),
) -> Encoded:
    """Token ids and labels of each example, at most `max_length` long, and no longer than all models can read.

    Args:
        examples: checked examples.
        tokenizer: a Hugging Face tokenizer; its `eos_token`, or what it puts behind any text,
            ends each completion or text; a chat template renders messages.
        max_length: the context; a prompt must leave room in it for at least one token of its completion. Completions
            and texts that run over it are cut there. None sets no limit.
        loss_on: "completion" counts the completion, or the assistant's messages, only; "all" counts every token.
            A text without a prompt counts in full either way.
        prompt_length: the context of models that read the prompt alone.
        own: contexts of models that have tokens of their own; what runs over them is cut as well.

    Raises:
        DataError: a prompt that fills a context, an empty encoding, or a chat template that cannot be used.
    """
    rows: list[dict[str, list[int]]] = []
    truncated, outgrown = 0, dict[str, int]()
    conversations = Conversations(tokenizer)
    for example in examples:
        if example.format in CONVERSATIONS:
            ids, learned = conversations.encode(example)
        else:
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
                    f"{learned.index(True)}; shorten it, or raise max_length if the models allow it."
                )
            ids = ids[:max_length]
            truncated += 1
        prompt = next((place for place, label in enumerate(labels) if label != IGNORE), 0)
        if prompt_length is not None and prompt > prompt_length:
            raise DataError(
                f"{example.place}: expected a prompt of at most {prompt_length} tokens, the context of an augmenting "
                f"model that reads it, but got {prompt}; shorten it."
            )
        for context in own:
            keep = context.readable(ids, _given(labels[: len(ids)]))
            if not any(learned[1:keep]):
                first = learned.index(True, 1)
                raise DataError(
                    f"{example.place}: expected the prompt and one token more to fit into the context of the "
                    f"augmenting model {context.name!r}, {context.length} of its own tokens, but they take "
                    f"{context.count(ids[: first + 1])}; shorten the prompt."
                )
            if keep < len(ids):
                ids = ids[:keep]
                outgrown[context.name] = outgrown.get(context.name, 0) + 1
        rows.append({"input_ids": ids, "labels": labels[: len(ids)]})
    return Encoded(rows, truncated, outgrown)


def _given(labels: list[int]) -> list[bool]:
    """Which tokens a composition takes for given, see ``calmlm.readers.given_of``."""
    given = [label == IGNORE for label in labels]
    return [*given[1:2], *given[1:]]


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """The ids that a prompt has in training: as the tokenizer gives them, without what it puts behind any text."""
    return without_appended(tokenizer(prompt, verbose=False)["input_ids"], tokenizer)


def _encode(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids of an example, and for each whether it is to be learned."""
    if example.format == "text":
        ids = _with_end(encode_prompt(example.fields["text"], tokenizer), tokenizer)
        return ids, [True] * len(ids)
    prompt, completion = example.fields["prompt"], example.fields["completion"]
    ids = _with_end(encode_prompt(prompt + completion, tokenizer), tokenizer)
    # An empty prompt still has what the tokenizer puts in front of any text (a beginning-of-text token).
    start = common_prefix(encode_prompt(prompt, tokenizer), ids)
    if start == len(ids):
        raise DataError(
            f"{example.place}: expected the completion to add tokens, but it adds none to its prompt; "
            f"change it or remove the record."
        )
    return ids, [False] * start + [True] * (len(ids) - start)


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """End with the token that ends texts, so that the model learns to stop."""
    end = end_of(tokenizer)
    return ids if end is None else [*ids, end]
