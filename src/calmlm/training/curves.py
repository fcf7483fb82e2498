"""Pictures at the end of a run: its losses, and how far the gates of its composition are open."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calmlm.errors import first_line
from calmlm.files.storage import write_atomically
from calmlm.training.mean_gates import GATE
from calmlm.training.outcome import Report
from calmlm.training.run_folder import RunFolder

__all__ = ["draw_curves"]

Line = list[tuple[int, float]]


def draw_curves(history: Sequence[dict[str, Any]], folder: RunFolder, report: Report) -> None:
    """Write `loss.png`, and `gates.png` where there are gates; without matplotlib, or in a failure, say so.

    Args:
        history: the trainer's log.
        folder: of the run.
        report: takes a line about what could not be drawn.
    """
    names = {name for entry in history for name in entry if name.startswith(GATE)}
    losses = {"training": _line(history, "loss"), "evaluation": _line(history, "eval_loss")}
    gates = {name.removeprefix(GATE): _line(history, name) for name in sorted(names)}
    if not any(losses.values()):
        return
    if find_spec("matplotlib") is None:
        report("loss.png and gates.png need the package 'matplotlib': pip install 'calmlm[train]'.")
        return
    try:
        _draw(losses, "loss, nats a token", folder.path / "loss.png")
        if gates:
            _draw(gates, "mean gate", folder.path / "gates.png", top=1.0)
    except Exception as error:  # of matplotlib, its fonts and its backends, or a full disk
        report(f"The curves could not be drawn ({type(error).__name__}: {first_line(error)}).")


def _line(history: Sequence[dict[str, Any]], key: str) -> Line:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _draw(lines: dict[str, Line], title: str, path: Path, top: float | None = None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        if line:
            steps, values = zip(*line, strict=True)
            axes.plot(steps, values, label=name, marker="." if len(line) < 30 else None)
    if top is not None:
        axes.set_ylim(0, top)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    write_atomically(path, lambda place: figure.savefig(place, format="png", dpi=110))
