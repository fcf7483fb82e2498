"""What the right prompt is worth to m_A's part in a composition: pairing gains and follow rates, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calmlm.comparison.contract import Task
from calmlm.comparison.figures import Scores, columns_of, difference, share
from calmlm.comparison.methods import TITLES
from calmlm.comparison.swapping import SWAPPED

__all__ = ["PAIRED_LINES", "pairing_of", "pairing_table"]


def pairing_of(
    scores: Mapping[str, dict[str, Scores]],
    cells: Iterable[dict[str, Any]],
    tasks: Mapping[str, Task],
    groups: Mapping[str, Sequence[str]],
    same_items: bool,
) -> list[dict[str, Any]]:
    """How far a composition is above itself with another prompt for m_A, by control and column.

    Args:
        scores: by method, task and seed.
        cells: of the experiment, some of which say whether answers fit the other item.
        tasks: the columns.
        groups: columns that take several tasks together.
        same_items: whether all seeds are asked the same.
    """
    followed: dict[str, dict[str, Scores]] = {}
    for cell in cells:
        for task, values in cell.get("follows", {}).items():
            followed.setdefault(cell["method"], {}).setdefault(task, {})[cell["seed"]] = values
    rows = []
    for method, paired in SWAPPED.items():
        ours, theirs = scores.get(paired, {}), scores.get(method, {})
        for column, members in {**{task: [task] for task in tasks}, **groups}.items():
            if not all(task in ours and task in theirs for task in members):
                continue
            right, other = columns_of(ours, members), columns_of(theirs, members)
            seeds = set(right[0]) & set(other[0])
            if not seeds:
                continue
            bits = tasks[members[0]].metric == "bits_per_byte"  # of which fewer are better
            first, second = (other, right) if bits else (right, other)
            scale = 1.0 if bits else 100.0
            row: dict[str, Any] = {
                "method": method,
                "column": column,
                "metric": tasks[members[0]].metric,
                "skill": tasks[members[0]].skill,
                "seeds": len(seeds),
                "gain": [round(scale * value, 3) for value in difference(first, second, same_items)],
            }
            found = followed.get(method, {})
            if all(task in found for task in members):
                shares = share(*columns_of(found, members), same_items=same_items)
                row["follow"] = [round(100 * value, 3) for value in shares]
            rows.append(row)
    return rows


PAIRED_LINES = [
    "Is anything communicated? The pairing gain is what CALM, or a graft, loses where m_A reads the prompt of another "
    "item, and all else stays: right minus other, item by item, with its 95 % interval. A gain over m_B that is no "
    "pairing gain comes from its parameters and its training, not from what m_A reads. The follow rate is the share "
    "of answers that fit the other item and not their own.",
    "",
]


def pairing_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a page; a remark where no cell of these controls is there yet."""
    if not rows:
        return ["The controls in which m_A reads the prompt of another item have no cells yet.", ""]
    lines = [
        *PAIRED_LINES,
        "| control | column | metric | seeds | pairing gain | follow rate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        form = "+.3f" if row["metric"] == "bits_per_byte" else "+.1f"
        follow = "-" if "follow" not in row else _range(row["follow"], ".1f")
        lines.append(
            f"| {TITLES[row['method']]} | {row['column'].replace('_', ' ')} | {row['metric'].replace('_', ' ')} | "
            f"{row['seeds']} | {_range(row['gain'], form)} | {follow} |"
        )
    return [*lines, ""]


def _range(values: Sequence[float], form: str) -> str:
    return "{} ({} to {})".format(*(format(value, form) for value in values))
