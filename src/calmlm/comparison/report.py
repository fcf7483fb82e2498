"""The report of a comparison: rows, answers to the questions that a user has, and a page with plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calmlm.comparison.cells import Cell
from calmlm.comparison.config import CompareConfig
from calmlm.comparison.domain import Task
from calmlm.comparison.domains import kind_of
from calmlm.comparison.figures import Scores, by_method, difference, interval, joined, kept, share
from calmlm.comparison.methods import ABLATIONS, METHODS, REFERENCE, TITLES, Method
from calmlm.comparison.plots import draw, shows_data
from calmlm.experiments.record import made_by, origin
from calmlm.storage import write_text

__all__ = ["QUESTIONS", "markdown", "summarise", "write_report"]

QUESTIONS = {
    "both bases": ("m_A", "m_B"),
    "LoRA at equal parameters": ("lora",),
    "merging": ("soup", "soup_greedy", "fisher", "task_arithmetic", "ties", "dare_ties"),
    "a mixture of experts": ("moe",),
    "the cascade": ("cascade",),
    "fine-tuning": ("fine_tuning", "continued_pretraining", "lora_full_data"),
    "routing and tools": ("router", "confidence_cascade", "text_tool"),
    "its controls": ("composed_random", "composed_vanilla", "composed_encoder"),
}
DOMAIN_TITLES = {
    "kv_arithmetic": "Key-value arithmetic",
    "languages": "Languages",
    "code": "Code",
    "visual": "Visual arithmetic",
}
SHARES = ("exact_match", "pass@1", "chrf")
"""Metrics in per cent, of which more is better."""
INTERVAL = (
    "95 % intervals by a two-level bootstrap (seeds drawn with replacement, then the items of each); with few seeds "
    "they understate the variation between seeds. Differences are taken item by item."
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
            columns: dict[str, Scores] = dict(scores[method])
            columns |= {group: joined(scores[method], members) for group, members in groups.items()}
            delta = _delta(scores, method, retained, kind.same_items)
            costs = _costs(spent[method])
            for column, values in columns.items():
                about = tasks[groups[column][0] if column in groups else column]
                mean, low, high = (interval if about.metric == "bits_per_byte" else share)(values, kind.same_items)
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
                        "seeds": len(values),
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
    mixed = _mixed([result for _, result in found])
    return {
        "experiment": "compare",
        "preset": config.preset,
        "cells": {"planned": planned, "finished": len(found), "by_experiment": counts},
        "settings": settings,
        "rows": rows,
        "answers": answers,
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
            seen.setdefault(f"{name} of {_title(cell['domain'])}, seed {cell['seed']}", set()).add(digest)
    return sorted(name for name, digests in seen.items() if len(digests) > 1)


def _costs(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What a method takes on an experiment, over its seeds."""
    seconds = [cell["train_cpu_seconds"] for cell in cells if "train_cpu_seconds" in cell]
    return {
        "trainable_parameters": round(statistics.mean(cell["trainable_parameters"] for cell in cells)),
        "train_flops": statistics.mean(cell["train_flops"] for cell in cells),
        "train_cpu_seconds": round(statistics.median(seconds), 1) if seconds else None,
        "decode_time_x_anchor": round(statistics.median(cell["decode_time_x_anchor"] for cell in cells), 3),
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
                ours, theirs = joined(scores["composed"], tasks), joined(scores[method], tasks)
                shared = set(ours) & set(theirs)
                if not shared:
                    continue
                mean, low, high = (100 * value for value in difference(ours, theirs, same_items))
                verdict = "above" if low > 0 else "below" if high < 0 else "no difference shown"
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


# The page ------------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any], plots: str = "") -> str:
    """The report as a page.

    Args:
        result: what the JSON file holds.
        plots: where the pictures lie, seen from the page; with a slash at its end.
    """
    cells = result["cells"]
    lines = [f"# Every system on the same data, preset `{result['preset']}`", ""]
    if cells["finished"] < cells["planned"]:
        done = f"{cells['finished']} of {cells['planned']} cells"
        lines += [f"**Not finished: {done}.** What is missing has no figure.", ""]
    lines += [
        "Frozen m_A (the specialist) and m_B (the anchor), the same for all methods with one seed. CALM, "
        "fine-tuning, LoRA and the mixture of experts train on the same D_C for the same number of steps; continued "
        "pre-training and LoRA on m_A's corpus take as many steps on that corpus. Merging and the mixture need two "
        "models of one architecture: they take a twin of m_B, trained further on m_A's corpus, so that both come from "
        "one checkpoint. LoRA has the rank whose parameters come nearest to the composition's. The weights of task "
        "arithmetic, TIES, DARE and Fisher averaging, the members of the greedy soup and the threshold of the "
        "confidence cascade are chosen by the loss on rows of D_C's kind that no training has seen. Merging and the "
        "mixture also need the twin, which is not in their figures.",
        "",
    ]
    if result.get("mixed"):
        lines += [
            f"**Not all cells have seen the same base models: {'; '.join(result['mixed'])}.** They were trained again "
            "in between, with other results. Differences between methods hold these as well; make the cells anew.",
            "",
        ]
    domains = _domains(result["rows"])
    if set(domains) & set(DOMAIN_TITLES):
        lines += BUILT_IN
    for domain, about in result.get("own", {}).items():
        lines += [f"{_title(domain)}: {about}", ""]
    lines += [
        result["interval"],
        "",
    ]
    for domain in domains:
        rows = [row for row in result["rows"] if row["task"].startswith(f"{domain}/")]
        lines += [f"## {_title(domain)}", "", *_kept(result, domain), *_tables(domain, rows), ""]
        lines += _questions(result["answers"].get(domain, []))
    lines += _qualitative(result["rows"])
    lines += ["## Plots", ""]
    drawn = {name: title for name, title in PLOTS.items() if name != "data" or shows_data(result["rows"])}
    lines += [f"![{title}]({plots}{result['preset']}-{name}.png)\n" for name, title in drawn.items()]
    lines += [made_by(result), ""]
    return "\n".join(lines)


BUILT_IN = [
    "calmlm's own experiments: m_A and m_B are trained once for each seed. The vanilla m_A is of m_A's size and has "
    "read m_B's kind of text instead; the twin is trained for as many steps as m_A, which takes as many operations "
    "as continued pre-training. D_C holds some of what m_B knows already, as the paper's does: a fifth of it for keys, "
    "a third for languages, a sixth for code. So retained skills say what is kept by a method that goes on seeing "
    "them. Continued pre-training, LoRA on m_A's corpus and the twin see that corpus alone, and what is merged with "
    "the twin takes over what it has forgotten.",
    "",
    "Learning rates: CALM's own for CALM and LoRA, 0.001 for what trains all weights of m_B, with CALM's weight "
    "decay; none was searched for. CALM's connections and what D_C is made of were settled on its own results with "
    "seed 0.",
    "",
]
"""What is said of the experiments that come with calmlm."""

PLOTS = {
    "accuracy": "Combined skills by method, with 95 % intervals",
    "forgetting": "What is forgotten against what is gained",
    "flops": "Combined skills against training operations",
    "data": "Accuracy against the size of D_C",
}


def _domains(rows: list[dict[str, Any]]) -> list[str]:
    """The experiments, calmlm's own first."""
    found = list(dict.fromkeys(row["task"].split("/")[0] for row in rows))
    return [name for name in DOMAIN_TITLES if name in found] + [name for name in found if name not in DOMAIN_TITLES]


def _title(domain: str) -> str:
    return DOMAIN_TITLES.get(domain, domain.replace("_", " "))


def _cells(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["task"]): row for row in rows}


def _kept(result: dict[str, Any], domain: str) -> list[str]:
    """Where the figures of an experiment come from, if not from the cells that are stored."""
    kept = result.get("kept", {}).get(domain)
    if kept is None:
        return []
    return [
        f"Kept from the report of commit {kept['commit'][:7]}, which had {kept['cells']} cells; of those that are "
        f"stored now, {kept['stored']} belong here.",
        "",
    ]


def _tables(domain: str, rows: list[dict[str, Any]]) -> list[str]:
    """The methods with their columns, what they cost, and the ablations."""
    cells = _cells(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tasks.sort(key=lambda task: ("combined", "augmenting", "retained").index(_first(rows, task)["skill"]))
    methods = [method for method in METHODS if any((method, task) in cells for task in tasks)]
    ablations = [method for method in ABLATIONS if any((method, task) in cells for task in tasks)]
    narrow = [task for task in tasks if not _is_language(task)]
    lines = _scores(cells, methods, narrow, METHODS)
    languages = [task for task in tasks if _is_language(task)]
    if languages:
        lines += ["", "By language:", "", *_scores(cells, methods, languages, METHODS)]
    lines += ["", "What it costs, and what becomes of m_B's skills:", ""]
    lines += [
        "| | retained skills, after minus before | parameters trained | training, floating-point operations | "
        "training, s of one core | decoding time, relative to m_B |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        row = next(cells[method, task] for task in tasks if (method, task) in cells)
        delta, seconds = _signed(row), row["train_cpu_seconds"]
        lines.append(
            f"| {TITLES[method]} | {delta} | {row['trainable_parameters']:,} | {row['train_flops']:.2g} | "
            f"{'-' if seconds is None else f'{seconds:.0f}'} | {row['decode_time_x_anchor']:.2f} |"
        )
    if ablations:
        lines += ["", "Ablations, one seed; each changes one thing of CALM:", ""]
        known = {REFERENCE: Method("CALM, the same seed", METHODS["composed"].fit), **ABLATIONS}
        lines += _scores(cells, [REFERENCE, *ablations], narrow, known)
    return lines


def _first(rows: list[dict[str, Any]], task: str) -> dict[str, Any]:
    return next(row for row in rows if row["task"] == task)


def _is_language(task: str) -> bool:
    domain, _, column = task.rpartition("/")
    return domain == "languages" and column.startswith("arithmetic_") and len(column.rpartition("_")[2]) == 2


def _scores(
    cells: dict[tuple[str, str], dict[str, Any]], methods: list[str], tasks: list[str], known: dict[str, Any]
) -> list[str]:
    metrics = {task: next(row["metric"] for (_, at), row in cells.items() if at == task) for task in tasks}
    heads = [f"{task.rpartition('/')[2].replace('_', ' ')} ({metrics[task].replace('_', ' ')})" for task in tasks]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in methods:
        texts = []
        for task in tasks:
            row = cells.get((method, task))
            digits = 2 if metrics[task] == "bits_per_byte" else 1
            figures = None if row is None else [f"{row[key]:.{digits}f}" for key in ("mean", "low", "high")]
            texts.append("-" if figures is None else "{} ({} to {})".format(*figures))
        seeds = {cells[method, task]["seeds"] for task in tasks if (method, task) in cells}
        lines.append(f"| {known[method].title} ({max(seeds, default=0)}) | " + " | ".join(texts) + " |")
    return [*lines, "", "In brackets behind a name: how many seeds."]


def _questions(answers: list[dict[str, Any]]) -> list[str]:
    """Does the composition beat the others, and what does each of them forget."""
    if not answers:
        return []
    lines = [
        "Does CALM beat them, on what asks for both models? Points of the mean over those columns of one metric, CALM "
        "minus the other, over the seeds that both have; behind it what became of m_B's skills.",
        "",
        "| CALM against | | metric | seeds | CALM minus the other | verdict | the other's retained skills | CALM's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for answer in answers:
        deltas = [
            "-" if key not in answer else "{:+.1f} ({:+.1f} to {:+.1f})".format(*answer[key])
            for key in ("forgets", "composed_forgets")
        ]
        verdict = {"above": "CALM is above", "below": "**CALM is below**"}.get(answer["verdict"], answer["verdict"])
        verdict += " on this seed" if answer["seeds"] == 1 else ""
        lines.append(
            f"| {answer['question']} | {TITLES[answer['method']]} | {answer['metric'].replace('_', ' ')} | "
            f"{answer['seeds']} | {answer['difference']:+.1f} "
            f"({answer['low']:+.1f} to {answer['high']:+.1f}) | {verdict} | {deltas[0]} | {deltas[1]} |"
        )
    return [*lines, ""]


COLUMNS = {
    "fine-tuning": "fine_tuning",
    "LoRA": "lora",
    "mixture of experts": "moe",
    "tool use": "text_tool",
    "routing": "router",
    "CALM": "composed",
}
REMOVABLE = {
    "fine_tuning": "no: the old weights are gone",
    "lora": "yes, bit for bit",
    "moe": "no: m_B's own weights are trained on",
    "text_tool": "yes: nothing is trained",
    "router": "yes: the models stay apart",
    "composed": "yes, bit for bit",
}

WITHOUT_SPECIALIST = ("fine_tuning", "lora")


def _qualitative(rows: list[dict[str, Any]]) -> list[str]:
    """The slides' comparison of systems, each cell with a measured figure."""
    cells = _cells(rows)
    domains = _domains(rows)
    lines = ["## The slides' table, with figures", "", "| | " + " | ".join(COLUMNS) + " |", "|---" * 7 + "|"]
    removable = [REMOVABLE[method] for method in COLUMNS.values()]
    lines.append("| Modularity: can it be taken out again after training | " + " | ".join(removable) + " |")
    for title, show in (
        ("Training efficiency: parameters trained", lambda row: f"{row['trainable_parameters']:,}"),
        ("Training efficiency: operations", lambda row: f"{row['train_flops']:.2g}"),
    ):
        lines.append(f"| {title} | " + " | ".join(_over(cells, m, domains, show) for m in COLUMNS.values()) + " |")
    reached = [
        "it takes no m_A" if method in WITHOUT_SPECIALIST else _combined(cells, method, domains)
        for method in COLUMNS.values()
    ]
    lines.append("| Re-use of a trained m_A: combined skills reached | " + " | ".join(reached) + " |")
    deltas = [_over(cells, method, domains, _signed) for method in COLUMNS.values()]
    lines.append("| Avoids forgetting: retained skills, after minus before | " + " | ".join(deltas) + " |")
    order = ", ".join(map(_title, domains))
    return [
        *lines,
        "",
        f"Figures in the order: {order}. What is said of taking a system out again is asserted in "
        "`tests/comparison/test_modularity.py`; combined skills are the mean over the columns that ask for both "
        "models, of pass@1 alone where there is another metric.",
        "",
    ]


def _signed(row: dict[str, Any]) -> str:
    return "-" if row["retained_delta"] is None else f"{row['retained_delta']:+.1f}"


def _over(cells: dict[tuple[str, str], dict[str, Any]], method: str, domains: list[str], show: Any) -> str:
    texts = []
    for domain in domains:
        row = next((row for (m, task), row in cells.items() if m == method and task.startswith(f"{domain}/")), None)
        texts.append("-" if row is None else show(row))
    return " / ".join(texts)


def _combined(cells: dict[tuple[str, str], dict[str, Any]], method: str, domains: list[str]) -> str:
    texts = []
    for domain in domains:
        means = [
            row["mean"]
            for (m, task), row in cells.items()
            if m == method
            and task.startswith(f"{domain}/")
            and row["skill"] == "combined"
            and row["metric"] not in ("chrf", "bits_per_byte")
            and not _is_language(task)
        ]
        texts.append(f"{statistics.mean(means):.1f}" if means else "-")
    return " / ".join(texts)


def write_report(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``<preset>.json``, ``<preset>.md`` and the plots; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{result['preset']}.json", folder / f"{result['preset']}.md"
    write_text(data, json.dumps(result, indent=1) + "\n")
    write_text(page, markdown(result))
    return [data, page, *draw(result, folder)]
