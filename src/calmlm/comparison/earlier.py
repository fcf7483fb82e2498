"""What a new report keeps of an earlier one: experiments of which more cells were stored then than are now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calmlm.errors import CalmError

__all__ = ["keep_fuller", "read_report"]


def read_report(path: Path) -> dict[str, Any] | None:
    """A report's JSON file, or None where there is none.

    Raises:
        CalmError: the file is no report.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    whole = isinstance(found, dict) and {"rows", "answers", "cells", "commit"} <= set(found)
    if not whole or not isinstance(found["cells"], dict):
        raise CalmError(
            f"Expected the report of a comparison in {path}, but it is none: remove it, or go without --keep."
        )
    return found


def keep_fuller(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """A report with the experiments of an earlier one that had more cells, with the same settings.

    Each of them is named under ``kept``, with the commit at which it was reported on. Seeds and methods are never
    mixed within an experiment.

    Args:
        result: the new report.
        earlier: the one before; it may hold kept experiments itself.
    """
    counts, before = result["cells"]["by_experiment"], earlier["cells"].get("by_experiment", {})
    settings = earlier.get("settings", {})
    fuller = [
        name
        for name, count in counts.items()
        if before.get(name, 0) > count and settings.get(name) == result["settings"][name]
    ]
    if not fuller:
        return result
    rows, answers, pairing = [], {}, {}
    for name in counts:
        source = earlier if name in fuller else result
        rows += [row for row in source["rows"] if row["task"].startswith(f"{name}/")]
        if name in source["answers"]:
            answers[name] = source["answers"][name]
        if name in source.get("pairing", {}):
            pairing[name] = source["pairing"][name]
    origins = {name: {"cells": before[name], "commit": earlier["commit"], "stored": counts[name]} for name in fuller}
    for name in set(fuller) & set(earlier.get("kept", {})):
        origins[name]["commit"] = earlier["kept"][name]["commit"]
    counts = counts | {name: before[name] for name in fuller}
    return result | {
        "rows": rows,
        "answers": answers,
        "pairing": pairing,
        "cells": result["cells"] | {"finished": sum(counts.values()), "by_experiment": counts},
        "commits": sorted({*result["commits"], *earlier["commits"]}),
        "kept": origins,
    }
