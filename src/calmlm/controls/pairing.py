"""Another item's prompt for each item, and batches in which the anchor and its augmenting models read one each."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from calmlm.data.padding import padded_left
from calmlm.errors import DataError

__all__ = ["beside", "listening", "partners"]

K = TypeVar("K", bound=Hashable)


def partners(lengths: Mapping[K, int], seed: int = 0) -> dict[K, K]:
    """Each prompt with another one, which no third prompt has; of the same length wherever there is one.

    Args:
        lengths: how many tokens each prompt has, by prompt.
        seed: of the order within a length.

    Raises:
        DataError: for fewer than two prompts.
    """
    if len(lengths) < 2:
        raise DataError(
            f"At least two different prompts are needed for one to be read in place of another, but there is "
            f"{len(lengths)}: give more items."
        )
    order = list(lengths)
    random.Random(f"partners-{seed}").shuffle(order)
    order.sort(key=lambda prompt: lengths[prompt])
    groups: list[list[K]] = []
    for prompt in order:
        if groups and (len(groups[-1]) == 1 or lengths[groups[-1][-1]] == lengths[prompt]):
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    if len(groups[-1]) == 1:
        last = groups.pop()
        groups[-1] += last
    pairs = {one: other for group in groups for one, other in zip(group, [*group[1:], group[0]], strict=True)}
    return {prompt: pairs[prompt] for prompt in lengths}


def listening(model: Any) -> list[str]:
    """The augmenting models of a composition that are switched on and read the text as it grows."""
    inner: Any = getattr(model, "model", None)
    if not getattr(inner, "enabled", False) or not hasattr(inner, "reads_text"):
        return []
    return [name for name in model.config.augmenting if name in inner.active and inner.reads_text(name)]


def beside(
    names: Sequence[str], rows: Sequence[Sequence[int]], others: Sequence[Sequence[int]], pad: int, device: Any = None
) -> dict[str, Any]:
    """A batch in which the anchor reads rows and augmenting models others, padded on the left to one width.

    So what both read stands in the same columns, counted from the end.

    Args:
        names: of the augmenting models.
        rows: token ids, one list each.
        others: the anchor's token ids of what the augmenting models read in their place.
        pad: fills rows up.
        device: where the tensors go.

    Returns:
        ``input_ids`` and ``attention_mask``, each (B, T) int64, and ``augmenting_inputs``.
    """
    width = max(map(len, [*rows, *others]))

    instead = {name: padded_left(others, width, pad, device) for name in names}
    return {**padded_left(rows, width, pad, device), "augmenting_inputs": instead}
