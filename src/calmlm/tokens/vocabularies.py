"""Which tokens two vocabularies share, how one says the other's, and how often they stand in text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.retokenization import Rewriting

NEVER_SAID = ("bos_token", "cls_token", "mask_token", "unk_token", "pad_token")
UNSEEN = 0.02  # what a token counts that no text holds, where one that stands there once counts 1


def shared_pieces(alignment: Alignment | Rewriting | None, anchor: int, augmenting: int) -> tuple[Tensor, Tensor]:
    """The anchor's tokens that are one token of the augmenting model as well, and that token.

    Args:
        alignment: of the two tokenizers; None for models that share ids.
        anchor, augmenting: how many tokens each model has.

    Returns:
        ids of both, (n,) int64 each.
    """
    if alignment is None:
        ids = torch.arange(min(anchor, augmenting))
        return ids, ids
    table = alignment if isinstance(alignment, Alignment) else alignment.alignment
    unknown = set(table.unknown)
    pairs = [
        (ours, row[0])
        for ours, row in enumerate(table.body[:anchor])
        if len(row) == 1 and row[0] not in unknown and row[0] < augmenting
    ]
    found = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def with_firsts(
    alignment: Alignment | Rewriting, anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase
) -> Alignment | Rewriting:
    """The same alignment, which also knows the way back: the anchor's first token of each augmenting token's bytes.

    The augmenting model's end-of-text token stands for the anchor's; its other special tokens, for those of the same
    content, but for those that no text holds.

    Raises:
        ModelError: when the augmenting tokenizer's tokens cannot be read.
    """
    back = Alignment.between(augmenting, anchor)
    unknown = set(back.unknown)
    firsts = [row[0] if row and row[0] not in unknown else None for row in back.body]
    for role in NEVER_SAID:
        index = getattr(augmenting, f"{role}_id", None)
        if index is not None and index < len(firsts):
            firsts[index] = None
    end = augmenting.eos_token_id
    if end is not None and end < len(firsts):
        firsts[end] = anchor.eos_token_id
    if isinstance(alignment, Alignment):
        return dataclasses.replace(alignment, firsts=firsts)
    return dataclasses.replace(alignment, alignment=dataclasses.replace(alignment.alignment, firsts=firsts))


def first_tokens(alignment: Alignment | Rewriting | None, anchor: int, augmenting: int) -> Tensor:
    """The anchor's first token of the bytes of each augmenting token, (V_A,) int64; -1 where there is none.

    Args:
        alignment: from ``with_firsts``; None for models that share ids.
        anchor, augmenting: how many tokens each model has.

    Raises:
        ModelError: where there is none for any.
    """
    if alignment is None:
        ids = torch.arange(augmenting)
        return ids.masked_fill(ids >= anchor, -1)
    table = alignment if isinstance(alignment, Alignment) else alignment.alignment
    found = [-1 if index is None or index >= anchor else index for index in table.firsts[:augmenting]]
    if max(found, default=-1) < 0:
        raise ModelError(
            "ingestor='anchor' or words='pointer' needs an alignment that says which of the anchor's tokens begin the "
            "augmenting model's, but this one says it of none: compose the models anew, or use neither."
        )
    return torch.tensor(found + [-1] * (augmenting - len(found)))


def frequencies(size: int, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """How often each of a model's tokens stands in texts, up to a factor, (size,) float32.

    Args:
        size: of the model's vocabulary.
        tokenizer: its own.
        texts: plain texts.
    """
    counts = Counter(index for text in texts for index in tokenizer(text, add_special_tokens=False).input_ids)
    found = torch.full((size,), UNSEEN)
    for index, count in counts.items():
        if index < size:
            found[index] += count
    return found
