"""Judging code by running it: the same inputs for what was asked and what was written, in the sandbox."""

from __future__ import annotations

import random
import re
from functools import lru_cache

from calmlm.evaluation.sandbox import run_python
from calmlm.experiments.code.operations import Function

__all__ = ["inputs_of", "is_right", "program"]

_INPUTS = 60
_NAME = re.compile(r"\s*def\s+([A-Za-z_]\w*)\s*\(")
_WORDS = "tiny Rest otter sEAN on stone rain noise Art no tree a iron".split()


def inputs_of(kind: str) -> list[object]:
    """What functions of a kind are tried on: always the same."""
    rng = random.Random(f"inputs-{kind}")
    if kind == "int":
        return [rng.randint(-30, 30) for _ in range(_INPUTS)]
    if kind == "str":
        return [" ".join(rng.choices(_WORDS, k=rng.randint(1, 12))) for _ in range(_INPUTS)]
    lengths = [rng.choice((rng.randint(0, 12), rng.randint(13, 100))) for _ in range(_INPUTS)]
    return [[rng.randint(-30, 30) for _ in range(length)] for length in lengths]


def program(written: str, function: Function) -> str:
    """A test program: it fails unless what was written gives what was asked for.

    Args:
        written: a function of any name, or whatever else a model wrote.
        function: what was asked for.
    """
    line = written.strip().split("\n")[0]
    match = _NAME.match(line)
    if match is None:
        return "raise SystemExit('no function')"
    wanted = eval(f"lambda x: {function.expression}", {})  # our own text, not a model's
    cases = [(value, wanted(value)) for value in inputs_of(function.takes)]
    # Compared as text of one type: what was written may define an equality of its own.
    return (
        f"{line}\nfor given, wanted in {cases!r}:\n    got = {match[1]}(given)\n"
        "    assert type(got) is type(wanted) and repr(got) == repr(wanted)\n"
    )


@lru_cache(maxsize=100_000)
def _passes(text: str) -> bool:
    return run_python(text, seconds=5.0).passed


def is_right(written: str, function: Function) -> bool:
    """Whether it passes the tests; equal programs are run once."""
    return _passes(program(written, function))
