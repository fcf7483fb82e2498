"""How an augmenting model reads: the same tokens, the same text in its own, or a prompt or image at once.

A reader runs its model for one call and prepares the ``Stream`` from which the anchor's hooks take keys and values.
What it knows of earlier calls lies in the cache; readers themselves keep no state between calls.
"""

from __future__ import annotations

from typing import Any

from calmlm.readers.another_text import check_text, in_place
from calmlm.readers.common import Reader
from calmlm.readers.encoder import EncoderReader, without_items
from calmlm.readers.inputs import (
    Inputs,
    base_arguments,
    check_inputs,
    given_of,
    length_of,
    mask_of,
    needs_tokens,
    no_cache,
    positions_for,
    prompt_of,
)
from calmlm.readers.own_text import OwnReader
from calmlm.readers.own_tokens import AlignedReader
from calmlm.readers.packing import prompt_mask_of, starts_of, texts_of
from calmlm.readers.preamble import Opening, check_opening
from calmlm.readers.prompt import PromptReader
from calmlm.readers.shared import SharedReader
from calmlm.tokens.live_text import OwnWriter

__all__ = [
    "AlignedReader",
    "EncoderReader",
    "Inputs",
    "Opening",
    "OwnReader",
    "PromptReader",
    "Reader",
    "SharedReader",
    "base_arguments",
    "check_inputs",
    "check_opening",
    "check_text",
    "given_of",
    "in_place",
    "length_of",
    "make_reader",
    "mask_of",
    "needs_tokens",
    "no_cache",
    "positions_for",
    "prompt_mask_of",
    "prompt_of",
    "starts_of",
    "texts_of",
    "without_items",
]


def make_reader(reads: str, common: dict[str, Any], transcoder: Any, anchor_vocabulary: int) -> Reader:
    """The reader of an augmenting model.

    Args:
        reads: one of ``calmlm.config.READS``.
        common: the fields of ``Common``, by name.
        transcoder: what writes the text in the model's own tokens, for ``"text"``.
        anchor_vocabulary: the anchor's token ids, for ``"tokens"``.
    """
    if reads == "tokens":
        return SharedReader(**common, anchor_vocabulary=anchor_vocabulary)
    if reads == "text" and isinstance(transcoder, OwnWriter):
        return OwnReader(**common, transcoder=transcoder)
    if reads == "text":
        return AlignedReader(**common, transcoder=transcoder)
    return (PromptReader if reads == "prompt" else EncoderReader)(**common)
