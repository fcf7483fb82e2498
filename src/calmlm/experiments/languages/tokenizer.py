"""The tokenizer of the experiment with languages: letters of any script come in pieces of two."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from calmlm.experiments.kv_arithmetic.tokenizer import SPACE, SPECIAL, SYMBOLS, split_by, wrapped
from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS

__all__ = ["build_tokenizer"]


def build_tokenizer(words: Iterable[str], largest_integer: int) -> PreTrainedTokenizerFast:
    """Build it for texts over these words and whatever is put together from their pieces.

    Args:
        words: whatever is written in the experiment.
        largest_integer: integers up to this size are one token each, sign included.
    """
    pieces: dict[str, None] = {}
    for word in {part for text in words for part in text.split()}:
        pieces.update(dict.fromkeys(word[i : i + 2] for i in range(0, len(word), 2)))
    pieces = dict.fromkeys([*sorted(pieces), *string.ascii_letters])
    integers = [str(n) for n in range(-largest_integer, largest_integer + 1)]
    plain = [*pieces, *SYMBOLS, *string.digits]
    spaced = [SPACE + text for text in dict.fromkeys([*plain, *PHRASE_WORDS, *integers])]
    vocabulary = dict.fromkeys([*SPECIAL, *plain, *spaced])
    integer = rf"-?\d{{1,{len(str(largest_integer))}}}(?!\d)"
    pattern = "|".join(
        [
            rf"{SPACE}(?:{'|'.join(PHRASE_WORDS)})(?!\p{{L}})",
            rf"{SPACE}(?:{integer})",
            rf"{SPACE}?(?:->|\p{{Ll}}{{2}}|[^{SPACE}])",
        ]
    )
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    split_by(backend, pattern)
    return wrapped(backend)
