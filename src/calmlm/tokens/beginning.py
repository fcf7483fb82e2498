"""What an augmenting model reads before a text: the special tokens of its tokenizer, and a prefix given to it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from calmlm.errors import ConfigError, first_line

Prefix: TypeAlias = str | Sequence[dict[str, Any]]
"""A text, or messages for the tokenizer's chat template."""


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text; none where it puts none."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for place in range(len(whole) - len(bare) + 1):
        if bare and whole[place : place + len(bare)] == bare:
            return list(whole[:place])
    return []


def prefix_ids(tokenizer: PreTrainedTokenizerBase | None, prefix: Prefix) -> list[int]:
    """The tokens of a prefix, without what its tokenizer puts before any text.

    Raises:
        ConfigError: without a tokenizer; for a text that cannot be written down, messages without a chat template, or
            such as it refuses, or a prefix of another type.
    """
    if tokenizer is None:
        raise ConfigError(
            "augmenting_prefix needs the augmenting model's tokenizer, but there is none: pass augmenting_tokenizer."
        )
    if isinstance(prefix, str):
        try:
            prefix.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"augmenting_prefix must be text in Unicode, but holds half of a character ({prefix[error.start]!r}) "
                f"at position {error.start + 1}: repair it."
            ) from None
        return list(tokenizer(prefix, add_special_tokens=False).input_ids)
    if not isinstance(prefix, Sequence) or not all(isinstance(message, dict) for message in prefix):
        raise ConfigError(
            f"augmenting_prefix must be a text or a list of messages, but got {type(prefix).__name__}: write for "
            f'example [{{"role": "user", "content": "..."}}].'
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "augmenting_prefix needs a chat template of the augmenting tokenizer for messages, but it has none: give a "
            "text."
        )
    try:
        ids = list(tokenizer.apply_chat_template(list(prefix), tokenize=True, return_dict=True)["input_ids"])
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise ConfigError(
            f"augmenting_prefix must be messages that the chat template accepts, but it refuses them "
            f"({first_line(error)}): change them, or give a text."
        ) from error
    beginning = beginning_of(tokenizer)
    return ids[len(beginning) :] if beginning and ids[: len(beginning)] == beginning else ids
