"""Answers that follow a JSON schema, by llguidance (the extra ``structured``)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmlm.data.extras import require
from calmlm.errors import ConfigError, first_line

ANY_OBJECT = {"type": "object"}
SPACE: Any = {"whitespace_pattern": r"[ \n]{0,8}"}  # between parts; a model that is at a loss would write it for ever


class SchemaWriter:
    """Makes grammars for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        vocabulary: how many logits its model has.
        ends: the tokens that end a text.

    Raises:
        MissingExtraError: llguidance is not installed.
        ConfigError: it cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: set[int]) -> None:
        require("llguidance", "structured", "response_format")
        from llguidance.hf import from_tokenizer

        self._vocabulary = vocabulary
        size = max(vocabulary, len(tokenizer))  # which may have tokens that its model does not know
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(ends) or None)
        except Exception as error:  # its core is written in Rust, and raises what it likes
            raise ConfigError(
                f"response_format must come with a tokenizer that llguidance reads, but it refuses this one "
                f"({first_line(error)}): leave response_format out."
            ) from error

    def grammar(self, schema: dict[str, Any]) -> JsonGrammar:
        """The grammar of a JSON schema.

        Raises:
            ConfigError: for a schema that cannot be followed.
        """
        from llguidance import LLMatcher

        try:
            made = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=SPACE)
            fault = LLMatcher.validate_grammar(made, self._tokenizer)
        except Exception as error:
            fault = first_line(error)
        if fault:
            raise _unfit(fault)
        found = JsonGrammar(LLMatcher(self._tokenizer, made), self._vocabulary)
        found.allowed(self._vocabulary)  # which tells whether anything can be written at all
        return found


class JsonGrammar:
    """One text's place in a grammar.

    Args:
        matcher: llguidance's.
        known: the model's tokens are below.
    """

    def __init__(self, matcher: Any, known: int) -> None:
        self._matcher, self._known = matcher, known

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may follow, (vocabulary,) bool.

        Raises:
            ConfigError: none may, and the answer is not whole: the schema asks for itself without end, say.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_stopped() and self._matcher.get_error():  # which is told only to those who ask for both
            raise _unfit(self._matcher.get_error())
        found, bits = np.zeros(vocabulary, dtype=bool), bits[: min(vocabulary, self._known)]
        found[: len(bits)] = bits.astype(bool)
        if not found.any():
            raise _unfit("the model has no token for what must follow")
        return torch.from_numpy(found)

    def take(self, token: int) -> None:
        """Go on behind a token."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"llguidance refuses a token that it has allowed: {self._matcher.get_error()}")

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


def _unfit(fault: str) -> ConfigError:
    """A schema that cannot be followed, or not to an end."""
    return ConfigError(
        f"response_format must hold a JSON schema that can be followed, but this one cannot "
        f"({fault.splitlines()[0].rstrip('. ')}): change it."
    )
