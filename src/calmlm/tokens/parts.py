"""Tokenizers of the tokenizers library: their parts as data, and variants that share one vocabulary.

A large vocabulary takes seconds and tens of megabytes each time it is written or read, so that it is done once.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from calmlm.errors import ModelError, first_line

KEPT = 4  # tokenizers that were read lately
OF_MODELS = ("continuing_subword_prefix", "end_of_word_suffix")
_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
}
_read: dict[str, Tokenizer] = {}


def parts_of(backend: Tokenizer) -> dict[str, Any]:
    """``normalizer``, ``pre_tokenizer``, ``decoder`` and ``model`` as in a saved tokenizer, without the vocabulary.

    Raises:
        ModelError: for parts that are code, so that they cannot be data.
    """
    found: dict[str, Any] = {}
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        try:
            found[name] = None if part is None else json.loads(part.__getstate__())
        except Exception as error:  # the library raises bare exceptions
            raise ModelError(
                f"A tokenizer must be made of parts that can be saved, but its {name} cannot ({first_line(error)}): "
                f"use one of the tokenizers library's own."
            ) from error
    model = backend.model
    return found | {"model": {"type": type(model).__name__, **{key: getattr(model, key, None) for key in OF_MODELS}}}


def part(name: str, data: dict[str, Any] | None) -> Any:
    """The part of a tokenizer that ``data`` describes."""
    return getattr(Tokenizer.from_str(json.dumps(_EMPTY | {name: data})), name)


def literal(backend: Tokenizer, **parts: dict[str, Any] | None) -> Tokenizer:
    """A tokenizer of the same vocabulary for parts of texts: what looks like a special token is text to it.

    It neither pads nor truncates, and adds nothing.

    Args:
        backend: as it is; it stays so.
        parts: as data, instead of its own: ``normalizer``, ``pre_tokenizer``.
    """
    made = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        found = part(name, parts[name]) if name in parts else getattr(backend, name)
        if found is not None:
            setattr(made, name, found)
    # In the order of their ids, so that they get the same ones again.
    made.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    made.encode_special_tokens = True
    return made


def literal_encoder(backend: Tokenizer) -> Any:
    """From a text to its ids. A special token that is spelled out in the text counts as text."""
    reader = literal(backend)
    return lambda text: reader.encode(text, add_special_tokens=False).ids


def read_backend(saved: str) -> Tokenizer:
    """A tokenizer, as the tokenizers library saves it; shared by all who ask, so that nobody may change it."""
    found = _read.pop(saved, None)
    return remember(saved, Tokenizer.from_str(saved) if found is None else found)


def remember(saved: str, backend: Tokenizer) -> Tokenizer:
    """Keep what ``saved`` is, so that it need not be read."""
    _read[saved] = backend
    while len(_read) > KEPT:
        del _read[next(iter(_read))]
    return backend


class SavedTokenizer:
    """What writing needs of a tokenizer that is there as data.

    Args:
        saved: as the tokenizers library saves it.
        unknown: its token for what it cannot write, or None.
    """

    def __init__(self, saved: str, unknown: str | None) -> None:
        self.backend_tokenizer = read_backend(saved)
        self.unk_token_id = None if unknown is None else self.backend_tokenizer.token_to_id(unknown)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """All tokens."""
        return self.backend_tokenizer.get_vocab()

    def get_vocab(self) -> dict[str, int]:
        """All tokens."""
        return self.vocabulary

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that were added to the vocabulary, by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def all_special_ids(self) -> list[int]:
        """The token for what it cannot write; all others stand among the added ones."""
        return [] if self.unk_token_id is None else [self.unk_token_id]
