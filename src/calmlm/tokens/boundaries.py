"""Where a text may be cut without changing the tokens that a tokenizer gives to its parts."""

from __future__ import annotations

import itertools
import unicodedata
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from calmlm.tokens.parts import literal_encoder
from calmlm.tokens.spelling import token_bytes

# One sample and more of each class of characters, for the search for boundaries.
CLASSES: dict[str, tuple[str, ...]] = {
    "letter": ("a", "the", "Zé", "ß"),
    "script": ("你", "好世", "の", "ไ"),
    "digit": ("1", "42", "1234567"),
    "space": (" ", "  "),
    "tab": ("\t",),
    "line": ("\n", "\r\n", "\n\n"),
    "mark": (".", "--", "'", "'s", "(", "_", "€", "😀"),
    "joiner": ("\u0301", "\u200d", "\ufe0f"),
}

SPACES = {"space", "tab", "line"}
BEYOND_ASCII = tuple(name for name in CLASSES if name != "space")


def class_of(character: str) -> str:
    """The class of a character, a key of ``CLASSES``."""
    if character == " ":
        return "space"
    if character in "\n\r\x0b\x0c\x85\u2028\u2029":
        return "line"
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z":
        return "tab"
    if category[0] == "M" or category == "Cf":
        return "joiner"
    if category[0] == "N":
        return "digit"
    if category[0] == "L":
        # Letters of scripts with case separate words by spaces; others often do not.
        return "letter" if category in ("Lu", "Ll", "Lt") else "script"
    return "mark"


@lru_cache(maxsize=1 << 16)
def _classes_of(character: str) -> tuple[str, ...]:
    """The classes that a character of a token may belong to: of a part of one, all beyond ASCII."""
    return BEYOND_ASCII if character == "\ufffd" else (class_of(character),)


def stable_pairs(tokenizer: PreTrainedTokenizerBase) -> set[tuple[str, str]]:
    """Between which classes of characters a text may be cut without changing its tokens, whatever follows.

    A pair counts where no token of the vocabulary reaches across such a place, and where the tokens of all samples that
    end there stay as they are when others follow. A token that was added to the vocabulary does not count: one of two
    words would keep all words back, so it is read as these words instead.
    """
    encode = literal_encoder(tokenizer.backend_tokenizer)
    pairs = {(left, right) for left in CLASSES for right in CLASSES}
    added, crossed = tokenizer.added_tokens_decoder, set[tuple[tuple[str, ...], tuple[str, ...]]]()
    for index, piece in enumerate(token_bytes(tokenizer, "augmenting model")):
        if index in added:
            continue
        crossed.update(itertools.pairwise(map(_classes_of, (piece or b"").decode(errors="replace"))))
    for left, right in crossed:
        pairs -= set(itertools.product(left, right))
    by_words = type(tokenizer.backend_tokenizer.model).__name__ in ("WordPiece", "WordLevel")
    leads = ("", "a ", "12", "\n", "x.", "  ")
    tails = ("", "a", " b", "1", ".", "\n", "  ", "'s", "é")

    def holds(left: str, right: str) -> bool:
        for lead in leads:
            for end in CLASSES[left]:
                alone = encode(lead + end)
                # A word that is unknown stays so whatever follows, and tells nothing of one that is known.
                if by_words and alone[-1:] == [tokenizer.unk_token_id] and not {left, right} & SPACES:
                    return False
                for start in CLASSES[right]:
                    if any(encode(lead + end + start + tail)[: len(alone)] != alone for tail in tails):
                        return False
        return True

    return {pair for pair in pairs if holds(*pair)}
