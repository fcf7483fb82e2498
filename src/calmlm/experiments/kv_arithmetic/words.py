"""Words of the key-value world: number words, the words of the phrasings, and random letter strings.

A key is a random string of 2 to 6 letters. It is never a number word, a word of a phrasing, or another key.
"""

from __future__ import annotations

import random
import string

__all__ = ["NUMBER_WORDS", "PHRASE_WORDS", "random_word", "sample_keys", "word_values"]

_ROMAN = "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx".split()

# The numbers 1 to 20 in seven languages (ASCII spelling, no hyphens). They are spelled with the same letter pieces as
# the keys, so an anchor that reads them must gather the value of a word at its last piece, as a key needs it too.
NUMBER_WORDS: dict[str, list[str]] = {
    "English": (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty"
    ).split(),
    "French": (
        "un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
        "dixsept dixhuit dixneuf vingt"
    ).split(),
    "German": (
        "eins zwei drei vier fuenf sechs sieben acht neun zehn elf zwoelf dreizehn vierzehn fuenfzehn sechzehn "
        "siebzehn achtzehn neunzehn zwanzig"
    ).split(),
    "Spanish": (
        "uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciseis "
        "diecisiete dieciocho diecinueve veinte"
    ).split(),
    "Italian": (
        "uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
        "diciassette diciotto diciannove venti"
    ).split(),
    "Dutch": (
        "een twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien zestien "
        "zeventien achttien negentien twintig"
    ).split(),
    "Portuguese": (
        "um dois tres quatro cinco seis sete oito nove dez onze doze treze quatorze quinze dezesseis "
        "dezessete dezoito dezenove vinte"
    ).split(),
}

# Words that stand in phrasings. Each is one token; no key, filler or number word may equal one of them.
PHRASE_WORDS: list[str] = (
    "What is Answer Expression Solving Compute Result Take add subtract Total plus minus subtracted with less and "
    "The value of Let be then away take start from increase decrease by Evaluate gives sum"
).split()


def word_values(highest: int) -> dict[str, int]:
    """Return every number word up to ``highest`` with its value; no word has two values."""
    values: dict[str, int] = {}
    for words in NUMBER_WORDS.values():
        for value, word in enumerate(words[:highest], start=1):
            if values.setdefault(word, value) != value:
                raise AssertionError(f"the number word {word!r} has two values")
    return values


_RESERVED = {word.lower() for word in PHRASE_WORDS} | set(word_values(20)) | set(_ROMAN)


def random_word(rng: random.Random) -> str:
    """Return 2 to 6 random letters that are no number word and no word of a phrasing."""
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))
        if word not in _RESERVED:
            return word


def sample_keys(count: int, rng: random.Random) -> list[str]:
    """Return ``count`` different keys."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[random_word(rng)] = None
    return list(keys)
