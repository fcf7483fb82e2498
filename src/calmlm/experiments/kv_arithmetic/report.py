"""The experiment's outcome: intervals over seeds and items, JSON, a markdown table beside the slides', and a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmlm.errors import MissingExtraError, first_line
from calmlm.experiments.kv_arithmetic.measures import COLUMNS
from calmlm.experiments.record import made_by
from calmlm.experiments.statistics import cells_of, rows_of, table_of
from calmlm.files.results import to_json, write_result
from calmlm.files.storage import write_atomically

__all__ = ["METHODS", "PUBLISHED", "markdown", "plot", "summarise", "summarise_halves", "write_report"]

METHODS = {
    "m_A": "m_A (knows the keys)",
    "m_B": "m_B (calculates)",
    "composed": "Composed, D_C of keys arithmetic",
    "composed_subs": "Composed, D_C of KV-SUBS",
    "composed_random": "Composed with a random m_A",
    "cascade": "Cascade (m_A, then m_B)",
    "flamingo": "As composed, connector `flamingo`",
    "legonn": "As composed, connector `legonn`",
    "m_A_characters": "m_A of single characters",
    "m_B_bpe": "m_B of byte pairs",
    "two_tokenizers": "These two composed",
}

HALVES = {
    "first_half": "Composed with the m_A of the first half",
    "second_half": "Composed with the m_A of the second half",
    "joined": "Both together, without training",
}
HALF_COLUMNS = {
    "first": "unseen keys of the first half",
    "second": "unseen keys of the second half",
    "both": "unseen keys of both",
}

# The table of the slides "LLM Augmented LLMs: Expanding Capabilities Through Composition"; None where it has a dash.
PUBLISHED: dict[str, dict[str, float | None]] = {
    "m_A": dict(zip(COLUMNS, (98.10, 4.20, None, None, None), strict=False)),
    "m_B": dict(zip(COLUMNS, (None, 73.70, None, None, None), strict=False)),
    "composed": dict(zip(COLUMNS, (92.90, 72.00, 84.30, 66.40, 30.30), strict=False)),
    "composed_random": dict(zip(COLUMNS, (25.60, 70.90, 20.25, 14.95, 7.75), strict=False)),
    "cascade": dict(zip(COLUMNS, (98.10, 73.70, 72.30, 51.00, 27.55), strict=False)),
}


def summarise(scores: dict[int, dict[str, dict[str, float]]], items: int) -> list[dict[str, Any]]:
    """Turn ``scores[seed][method][column]`` into the rows of the table."""
    return rows_of(scores, items, METHODS, COLUMNS)


def summarise_halves(scores: dict[int, dict[str, dict[str, float]]], items: int) -> list[dict[str, Any]]:
    """Turn ``scores[seed][composition][column]`` into the rows of the table of halves."""
    return rows_of(scores, items, HALVES, HALF_COLUMNS)


def goals(cells: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Say goal by goal whether the composition reaches it, by how much it does not, as markdown items.

    Args:
        cells: rows by method and column; a goal whose rows are missing is left out.
    """
    asked: list[tuple[str, tuple[str, str], float | tuple[str, str], float]] = [
        ("at least 90 on Key-Value", ("composed", "key_value"), 90.0, 0.0),
        ("within 2 points of m_B on Numeric", ("composed", "numeric"), ("m_B", "numeric"), 2.0),
        ("at least 85 on Keys arithmetic over unseen keys", ("composed", "keys_arithmetic"), 85.0, 0.0),
    ]
    for column in ("keys_arithmetic", "ood", "ood_hard"):
        name = f"within 2 points of the cascade on {COLUMNS[column]}"
        asked.append((name, ("composed", column), ("cascade", column), 2.0))
    for column in ("key_value", "numeric", "keys_arithmetic", "ood", "ood_hard"):
        name = f"two tokenizers within 3 points of one on {COLUMNS[column]}"
        asked.append((name, ("two_tokenizers", column), ("composed", column), 3.0))
    lines = []
    for name, ours, bound, slack in asked:
        if ours not in cells or (isinstance(bound, tuple) and bound not in cells):
            continue
        least = cells[bound]["mean"] if isinstance(bound, tuple) else bound
        missing = round(least - slack - cells[ours]["mean"], 2)
        verdict = "reached" if missing <= 0 else f"**not reached, {missing:.1f} points short**"
        lines.append(f"- {name}: {cells[ours]['mean']:.1f} against {least:.1f}, {verdict};")
    random_rows = [
        cells["composed_random", column]["mean"]
        for column in ("key_value", "keys_arithmetic", "ood", "ood_hard")
        if ("composed_random", column) in cells
    ]
    if random_rows:
        verdict = "reached" if max(random_rows) <= 25 else f"**not reached, {max(random_rows) - 25:.1f} points over**"
        lines.append(f"- a random m_A at most 25 in every column with keys: {max(random_rows):.1f}, {verdict}.")
    return lines


def _half_goals(cells: dict[tuple[str, str], dict[str, Any]], restored: bool) -> list[str]:
    """Whether two models that were trained apart keep what each of them could, as markdown items."""
    lines = []
    for name, column in (("first_half", "first"), ("second_half", "second")):
        alone, together = cells[name, column]["mean"], cells["joined", column]["mean"]
        share = 100 * together / alone if alone else 0.0
        verdict = "reached" if share >= 90 else f"**not reached, {90 - share:.1f} points short**"
        lines.append(f"- at least 90 % of its own accuracy on {HALF_COLUMNS[column]}: {share:.1f} %, {verdict};")
    words = "exactly as before, reached" if restored else "**other than before, not reached**"
    return [*lines, f"- with the second taken out again, the first answers {words}."]


def _fewer(result: dict[str, Any]) -> str:
    """Which rows are means over fewer seeds."""
    seeds = len(result["seeds"])
    counts = {row["method"]: row["seeds"] for row in (*result["rows"], *result["halves"]) if row["seeds"] < seeds}
    titles = METHODS | HALVES
    lines = []
    for count in sorted(set(counts.values())):
        names = ", ".join(titles[method] for method, n in counts.items() if n == count)
        lines.append(f" Over {count} seed{'s' if count > 1 else ''}: {names}.")
    return "".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """Write the result as a markdown page: our table beside the slides', how long it took, what the bases are."""
    cells = cells_of(result["rows"])
    seeds = len(result["seeds"])
    lines = [
        f"# Key-value arithmetic, preset `{result['preset']}`",
        "",
        f"Exact match, per cent: mean over {seeds} seed{'s' if seeds > 1 else ''} with its 95 % interval, and in "
        "brackets the figure that the slides publish for models of their size." + _fewer(result),
        "",
        *table_of(cells, METHODS, COLUMNS, PUBLISHED),
        "",
        "D_C shows some of the numeric items (about half, with the preset `small`), as it shows m_B what is to be "
        "kept; `calmlm compare` asks the others alone.",
        "",
        "What a composition is held to here, on the means:",
        "",
        *goals(cells),
    ]
    if result["halves"]:
        halves = cells_of(result["halves"])
        lines += [
            "",
            "## Two specialists, trained apart and joined",
            "",
            "Two augmenting models know half of the keys each; each was composed with the anchor alone, with D_C over "
            "its own keys. `add_augmenting` joins them, and nothing is trained after that.",
            "",
            *table_of(halves, HALVES, HALF_COLUMNS),
            "",
            *_half_goals(halves, result["restored"]),
        ]
    stages = " · ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["seconds"].items())
    titles = {"m_A": "m_A", "m_B": "m_B", "added": "added by the composition"}
    sizes = ", ".join(f"{titles[name]} {count:,}" for name, count in result["parameters"].items())
    lines += [
        "",
        result["footer"],
        "",
        f"Wall-clock, mean over seeds: {stages}.",
        "",
        f"Parameters: {sizes}.",
        "",
        made_by(result),
        "",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the table as bars with their intervals.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "repro", "Drawing the result") from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    columns = [column for column in COLUMNS if column != "keys_arithmetic_seen"]
    present = {row["method"] for row in result["rows"]}
    shown = {method: title for method, title in METHODS.items() if method in present}
    width = 0.8 / len(shown)
    for i, (method, title) in enumerate(shown.items()):
        rows = [
            row for column in columns for row in result["rows"] if (row["method"], row["column"]) == (method, column)
        ]
        places = [columns.index(row["column"]) + (i - (len(shown) - 1) / 2) * width for row in rows]
        errors = [[max(0, r["mean"] - r["low"]) for r in rows], [max(0, r["high"] - r["mean"]) for r in rows]]
        axes.bar(places, [row["mean"] for row in rows], width, label=title, yerr=errors, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(columns)), [COLUMNS[column] for column in columns])
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 105)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def write_report(result: dict[str, Any], output: Path, report: Callable[[str], None]) -> list[Path]:
    """Write ``<preset>.json``, ``.md`` and, where matplotlib is installed, ``.png`` into ``output``.

    ``report`` takes a line where the plot could not be drawn.
    """
    base = output / result["preset"]
    paths = [base.with_suffix(".json"), base.with_suffix(".md")]
    write_result(paths[0], to_json(result, indent=2) + "\n")
    write_result(paths[1], markdown(result))
    try:
        plot(result, base.with_suffix(".png"))
    except MissingExtraError:
        return paths
    except Exception as error:  # of matplotlib, its fonts and its backends
        report(f"The plot could not be drawn ({type(error).__name__}: {first_line(error)}).")
        return paths
    return [*paths, base.with_suffix(".png")]
