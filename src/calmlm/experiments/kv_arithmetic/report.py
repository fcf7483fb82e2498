"""The experiment's outcome: intervals over seeds and items, JSON, a markdown table beside the slides', and a plot."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calmlm.errors import MissingExtraError
from calmlm.experiments.kv_arithmetic.evaluate import COLUMNS
from calmlm.storage import write_atomically, write_text

__all__ = ["METHODS", "PUBLISHED", "interval", "markdown", "plot", "summarise", "write_report"]

METHODS = {
    "m_A": "m_A (knows the keys)",
    "m_B": "m_B (calculates)",
    "composed": "Composed, D_C of keys arithmetic",
    "composed_subs": "Composed, D_C of KV-SUBS",
    "composed_random": "Composed with a random m_A",
    "cascade": "Cascade (m_A, then m_B)",
}

# The table of the slides "LLM Augmented LLMs: Expanding Capabilities Through Composition"; None where it has a dash.
PUBLISHED: dict[str, dict[str, float | None]] = {
    "m_A": dict(zip(COLUMNS, (98.10, 4.20, None, None, None), strict=False)),
    "m_B": dict(zip(COLUMNS, (None, 73.70, None, None, None), strict=False)),
    "composed": dict(zip(COLUMNS, (92.90, 72.00, 84.30, 66.40, 30.30), strict=False)),
    "composed_random": dict(zip(COLUMNS, (25.60, 70.90, 20.25, 14.95, 7.75), strict=False)),
    "cascade": dict(zip(COLUMNS, (98.10, 73.70, 72.30, 51.00, 27.55), strict=False)),
}

INTERVAL = (
    "95 % confidence intervals by a two-level bootstrap with 10,000 draws: seeds are drawn with replacement, then the "
    "items of each. With few seeds they understate the variation between seeds."
)


def interval(shares: Sequence[float], items: int, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``shares`` (per cent, one per seed, each over ``items`` items)."""
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        total = 0.0
        for _ in shares:
            share = rng.choice(shares) / 100
            # The normal approximation of the binomial; exact at shares of 0 and 1.
            total += min(1.0, max(0.0, rng.gauss(share, (share * (1 - share) / items) ** 0.5)))
        means.append(100 * total / len(shares))
    means.sort()
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def summarise(scores: dict[int, dict[str, dict[str, float]]], items: int) -> list[dict[str, Any]]:
    """Turn ``scores[seed][method][column]`` into the rows of the table."""
    rows = []
    for method in METHODS:
        for column in COLUMNS:
            by_seed = {seed: table[method][column] for seed, table in scores.items() if method in table}
            if not by_seed:
                continue
            shares = list(by_seed.values())
            low, high = interval(shares, items)
            rows.append(
                {
                    "method": method,
                    "column": column,
                    "mean": round(sum(shares) / len(shares), 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "seeds": len(shares),
                    "per_seed": {str(seed): round(share, 2) for seed, share in by_seed.items()},
                }
            )
    return rows


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


def markdown(result: dict[str, Any]) -> str:
    """Write the result as a markdown page: our table beside the slides', how long it took, what the bases are."""
    cells = {(row["method"], row["column"]): row for row in result["rows"]}
    seeds = len(result["seeds"])
    lines = [
        f"# Key-value arithmetic, preset `{result['preset']}`",
        "",
        f"Exact match, per cent: mean over {seeds} seed{'s' if seeds > 1 else ''} with its 95 % interval, and in "
        "brackets the figure that the slides publish for models of their size.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for method, title in METHODS.items():
        texts = []
        for column in COLUMNS:
            row = cells.get((method, column))
            text = "-" if row is None else f"{row['mean']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
            published = PUBLISHED.get(method, {}).get(column)
            texts.append(text if published is None else f"{text} [{published:.2f}]")
        lines.append(f"| {title} | " + " | ".join(texts) + " |")
    lines += ["", "What a composition is held to here, on the means:", "", *goals(cells)]
    stages = " · ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["seconds"].items())
    machine = result["machine"]
    lines += [
        "",
        result["footer"],
        "",
        f"Wall-clock, mean over seeds: {stages}.",
        "",
        f"Parameters: m_A {result['parameters']['m_A']:,}, m_B {result['parameters']['m_B']:,}, added by the "
        f"composition {result['parameters']['added']:,}.",
        "",
        f"Made by `{result['command']}` at commit {result['commit']} on {machine['processor']} ({machine['cores']} "
        f"cores, {machine['threads']} threads, {machine['device']}) with "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
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
    width = 0.8 / len(METHODS)
    for i, (method, title) in enumerate(METHODS.items()):
        rows = [
            row for column in columns for row in result["rows"] if (row["method"], row["column"]) == (method, column)
        ]
        places = [columns.index(row["column"]) + (i - (len(METHODS) - 1) / 2) * width for row in rows]
        errors = [[max(0, r["mean"] - r["low"]) for r in rows], [max(0, r["high"] - r["mean"]) for r in rows]]
        axes.bar(places, [row["mean"] for row in rows], width, label=title, yerr=errors, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(columns)), [COLUMNS[column] for column in columns])
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 105)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def write_report(result: dict[str, Any], output: Path) -> list[Path]:
    """Write ``<preset>.json``, ``.md`` and, where matplotlib is installed, ``.png`` into ``output``."""
    base = output / result["preset"]
    paths = [base.with_suffix(".json"), base.with_suffix(".md")]
    write_text(paths[0], json.dumps(result, indent=2) + "\n")
    write_text(paths[1], markdown(result))
    try:
        plot(result, base.with_suffix(".png"))
    except MissingExtraError:
        return paths
    return [*paths, base.with_suffix(".png")]
