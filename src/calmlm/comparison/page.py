"""The report of a comparison as a page: tables, verdicts, the slides' table with figures, and plots."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any

from calmlm.comparison.figures import known
from calmlm.comparison.gains import pairing_table
from calmlm.comparison.methods import ABLATIONS, METHODS, REFERENCE, TITLES, Method
from calmlm.comparison.plots import shows_data
from calmlm.experiments.record import made_by

__all__ = ["COLUMNS", "REMOVABLE", "markdown", "title_of"]

DOMAIN_TITLES = {
    "kv_arithmetic": "Key-value arithmetic",
    "languages": "Languages",
    "code": "Code",
    "visual": "Visual arithmetic",
}


def markdown(result: dict[str, Any], plots: str = "", missing: Collection[str] = ()) -> str:
    """The report as a page.

    Args:
        result: what the JSON file holds.
        plots: where the pictures lie, seen from the page; with a slash at its end.
        missing: names of plots that could not be drawn.
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
        lines += [f"{title_of(domain)}: {about}", ""]
    lines += [
        result["interval"],
        "",
    ]
    for domain in domains:
        rows = [row for row in result["rows"] if row["task"].startswith(f"{domain}/")]
        lines += [f"## {title_of(domain)}", "", *_kept(result, domain), *_tables(domain, rows), ""]
        lines += _questions(result["answers"].get(domain, []))
        if domain in result.get("pairing", {}):
            lines += pairing_table(result["pairing"][domain])
    lines += _qualitative(result["rows"])
    lines += ["## Plots", ""]
    drawn = {name: title for name, title in PLOTS.items() if name != "data" or shows_data(result["rows"])}
    drawn = {name: title for name, title in drawn.items() if name not in missing}
    lines += [f"![{title}]({plots}{result['preset']}-{name}.png)\n" for name, title in drawn.items()]
    lines += [made_by(result), ""]
    return "\n".join(lines)


BUILT_IN = [
    "calmlm's own experiments: m_A and m_B are trained once for each seed. The vanilla m_A is of m_A's size and has "
    "read m_B's kind of text instead; the twin is trained on what m_A was trained on, for as many steps of as many "
    "rows: with as many tokens as continued pre-training in languages, 0.69 of them in code, 0.55 in keys. D_C holds "
    "some of what m_B knows already, as the paper's does: a fifth of it for keys, a third for languages, a sixth for "
    "code. So retained skills say what is kept by a method that goes on seeing them, though in other items: none that "
    "is asked stands in D_C (but for two ablations of keys that draw another D_C). Continued pre-training, LoRA on "
    "m_A's corpus and the twin see that corpus alone, and what is merged with the twin takes over what it has "
    "forgotten. The cascade is told what no other system is: which words are keys or number words, and in code to ask "
    "m_B for a name first.",
    "",
    "Learning rates: CALM's own for CALM and LoRA, 0.001 for what trains all weights of m_B, with CALM's weight "
    "decay; none was searched for the others. CALM's connections, heads, steps, learning rate and weight decay, and "
    "what D_C is made of, were settled on its own results with seed 0, the number of heads in languages on those with "
    "seeds 0 and 1.",
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


def title_of(domain: str) -> str:
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
        f"stored now, {kept['stored']} belong here. The items are those of that commit.",
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
        lines.append(
            f"| {TITLES[method]} | {_signed(row)} | {row['trainable_parameters']:,} | {row['train_flops']:.2g} | "
            f"{_figure(row['train_cpu_seconds'], '.0f')} | {_figure(row['decode_time_x_anchor'], '.2f')} |"
        )
    if ablations:
        lines += ["", "Ablations, one seed; each changes of CALM what it names:", ""]
        titles = {REFERENCE: Method("CALM, the same seed", METHODS["composed"].fit), **ABLATIONS}
        lines += _scores(cells, [REFERENCE, *ablations], narrow, titles)
    return lines


def _first(rows: list[dict[str, Any]], task: str) -> dict[str, Any]:
    return next(row for row in rows if row["task"] == task)


def _is_language(task: str) -> bool:
    domain, _, column = task.rpartition("/")
    return domain == "languages" and column.startswith("arithmetic_") and len(column.rpartition("_")[2]) == 2


def _scores(
    cells: dict[tuple[str, str], dict[str, Any]], methods: list[str], tasks: list[str], titles: dict[str, Any]
) -> list[str]:
    """The table of methods by columns; ``titles`` names the methods."""
    metrics = {task: next(row["metric"] for (_, at), row in cells.items() if at == task) for task in tasks}
    heads = [f"{task.rpartition('/')[2].replace('_', ' ')} ({metrics[task].replace('_', ' ')})" for task in tasks]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in methods:
        texts = []
        for task in tasks:
            row = cells.get((method, task))
            form = ".2f" if metrics[task] == "bits_per_byte" else ".1f"
            texts.append("-" if row is None else _range([row[key] for key in ("mean", "low", "high")], form))
        seeds = {cells[method, task]["seeds"] for task in tasks if (method, task) in cells}
        lines.append(f"| {titles[method].title} ({max(seeds, default=0)}) | " + " | ".join(texts) + " |")
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
        deltas = ["-" if key not in answer else _range(answer[key], "+.1f") for key in ("forgets", "composed_forgets")]
        verdict = {"above": "CALM is above", "below": "**CALM is below**"}.get(answer["verdict"], answer["verdict"])
        verdict += " on this seed" if answer["seeds"] == 1 else ""
        lines.append(
            f"| {answer['question']} | {TITLES[answer['method']]} | {answer['metric'].replace('_', ' ')} | "
            f"{answer['seeds']} | {_range([answer[key] for key in ('difference', 'low', 'high')], '+.1f')} | "
            f"{verdict} | {deltas[0]} | {deltas[1]} |"
        )
    return [*lines, ""]


COLUMNS = {
    "fine-tuning": "fine_tuning",
    "LoRA": "lora",
    "mixture of experts": "moe",
    "tool use as text": "text_tool",
    "tool use, cascade": "cascade",
    "routing": "router",
    "CALM": "composed",
}
REMOVABLE = {
    "fine_tuning": "no: the old weights are gone",
    "lora": "yes, bit for bit",
    "moe": "no: m_B's own weights are trained on",
    "text_tool": "yes: nothing is trained",
    "cascade": "yes: nothing is trained",
    "router": "yes: the models stay apart",
    "composed": "yes, bit for bit",
}

WITHOUT_SPECIALIST = ("fine_tuning", "lora", "moe")


def _qualitative(rows: list[dict[str, Any]]) -> list[str]:
    """The slides' comparison of systems, each cell with a measured figure."""
    cells = _cells(rows)
    domains = _domains(rows)
    lines = [
        "## The slides' table, with figures",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
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
    order = ", ".join(map(title_of, domains))
    return [
        *lines,
        "",
        f"Figures in the order: {order}. What is said of taking a system out again is asserted in "
        "`tests/comparison/test_modularity.py`; combined skills are the mean over the columns that ask for both "
        "models, of pass@1 alone where there is another metric.",
        "",
    ]


def _signed(row: dict[str, Any]) -> str:
    return _figure(row["retained_delta"], "+.1f")


def _figure(value: float | None, form: str) -> str:
    return format(value, form) if known(value) else "-"


def _range(values: Sequence[float | None], form: str) -> str:
    """A figure with its interval in brackets."""
    if not known(values[0]):
        return "-"
    return "{} ({} to {})".format(*(_figure(value, form) for value in values))


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
            and known(row["mean"])
        ]
        texts.append(f"{statistics.mean(means):.1f}" if means else "-")
    return " / ".join(texts)
