"""Batches whose prompts end in one column, and what m_A reads there where it is given other rows' prompts instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calmlm.data.labels import IGNORE
from calmlm.data.padding import padded_left
from calmlm.experiments.fitting import Row

__all__ = ["AUGMENTING", "Text", "batches", "laid_out", "reading_others", "with_others"]

AUGMENTING = "augmenting"
"""The name that the augmenting model has in every composition of the experiment."""
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Text:
    """A text in a model's tokens.

    Attributes:
        ids: all of it.
        start: where what is to be predicted begins, at least 1.
        other: tokens that m_A reads in the place of those before ``start``, or none.
    """

    ids: list[int]
    start: int
    other: list[int] | None = None

    @property
    def before(self) -> int:
        """Columns that its prompt takes."""
        return max(self.start, len(self.other or ()))


def batches(texts: Sequence[Text], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of texts of about one length, as many at a time as have so many tokens."""
    batch: list[int] = []
    before = after = 0
    for index in sorted(range(len(texts)), key=lambda i: (len(texts[i].ids), texts[i].start)):
        text = texts[index]
        wider = max(before, text.before), max(after, len(text.ids) - text.start)
        if batch and (len(batch) + 1) * sum(wider) > tokens:
            yield batch
            batch, wider = [], (text.before, len(text.ids) - text.start)
        batch.append(index)
        before, after = wider
    if batch:
        yield batch


def laid_out(texts: Sequence[Text], pad: int) -> tuple[dict[str, Any], int]:
    """A batch, padded on both sides so that all prompts end in one column.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, (B, T) int64 each, with ``augmenting_inputs`` where texts have
        an ``other``; and the column W in which what is to be predicted begins.
    """
    width = max(text.before for text in texts)
    length = width + max(len(text.ids) - text.start for text in texts)
    ids, labels = torch.full((len(texts), length), pad), torch.full((len(texts), length), IGNORE)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        first = width - text.start
        end = first + len(text.ids)
        ids[row, first:end] = torch.tensor(text.ids)
        mask[row, first:end] = 1
        labels[row, width:end] = ids[row, width:end]
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if any(text.other is not None for text in texts):
        others = [text.ids[: text.start] if text.other is None else text.other for text in texts]
        batch["augmenting_inputs"] = with_others(others, width, pad)
    return batch, width


def with_others(others: Sequence[Sequence[int]], width: int, pad: int) -> dict[str, dict[str, Tensor]]:
    """``augmenting_inputs`` by which the augmenting model reads these prompts in the first ``width`` columns.

    Args:
        others: prompts in the anchor's tokens, one for each row, at most ``width`` long.
        width: where the rows' own prompts end.
        pad: the padding token.
    """
    return {AUGMENTING: padded_left(others, width, pad)}


def reading_others(pad: int) -> Any:
    """A collator for rows with ``other``, the prompt that m_A reads; plain text has none."""

    def collate(rows: list[Row]) -> dict[str, Any]:
        texts = []
        for row in rows:
            start = next((place for place, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))
            texts.append(Text(row["input_ids"], max(1, start), row.get("other")))
        return laid_out(texts, pad)[0]

    return collate
