"""Rows with a prompt and a completion, and the batches in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

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
        while len(ids) > start and ids[-1] in tokenizer.all_special_ids:  # the end of the text is no text
            ids.pop()
        stop = next((place for place in range(start, len(ids)) if labels[place] == IGNORE), len(ids))
        ids = ids[:stop]  # of a conversation the first answer
        size = sum(len(pieces[index] or b"") for index in ids[start:])
        if not size or not start:
            return None
        return cls(ids, start, size, sum(len(pieces[index] or b"") for index in ids))

    @property
    def row(self) -> Row:
        """The anchor's tokens, and where the completion begins."""
        return self.ids, self.start

    def behind(self, other: Excerpt) -> Excerpt:
        """This completion behind another row's prompt."""
        ids = [*other.ids[: other.start], *self.ids[self.start :]]
        return Excerpt(ids, other.start, self.size, self.whole)


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
