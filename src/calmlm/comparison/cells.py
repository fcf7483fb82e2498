"""One cell: a method on an experiment with a seed. A finished one is a file, and is never repeated."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmlm.comparison.contract import Answerer, Domain, Fitted, TextDomain
from calmlm.comparison.domains import kind_of
from calmlm.comparison.methods import ABLATIONS, METHODS
from calmlm.comparison.swapping import Swapped, follows
from calmlm.errors import CalmError, first_line
from calmlm.experiments.flops import Meter
from calmlm.experiments.record import origin
from calmlm.files.results import to_json, write_result
from calmlm.files.storage import write_text

__all__ = ["Cell", "decode_time_x_anchor"]

_REVISION = 1  # of what a cell holds; another one makes all cells new
_TIMED_TOKENS, _ROUNDS = 12, 5


@dataclass(frozen=True)
class Cell:
    """A method on an experiment with a seed.

    Attributes:
        domain, method: names.
        preset: the experiment's settings.
        seed: of everything random.
    """

    domain: str
    method: str
    preset: Any
    seed: int

    def path(self, cache: Path) -> Path:
        """Where it lies; the name changes with whatever it depends on."""
        settings = kind_of(self.domain).mark(self.preset)
        mark = hashlib.sha256(json.dumps([settings, self.method, self.seed, _REVISION]).encode()).hexdigest()[:8]
        return cache / "cells" / self.domain / f"{self.preset.name}-{self.method}-seed-{self.seed}-{mark}.json"

    def stored(self, cache: Path) -> dict[str, Any] | None:
        """What it holds, where it is finished; a file that is no cell counts as missing."""
        try:
            found = json.loads(self.path(cache).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and {"domain", "method", "seed", "scores"} <= set(found)
        return found if whole and isinstance(found["scores"], dict) else None

    def fail(self, cache: Path, error: Exception) -> None:
        """Note why it could not be made; the note goes with the next attempt that can."""
        text = str(error).strip() or type(error).__name__
        text = text if isinstance(error, CalmError) else f"{type(error).__name__}: {text}"
        try:
            write_text(self._note(cache), text)
        except OSError:  # the folder is full or gone: whoever looks on is to read it at least
            print(f"{self.method} of {self.domain}, seed {self.seed}: {text}", file=sys.stderr, flush=True)

    def failure(self, cache: Path) -> str:
        """Why it could not be made, in one line."""
        try:
            return self._note(cache).read_text(encoding="utf-8").splitlines()[0].rstrip(".")
        except (OSError, IndexError):
            return "no reason was noted"

    def _note(self, cache: Path) -> Path:
        return cache / "log" / f"{self.path(cache).stem}.failed"

    def do(self, domain: Domain, cache: Path, report: Callable[[str], None]) -> dict[str, Any]:
        """Train and evaluate, and write the file."""
        report(f"{self.domain}, seed {self.seed}: {self.method} ...")
        domain.prepare(self.method)  # or the first method would pay for what all of them share
        # The processor's time, not the clock's: a run may be stopped for hours, or share its core.
        start = time.process_time()
        meter = Meter()
        if self.method in domain.own:
            fitted = domain.own[self.method](meter)
        else:
            assert isinstance(domain, TextDomain)
            fitted = {**METHODS, **ABLATIONS}[self.method].fit(domain, meter)
        trained = time.process_time() - start
        scores = domain.score(fitted.complete, fitted.model)
        # Of a control in which m_A reads another item's prompt: whether the answers fit that one.
        swapped = {"follows": follows(domain, fitted.complete, scores)} if isinstance(fitted.complete, Swapped) else {}
        result = {
            "domain": self.domain,
            "method": self.method,
            "seed": self.seed,
            "scores": {task: [_rounded(value) for value in values] for task, values in scores.items()},
            **swapped,
            "trainable_parameters": meter.trainable,
            "train_flops": meter.flops,
            "train_cpu_seconds": round(trained, 1),
            "decode_time_x_anchor": self._decode_time(fitted, domain, report),
            "cpu_seconds": round(time.process_time() - start, 1),
            "bases": domain.stages.digests(),
            **origin(None),
        }
        write_result(self.path(cache), to_json(result))
        self._note(cache).unlink(missing_ok=True)
        report(f"{self.domain}, seed {self.seed}: {self.method} took {result['cpu_seconds']:.0f} s of processor time")
        return result

    def _decode_time(self, fitted: Fitted, domain: Domain, report: Callable[[str], None]) -> float | None:
        """See ``decode_time_x_anchor``; None where that fails, which is no reason to lose a trained system's scores."""
        try:
            return decode_time_x_anchor(fitted.complete, domain)
        except Exception as error:
            report(f"{self.domain}, seed {self.seed}: {self.method} could not be timed ({first_line(error)})")
            return None


def _rounded(value: Any) -> Any:
    """A score with four digits; what is no number of Python's is left as it is, and written all the same."""
    return round(value, 4) if isinstance(value, (int, float)) else value


def decode_time_x_anchor(complete: Answerer, domain: Domain) -> float:
    """The time of so many new tokens for a few prompts, by the time of the anchor alone: a median of paired rounds."""
    anchor = domain.alone()
    ratios = []
    for _ in range(_ROUNDS + 1):
        times = []
        for writer in (anchor, complete):
            start = time.perf_counter()
            writer(domain.prompts, _TIMED_TOKENS)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return round(statistics.median(ratios[1:]), 3)  # the first round warms up
