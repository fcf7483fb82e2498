"""Texts with pictures in them: expressions over figures, number words and pictures of digits.

A picture stands in the text as the token ``<image>``. As in key-value arithmetic, an answer restates each operand as it
is used: ``<image> + 3 =`` gives ``7 + 3 = 10``; ``<image> ->`` asks for the restatement alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from calmlm.experiments.kv_arithmetic.words import NUMBER_WORDS, random_word
from calmlm.experiments.kv_arithmetic.world import PHRASINGS, REWRITE, Expression
from calmlm.experiments.visual_arithmetic.digits import Digits
from calmlm.experiments.visual_arithmetic.presets import Preset

__all__ = ["DC_PHRASINGS", "HARD_PHRASINGS", "IMAGE", "OOD_PHRASINGS", "Example", "World"]

IMAGE = "<image>"
DC_PHRASINGS = ("plain", "value", "compute", "evaluate")
OOD_PHRASINGS = ("what", "expression")
HARD_PHRASINGS = ("take",)
_OPERATORS = ("+", "-")
_ZERO = ("zero", "null", "nul", "cero", "nulla")


@dataclass(frozen=True)
class Example:
    """A prompt, the completion that is right, and the pictures (indices into ``Digits``) in the prompt's order."""

    prompt: str
    completion: str
    pictures: tuple[int, ...] = ()


class World:
    """Digits, which pairs of them the composition may see, and examples about them."""

    def __init__(self, preset: Preset, seed: int) -> None:
        rng = random.Random(f"visual-world-{preset.name}-{seed}")
        self.preset, self.seed = preset, seed
        self.digits = Digits.load(rng, preset.training_share, preset.composition_share)
        self.unseen_pairs = _held_out(rng, preset.unseen_pairs)
        pairs = [(a, b) for a in range(10) for b in range(10)]
        self.pairs = [pair for pair in pairs if pair not in self.unseen_pairs]
        self._words = {value: [words[value - 1] for words in NUMBER_WORDS.values()] for value in range(1, 10)}
        self._words[0] = list(_ZERO)

    def rng(self, purpose: str) -> random.Random:
        """Return a generator of its own for one purpose; it depends on the preset, the seed and the purpose alone."""
        return random.Random(f"visual-{purpose}-{self.preset.name}-{self.seed}")

    def general(self, rng: random.Random) -> Example:
        """What m_B is trained on: one to three numbers in any notation and phrasing, among words and empty pictures."""
        values = [rng.randrange(10) for _ in range(rng.randint(1, 3))]
        texts = []
        for value in values:
            text = rng.choice(self._words[value]) if rng.random() < 0.5 else str(value)
            draw = rng.random()
            if draw < 0.2:
                text = f"{IMAGE} {text}"  # the token says nothing by itself
            elif draw < 0.4:
                text = f"{random_word(rng)} {text}"
            texts.append(text)
        expression = Expression(tuple(values), tuple(rng.choice(_OPERATORS) for _ in values[1:]))
        if rng.random() < 0.15:
            return Example(REWRITE.prompt(texts, expression.operators), expression.restated())
        phrasing = PHRASINGS[rng.choice([*DC_PHRASINGS, *OOD_PHRASINGS, *HARD_PHRASINGS])]
        return Example(phrasing.prompt(texts, expression.operators), expression.solution())

    def naming(self, rng: random.Random, pictures: list[int]) -> Example:
        """One picture, to be named."""
        picture = rng.choice(pictures)
        return Example(f"{IMAGE} ->", str(self.digits.shown[picture]), (picture,))

    def numeric(self, rng: random.Random, phrasings: Sequence[str] = DC_PHRASINGS) -> Example:
        """Two numbers in figures."""
        return self.arithmetic(rng, [(rng.randrange(10), rng.randrange(10))], [], phrasings, figure_share=1.0)

    def arithmetic(
        self,
        rng: random.Random,
        pairs: Sequence[tuple[int, int]],
        pictures: list[int],
        phrasings: Sequence[str],
        figure_share: float = 0.0,
        third: bool = False,
    ) -> Example:
        """Two operands, pictures unless written in figures; with ``third``, a third one."""
        values = list(rng.choice(pairs)) + ([rng.randrange(10)] if third else [])
        texts, shown = [], []
        for value in values:
            if rng.random() < figure_share:
                texts.append(str(value))
            else:
                texts.append(IMAGE)
                shown.append(self.digits.of(value, pictures, rng))
        expression = Expression(tuple(values), tuple(rng.choice(_OPERATORS) for _ in values[1:]))
        prompt = PHRASINGS[rng.choice(phrasings)].prompt(texts, expression.operators)
        return Example(prompt, expression.solution(), tuple(shown))


def _held_out(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Draw pairs such that the others still have every digit in either place."""
    while True:
        chosen = rng.sample([(a, b) for a in range(10) for b in range(10)], count)
        if all(max([pair[place] for pair in chosen].count(digit) for digit in range(10)) < 8 for place in (0, 1)):
            return chosen
