"""The key-value world: which key has which value, and the texts that are written about keys and numbers.

Everything is text, a prompt and its completion, and everything follows from a preset and a seed. An answer goes
through the expression from the left and restates each operand as a number: ``ab + five - 3 =`` gives
``12 + 5 = 17 - 3 = 14``; the final answer is what follows the last ``=``. The prompt ``ab + cd ->`` asks for the
expression over numbers alone (KV-SUBS).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calmlm.experiments.kv_arithmetic.presets import Preset
from calmlm.experiments.kv_arithmetic.words import random_word, sample_keys, word_values

__all__ = [
    "DC_PHRASINGS",
    "HARD_PHRASINGS",
    "OOD_PHRASINGS",
    "PHRASINGS",
    "REWRITE",
    "Example",
    "Expression",
    "Phrasing",
    "World",
    "final_answer",
]

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "×": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Phrasing:
    """One way to ask: what stands before the operands, for each operator, and after the operands."""

    start: str
    plus: str
    minus: str
    end: str
    times: str = " ×"

    def prompt(self, operands: Sequence[str], operators: Sequence[str]) -> str:
        """Write the question over operands that are already text."""
        words = {"+": self.plus, "-": self.minus, "×": self.times}
        text = f"{self.start} {operands[0]}" if self.start else operands[0]
        for operator, operand in zip(operators, operands[1:], strict=True):
            text += f"{words[operator]} {operand}"
        return text + self.end


PHRASINGS: dict[str, Phrasing] = {
    "plain": Phrasing("", " +", " -", " ="),
    "value": Phrasing("The value of", " plus", " minus", " is"),
    "compute": Phrasing("Compute", " +", " -", ". Result:"),
    "evaluate": Phrasing("Evaluate", " plus", " less", ". Answer:"),
    "start": Phrasing("Start from", ", increase by", ", decrease by", ". Result:"),
    "what": Phrasing("What is", " +", " subtracted with", "? Answer:"),
    "expression": Phrasing("Expression:", " +", " -", " Solving:"),
    "take": Phrasing("Take", ", add", ", subtract", ". Total:"),
    "let": Phrasing("Let sum be", " and then add", " and then take away", ". Total:"),
}
REWRITE = Phrasing("", " +", " -", " ->")
DC_PHRASINGS = ("plain", "value", "compute", "evaluate", "start", "let")
OOD_PHRASINGS = ("what", "expression")
HARD_PHRASINGS = ("take",)
# What follows an operand somewhere in the phrasings.
_FOLLOWERS = [f" {word}" for word in "+ - × = -> plus minus less subtracted and is Solving".split()] + [",", ".", "?"]


@dataclass(frozen=True)
class Expression:
    """Integers joined by operators, reduced from the left."""

    values: tuple[int, ...]
    operators: tuple[str, ...]

    def restated(self) -> str:
        """Return the expression over plain numbers, such as ``12 + 5 - 3``."""
        text = str(self.values[0])
        for operator, value in zip(self.operators, self.values[1:], strict=True):
            text += f" {operator} {value}"
        return text

    def solution(self) -> str:
        """Return the steps from the left, each operand restated as it is used: ``12 + 5 = 17 - 3 = 14``."""
        total = self.values[0]
        text = str(total)
        for operator, value in zip(self.operators, self.values[1:], strict=True):
            total = _OPERATIONS[operator](total, value)
            text += f" {operator} {value} = {total}"
        return text


@dataclass(frozen=True)
class Example:
    """A prompt and the completion that is right; ``completion`` is empty where the prompt is its own target (rows)."""

    prompt: str
    completion: str


def final_answer(completion: str) -> str:
    """Return the text after the last ``=``."""
    return completion.rsplit("=", 1)[-1].strip()


class World:
    """Keys, their values, which of them the composition may see, and examples about them."""

    def __init__(self, preset: Preset, seed: int) -> None:
        rng = random.Random(f"kv-world-{preset.name}-{seed}")
        self.preset = preset
        self.seed = seed
        self.keys = keys = sample_keys(preset.keys, rng)
        values = [1 + i % preset.highest for i in range(preset.keys)]
        rng.shuffle(values)
        self.value: dict[str, int] = dict(zip(keys, values, strict=True))
        held_in = round(preset.keys * preset.composition_share)
        self.composition_keys = keys[:held_in]
        self.unseen_keys = keys[held_in:]
        # Two specialists, each with half of the keys: D_C takes its share of either.
        self.halves = (keys[0::2], keys[1::2])
        self._words: dict[int, list[str]] = {}
        named = min(preset.highest, 20)
        for word, value in word_values(named).items():
            self._words.setdefault(value, []).append(word)
        invented = [word for word in sample_keys(2 * preset.languages * named, rng) if word not in self.value]
        for i, word in enumerate(invented[: preset.languages * named]):
            self._words[1 + i % named].append(word)
        self._known = {word for words in self._words.values() for word in words}
        self._number_words = sorted(self._known)

    def half(self, index: int) -> tuple[list[str], list[str]]:
        """The keys of one half: those that its D_C uses, and the others."""
        held_in = set(self.composition_keys)
        keys = self.halves[index]
        return [key for key in keys if key in held_in], [key for key in keys if key not in held_in]

    def rng(self, purpose: str) -> random.Random:
        """Return a generator of its own for one purpose; it depends on the preset, the seed and the purpose alone."""
        return random.Random(f"kv-{purpose}-{self.preset.name}-{self.seed}")

    def expression(
        self, rng: random.Random, operands: tuple[int, int], keys: Sequence[str] | None
    ) -> tuple[Expression, list[str]]:
        """Draw an expression; its operands are from ``keys`` (the second result), or numbers where ``keys`` is None."""
        count = rng.randint(*operands)
        chosen = [rng.choice(keys) for _ in range(count)] if keys else []
        values = [self.value[key] for key in chosen] or [rng.randint(1, self.preset.highest) for _ in range(count)]
        operators = tuple(rng.choice(self.preset.operators) for _ in range(count - 1))
        return Expression(tuple(values), operators), chosen

    # What m_A is trained on -------------------------------------------------------------------------------------------

    def row(
        self,
        rng: random.Random,
        known: Sequence[str] | None = None,
        drawn_from: Sequence[str] | None = None,
        joined_share: float = 0.0,
    ) -> Example:
        """Keys each with its value: right behind the key, or behind the sign or word that follows the key.

        With ``known``, only these keys have a value; of other words, half of the row, it says that they have none.
        With ``drawn_from``, other keys do not occur. ``joined_share`` of the rows have no space between key and value,
        so that the key's last letter tells it.
        """
        keys = rng.choices(known or drawn_from or self.keys, k=rng.randint(4, 7))
        value: dict[str, str] = {key: str(self.value[key]) for key in keys}
        if known is not None:
            keys = [key if rng.random() < 0.5 else self._any_word(rng) for key in keys]
            value = {key: value.get(key, "?") for key in keys}
        if joined_share and rng.random() < joined_share:
            return Example(" ".join(f"{key}{value[key]}" for key in keys), "")
        draw = rng.random()
        if draw < 0.5:
            entries = [f"{key}{rng.choice(_FOLLOWERS)} {value[key]}" for key in keys]
        else:
            entries = [f"{key} {value[key]}" for key in keys]
        if draw < 0.7:
            return Example(" ".join(f"{random_word(rng)} {e}" if rng.random() < 0.25 else e for e in entries), "")
        phrasing = rng.choice([*PHRASINGS.values(), REWRITE])
        operators = [rng.choice(self.preset.operators) for _ in keys[1:]]
        return Example(phrasing.prompt(entries, operators), "")

    def plain_row(self, rng: random.Random, keys: Sequence[str]) -> Example:
        """Six keys each with its value, with or without a space between them, and nothing else."""
        drawn = rng.choices(keys, k=6)
        return Example(" ".join(f"{key}{rng.choice(['', ' '])}{self.value[key]}" for key in drawn), "")

    def substitution(self, rng: random.Random, keys: Sequence[str], operands: tuple[int, int] | None = None) -> Example:
        """KV-SUBS: an expression over keys, and the same over their values."""
        expression, names = self.expression(rng, operands or self.preset.operands, keys)
        return Example(REWRITE.prompt(names, expression.operators), expression.restated())

    def _any_word(self, rng: random.Random) -> str:
        """A word that is no key: random letters, now and then a number word."""
        if rng.random() < 0.15:
            return rng.choice(self._number_words)
        return self.nobodys_word(rng)

    def nobodys_word(self, rng: random.Random) -> str:
        """Random letters that are no key, of neither half."""
        while (word := random_word(rng)) in self.value:
            pass
        return word

    # What m_B is trained on -------------------------------------------------------------------------------------------

    def number(self, rng: random.Random, value: int) -> str:
        """Write a number in figures or as a word of some language, sometimes among other words."""
        text = str(value)
        if value in self._words and rng.random() < self.preset.word_share:
            text = rng.choice(self._words[value])
        draw = rng.random()
        if draw < 0.25:
            text = f"{self.unknown_word(rng)} {text}"
        elif draw < 0.3:
            text = f"{text} {self.unknown_word(rng)}"
        return text

    def unknown_word(self, rng: random.Random) -> str:
        """Return random letters that mean nothing to m_B."""
        while (word := random_word(rng)) in self._known:
            pass
        return word

    def general(self, rng: random.Random, progress: float = 1.0) -> Example:
        """Arithmetic in any phrasing and notation, with text around the numbers; some of it asks to restate alone.

        ``progress`` through the training, 0 to 1, sets how long expressions are: they grow over its first half.
        """
        low, high = self.preset.anchor_operands
        growing = low + 1 + int(2 * progress * (high - low))
        expression, _ = self.expression(rng, (low, min(high, growing)), None)
        operands = [self.number(rng, value) for value in expression.values]
        if rng.random() < 0.15:
            return Example(REWRITE.prompt(operands, expression.operators), expression.restated())
        prompt = rng.choice(list(PHRASINGS.values())).prompt(operands, expression.operators)
        if rng.random() < 0.1:
            prompt = f"{self.unknown_word(rng)}. {prompt}"
        return Example(prompt, expression.solution())

    # What the composition is trained on, and what everything is measured on -----------------------------------------

    def numeric(self, rng: random.Random, phrasings: Sequence[str], operands: tuple[int, int] | None = None) -> Example:
        """An expression over numbers in figures, in one of ``phrasings``."""
        expression, _ = self.expression(rng, operands or self.preset.operands, None)
        prompt = PHRASINGS[rng.choice(phrasings)].prompt([str(v) for v in expression.values], expression.operators)
        return Example(prompt, expression.solution())

    def numeric_restatement(self, rng: random.Random) -> Example:
        """An expression over numbers in figures that is to be restated only."""
        expression, _ = self.expression(rng, self.preset.operands, None)
        return Example(REWRITE.prompt([str(v) for v in expression.values], expression.operators), expression.restated())

    def unanswerable(self, rng: random.Random) -> str:
        """A question over numbers and words that no model knows."""
        expression, _ = self.expression(rng, self.preset.composition_operands, None)
        texts = [self.nobodys_word(rng) if rng.random() < 0.7 else str(value) for value in expression.values]
        return PHRASINGS[rng.choice(DC_PHRASINGS)].prompt(texts, expression.operators)

    def arithmetic(
        self,
        rng: random.Random,
        keys: Sequence[str],
        phrasings: Sequence[str],
        operands: tuple[int, int] | None = None,
        number_share: float = 0.0,
        word_share: float = 0.0,
    ) -> Example:
        """KV-MATH: an expression over keys in one of ``phrasings``.

        ``number_share`` of the operands are in figures, and of the rest ``word_share`` are number words.
        """
        expression, names = self.expression(rng, operands or self.preset.operands, keys)
        texts = [str(v) if rng.random() < number_share else n for v, n in zip(expression.values, names, strict=True)]
        if word_share:
            texts = [
                rng.choice(self._words[v]) if text == name and rng.random() < word_share else text
                for text, name, v in zip(texts, names, expression.values, strict=True)
            ]
        prompt = PHRASINGS[rng.choice(phrasings)].prompt(texts, expression.operators)
        return Example(prompt, expression.solution())
