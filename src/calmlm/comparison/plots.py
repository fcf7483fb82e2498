"""The plots of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmlm.comparison.contract import GRAFTS
from calmlm.comparison.figures import known
from calmlm.comparison.methods import METHODS, REFERENCE, TITLES
from calmlm.data.extras import require
from calmlm.errors import MissingExtraError, first_line
from calmlm.files.storage import write_atomically

__all__ = ["draw", "shows_data"]

_FAMILIES: dict[str, tuple[str, ...]] = {
    "black": ("m_A", "m_B"),
    "tab:blue": ("composed", "flamingo", "legonn", "composed_map", "composed_pointer", "pointer"),
    "tab:cyan": ("composed_random", "composed_vanilla", "composed_encoder", "swapped", "swapped_trained"),
    "tab:pink": GRAFTS,
    "tab:orange": ("fine_tuning", "continued_pretraining", "lora", "lora_full_data"),
    "tab:green": ("soup", "soup_greedy", "fisher", "task_arithmetic", "ties", "dare_ties"),
    "tab:red": ("moe",),
    "tab:purple": ("router", "confidence_cascade", "text_tool", "cascade"),
}
"""Methods by what they are kin to, under the colour of their points."""
_MARKERS = "osD^vP"
_STYLES = {
    method: (color, "*" if method == "composed" else marker)
    for color, family in _FAMILIES.items()
    for method, marker in zip(family, _MARKERS, strict=False)
}
_SHARES = {"share=0.05": 5.0, "share=0.1": 10.0, REFERENCE: 20.0}


def draw(result: dict[str, Any], folder: Path, report: Callable[[str], None]) -> dict[str, Path | None]:
    """Write the plots; what keeps one from being drawn is reported, and loses nothing else.

    Returns:
        their paths by name, None for those that could not be drawn.
    """
    names = ["accuracy", "forgetting", "flops", *(["data"] if shows_data(result["rows"]) else [])]
    found: dict[str, Path | None] = {}
    for name in names:
        path = folder / f"{result['preset']}-{name}.png"
        try:
            require("matplotlib", "compare", "The plots of a comparison")
            _draw(result, name, path)
            found[name] = path
        except MissingExtraError as error:
            report(str(error))
            return dict.fromkeys(names)
        except Exception as error:  # of matplotlib, its fonts and its backends, or for figures that it cannot scale
            report(f"The plot '{name}' could not be drawn ({type(error).__name__}: {first_line(error)}).")
            found[name] = None
    return found


def _draw(result: dict[str, Any], name: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if name == "data":
        figure, axis = pyplot.subplots(figsize=(5.5, 4.0))
        _data(axis, result["rows"])
        _save(figure, pyplot, path)
        return
    domains = list(dict.fromkeys(row["task"].split("/")[0] for row in result["rows"]))
    points = {domain: _points([r for r in result["rows"] if r["task"].startswith(f"{domain}/")]) for domain in domains}
    plot = {"accuracy": _accuracy, "forgetting": _forgetting, "flops": _flops}[name]
    figure, axes = pyplot.subplots(1, len(domains), figsize=(5.5 * len(domains), 5.0), squeeze=False)
    for axis, domain in zip(axes[0], domains, strict=True):
        plot(axis, points[domain])
        axis.set_title(domain.replace("_", " "))
    if name != "accuracy":
        _legend(figure, axes[0])
    _save(figure, pyplot, path)


def shows_data(rows: list[dict[str, Any]]) -> bool:
    """Whether there is something to draw over the size of D_C: key-value arithmetic with two sizes of it or more."""
    found = {row["method"] for row in rows if row["task"].startswith("kv_arithmetic/")}
    return len(found & _SHARES.keys()) > 1


def _save(figure: Any, pyplot: Any, path: Path) -> None:
    figure.tight_layout()
    write_atomically(
        path,
        lambda place: figure.savefig(place, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None}),
    )
    pyplot.close(figure)


def _points(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What the plots show of each method: the mean over the columns that ask for both models, and the costs."""
    points = {}
    shares = [row for row in rows if row["skill"] == "combined" and row["metric"] != "bits_per_byte"]
    shares = [row for row in shares if known(row["mean"])]
    exact = [row for row in shares if row["metric"] != "chrf"]
    for method in METHODS:
        own = [row for row in exact or shares if row["method"] == method]
        if own:
            points[method] = {
                key: statistics.mean(row[key] for row in own) for key in ("mean", "low", "high", "train_flops")
            }
            if known(own[0]["retained_delta"]):
                points[method]["delta"] = own[0]["retained_delta"]
    return points


def _accuracy(axis: Any, points: dict[str, dict[str, float]]) -> None:
    names = list(points)[::-1]
    means = [points[name]["mean"] for name in names]
    # The mean of the columns' intervals, which is a little wider than the interval of the mean.
    errors = [
        [max(0.0, points[name]["mean"] - points[name]["low"]) for name in names],
        [max(0.0, points[name]["high"] - points[name]["mean"]) for name in names],
    ]
    colors = ["tab:blue" if name == "composed" else "lightgray" for name in names]
    axis.barh(names, means, xerr=errors, color=colors, edgecolor="gray", capsize=2)
    axis.set_yticks(range(len(names)), [TITLES[name] for name in names], fontsize=7)
    axis.set_xlabel("combined skills, %")


def _legend(figure: Any, axes: Any) -> None:
    """One for all panels, in the order of the tables."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    titles = [TITLES[method] for method in METHODS if TITLES[method] in handles]
    shown = [handles[title] for title in titles]
    figure.legend(shown, titles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _point(axis: Any, x: float, y: float, method: str) -> None:
    color, marker = _STYLES[method]
    size = 150 if method == "composed" else 40
    axis.scatter([x], [y], color=color, marker=marker, s=size, alpha=0.8, linewidths=0, label=TITLES[method])


def _forgetting(axis: Any, points: dict[str, dict[str, float]]) -> None:
    before = points.get("m_B", {"mean": 0.0})["mean"]
    points = {method: point for method, point in points.items() if "delta" in point}
    for method, point in points.items():
        _point(axis, point["mean"] - before, point["delta"], method)
    deltas = [1.1 * point["delta"] for point in points.values()]
    low = min([-10.0, *deltas])
    axis.set_ylim(low, max([-0.06 * low, *deltas]))
    if not points:
        axis.text(0.5, 0.5, "no task asks for retained skills", ha="center", transform=axis.transAxes)
    axis.axhline(0.0, color="lightgray", linewidth=1, zorder=0)
    axis.axvline(0.0, color="lightgray", linewidth=1, zorder=0)
    axis.set_xlabel("gain on combined skills over m_B, points")
    axis.set_ylabel("retained skills, after minus before, points")


def _flops(axis: Any, points: dict[str, dict[str, float]]) -> None:
    for method, point in points.items():
        if point["train_flops"]:
            _point(axis, point["train_flops"], point["mean"], method)
    spent = [point["train_flops"] for point in points.values() if point["train_flops"]]
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(lambda value, position: "")
    if spent:  # whole decades, or the marks of a narrow range would overlap
        axis.set_xlim(10 ** math.floor(math.log10(min(spent))), 10 ** math.ceil(math.log10(max(spent)) + 0.01))
    axis.set_ylim(-3, 103)
    axis.set_xlabel("training, floating-point operations")
    axis.set_ylabel("combined skills, %")


def _data(axis: Any, rows: list[dict[str, Any]]) -> None:
    for task in ("keys_arithmetic", "ood", "ood_hard"):
        found = [
            (_SHARES[row["method"]], row["mean"])
            for row in rows
            if row["task"] == f"kv_arithmetic/{task}" and row["method"] in _SHARES and known(row["mean"])
        ]
        if found:
            xs, ys = zip(*sorted(found), strict=True)
            axis.plot(xs, ys, marker="o", label=task.replace("_", " "))
            axis.legend(fontsize=8)
    axis.set_xlabel("share of the keys that D_C uses, %")
    axis.set_ylabel("exact match on unseen keys, %")
    axis.set_ylim(0, 102)
