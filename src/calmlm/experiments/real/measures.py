"""What is measured: bits per byte of what is to be written, and chrF of what is written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from calmlm.data.conversations import common_prefix
from calmlm.data.labels import IGNORE, encode_prompt
from calmlm.experiments.real.layout import Text
from calmlm.experiments.real.sentence_counts import corpus, counted
from calmlm.experiments.real.world import Item, World

__all__ = ["System", "bits", "first_line_of", "measure", "text_of", "translations"]

T = TypeVar("T")


class System(Protocol):
    """What writes English: a model, two of them, or a composition."""

    hears: bool
    """Whether it can be measured with what m_A reads replaced."""

    def nats(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """Each target's negative log-probability; with ``swapped``, m_A reads the other prompt."""
        ...

    def write(self, items: Sequence[Item], new_tokens: int) -> list[str]:
        """What it answers to each prompt."""
        ...


def text_of(item: Item, tokenizer: Any, before: str = "", other: bool = False) -> Text:
    """A prompt and its target in a model's tokens, without an end.

    Args:
        item: what is asked.
        tokenizer: the model's.
        before: text that the model reads first.
        other: whether m_A is to read the item's other prompt.
    """
    prompt = before + item.prompt
    ids = encode_prompt(prompt + item.completion, tokenizer)
    start = max(1, common_prefix(encode_prompt(prompt, tokenizer), ids))
    return Text(ids, start, encode_prompt(before + item.other, tokenizer) if other and item.other else None)


def by_row(values: Tensor, labels: Tensor) -> list[float]:
    """Sums of values (n,), one for each label of (B, T) that counts, over each row."""
    rows = (labels != IGNORE).nonzero()[:, 0]
    return values.new_zeros(len(labels)).index_add(0, rows, values).tolist()


def bits(nats: Sequence[float], items: Sequence[Item]) -> float:
    """Bits per byte."""
    return sum(nats) / sum(item.size for item in items) / math.log(2)


def first_line_of(text: str) -> str:
    """The first line that holds anything: a model that goes on with further examples has answered there."""
    return text.strip().split("\n")[0].strip()


def measure(
    system: System, world: World, swapped: bool, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """All measures of a system.

    Returns:
        ``nats`` and ``swapped_nats`` of each tested item (the second None where m_A has no part or is not asked),
        ``english_nats`` of each plain line, ``written`` texts with their ``chrf`` inside and outside D_C and what chrF
        and BLEU count in each (``scores``), and how many seconds each took.
    """
    tested, english = world.tested, world.english
    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        seconds[what] = round(time.perf_counter() - start, 1)
        return result

    found: dict[str, Any] = {"nats": timed("tested", lambda: _rounded(system.nats(tested)))}
    report(f"{bits(found['nats'], tested):.3f} bits per byte over {len(tested)} rows")
    heard = swapped and system.hears
    found["swapped_nats"] = timed("swapped", lambda: _rounded(system.nats(tested, swapped=True))) if heard else None
    found["english_nats"] = timed("english", lambda: _rounded(system.nats(english)))
    found |= timed("written", lambda: translations(system, world))
    return found | {"measuring_seconds": seconds}


def translations(system: System, world: World) -> dict[str, Any]:
    """What a system writes, with its chrF inside and outside D_C, and what chrF and BLEU count in each text."""
    settings, asked = world.settings, world.written
    written = [first_line_of(text) for text in system.write(asked, settings.new_tokens)]
    found: dict[str, Any] = {"written": written, "scores": counted(written, [item.target for item in asked])}
    for column, varieties in (("inside", settings.varieties.inside), ("outside", settings.varieties.outside)):
        chosen = [index for index, item in enumerate(asked) if item.variety in varieties]
        if chosen:
            found[f"chrf_{column}"] = round(corpus("chrf", [found["scores"]["chrf"][i] for i in chosen]), 2)
    return found


def _rounded(nats: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in nats]
