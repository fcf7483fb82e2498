"""How an augmenting model reads: the same tokens, the same text in its own, or a prompt or image at once.

A reader runs its model for one call and prepares the ``Stream`` from which the anchor's hooks take keys and values.
What it knows of earlier calls lies in the cache; readers themselves keep no state between calls.
"""

from __future__ import annotations

from calmlm.readers.common import Reader
from calmlm.readers.encoder import EncoderReader
from calmlm.readers.inputs import (
    Inputs,
    base_arguments,
    check_inputs,
    length_of,
    mask_of,
    needs_tokens,
    no_cache,
    positions_for,
    prompt_of,
)
from calmlm.readers.own_tokens import AlignedReader
from calmlm.readers.prompt import PromptReader
from calmlm.readers.shared import SharedReader

__all__ = [
    "AlignedReader",
    "EncoderReader",
    "Inputs",
    "PromptReader",
    "Reader",
    "SharedReader",
    "base_arguments",
    "check_inputs",
    "length_of",
    "mask_of",
    "needs_tokens",
    "no_cache",
    "positions_for",
    "prompt_of",
]
