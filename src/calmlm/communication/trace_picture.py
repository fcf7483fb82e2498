"""What was found inside a composition, as a picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from calmlm.communication.token_texts import shown
from calmlm.communication.trace import Attended, Trace
from calmlm.data.extras import require
from calmlm.files.storage import write_atomically

__all__ = ["check_pictures", "draw_trace"]

MOST = 60  # labels on an axis; of more tokens only some are named
CELL = 0.2  # inches of a token


def check_pictures() -> None:
    """Raise unless pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "ui", "a picture")


def draw_trace(trace: Trace, path: Path) -> None:
    """Write a PNG: a heat map for each connection, its heads' mean, then what happened at each token.

    Args:
        trace: of an answer.
        path: of the file, which is replaced.
    """
    from matplotlib.figure import Figure

    rows = len(trace.tokens)
    maps = [one for one in trace.attention if one.weights.shape[2]]
    widest = max((one.weights.shape[2] for one in maps), default=0)
    heights = [1.7 + CELL * min(rows, MOST)] * len(maps) + [2.8]
    wide = max(CELL * min(widest, 2 * MOST), CELL * min(rows, MOST)) + 2.5
    figure = Figure(figsize=(max(6.0, wide), sum(heights)), layout="constrained")
    parts = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, one in zip(parts, maps, strict=False):
        _heat_map(figure, axes, trace, one)
    _lines(parts[-1], trace)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # no font has all scripts
        write_atomically(path, lambda place: figure.savefig(place, format="png", dpi=110))


def _heat_map(figure: Any, axes: Any, trace: Trace, one: Attended) -> None:
    mean = one.weights.mean(0).numpy()
    image = axes.imshow(mean, aspect="auto", cmap="magma_r", vmin=0, vmax=max(float(mean.max(initial=0)), 1e-6))
    figure.colorbar(image, ax=axes, label="weight")
    axes.set_title(f"{one.label}, mean of {len(one.weights)} heads", fontsize="medium", parse_math=False)
    axes.set_xlabel(f"tokens of {one.model}", parse_math=False)
    axes.set_ylabel("answer")
    _name(axes.xaxis, trace.heard[one.model].tokens, rotation=90)
    _name(axes.yaxis, trace.tokens)


def _lines(axes: Any, trace: Trace) -> None:
    places = range(len(trace.tokens))
    groups = {"silenced": trace.silenced, "swapped": trace.swapped}
    bars = [(f"{name} {title}", values) for title, group in groups.items() for name, values in group.items()]
    width = 0.8 / max(1, len(bars))
    for index, (label, values) in enumerate(bars):
        axes.bar([place - 0.4 + width * (index + 0.5) for place in places], values, width, label=label)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_ylabel("nats gained", fontsize="small")
    axes.margins(x=0.01)
    _name(axes.xaxis, trace.tokens, rotation=90)
    handles, labels = axes.get_legend_handles_labels()
    if trace.gates:
        other = axes.twinx()
        for label, values in trace.gates.items():
            other.plot(places, values, marker=".", linewidth=1, label=f"gate {label}")
        other.set_ylim(0, 1)
        other.set_ylabel("gate", fontsize="small")
        more, names = other.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    axes.legend(handles, labels, fontsize="x-small", ncols=3, loc="upper left", bbox_to_anchor=(0, 1.25))


def _name(axis: Any, tokens: list[str], **options: Any) -> None:
    """Name the places of an axis after tokens, every second one or fewer where there are many."""
    step = -(-len(tokens) // (2 * MOST)) or 1
    places = range(0, len(tokens), step)
    axis.set_ticks(places, [shown(tokens[place]) for place in places], fontsize=7, parse_math=False, **options)
