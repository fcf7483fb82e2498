"""chrF and BLEU of translations, from counts of each sentence that can be added up in any way.

sacrebleu counts and scores; that it can be had in two steps is a private part of it, which this module alone uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from calmlm.data.extras import require

__all__ = ["METRICS", "Counts", "Metric", "corpus", "counted"]

Metric = Literal["chrf", "bleu"]
METRICS: tuple[Metric, ...] = ("chrf", "bleu")
Counts = list[int]
"""What sacrebleu counts in one sentence: 18 numbers for chrF, 10 for BLEU."""


def counted(written: Sequence[str], wanted: Sequence[str]) -> dict[Metric, list[Counts]]:
    """The counts of each translation.

    Args:
        written: translations.
        wanted: a reference for each.

    Raises:
        MissingExtraError: without sacrebleu.
    """
    found = {}
    for metric in METRICS:
        rows = _scorer(metric)._extract_corpus_statistics(list(written), [list(wanted)])
        found[metric] = [[int(number) for number in row] for row in rows]
    return found


def corpus(metric: Metric, counts: Sequence[Sequence[float]]) -> float:
    """The score of all these sentences together, 0 to 100.

    Raises:
        MissingExtraError: without sacrebleu.
    """
    total = [sum(column) for column in zip(*counts, strict=True)]
    return float(_scorer(metric)._compute_score_from_stats(total).score)


_SCORERS: dict[str, Any] = {}


def _scorer(metric: Metric) -> Any:
    if metric not in _SCORERS:
        require("sacrebleu", "compare", "chrF and BLEU")
        from sacrebleu.metrics import BLEU, CHRF

        _SCORERS.update(chrf=CHRF(), bleu=BLEU(force=True))  # says nothing about spaces before full stops
    return _SCORERS[metric]
