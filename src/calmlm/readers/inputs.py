"""What a composition is called with, and what that tells about tokens, positions and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from calmlm.bases.families import Backbone
from calmlm.errors import ConfigError, DataError
from calmlm.state.cache import length_in, static_length
from calmlm.state.frontier import NOBODY, Frontier
from calmlm.state.past import Past

if TYPE_CHECKING:
    from calmlm.readers.packing import Texts

# The argument of models that keep a state alone: they multiply their input with the mask, which must be as long.
STATE = "cache_params"


@dataclass(frozen=True)
class Inputs:
    """What a composition is called with.

    Attributes:
        ids: (B, T) int64, the anchor's new tokens; None only while the composition is disabled.
        mask: (B, past + T), a 4-D mask, a dictionary made by ``create_masks_for_generate``, or None.
        positions: (B or 1, T) int64, or None.
        prompt: (B, T or fewer) bool, which tokens are the prompt, or None for all; read by ``PromptReader`` alone.
        augmenting: inputs of augmenting encoders, and texts that models read in the anchor's place, by name, or None.
        composed: (B,) bool, which rows the composition speaks in, or (B, models) bool, which augmenting models speak in
            which row, in their order in the configuration; None for all.
        told: (B, past + T or fewer) bool, which tokens of the text were given and not generated; None where only
            ``prompt`` tells. Read by ``OwnReader`` alone.
        texts: the texts of packed rows, in a call without a cache; None where each row holds one, or where nobody needs
            to tell them apart.
    """

    ids: Any
    mask: Any
    positions: Tensor | None
    prompt: Tensor | None
    augmenting: dict[str, dict[str, Any]] | None
    composed: Tensor | None = None
    told: Tensor | None = None
    texts: Texts | None = None


def check_inputs(inputs: Inputs, reads: dict[str, str]) -> None:
    """Raise unless what a composition is called with has the right forms and names.

    Args:
        inputs: of the call.
        reads: what each augmenting model reads.

    Raises:
        DataError: otherwise.
    """
    if not isinstance(inputs.ids, Tensor) or inputs.ids.ndim != 2 or inputs.ids.is_floating_point():
        got = tuple(inputs.ids.shape) if isinstance(inputs.ids, Tensor) else type(inputs.ids).__name__
        raise DataError(
            f"input_ids must be whole numbers of shape (batch, length), but got {got}: tokenize the text with "
            f"return_tensors='pt'."
        )
    rows, batch = inputs.composed, inputs.ids.shape[0]
    if rows is not None and (not isinstance(rows, Tensor) or rows.shape not in ((batch,), (batch, len(reads)))):
        raise DataError(
            f"composition_mask must hold one truth value for each of the {batch} rows, or for each row and each of the "
            f"augmenting models ({', '.join(reads)}), but got "
            f"{tuple(rows.shape) if isinstance(rows, Tensor) else rows!r}: pass a tensor of shape (batch,) or "
            f"(batch, {len(reads)})."
        )
    given = {} if inputs.augmenting is None else inputs.augmenting
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise DataError(
            "augmenting_inputs must be a dictionary of dictionaries, the inputs of each model by name, but got "
            "something else: write {name: {'pixel_values': ...}}."
        )
    for name in given:
        if reads.get(name) == "prompt":
            raise DataError(
                f"augmenting_inputs must be for models that read the text as it grows, or for encoders, but {name!r} "
                f"reads the prompt alone: leave its inputs out."
            )
    unknown = sorted(set(given) - set(reads))
    if unknown:
        raise DataError(
            f"augmenting_inputs must name augmenting models of this composition ({', '.join(reads)}), but got "
            f"{', '.join(unknown)}: use their names."
        )


def no_cache(what: str) -> ConfigError:
    """The error for ``what`` needing a cache where there can be none."""
    return ConfigError(
        f"The models of a composition must carry their past in a cache of transformers' general form for {what}, but "
        f"one of these keeps it in a form of its own: leave {what} out."
    )


def needs_tokens() -> DataError:
    """The error for embeddings in the place of tokens."""
    return DataError(
        "A composition must be given input_ids alone, because the augmenting model reads the same tokens, but got "
        "inputs_embeds: pass input_ids, or disable the composition."
    )


def prompt_of(labels: Tensor, starts: Tensor | None = None) -> Tensor:
    """Which tokens belong to the prompt: those before the first label of their text; (B, T) int64 to (B, T) bool.

    The first token of a text always does: nothing predicts it, whatever its label.

    Args:
        labels: -100 for none.
        starts: (B, T) bool, where texts begin; None for the first column alone.
    """
    starts = _starts(labels) if starts is None else starts
    learned = (labels != -100) & ~starts
    counted = learned.long().cumsum(-1)
    begun = torch.where(starts, counted, 0).cummax(-1).values  # how many there were before the text
    return counted == begun


def given_of(labels: Tensor, past: Cache | None, starts: Tensor | None = None) -> Tensor:
    """Which tokens of a text were given: those without a label; (B, T) int64 to (B, past + T) bool.

    The first token of a text is taken for what the second one is: nothing predicts it, whatever its label.

    Args:
        labels: -100 for none.
        past: of earlier calls, whose tokens were given.
        starts: (B, T) bool, where texts begin; None for the first column alone.
    """
    before = length_in(past) if past is not None else 0
    before = before if isinstance(before, int) else 0
    given = labels == -100
    if not before:
        starts = _starts(labels) if starts is None else starts
        given = torch.where(starts, nn.functional.pad(given[:, 1:], (0, 1), value=True), given)
    return nn.functional.pad(given, (before, 0), value=True)


def _starts(labels: Tensor) -> Tensor:
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, :1] = True
    return starts


def real_tokens(inputs: Inputs, name: str) -> Tensor:
    """Which of the new tokens are real, not padding, (B, T) bool."""
    mask = inputs.mask.get("tokens") if isinstance(inputs.mask, dict) else inputs.mask
    if mask is None:
        return torch.ones_like(inputs.ids, dtype=torch.bool)
    batch, length = inputs.ids.shape
    if mask.ndim == 2 and (mask.shape[0] != batch or mask.shape[1] < length):
        raise DataError(
            f"attention_mask must be of shape ({batch}, {length} or more), as many rows as input_ids and no fewer "
            f"tokens, but got {tuple(mask.shape)}: pass that of these tokens."
        )
    if mask.ndim != 2:
        raise DataError(
            f"attention_mask must be of shape (batch, length) where the augmenting model {name!r} has tokens of its "
            f"own, but got {tuple(mask.shape)}: pass a padding mask."
        )
    return mask[:, -inputs.ids.shape[1] :].bool()


def padded_since(inputs: Inputs, frontier: Frontier) -> Tensor | None:
    """Which earlier tokens the mask calls padding that were read as text, (B, L) bool; None for none."""
    mask, length = inputs.mask, frontier.length
    if not length or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != length + inputs.ids.shape[1]:
        return None
    assert frontier.ids is not None
    columns = (frontier.ids != NOBODY) & ~mask[:, :length].bool()
    return columns if bool(columns.any()) else None


def check_one_text(inputs: Inputs, real: Tensor, name: str) -> None:
    """Raise where positions begin anew within a row that a cache takes for one text.

    Raises:
        DataError: for such rows.
    """
    positions = inputs.positions
    if positions is None or positions.shape[-1] < 2:
        return
    both = (real[:, 1:] & real[:, :-1]).to(positions.device)
    if bool((both & (positions[..., 1:] <= positions[..., :-1])).any()):
        raise DataError(
            f"Each row must hold one text where a cache is used, because the augmenting model {name!r} goes on from "
            f"it, but got position_ids that begin anew within a row: pass use_cache=False, or switch packing off."
        )


def catch_up(inputs: Inputs, past: Past, name: str) -> Tensor:
    """Bring the record of a model with tokens of its own up to what a call says of earlier tokens.

    What stood for anchor tokens that have turned out to be padding is left out.

    Returns:
        which of the new tokens are no padding, (B, T) bool.

    Raises:
        DataError: for other rows than before, several texts in a row, or padding that text follows.
    """
    frontier = past.frontier
    real = real_tokens(inputs, name)
    check_one_text(inputs, real, name)
    if frontier.ids is not None and frontier.ids.shape[0] != inputs.ids.shape[0]:
        raise DataError(
            f"input_ids must have as many rows as past_key_values, {frontier.ids.shape[0]}, but got "
            f"{inputs.ids.shape[0]}: begin a new cache for other rows."
        )
    columns = padded_since(inputs, frontier)
    if columns is not None:
        shift, exact = frontier.forget(columns)
        if not exact:
            raise DataError(
                f"attention_mask must keep the tokens that past_key_values hold and that text follows, because the "
                f"augmenting model {name!r} has read on from them, but it calls some of them padding: begin a new "
                f"cache."
            )
        past.move(shift)
    return real


def base_arguments(
    backbone: Backbone, *, input_ids: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Cache | None
) -> dict[str, Any]:
    """Arguments for one base model's call, without those that it does not know."""
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if backbone.cache_argument == STATE and isinstance(attention_mask, Tensor):
        attention_mask = attention_mask[:, -input_ids.shape[1] :] if attention_mask.ndim == 2 else None
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and cache is not None:
        # Bloom counts its keys in the mask, so that it has to be as long as a static cache.
        more = (static_length(cache) or 0) - attention_mask.shape[1]
        attention_mask = nn.functional.pad(attention_mask, (0, more)) if more > 0 else attention_mask
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    if position_ids is None and cache is not None and not backbone.counts_on:
        past = length_in(cache) or 0
        position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    if position_ids is not None and backbone.takes_positions:
        arguments["position_ids"] = position_ids + backbone.first_position if backbone.first_position else position_ids
    if cache is not None and backbone.cache_argument is not None:
        arguments[backbone.cache_argument] = cache
    if backbone.takes_use_cache:
        arguments["use_cache"] = cache is not None
    return arguments


def positions_for(
    backbone: Backbone, position_ids: Tensor | None, input_ids: Tensor, attention_mask: Any
) -> Tensor | None:
    """The positions that one base model gets: the caller's, or counted over real tokens where the model needs that."""
    return position_ids if position_ids is not None else backbone.positions(input_ids, attention_mask)


def length_of(input_ids: Tensor, attention_mask: Any, cache: Cache | None) -> int:
    """Tokens up to the end of this call, as far as shapes tell; only the device knows what a static cache holds."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.shape[1]
    # torch would compile a step for each length that it reads on the host.
    past = length_in(cache) if cache is not None and not torch.compiler.is_compiling() else 0
    return input_ids.shape[1] + (past if isinstance(past, int) else 0)


def mask_of(attention_mask: Any, prefix: str) -> Any:
    """One base model's part of the dictionary that ``create_masks_for_generate`` makes; other masks as they are."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    if prefix in attention_mask:
        return attention_mask[prefix]
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in attention_mask.items() if key.startswith(start)}
