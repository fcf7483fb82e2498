"""The tokenizers of the key-value experiment: one that both models share, and two that they do not.

In the shared one, letters come in pieces of two (the last of an odd word alone); a piece that starts a word carries its
space. Small integers are one token each, sign included; larger ones are spelled in digits. ``-7`` is a signed integer,
`` - 7`` an operator and an integer. ``decode(encode(text))`` gives the text back for single-spaced text over these
characters, in all three.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS

__all__ = [
    "SPACE",
    "SPECIAL",
    "SYMBOLS",
    "build_bpe_tokenizer",
    "build_character_tokenizer",
    "build_tokenizer",
    "split_by",
    "wrapped",
]

SPACE = "▁"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
SYMBOLS = ["+", "-", "×", "=", "?", ":", ".", ",", "(", ")", "->"]


def build_tokenizer(largest_integer: int) -> PreTrainedTokenizerFast:
    """Build the shared tokenizer; integers from ``-largest_integer`` to ``largest_integer`` are one token each."""
    lower = string.ascii_lowercase
    pieces = [a + b for a, b in itertools.product(lower, lower)] + list(string.ascii_letters)
    words = [*pieces, *PHRASE_WORDS, *SYMBOLS, *string.digits]
    integers = [str(n) for n in range(-largest_integer, largest_integer + 1)]
    vocabulary = [*SPECIAL, *pieces, *SYMBOLS, *string.digits]
    vocabulary += [SPACE + word for word in dict.fromkeys([*words, *integers])]

    longest = len(str(largest_integer))
    integer = rf"-?\d{{1,{longest}}}(?!\d)" if largest_integer > 9 else r"\d"
    pattern = "|".join(
        [
            rf"{SPACE}(?:{'|'.join(PHRASE_WORDS)})(?![A-Za-z])",
            rf"{SPACE}(?:{integer})",
            rf"{SPACE}?(?:->|[a-z]{{2}}|[^{SPACE}])",
        ]
    )
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    split_by(backend, pattern)
    return wrapped(backend)


def build_bpe_tokenizer(corpus: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding on a corpus; a word, an integer with its sign and any other sign are merged apart."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    pattern = rf"{SPACE}?-?\d+|{SPACE}?[A-Za-z]+|{SPACE}?->|{SPACE}?[^{SPACE}]"
    split_by(backend, pattern)
    characters = [*string.ascii_letters, *string.digits, *(c for symbol in SYMBOLS for c in symbol), SPACE]
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(set(characters)),
        limit_alphabet=len(set(characters)),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return wrapped(backend)


def build_character_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer in which every character is a token, the space too."""
    characters = [*string.ascii_letters, *string.digits, *(c for symbol in SYMBOLS for c in symbol), " "]
    vocabulary = [*SPECIAL, *dict.fromkeys(characters)]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return wrapped(backend)


def split_by(backend: Tokenizer, pattern: str) -> None:
    """Let words carry their space and be cut by ``pattern``."""
    backend.normalizer = normalizers.Strip()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers: texts begin with <bos>, and batches are padded on the left."""
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
