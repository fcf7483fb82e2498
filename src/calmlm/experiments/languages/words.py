"""Number words (num2words) and terms of the CLDR (Babel) in many languages, cut to what the tokenizer knows."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence

from calmlm.data.extras import require

__all__ = ["number_words", "terms"]

_LETTERS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")
_LONGEST = 18
_UNITS = (
    "length-meter", "length-kilometer", "length-centimeter", "length-mile", "mass-gram", "mass-kilogram",
    "volume-liter", "duration-day", "duration-hour", "duration-minute", "duration-month", "duration-second",
    "duration-week", "duration-year", "energy-calorie", "energy-joule", "power-watt", "electric-volt", "area-hectare",
)  # fmt: skip


def plain(text: str) -> str:
    """Lower case, composed accents, and spaces for hyphens."""
    return unicodedata.normalize("NFC", text).lower().replace("-", " ").strip()


def number_words(language: str, highest: int) -> list[str]:
    """The words for 1 to ``highest`` in a language.

    Raises:
        MissingExtraError: without num2words.
    """
    require("num2words", "compare", "The experiment with languages")
    from num2words import num2words

    return [plain(num2words(number, lang=language)) for number in range(1, highest + 1)]


def terms(languages: Sequence[str], count: int, rng: random.Random) -> dict[str, list[str]]:
    """The same terms in each language: names of territories, languages, currencies and units.

    A term is taken where it consists of letters in every language, and where no language has one name for two terms.

    Raises:
        MissingExtraError: without Babel.
    """
    require("babel", "compare", "The experiment with languages")
    from babel import Locale
    from babel.units import get_unit_name

    found: dict[str, list[str]] = {}
    locales = [Locale.parse(language) for language in languages]
    names = [
        {
            **{f"territory-{code}": name for code, name in locale.territories.items() if len(code) == 2},
            **{f"language-{code}": name for code, name in locale.languages.items() if len(code) == 2},
            **{f"currency-{code}": name for code, name in locale.currencies.items()},
            **{f"unit-{unit}": get_unit_name(unit, locale=locale) or "" for unit in _UNITS},
        }
        for locale in locales
    ]
    taken: list[set[str]] = [set() for _ in languages]
    shared = sorted(set.intersection(*(set(each) for each in names)))
    for code in rng.sample(shared, len(shared)):
        words = [plain(each[code]) for each in names]
        if all(_LETTERS.fullmatch(word) and len(word) <= _LONGEST for word in words) and not any(
            word in known for word, known in zip(words, taken, strict=True)
        ):
            for word, known in zip(words, taken, strict=True):
                known.add(word)
            found[code] = words
        if len(found) == count:
            break
    return {language: [words[i] for words in found.values()] for i, language in enumerate(languages)}
