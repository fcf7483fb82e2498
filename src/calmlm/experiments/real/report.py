"""The outcome with two real models: JSON and a markdown page, with LoRA and the ensemble beside every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calmlm.experiments.real.by_variety import Cells, compare, page
from calmlm.experiments.real.picture import draw
from calmlm.experiments.real.presets import Method, Settings
from calmlm.experiments.real.resampling import Estimate, Figures, bits_of, difference, shown
from calmlm.files.results import to_json, write_result

__all__ = ["INTERVAL", "goals", "markdown", "summarise", "write_report"]

INTERVAL = (
    "In brackets 95 % intervals by a two-level bootstrap: seeds are drawn with replacement, then sentences, the same "
    "ones for what is compared. With few seeds they understate the variation between seeds."
)
WIDEST = 12  # varieties that a table has columns for


def summarise(settings: Settings, cells: Cells) -> dict[str, dict[str, Any]]:
    """Each method's figures; a figure that its cells do not give is left out.

    ``inside``, ``outside`` and each variety are bits per byte. ``gain`` and ``gain_outside`` are what the right prompt
    saves where m_A reads it. ``against_lora`` and ``against_ensemble`` are differences, the second to the ensemble that
    reads the same examples. ``english`` is bits per byte of plain English divided by m_B's.
    """
    found = {}
    for name, by_seed in cells.items():
        method = settings.methods[name]
        row: dict[str, Any] = {"title": method.title, "seeds": len(by_seed), "steps": method.steps}
        for variety in settings.varieties.all:
            row[variety] = bits_of(_figures(by_seed, [variety]))
        rivals = {
            "against_lora": settings.lora_beside(name),
            "against_ensemble": f"ensemble{'_examples' if settings.shows(name) else ''}",
        }
        for column, suffix, chosen in (
            ("inside", "", settings.varieties.inside),
            ("outside", "_outside", settings.varieties.outside),
        ):
            if not chosen:
                continue
            figures = _figures(by_seed, chosen)
            row[column] = bits_of(figures)
            if all(cell["swapped_nats"] is not None for cell in by_seed.values()):
                swapped = _figures(by_seed, chosen, "swapped_nats")
                row |= {f"swapped{suffix}": bits_of(swapped), f"gain{suffix}": difference(swapped, figures)}
            for title, rival in rivals.items():
                if rival in cells and rival != name:
                    row[f"{title}{suffix}"] = difference(figures, _figures(cells[rival], chosen))
        if "m_B" in cells:
            row["english"] = _english(by_seed) / _english(cells["m_B"])
        for key in ("chrf_inside", "chrf_outside", "parameters", "training_seconds", "seconds", "weight"):
            values = [cell[key] for cell in by_seed.values() if cell.get(key) is not None]
            if values:
                row[key] = sum(values) / len(values)
        found[name] = row
    return found


def _figures(by_seed: Mapping[str, Mapping[str, Any]], varieties: Sequence[str], measure: str = "nats") -> Figures:
    return Figures.of(list(by_seed.values()), varieties, measure)


def _english(by_seed: Mapping[str, Mapping[str, Any]]) -> float:
    nats = [sum(cell["english_nats"]) / sum(cell["sizes"]["english"]) for cell in by_seed.values()]
    return sum(nats) / len(nats)


def goals(settings: Settings, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say goal by goal whether it is reached, as markdown items; goals whose rows are missing are left out.

    The best composition is, among those with the same examples, the one with the fewest bits per byte inside D_C.
    """
    lines: list[str] = []
    if settings.headline:  # asked for by variety, on a page of its own
        return lines

    def figure(name: str, key: str) -> float | None:
        found = rows.get(name, {}).get(key)
        return found.mean if isinstance(found, Estimate) else found

    def held(what: str, value: float | None, bound: float, least: bool = False, places: int = 3) -> None:
        if value is None:
            return
        missing = bound - value if least else value - bound
        verdict = "reached" if missing <= 0 else f"**not reached, {missing:,.{places}f} short**"
        lines.append(f"- {what}: {value:,.{places}f}, {verdict};")

    held("map of words alone, against LoRA at most -0.08", figure("words_map", "against_lora"), -0.08)
    held("map of words alone, trained numbers at most 5,000", figure("words_map", "parameters"), 5000, places=0)
    seconds = figure("words_map", "training_seconds")
    held("map of words alone, seconds of training at most 120", seconds, 120, places=0)
    pointer = figure("words_pointer_examples", "against_lora")
    held("pointer alone with examples, against LoRA at most -0.20", pointer, -0.2)
    held("states alone, against LoRA at most -0.20", figure("graft_adapters", "against_lora"), -0.2)
    held("states alone, gain at least 0.40", figure("graft_adapters", "gain"), 0.4, least=True)
    for examples in (False, True):
        own = [name for name in rows if _ours(settings.methods[name]) and settings.shows(name) == examples]
        if not own:
            continue
        best = min(own, key=lambda name: rows[name]["inside"].mean)
        what = f"best composition with{'' if examples else 'out'} examples (`{best}`)"
        held(f"{what}, against LoRA at most -0.30", figure(best, "against_lora"), -0.3)
        held(f"{what}, against the ensemble at most -0.10", figure(best, "against_ensemble"), -0.1)
        held(f"{what}, gain at least 0.25", figure(best, "gain"), 0.25, least=True)
        held(f"{what}, English at most 1.01 of m_B's", figure(best, "english"), 1.01)
        alone = figure("m_A_examples" if examples else "m_A", "inside")
        if alone is not None:
            held(f"{what}, at most m_A's {alone:.3f} bits per byte", figure(best, "inside"), alone)
        written = figure("m_A_examples", "chrf_inside")
        if written is not None:
            held(f"{what}, chrF at least m_A's {written:.1f}", figure(best, "chrf_inside"), written, least=True)
            for name in [name for name in rows if settings.guided(name) == best]:
                found = figure(name, "chrf_inside")
                held(
                    f"the same with guidance (`{name}`), chrF at least m_A's {written:.1f}", found, written, least=True
                )
    for name in rows:
        if settings.methods[name].augmenting == "random":
            held(f"`{name}`, against LoRA at least 0", figure(name, "against_lora"), 0.0, least=True)
    return lines


def _ours(method: Method) -> bool:
    """Whether a method is a composition that writes greedily, and none of the controls."""
    ours = method.system == "composed" and method.guidance is None
    return ours and (method.augmenting, method.reads) == ("real", "own")


def markdown(settings: Settings, result: Mapping[str, Any], cells: Cells) -> str:
    """Write the result as a markdown page."""
    rows: Mapping[str, Mapping[str, Any]] = result["rows"]
    varieties = settings.varieties
    first = next((cell for by_seed in cells.values() for cell in by_seed.values()), None)
    lines = [
        f"# Two real models, `{settings.name}`",
        "",
        f"m_B is {settings.anchor.id}, m_A is {settings.augmenting.id}. Bits per byte of the English sentence behind "
        f"`{{source}}\\nEnglish:`, on sentences that D_C shows in no language, in its varieties "
        f"({', '.join(varieties.inside)}). *Swapped*: m_A alone reads another sentence of the same variety. *Gain*: "
        f"swapped minus right. *LoRA*, *ensemble*: the difference to them; LoRA has seen the same D_C, the ensemble "
        f"has read the same examples. *English*: bits per byte of plain English divided by m_B's. chrF inside / "
        f"outside D_C, greedy where no guidance is named. {INTERVAL}",
        "",
        "| | bits per byte | swapped | gain | LoRA | ensemble | English | chrF | trained | steps | seconds |",
        "|---" + "|---:" * 10 + "|",
    ]
    for row in rows.values():
        chrf = " / ".join(f"{row[key]:.1f}" for key in ("chrf_inside", "chrf_outside") if key in row)
        parts = [
            *_compared(row, "inside", ""),
            f"{row['english']:.3f}" if "english" in row else "-",
            chrf or "-",
            f"{row['parameters']:,.0f}" if "parameters" in row else "-",
            str(row["steps"]) if row["steps"] else "-",
            f"{row['training_seconds']:.0f}" if "training_seconds" in row else "-",
        ]
        lines.append(f"| {_title(row, result)} | " + " | ".join(parts) + " |")
    if varieties.outside:
        lines += ["", f"## Outside D_C ({', '.join(varieties.outside)})", ""]
        lines += ["| | bits per byte | swapped | gain | LoRA | ensemble |", "|---" + "|---:" * 5 + "|"]
        for row in rows.values():
            lines.append(f"| {_title(row, result)} | " + " | ".join(_compared(row, "outside", "_outside")) + " |")
    if len(varieties.all) <= WIDEST:
        apart = "The last ones are apart: m_A knows little of them." if varieties.apart else ""
        lines += ["", "## By variety", *(["", apart] if apart else []), ""]
        lines += ["| | " + " | ".join(varieties.all) + " |", "|---" + "|---:" * len(varieties.all) + "|"]
        for row in rows.values():
            lines.append(f"| {row['title']} | " + " | ".join(f"{row[key].mean:.3f}" for key in varieties.all) + " |")
    reached = goals(settings, rows)
    if reached:
        lines += ["", "## What is asked for", "", *reached]
    lines += ["", "## How", "", _how(settings, first)]
    if first is not None:
        dtypes = {cell.get("dtype", "bfloat16") for by_seed in cells.values() for cell in by_seed.values()}
        lines[-1] += f" The base models compute in {' or '.join(sorted(dtypes))}, which a cell names."
        made = "".join(f", {name} {version}" for name, version in first["versions"].items())
        machines = sorted({_machine(cell) for by_seed in cells.values() for cell in by_seed.values()})
        commits = sorted({cell["commit"][:7] for by_seed in cells.values() for cell in by_seed.values()})
        lines += ["", f"Made at commit {', '.join(commits)} on {'; '.join(machines)}{made}."]
    return "\n".join([*lines, ""])


def _compared(row: Mapping[str, Any], column: str, suffix: str) -> list[str]:
    """Bits per byte, and what they are beside controls and rivals."""
    return [
        shown(row.get(column)),
        shown(row.get(f"swapped{suffix}")),
        shown(row.get(f"gain{suffix}")),
        shown(row.get(f"against_lora{suffix}"), "+.3f"),
        shown(row.get(f"against_ensemble{suffix}"), "+.3f"),
    ]


def _title(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    weight = f", m_A's weight {row['weight']:.2f}" if "weight" in row else ""
    one = " (one seed)" if row["seeds"] == 1 < len(result["seeds"]) else ""
    return f"{row['title']}{weight}{one}"


def _how(settings: Settings, cell: Mapping[str, Any] | None) -> str:
    left = "" if cell is None else f" ({cell['left_out']} were)"
    return (
        f"Data: {settings.data}, split by sentence for all languages at once; the split is the same for all seeds. "
        f"Sentences of more than {settings.longest} characters in a variety are left out{left}. D_C: {settings.pairs} "
        f"pairs, each another sentence, and {settings.plain} lines of plain English; a seed draws them, their order, "
        f"the {settings.shots} examples and what a training starts from. {settings.items} sentences are asked in each "
        f"variety, {settings.english_items} lines of plain English, and {settings.written} sentences are translated in "
        f"each but those apart. Bytes are those of the English text; its end does not count. The ensemble's weight is "
        f"chosen on {settings.weighed} development sentences in each variety of D_C; nothing else is. What is "
        f"trained is in float32. Seconds are those of the training."
    )


def _machine(cell: Mapping[str, Any]) -> str:
    machine = cell["machine"]
    return f"{machine['processor']} ({machine['cores']} cores, {machine['threads']} threads, {machine['device']})"


def write_report(settings: Settings, result: Mapping[str, Any], cells: Cells, output: Path) -> list[Path]:
    """Write ``<name>.json`` and ``.md``, and a page by varieties if the settings ask for it; the cells stay."""
    base = output / settings.name
    paths = [base.with_suffix(".json"), base.with_suffix(".md")]
    if settings.headline:
        found = compare(settings, cells)
        result = {**result, "by_variety": found}
        picture = draw(settings, found, output / f"{settings.name}-by-variety.png")
        paths += [output / f"{settings.name}-by-variety.md", *([picture] if picture is not None else [])]
        write_result(paths[2], page(settings, found, picture.name if picture is not None else None))
    write_result(paths[0], to_json(result, indent=2) + "\n")
    write_result(paths[1], markdown(settings, result, cells))
    return paths
