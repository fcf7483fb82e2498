"""A picture of translation by variety: what is gained over m_B against what m_A has to communicate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calmlm.data.extras import require
from calmlm.errors import MissingExtraError
from calmlm.experiments.real.by_variety import BASES
from calmlm.experiments.real.presets import Settings
from calmlm.files.storage import write_atomically

__all__ = ["draw"]

STYLES = {"lora": ("tab:orange", "o"), "headline": ("tab:blue", "*"), "m_A": ("black", ".")}


def draw(settings: Settings, found: Mapping[str, Any], path: Path) -> Path | None:
    """Draw chrF above m_B's better row, by variety; return the path, or None without these figures or matplotlib.

    Args:
        settings: the experiment's.
        found: what ``calmlm.experiments.real.by_variety.compare`` returned.
        path: of the picture.
    """
    methods, x = found["methods"], found["to_communicate"]
    ours = [methods[name]["chrf"] for name in BASES["m_B"] if name in methods]
    shown = {"headline": settings.headline, "lora": settings.lora_beside(settings.headline), "m_A": "m_A_examples"}
    shown = {style: name for style, name in shown.items() if name in methods}
    if not (x and ours and "headline" in shown):
        return None
    try:
        require("matplotlib", "compare", "The picture by variety")
    except MissingExtraError:
        return None
    from matplotlib import pyplot

    base = {v: max(chrf[v] for chrf in ours) for v in found["varieties"]}
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for style, name in shown.items():
        color, marker = STYLES[style]
        ys = [methods[name]["chrf"][v] - base[v] for v in base]
        size = 90 if style == "headline" else 30
        axis.scatter([x[v] for v in base], ys, c=color, marker=marker, s=size, alpha=0.8, label=methods[name]["title"])
    for variety in base:
        at = x[variety], methods[settings.headline]["chrf"][variety] - base[variety]
        axis.annotate(variety, at, fontsize=6, xytext=(4, 3), textcoords="offset points")
    axis.axhline(0.0, color="lightgray", linewidth=1, zorder=0)
    axis.axvline(0.0, color="lightgray", linewidth=1, zorder=0)
    axis.set_xlabel("what m_A gains from the text more than m_B, bits per byte")
    axis.set_ylabel("chrF above m_B's better row")
    axis.legend(fontsize=8, frameon=False)
    write_atomically(
        path,
        lambda temporary: figure.savefig(
            temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None}
        ),
    )
    pyplot.close(figure)
    return path
