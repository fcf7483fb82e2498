"""Numbers and terms in many languages, and the texts about them.

m_A has seen number words of low-resource languages beside figures, and terms with their English names. m_B calculates
with figures and with number words of high-resource languages, and translates from those. Arithmetic in a low-resource
language asks for both: ``tri plus saith =`` gives ``3 + 7 = 10``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS
from calmlm.experiments.kv_arithmetic.world import PHRASINGS, REWRITE, Example, Expression
from calmlm.experiments.languages.presets import Preset
from calmlm.experiments.languages.words import number_words, terms

__all__ = ["World"]

_SHOWN = ("plain", "value", "compute", "evaluate")
_FOLLOWERS = [f" {word}" for word in "+ - = -> plus minus less is".split()] + ["."]


class World:
    """Words, which of them D_C may use, and examples about them."""

    def __init__(self, preset: Preset, seed: int) -> None:
        self.preset, self.seed = preset, seed
        rng = self.rng("world")
        self.languages = (*preset.low, *preset.high)
        self.words = {language: number_words(language, preset.highest) for language in self.languages}
        # A word that stands for different numbers in two languages would have no answer: it is left out.
        values: dict[str, set[int]] = {}
        for words in self.words.values():
            for value, word in enumerate(words, start=1):
                values.setdefault(word, set()).add(value)
        self.ambiguous = {word for word, meant in values.items() if len(meant) > 1}
        self.terms = terms(self.languages, preset.terms, random.Random("terms"))
        count = len(self.terms[preset.high[0]])
        self.composition_terms = sorted(rng.sample(range(count), round(count * preset.term_share)))
        self.unseen_terms = [i for i in range(count) if i not in self.composition_terms]
        # Of what m_B translates, D_C shows a half: what it has kept is asked in the other one.
        self.replayed_terms = sorted(self.rng("replayed").sample(range(count), count // 2))
        self.kept_terms = [i for i in range(count) if i not in self.replayed_terms]
        # A term that is spelled alike in another language may stand in D_C or in m_B's corpus by that.
        self.shown_terms = {self.terms[name][i] for name in preset.low for i in self.composition_terms}
        self.shown_terms |= {term for name in preset.high for term in self.terms[name]}
        known = {word for language in preset.high for word in self.words[language]}
        self.composition_words: dict[str, list[int]] = {}
        self.unseen_words: dict[str, list[int]] = {}
        for language in preset.low:
            usable = [
                value
                for value, word in enumerate(self.words[language], start=1)
                if word not in self.ambiguous and word not in known
            ]
            chosen = rng.sample(usable, round(len(usable) * preset.word_share))
            self.composition_words[language] = sorted(chosen)
        # A word of D_C may be a word of another language, too: then it is seen there as well.
        seen = {self.words[name][value - 1] for name, chosen in self.composition_words.items() for value in chosen}
        for language in preset.low:
            self.unseen_words[language] = [
                value
                for value, word in enumerate(self.words[language], start=1)
                if word not in self.ambiguous and word not in known and word not in seen
            ]
        self.parts = parts = {part for words in self.words.values() for word in words for part in word.split()}
        self.pieces = sorted({part[i : i + 2] for part in parts for i in range(0, len(part) - 1, 2)})
        rng = self.rng("invented")  # of its own, so that what m_B learns does not hang on what D_C uses
        self.invented = [[self._invent(rng) for _ in range(preset.highest)] for _ in range(preset.invented)]

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for one purpose."""
        return random.Random(f"languages-{purpose}-{self.preset.name}-{self.seed}")

    def _invent(self, rng: random.Random) -> str:
        """One to three words of random pieces of words, none of them a word of any language's numbers."""
        words = ["".join(rng.choices(self.pieces, k=rng.randint(1, 4))) for _ in range(rng.choice([1, 1, 2, 3]))]
        made = [word for word in words if word not in PHRASE_WORDS and word not in self.parts]
        return " ".join(made) or self._invent(rng)

    def expression(self, rng: random.Random, values: Sequence[int] | None = None, most: int = 2) -> Expression:
        """One number or an operation on two."""
        count = 2 if most == 2 and rng.random() < 0.85 else 1
        chosen = tuple(rng.choice(values or range(1, self.preset.highest + 1)) for _ in range(count))
        return Expression(chosen, tuple(rng.choice("+-") for _ in chosen[1:]))

    def ask(self, rng: random.Random, expression: Expression, operands: Sequence[str]) -> Example:
        """An expression in one of the phrasings, or now and then to be restated only."""
        if rng.random() < 0.15:
            return Example(REWRITE.prompt(operands, expression.operators), expression.restated())
        phrasing = PHRASINGS[rng.choice(_SHOWN)]
        return Example(phrasing.prompt(operands, expression.operators), expression.solution())

    # What m_A is trained on -------------------------------------------------------------------------------------------

    def specialist(self, rng: random.Random) -> Example:
        """Number words of one low-resource language with their values, or a term with its English name."""
        language = rng.choice(self.preset.low)
        if rng.random() < 0.4:
            return self.translation(rng, language, range(len(self.terms[language])))
        entries = []
        for _ in range(rng.randint(3, 5)):
            value = rng.randint(1, self.preset.highest)
            word = self.words[language][value - 1]
            follower = rng.choice(_FOLLOWERS) if rng.random() < 0.5 else ""
            entries.append(f"{self._invent(rng)} {word}{follower} {value}" if rng.random() < 0.15 else
                           f"{word}{follower} {value}")  # fmt: skip
        return Example(" ".join(entries), "")

    def request(self, term: str) -> str:
        """What asks for the English name of a term."""
        return f"translate {term} :"

    def translation(self, rng: random.Random, language: str, which: Sequence[int]) -> Example:
        """A term and its English name."""
        index = rng.choice(which)
        return Example(self.request(self.terms[language][index]), self.terms[self.preset.high[0]][index])

    # What m_B is trained on -------------------------------------------------------------------------------------------

    def general(self, rng: random.Random) -> Example:
        """Arithmetic with figures and with words of the high-resource and of invented languages, and translations."""
        if rng.random() < 0.12:
            language = rng.choice(self.preset.high[1:])
            return self.translation(rng, language, range(len(self.terms[language])))
        expression = self.expression(rng)
        operands = []
        for value in expression.values:
            draw = rng.random()
            if draw < 0.3:
                text = self.words[rng.choice(self.preset.high)][value - 1]
            elif draw < 0.65:
                text = rng.choice(self.invented)[value - 1]
            else:
                text = str(value)
            operands.append(f"{self._invent(rng)} {text}" if rng.random() < 0.15 else text)
        return self.ask(rng, expression, operands)

    # What the composition is trained on, and what is measured ---------------------------------------------------------

    def composed(self, rng: random.Random) -> Example:
        """D_C: part of the words and terms, and a share of what m_B can do."""
        draw = rng.random()
        if draw < 0.08:
            return self.translation(rng, rng.choice(self.preset.high[1:]), self.replayed_terms)
        if draw < 0.36:
            return self.high(rng, rng.choice([*self.preset.high, None]))
        language = rng.choice(self.preset.low)
        if draw < 0.48:
            return self.translation(rng, language, self.composition_terms)
        expression = self.expression(rng, self.composition_words[language])
        words = self.words[language]
        operands = [str(value) if rng.random() < 0.1 else words[value - 1] for value in expression.values]
        return self.ask(rng, expression, operands)

    def high(self, rng: random.Random, language: str | None) -> Example:
        """Arithmetic that m_B knows: in a high-resource language, or in figures."""
        expression = self.expression(rng)
        words = None if language is None else self.words[language]
        return self.ask(rng, expression, [words[v - 1] if words else str(v) for v in expression.values])

    def item(self, rng: random.Random, language: str | None) -> Example:
        """An item of the evaluation: an operation on two numbers, for low-resource languages on words outside D_C."""
        values = self.unseen_words.get(language or "", list(range(1, self.preset.highest + 1)))
        chosen = (rng.choice(values), rng.choice(values))
        expression = Expression(chosen, (rng.choice("+-"),))
        words = None if language is None else self.words[language]
        phrasing = PHRASINGS[rng.choice(_SHOWN)]
        operands = [words[v - 1] if words else str(v) for v in chosen]
        return Example(phrasing.prompt(operands, expression.operators), expression.solution())
