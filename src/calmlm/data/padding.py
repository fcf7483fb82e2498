"""Rows of token ids as one tensor, filled up on either side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def padded(rows: Iterable[Sequence[int]], fill: int, device: Any = None) -> Tensor:
    """Rows, filled up on the right to the longest, (B, T) int64."""
    rows = list(rows)
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def padded_left(rows: Sequence[Sequence[int]], width: int, fill: int, device: Any = None) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of rows that end in one column, (B, width) int64 each."""
    ids = [[fill] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.long, device=device),
    }


def pad_id(tokenizer: Any) -> int:
    """What fills rows, where no model attends to it: the tokenizer's padding, or any id where it has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
