"""The outcome of visual arithmetic as JSON and a markdown table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calmlm.experiments.record import made_by
from calmlm.experiments.statistics import cells_of, table_of
from calmlm.experiments.visual_arithmetic.measures import COLUMNS
from calmlm.files.results import to_json, write_result

__all__ = ["METHODS", "markdown", "write_report"]

METHODS = {
    "m_A": "m_A (recognises digits)",
    "m_B": "m_B (calculates)",
    "composed": "Composed",
    "composed_random": "Composed with an untrained encoder",
    "pipeline": "Pipeline (classify, then calculate)",
    "flamingo": "As composed, connector `flamingo`",
    "legonn": "As composed, connector `legonn`",
}


def markdown(result: dict[str, Any]) -> str:
    """Write the result as a markdown page."""
    seeds = len(result["seeds"])
    by_seed = [sum(seconds.values()) for seconds in result["seconds_per_seed"].values()]
    sizes = " · ".join(f"{name} {count:,}" for name, count in result["parameters"].items() if name != "random")
    return "\n".join(
        [
            f"# Visual arithmetic, preset `{result['preset']}`",
            "",
            f"Exact answers, per cent: mean over {seeds} seed{'s' if seeds > 1 else ''} with its 95 % interval.",
            "",
            *table_of(cells_of(result["rows"]), METHODS, COLUMNS),
            "",
            "D_C shows nearly all numeric items, which are two figures; `calmlm compare` asks in phrasings that D_C "
            "does not show.",
            "",
            result["footer"],
            "",
            f"Wall-clock of a seed: {min(by_seed):.0f} to {max(by_seed):.0f} s. Parameters (of compositions: added): "
            f"{sizes}.",
            "",
            made_by(result),
            "",
        ]
    )


def write_report(result: dict[str, Any], output: Path) -> list[Path]:
    """Write ``<preset>.json`` and ``.md`` into ``output``."""
    base = output / result["preset"]
    paths = [base.with_suffix(".json"), base.with_suffix(".md")]
    write_result(paths[0], to_json(result, indent=2) + "\n")
    write_result(paths[1], markdown(result))
    return paths
