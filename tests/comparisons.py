"""A comparison of tiny sizes, and cells by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calmlm.comparison.selection import CompareConfig, Part


def comparison(folder: Path, **parts: Part) -> CompareConfig:
    return CompareConfig(
        domains={},
        preset="tiny",
        output=str(folder / "out"),
        cache=str(folder / "cells"),
        bases=str(folder / "bases"),
        workers=1,
        parts=parts,
    )


def cell(method: str, seed: int, right: float, numeric: float = 1.0) -> dict[str, Any]:
    tasks = {"key_value": 0.0, "numeric": numeric, "keys_arithmetic": right, "ood": right, "ood_hard": right}
    return {
        "method": method,
        "seed": seed,
        "scores": {task: [float(i < share * 100) for i in range(100)] for task, share in tasks.items()},
        "trainable_parameters": 10,
        "train_flops": 1e9,
        "train_cpu_seconds": 3.0,
        "decode_time_x_anchor": 1.5,
        "commit": "c",
    }
