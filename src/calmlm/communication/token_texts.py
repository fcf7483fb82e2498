"""Single tokens as text that can be shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calmlm.errors import ModelError
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.parts import read_backend
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import Spelling

__all__ = ["TokenTexts", "printable", "shown", "texts_of_augmenting"]


class TokenTexts:
    """Shows tokens of one tokenizer: what they write, with bytes that are no character as ``\\xf0``.

    Args:
        tokenizer: None where nobody knows it; tokens are shown by their numbers then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self.spelling: Spelling | None = None
        if tokenizer is not None:
            try:
                self.spelling = Spelling.of(tokenizer, "model")
            except ModelError:  # of another library: what it calls its tokens is shown
                self.spelling = None

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """The tokens as text."""
        return [self._one(int(index)) for index in ids]

    def _one(self, index: int) -> str:
        token: Any = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(index)
        if token is None:
            return f"#{index}"
        assert self.tokenizer is not None
        if self.spelling is None or index in self.tokenizer.added_tokens_decoder:
            return str(token)
        return self.spelling.bytes_of(token).decode("utf-8", "backslashreplace")


def shown(token: str) -> str:
    """A token as one word: a space at its ends is ``␣``, and what no terminal shows is written out."""
    inner = token.strip(" ")
    left, right = len(token) - len(token.lstrip(" ")), len(token) - len(token.rstrip(" "))
    if not inner:
        return "␣" * len(token)
    return "␣" * left + printable(inner) + "␣" * right


def printable(text: str, kept: str = "") -> str:
    """A text in which what no terminal shows is written out, but for the characters in ``kept``."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def texts_of_augmenting(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenTexts]:
    """What shows the tokens that augmenting models read, by name.

    Args:
        model: the composition.
        tokenizer: the anchor's.
    """
    found, own = {}, TokenTexts(tokenizer)
    for name, entry in model.config.augmenting.items():
        alignment = model.model.alignments.get(name)
        if entry["reads"] in ("tokens", "prompt"):
            found[name] = own
        elif isinstance(alignment, Rewriting):
            found[name] = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=read_backend(alignment.tokenizer)))
        else:
            place = model.augmenting[name].name_or_path
            found[name] = TokenTexts(find_tokenizer(place, local_files_only=True) if place else None)
    return found
