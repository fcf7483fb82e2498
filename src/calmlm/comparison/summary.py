"""The report of a comparison: rows, and answers to the questions that a user has."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from calmlm.comparison.cells import Cell
from calmlm.comparison.contract import Task
from calmlm.comparison.domains import kind_of
from calmlm.comparison.figures import Scores, by_method, columns_of, difference, interval, kept, known, share
from calmlm.comparison.gains import pairing_of
from calmlm.comparison.methods import ABLATIONS, METHODS, REFERENCE
from calmlm.comparison.page import markdown, title_of
from calmlm.comparison.plots import draw
from calmlm.comparison.selection import CompareConfig
from calmlm.comparison.swapping import SWAPPED
from calmlm.experiments.record import origin
from calmlm.files.results import to_json, write_result

__all__ = ["QUESTIONS", "summarise", "write_report"]

QUESTIONS = {
    "both bases": ("m_A", "m_B"),
    "LoRA at equal parameters": ("lora",),
    "merging": ("soup", "soup_greedy", "fisher", "task_arithmetic", "ties", "dare_ties"),
    "a mixture of experts": ("moe",),
    "the cascade": ("cascade",),
    "fine-tuning": ("fine_tuning", "continued_pretraining", "lora_full_data"),
    "routing and tools": ("router", "confidence_cascade", "text_tool"),
    "its controls": ("composed_random", "composed_vanilla", "composed_encoder", "swapped", "swapped_trained"),
}
SHARES = ("exact_match", "pass@1", "chrf")
"""Metrics in per cent, of which more is better."""
INTERVAL = (
    "95 % intervals by a two-level bootstrap (seeds drawn with replacement, then the items of each); with few seeds "
    "they understate the variation between seeds. Differences are taken item by item. Where all items are equal, the "
    "exact limit of the binomial."
)


def summarise(
    config: CompareConfig, stored: Iterable[tuple[Cell, dict[str, Any]]], planned: int, command: str | None
) -> dict[str, Any]:
    """Turn cells into what the JSON file holds.

    Args:
        config: of the comparison.
        stored: the finished cells.
        planned: how many cells the comparison has.
        command: the command that the report names as its origin.
    """
    found = list(stored)
    rows: list[dict[str, Any]] = []
    answers: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, int] = {}
    settings: dict[str, str] = {}
    pairing: dict[str, list[dict[str, Any]]] = {}
    asked = {cell.domain for cell in config.cells() if cell.method in SWAPPED}
    for name in config.parts:
        kind, preset = kind_of(name), config.preset_of(name)
        cells = [result for cell, result in found if cell.domain == name]
        counts[name], settings[name] = len(cells), kind.mark(preset)
        scores = by_method(cells)
        tasks = kind.tasks_of(preset)
        retained = _retained(tasks)
        groups = kind.groups_of(preset)
        spent = {method: [cell for cell in cells if cell["method"] == method] for method in scores}
        if set(scores) & set(ABLATIONS) and "composed" in scores:
            first = config.parts[name].seeds[0]
            scores[REFERENCE] = {
                task: {first: seeds[first]} for task, seeds in scores["composed"].items() if first in seeds
            }
            spent[REFERENCE] = [cell for cell in spent["composed"] if cell["seed"] == first]
        for method in [*METHODS, REFERENCE, *ABLATIONS]:
            if not scores.get(method):
                continue
            columns: dict[str, list[Scores]] = {task: [values] for task, values in scores[method].items()}
            columns |= {group: columns_of(scores[method], members) for group, members in groups.items()}
            delta = _delta(scores, method, retained, kind.same_items)
            costs = _costs(spent[method])
            for column, values in columns.items():
                about = tasks[groups[column][0] if column in groups else column]
                figure = interval if about.metric == "bits_per_byte" else share
                mean, low, high = figure(*values, same_items=kind.same_items)
                scale = 1.0 if about.metric == "bits_per_byte" else 100.0
                rows.append(
                    {
                        "method": method,
                        "task": f"{name}/{column}",
                        "metric": about.metric,
                        "skill": about.skill,
                        "mean": round(scale * mean, 3),
                        "low": round(scale * low, 3),
                        "high": round(scale * high, 3),
                        "seeds": len(values[0]),
                        "retained_delta": None if delta is None else round(100 * delta[0], 3),
                        **costs,
                    }
                )
        combined: dict[str, list[str]] = {}
        for task, about in tasks.items():
            if about.skill == "combined" and about.metric in SHARES:
                combined.setdefault(about.metric, []).append(task)
        if "composed" in scores and combined:
            answers[name] = _answers(scores, combined, retained, kind.same_items)
        if name in asked and set(SWAPPED.values()) & set(scores):
            pairing[name] = pairing_of(scores, cells, tasks, groups, kind.same_items)
    mixed = _mixed([result for _, result in found])
    return {
        "experiment": "compare",
        "preset": config.preset,
        "cells": {"planned": planned, "finished": len(found), "by_experiment": counts},
        "settings": settings,
        "rows": rows,
        "answers": answers,
        "pairing": pairing,
        **({"mixed": mixed} if mixed else {}),
        "interval": INTERVAL,
        "own": {name: own.about for name, part in config.parts.items() if (own := part.own) is not None},
        "commits": sorted({result["commit"] for _, result in found}),
        **origin(command),
    }


def _retained(tasks: dict[str, Task]) -> list[str]:
    """What m_B could do, in one metric: figures of two metrics have no mean."""
    found = {task: about.metric for task, about in tasks.items() if about.skill == "retained"}
    exact = [task for task, metric in found.items() if metric in ("exact_match", "pass@1")]
    return exact or [task for task, metric in found.items() if metric == "chrf"]


def _mixed(cells: list[dict[str, Any]]) -> list[str]:
    """Base models of which the cells of one experiment and seed have seen different ones."""
    seen: dict[str, set[str]] = {}
    for cell in cells:
        for name, digest in cell.get("bases", {}).items():
            seen.setdefault(f"{name} of {title_of(cell['domain'])}, seed {cell['seed']}", set()).add(digest)
    return sorted(name for name, digests in seen.items() if len(digests) > 1)


def _costs(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What a method takes on an experiment, over its seeds."""
    seconds = [cell["train_cpu_seconds"] for cell in cells if "train_cpu_seconds" in cell]
    times = [cell["decode_time_x_anchor"] for cell in cells if known(cell["decode_time_x_anchor"])]
    return {
        "trainable_parameters": round(statistics.mean(cell["trainable_parameters"] for cell in cells)),
        "train_flops": statistics.mean(cell["train_flops"] for cell in cells),
        "train_cpu_seconds": round(statistics.median(seconds), 1) if seconds else None,
        "decode_time_x_anchor": round(statistics.median(times), 3) if times else None,
    }


def _delta(
    scores: dict[str, dict[str, Scores]], method: str, retained: list[str], same_items: bool
) -> tuple[float, float, float] | None:
    """Retained skills after minus before."""
    if (
        not retained
        or "m_B" not in scores
        or not set.intersection(*(set(scores[m][retained[0]]) for m in (method, "m_B")))
    ):
        return None
    return kept(scores[method], scores["m_B"], retained, same_items)


def _answers(
    scores: dict[str, dict[str, Scores]], combined: dict[str, list[str]], retained: list[str], same_items: bool
) -> list[dict[str, Any]]:
    """Whether the composition is above the others on what asks for both models, and what each of them forgets.

    Args:
        scores: by method, task and seed.
        combined: the tasks that ask for both models, by metric; figures of two metrics have no mean.
        retained: the tasks that m_B could do before.
        same_items: whether all seeds are asked the same.
    """
    answers = []
    deltas = {method: _delta(scores, method, retained, same_items) for method in scores}
    for question, methods in QUESTIONS.items():
        for method in (each for each in methods if each in scores):
            for metric, tasks in combined.items():
                ours, theirs = columns_of(scores["composed"], tasks), columns_of(scores[method], tasks)
                shared = set(ours[0]) & set(theirs[0])
                if not shared:
                    continue
                mean, low, high = (100 * value for value in difference(ours, theirs, same_items))
                verdict = "above" if low > 0 else "below" if high < 0 else "no difference shown"
                verdict = verdict if known(mean) else "no figure"
                answer: dict[str, Any] = {
                    "question": question,
                    "method": method,
                    "metric": metric,
                    "seeds": len(shared),
                    "difference": round(mean, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "verdict": verdict,
                }
                for key, name in (("forgets", method), ("composed_forgets", "composed")):
                    delta = deltas[name]
                    if delta is not None:
                        answer[key] = [round(100 * value, 2) for value in delta]
                answers.append(answer)
    return answers


def write_report(result: dict[str, Any], folder: Path, report: Callable[[str], None]) -> list[Path]:
    """Write ``<preset>.json``, ``<preset>.md`` and the plots; return their paths.

    Args:
        result: what the JSON file holds.
        folder: where they go.
        report: takes a line about each plot that could not be drawn.

    Raises:
        CalmError: the folder cannot be written to; the message says where the figures are.
    """
    data, page = folder / f"{result['preset']}.json", folder / f"{result['preset']}.md"
    write_result(data, to_json(result, indent=1) + "\n")
    drawn = draw(result, folder, report)
    write_result(page, markdown(result, missing=[name for name, path in drawn.items() if path is None]))
    return [data, page, *(path for path in drawn.values() if path is not None)]
