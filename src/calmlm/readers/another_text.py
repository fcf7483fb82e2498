"""What an augmenting model reads in the anchor's place: another text in the first columns, then the anchor's own.

It tells whether anything is communicated: where the model reads another item's prompt, what the composition still gains
from it comes from no content.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calmlm.bases.families import counted
from calmlm.errors import ConfigError, DataError
from calmlm.readers.inputs import Inputs
from calmlm.state.past import Announced, Past


def in_place(inputs: Inputs, past: Past, name: str) -> tuple[Inputs, Past]:
    """What the model ``name`` reads in this call: the text that it was given, behind which the anchor's goes on.

    Args:
        inputs: of the call.
        past: of the model.
        name: of the model, which reads the text.

    Returns:
        inputs and past for its reader; the same ones where it was given nothing.

    Raises:
        ConfigError: with a static cache.
        DataError: for a mask that does not tell which columns are padding.
    """
    given = (inputs.augmenting or {}).get(name)
    if given is None:
        return inputs, past
    if isinstance(inputs.mask, dict) or (past.cross is not None and past.cross.is_compileable):
        raise ConfigError(
            f"Another text for the augmenting model {name!r} must come with a dynamic cache, but this one is static: "
            f"leave cache_implementation out."
        )
    batch, new = inputs.ids.shape
    start = past.frontier.length or (int(past.cross.get_seq_length()) if past.cross is not None else 0)
    length = start + new
    mask = inputs.mask
    if mask is not None and (mask.ndim != 2 or mask.shape[1] != length):
        raise DataError(
            f"attention_mask must be of shape ({batch}, {length}), a column for each token so far, where the "
            f"augmenting model {name!r} reads another text, but got {tuple(mask.shape)}: pass a padding mask."
        )
    ids, real = _rows(given, inputs.ids)
    own = torch.ones((batch, length), dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
    replaced = _laid_over(own, real)
    if mask is not None or not bool(replaced.all()):
        mask = replaced.to(torch.long if mask is None else mask.dtype)
    positions = inputs.positions
    if positions is not None:
        found = counted(inputs.ids, mask)
        positions = torch.arange(start, length, device=ids.device)[None] if found is None else found
    inputs = replace(
        inputs,
        ids=_laid_over(inputs.ids, ids[:, start:]),
        mask=mask,
        positions=positions,
        prompt=_told(inputs.prompt, own, ids.shape[1]),
        told=_told(inputs.told, own, ids.shape[1]),
    )
    coming = past.announced
    if coming is None:
        return inputs, past
    ids, real = ids[:, coming.start :], real[:, coming.start :]
    announced = Announced(_laid_over(coming.ids, ids), _laid_over(coming.real, real), coming.start)
    return inputs, replace(past, announced=announced)


def check_text(given: dict[str, Any], name: str, rows: int) -> None:
    """Raise unless what a model is to read in the anchor's place has the right form.

    Args:
        given: ``input_ids`` (B, W) int64 and, where some of them are padding, ``attention_mask`` (B, W).
        name: of the model.
        rows: of the call.

    Raises:
        DataError: otherwise.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    form = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() and ids.dtype != torch.bool
    if not form or set(given) - {"input_ids", "attention_mask"}:
        raise DataError(
            f"augmenting_inputs[{name!r}] must hold input_ids of shape (batch, length) and their attention_mask alone, "
            f"since this model reads text, but got {', '.join(given) or 'nothing'}: pass the anchor's token ids of "
            f"another text, or leave its inputs out."
        )
    assert isinstance(ids, Tensor)
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise DataError(
            f"augmenting_inputs[{name!r}]['attention_mask'] must be of the shape of its input_ids, {tuple(ids.shape)}, "
            f"but got {got}: pass that of this text."
        )
    if not len(ids) or rows % len(ids):
        raise DataError(
            f"augmenting_inputs[{name!r}] must hold one text per row, but got {len(ids)} for {rows} rows: pass one "
            f"each."
        )


def _rows(given: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, W) of the given text, one for each row of ``like``; several rows of a beam share one."""
    ids = given["input_ids"].to(like)
    mask = given.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(like.device).bool()
    times = len(like) // len(ids)
    return ids.repeat_interleave(times, 0), real.repeat_interleave(times, 0)


def _laid_over(whole: Tensor, part: Tensor) -> Tensor:
    """``whole`` (B, L) with the columns of ``part`` (B, W) in place of its first ones."""
    width = min(whole.shape[1], part.shape[1])
    return torch.cat((part[:, :width].to(whole.dtype), whole[:, width:]), dim=1)


def _told(told: Tensor | None, own: Tensor, width: int) -> Tensor | None:
    """Which tokens were given, (B, past + T or fewer) bool: in the first columns also those beside padding.

    Args:
        told: of the anchor's text.
        own: (B, past + T) bool, which of the anchor's tokens are real.
        width: columns of the other text.
    """
    if told is None:
        return None
    beside = ~own[:, :width]
    told = told.bool()
    told = nn.functional.pad(told, (0, max(0, beside.shape[1] - told.shape[1])))
    return torch.cat((told[:, : beside.shape[1]] | beside, told[:, beside.shape[1] :]), dim=1)
