"""Negative log-probabilities of completions, by a model or by a composition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from calmlm.bases.structure import accepts
from calmlm.communication.ear import Ear
from calmlm.communication.excerpts import Excerpt, Row, batches
from calmlm.communication.tokenwise import token_nats
from calmlm.controls import beside, listening
from calmlm.data.labels import IGNORE
from calmlm.data.padding import padded
from calmlm.errors import CalmError

__all__ = ["nats_beside", "nats_of"]


def nats_of(model: Any, rows: Sequence[Row], *, ears: Iterable[Ear] = (), told: bool = True) -> list[float]:
    """The completions' negative log-probabilities by a model.

    Args:
        model: a composition, or a model alone.
        rows: ids of each, and where its completion begins.
        ears: hear what augmenting models make of them meanwhile.
        told: whether the model is told which tokens were given.
    """
    found = [0.0] * len(rows)
    for batch in batches([len(ids) for ids, _ in rows]):
        chosen = [rows[index] for index in batch]
        for ear in ears:
            ear.rows = list(zip(batch, chosen, strict=True))
        ids = padded([ids for ids, _ in chosen], 0, model.device)
        mask = padded([[1] * len(ids) for ids, _ in chosen], 0, model.device)
        labels = padded([[IGNORE] * start + ids[start:] for ids, start in chosen], IGNORE, model.device)
        given = _keeping(model, min(start for _, start in chosen) - 1, ids)
        if told:
            given["prompt_mask"] = labels == IGNORE
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        for index, nats in zip(batch, _nats(logits, labels), strict=True):
            found[index] = nats
    return found


def nats_beside(model: Any, texts: Sequence[Excerpt], others: Sequence[Excerpt]) -> list[float] | None:
    """The completions' negative log-probabilities by a composition whose augmenting models read them behind others.

    None where no augmenting model reads the text, or one of the models cannot read rows that stand beside each other.
    """
    names, found = listening(model), [0.0] * len(others)
    if not names or not others:
        return None
    for batch in batches([max(len(one.ids), len(two.ids)) for one, two in zip(texts, others, strict=True)]):
        chosen = [texts[index] for index in batch]
        given = beside(names, [text.ids for text in chosen], [others[index].ids for index in batch], 0, model.device)
        ids = given["input_ids"]
        new = [text.ids[text.start :] for text in chosen]
        labels = torch.tensor([[IGNORE] * (ids.shape[1] - len(part)) + part for part in new], device=ids.device)
        given |= _keeping(model, ids.shape[1] - max(map(len, new)) - 1, ids)
        try:
            logits = model(**given, prompt_mask=labels == IGNORE, use_cache=False).logits
        except CalmError:
            return None
        for index, nats in zip(batch, _nats(logits, labels), strict=True):
            found[index] = nats
    return found


def _nats(logits: Tensor, labels: Tensor) -> list[float]:
    """Each row's negative log-probability of its labels (B, T) by logits of the last columns (B, n, V)."""
    following = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    wanted = following != IGNORE
    losses = token_nats(logits[:, :-1][wanted], following[wanted])
    rows = wanted.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, rows, losses).tolist()


def _keeping(model: Any, first: int, ids: Tensor) -> dict[str, Tensor]:
    """What lets a model compute the logits of its columns from ``first`` on alone, where it can.

    A slice, which a number would give, is multiplied several times as slowly as a copy in bfloat16 on CPUs.
    """
    given = torch.arange(max(0, first), ids.shape[1], device=ids.device)
    return {"logits_to_keep": given} if accepts(model, "logits_to_keep") else {}
