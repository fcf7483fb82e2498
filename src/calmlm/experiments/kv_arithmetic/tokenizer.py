"""The tokenizer that both models of the key-value experiment share.

Letters come in pieces of two (the last of an odd word alone); a piece that starts a word carries its space. Small
integers are one token each, sign included; larger ones are spelled in digits. ``-7`` is a signed integer, `` - 7`` an
operator and an integer. ``decode(encode(text))`` gives the text back for single-spaced text over these characters.
"""

from __future__ import annotations

import itertools
import string

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS

__all__ = ["build_tokenizer"]

_SPACE = "▁"
_SYMBOLS = ["+", "-", "×", "=", "?", ":", ".", ",", "(", ")", "->"]


def build_tokenizer(largest_integer: int) -> PreTrainedTokenizerFast:
    """Build the shared tokenizer; integers from ``-largest_integer`` to ``largest_integer`` are one token each."""
    lower = string.ascii_lowercase
    pieces = [a + b for a, b in itertools.product(lower, lower)] + list(string.ascii_letters)
    words = [*pieces, *PHRASE_WORDS, *_SYMBOLS, *string.digits]
    integers = [str(n) for n in range(-largest_integer, largest_integer + 1)]
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *pieces, *_SYMBOLS, *string.digits]
    vocabulary += [_SPACE + word for word in dict.fromkeys([*words, *integers])]

    longest = len(str(largest_integer))
    integer = rf"-?\d{{1,{longest}}}(?!\d)" if largest_integer > 9 else r"\d"
    pattern = "|".join(
        [
            rf"{_SPACE}(?:{'|'.join(PHRASE_WORDS)})(?![A-Za-z])",
            rf"{_SPACE}(?:{integer})",
            rf"{_SPACE}?(?:->|[a-z]{{2}}|[^{_SPACE}])",
        ]
    )
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Strip()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
