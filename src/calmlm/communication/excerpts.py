"""Rows with a prompt and a completion, and the batches in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from calmlm.data.context import OwnContext
from calmlm.data.labels import IGNORE

__all__ = ["Excerpt", "Row", "batches"]

BATCH_TOKENS = 512

Row = tuple[list[int], int]
"""Tokens of one model, and where the completion begins among them."""


@dataclass(frozen=True)
class Excerpt:
    """One row: the anchor's tokens, where the completion begins, and the bytes of both."""

    ids: list[int]
    start: int
    size: int
    whole: int

    @classmethod
    def of(
        cls, row: dict[str, list[int]], pieces: list[bytes | None], tokenizer: PreTrainedTokenizerBase
    ) -> Excerpt | None:
        labels = row["labels"]
        start = next((place for place, label in enumerate(labels) if label != IGNORE), len(labels))
        ids = list(row["input_ids"])
        stop = next((place for place in range(start, len(ids)) if labels[place] == IGNORE), len(ids))
        ids = _without_end(ids[:stop], start, pieces, tokenizer)  # of a conversation the first answer
        size = sum(len(pieces[index] or b"") for index in ids[start:])
        if not size or not start:
            return None
        return cls(ids, start, size, sum(len(pieces[index] or b"") for index in ids))

    @property
    def row(self) -> Row:
        """The anchor's tokens, and where the completion begins."""
        return self.ids, self.start

    def behind(self, other: Excerpt, longest: int | None = None, contexts: Sequence[OwnContext] = ()) -> Excerpt:
        """This completion behind another row's prompt.

        What does not fit is cut from the prompt's beginning, all but its last token.

        Args:
            other: the row of the prompt.
            longest: how many of the anchor's tokens models can read; None for any number.
            contexts: of the models that have tokens of their own.
        """
        prompt, completion = other.ids[: other.start], self.ids[self.start :]
        if longest is not None:
            prompt = prompt[-max(1, longest - len(completion)) :]
        for context in contexts:
            while len(prompt) > 1 and (
                over := len(prompt) + len(completion) - context.readable([*prompt, *completion])
            ):
                prompt = prompt[min(over, len(prompt) - 1) :]
        return Excerpt([*prompt, *completion], len(prompt), self.size, self.whole)


def _without_end(
    ids: list[int], start: int, pieces: list[bytes | None], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokens without the end of a text or turn: special tokens, and the white space that a template puts behind."""
    special, end = set(tokenizer.all_special_ids), len(ids)
    while end > start and (ids[end - 1] in special or not (pieces[ids[end - 1]] or b"").strip()):
        end -= 1
    while end < len(ids) and ids[end] not in special:  # white space before it is text
        end += 1
    return ids[:end]


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about one length, as many at a time as fit into ``BATCH_TOKENS``."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
