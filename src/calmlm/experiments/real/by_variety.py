"""Translation variety by variety: where the composition is above its models, and what there was to communicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from calmlm.experiments.real.presets import Settings
from calmlm.experiments.real.resampling import Estimate, Figures, bits_of, difference, estimate, shares, shown
from calmlm.experiments.real.sentence_counts import METRICS, Metric, corpus

__all__ = ["LEAST", "compare", "goals", "page"]

LEAST = 0.1
"""Bits per byte by which m_A must gain more from a text than m_B, to count as a variety that m_A knows better."""
DRAWS = 400
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Cells by method and seed."""
BASES = {"m_A": ("m_A", "m_A_examples"), "m_B": ("m_B", "m_B_examples")}
"""Rows of a model alone; what counts is its better one in each variety."""


class Written:
    """The counts of a method's translations.

    Args:
        by_seed: its cells.
        varieties: in the cells' order; the same sentences stand in each.
    """

    def __init__(self, by_seed: Mapping[str, Mapping[str, Any]], varieties: Sequence[str]) -> None:
        self.varieties = list(varieties)
        self.counts = {
            metric: torch.tensor([cell["scores"][metric] for cell in by_seed.values()], dtype=torch.float64).unflatten(
                1, (len(varieties), -1)
            )
            for metric in METRICS
        }
        """By metric, (seeds, varieties, sentences, numbers)."""

    def score(self, metric: Metric, variety: str) -> float:
        """Of one variety, the mean over seeds."""
        found = self.counts[metric][:, self.varieties.index(variety)]
        return sum(corpus(metric, seed.tolist()) for seed in found) / len(found)

    def mean(self, metric: Metric, chosen: Sequence[str]) -> float:
        """The mean over varieties."""
        return sum(self.score(metric, variety) for variety in chosen) / len(chosen)

    def drawn(self, metric: Metric, chosen: Sequence[str], sentences: torch.Tensor) -> torch.Tensor:
        """That mean in each draw, (draws, seeds).

        Args:
            sentences: how often each sentence is drawn, (draws, sentences).
        """
        places = [self.varieties.index(variety) for variety in chosen]
        summed = torch.einsum("dn,svnk->dsvk", sentences, self.counts[metric][:, places])
        return torch.tensor(
            [[sum(corpus(metric, [row]) for row in seed) / len(seed) for seed in draw] for draw in summed.tolist()],
            dtype=torch.float64,
        )


def estimated(metric: Metric, chosen: Sequence[str], one: Written, other: Written | None = None) -> Estimate:
    """A method's mean over varieties, or by how much it is above another's; seeds and sentences are drawn."""
    generator = torch.Generator().manual_seed(0)
    sentences = shares(one.counts[metric].shape[2], generator, DRAWS) * one.counts[metric].shape[2]
    means, draws = [], []
    for method in (one,) if other is None else (one, other):
        seeds = shares(len(method.counts[metric]), generator, DRAWS)
        means.append(method.mean(metric, chosen))
        draws.append((method.drawn(metric, chosen, sentences) * seeds).sum(1))
    if other is None:
        return estimate(means[0], draws[0])
    return estimate(means[0] - means[1], draws[0] - draws[1])


def compare(settings: Settings, cells: Cells) -> dict[str, Any]:
    """What there is to say by variety, over the cells that hold the counts of their translations.

    Returns:
        ``to_communicate``: m_A's gain from a text minus m_B's, in bits per byte, by variety, where both are known;
        ``known``: the varieties in which that is at least ``LEAST``; ``methods``: by name ``chrf``, ``bleu`` and
        ``bits`` by variety, means over all and over the known ones with intervals, the difference to LoRA, the pairing
        gain where m_A is heard, and in how many varieties chrF is ``above`` others.
    """
    varieties = settings.varieties.all
    cells = {name: found for name, found in cells.items() if all("scores" in cell for cell in found.values())}
    asked = [v for v in varieties if v not in settings.varieties.apart]
    written = {name: Written(by_seed, asked) for name, by_seed in cells.items()}
    gains = {name: _gains(cells[name], varieties) for name in BASES if name in cells}
    to_communicate = {v: gains["m_A"][v] - gains["m_B"][v] for v in varieties} if len(gains) == len(BASES) else {}
    known = [v for v in asked if to_communicate.get(v, 0.0) >= LEAST]
    scores: dict[str, dict[str, dict[str, float]]] = {
        name: {m: {v: found.score(m, v) for v in asked} for m in METRICS} for name, found in written.items()
    }
    rivals: dict[str, Callable[[str], float]] = {}
    for base, rows in BASES.items():
        own = [row for row in rows if row in settings.methods]
        if own and scores.keys() >= set(own):  # the better one of all of them, so that none may be missing
            rivals[base] = lambda v, own=own: max(scores[row]["chrf"][v] for row in own)  # type: ignore[misc]
    if len(rivals) == len(BASES):
        bases = list(rivals.values())
        rivals["both"] = lambda v: max(rival(v) for rival in bases)
    methods = {}
    for name, by_seed in cells.items():
        row: dict[str, Any] = {"title": settings.methods[name].title, "seeds": len(by_seed), **scores[name]}
        row["bits"] = {v: bits_of(Figures.of(list(by_seed.values()), [v])).mean for v in varieties}
        lora = _lora_beside(settings, name, written)
        for group, chosen in (("all", asked), ("known", known)):
            if not chosen:
                continue
            row[f"chrf_{group}"] = estimated("chrf", chosen, written[name])
            row[f"bleu_{group}"] = written[name].mean("bleu", chosen)
            figures = Figures.of(list(by_seed.values()), chosen)
            row[f"bits_{group}"] = bits_of(figures)
            if all(cell["swapped_nats"] is not None for cell in by_seed.values()):
                row[f"gain_{group}"] = difference(Figures.of(list(by_seed.values()), chosen, "swapped_nats"), figures)
            if lora in written and name != lora:
                row[f"above_lora_{group}"] = estimated("chrf", chosen, written[name], written[lora])
        row["above"] = {to: sum(scores[name]["chrf"][v] > rival(v) for v in asked) for to, rival in rivals.items()}
        if lora in scores:
            row["above"]["LoRA"] = sum(scores[name]["chrf"][v] > scores[lora]["chrf"][v] for v in asked)
        methods[name] = row
    return {"varieties": asked, "to_communicate": to_communicate, "known": known, "methods": methods}


def _lora_beside(settings: Settings, name: str, written: Mapping[str, Written]) -> str:
    """The row of LoRA that a method is compared with: for one with guidance the better one, greedy or with guidance."""
    plain = settings.lora_beside(name)
    rows = [plain]
    if settings.guided(name):
        rows += [row for row in written if settings.guided(row) == plain and row != name]
    known = [row for row in rows if row in written]
    return max(known, key=lambda row: written[row].mean("chrf", written[row].varieties), default=plain)


def _gains(by_seed: Mapping[str, Mapping[str, Any]], varieties: Iterable[str]) -> dict[str, float]:
    """What a model saves by the right text, in bits per byte, by variety."""
    found = list(by_seed.values())
    if any(cell["swapped_nats"] is None for cell in found):
        return dict.fromkeys(varieties, 0.0)
    return {v: Figures.of(found, [v], "swapped_nats").bits - Figures.of(found, [v]).bits for v in varieties}


def goals(settings: Settings, found: Mapping[str, Any]) -> list[str]:
    """Say of the row that the settings name as theirs, and of it with guidance, whether it reaches what is asked for.

    Returns:
        markdown items.
    """
    methods, lines = settings.methods, list[str]()
    for name in [settings.headline, *(name for name in methods if settings.guided(name) == settings.headline)]:
        if name in found["methods"]:
            lines += _goals(name, found["methods"][name], len(found["varieties"]))
    return lines


def _goals(name: str, row: Mapping[str, Any], count: int) -> list[str]:
    lines = []

    def held(what: str, value: float | None, least: float, form: str = ".0f") -> None:
        if value is not None:
            verdict = "reached" if value >= least else "**not reached**"
            lines.append(f"- {what}: {value:{form}}, asked for {least:{form}}: {verdict};")

    held(f"`{name}` above m_B, varieties of {count}", row["above"].get("m_B"), round(0.9 * count))
    held(f"`{name}` above both models, varieties of {count}", row["above"].get("both"), round(0.75 * count))
    if "above_lora_known" in row:
        held(f"`{name}` above LoRA where m_A knows more, chrF", row["above_lora_known"].mean, 8.0, ".1f")
    if "gain_known" in row:
        held(f"`{name}`, lower end of the pairing gain there", row["gain_known"].low, 0.0, ".3f")
    return lines


def page(settings: Settings, found: Mapping[str, Any], plot: str | None) -> str:
    """Write what ``compare`` found as a markdown page.

    Args:
        settings: the experiment's.
        found: what it returned.
        plot: the name of the picture's file, if there is one.
    """
    methods: Mapping[str, Mapping[str, Any]] = found["methods"]
    asked, known = found["varieties"], found["known"]
    lines = [
        f"# Translation from {len(asked)} varieties, `{settings.name}`",
        "",
        f"m_B is {settings.anchor.id}, m_A is {settings.augmenting.id}; {settings.written} sentences of each variety "
        f"into English, greedy where no guidance is named. chrF and BLEU by sacrebleu, of each variety by itself, "
        f"then the mean over varieties and seeds. *Known*: the {len(known)} varieties in which m_A gains at least "
        f"{LEAST} bits per byte more from the text than m_B does. *Gain*: bits per byte when m_A reads another "
        f"sentence, minus right. *Above*: in how many of the {len(asked)} the method's chrF is above that of m_B, of "
        f"m_A (the better of 0 and {settings.shots} examples), of both, of LoRA on the same D_C (where guidance "
        f"is named, the better of LoRA greedy and with guidance). In brackets 95 % intervals over seeds and sentences.",
        "",
        "| | chrF | BLEU | bits per byte | chrF, known | above LoRA, known | gain, known "
        "| above m_B | m_A | both | LoRA |",
        "|---" + "|---:" * 10 + "|",
    ]
    for row in methods.values():
        parts = [
            shown(row["chrf_all"], ".1f"),
            f"{row['bleu_all']:.1f}",
            shown(row["bits_all"], ".3f"),
            shown(row.get("chrf_known"), ".1f"),
            shown(row.get("above_lora_known"), "+.1f"),
            shown(row.get("gain_known"), ".3f"),
            *(str(row["above"].get(rival, "-")) for rival in ("m_B", "m_A", "both", "LoRA")),
        ]
        seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
        lines.append(f"| {row['title']}{seeds} | " + " | ".join(parts) + " |")
    reached = goals(settings, found)
    if reached:
        lines += ["", "## What is asked for", "", *reached]
    if plot is not None:
        lines += ["", f"![chrF above m_B, by what there is to communicate]({plot})"]
    beside = (*BASES["m_B"], *BASES["m_A"], settings.lora_beside(settings.headline), settings.headline)
    columns = [name for name in beside if name in methods]
    to_communicate = found["to_communicate"]
    lines += [
        "",
        "## By variety",
        "",
        "m_A's gain from the text minus m_B's, in bits per byte, then chrF; highest first.",
        "",
        "| | gain | " + " | ".join(methods[name]["title"] for name in columns) + " |",
        "|---" + "|---:" * (1 + len(columns)) + "|",
    ]
    for variety in sorted(asked, key=lambda v: -to_communicate.get(v, 0.0)):
        gain = f"{to_communicate[variety]:+.3f}" if variety in to_communicate else "-"
        figures = (f"{methods[name]['chrf'][variety]:.1f}" for name in columns)
        lines.append(f"| {variety} | {gain} | " + " | ".join(figures) + " |")
    return "\n".join([*lines, ""])
