"""A composition that translates and one that knows facts, each trained apart, then both at once on their anchor."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import calmlm
from calmlm.bases.speed import faster_dtype
from calmlm.data.padding import pad_id
from calmlm.errors import DataError
from calmlm.experiments.fitting import Stage, fit
from calmlm.experiments.real.joined import Pair, open_pair, open_trained, rows_of
from calmlm.experiments.real.layout import AUGMENTING
from calmlm.experiments.real.measures import first_line_of
from calmlm.experiments.real.presets import load_settings
from calmlm.experiments.real.resampling import Estimate, Figures, bits_of, difference, shown
from calmlm.experiments.real.systems import Alone, Composed
from calmlm.experiments.real.world import Item, World, read_sentences
from calmlm.experiments.record import device, origin
from calmlm.experiments.several.facts import VARIETY, Specialist, facts, taught
from calmlm.files.results import to_json, write_result
from calmlm.files.storage import check_writable

__all__ = ["Preset", "markdown", "run"]

OWN = {"translates": "translation", "knows": "facts"}
"""The task of each composition."""


@dataclass(frozen=True)
class Preset:
    """Sizes.

    Attributes:
        facts: that the specialist learns.
        shown: of these, how many D_C shows; the others are asked.
        plain: lines of plain English beside them in D_C.
        items: sentences that are asked in each variety.
        english: lines of plain English that are read.
        specialist: the small model.
        training: of the composition with it.
    """

    facts: int = 160
    shown: int = 80
    plain: int = 160
    items: int = 20
    english: int = 100
    specialist: Specialist = field(default_factory=Specialist)
    training: Stage = field(default_factory=lambda: Stage(60, 16, 1e-3, weight_decay=0.0))


def run(
    composition: str | Path,
    output: str | Path = "experiments/several/results",
    models: str | Path = "models",
    *,
    config: str | Path = "configs/real/varieties.yaml",
    data: str | Path | None = None,
    seed: int = 0,
    preset: Preset | None = None,
    threads: int | None = None,
    command: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train what knows facts, join it to what translates, and measure each alone and both.

    Args:
        composition: folder of the one that translates, trained on the models of ``config``.
        output: folder of the report.
        models: folder of the models' files.
        config: the models, and the sentences.
        data: a file of sentences, instead of the settings' id.
        seed: of facts, weights and D_C.
        preset: the sizes.
        threads: of torch.
        command: that the report names as its origin.
        report: called with each line of progress.

    Raises:
        ConfigError: for an output that cannot be written to.
        ModelError, DataError, CheckpointError: models, data or a composition that cannot be loaded.
    """
    preset, settings = preset or Preset(), load_settings(config)
    settings = dataclasses.replace(settings, items=preset.items, english_items=preset.english)
    folder = Path(output)
    check_writable(folder / "several.json")
    if threads is not None:
        torch.set_num_threads(threads)
    world = World(settings, seed, read_sentences(settings, data))
    if preset.shown + preset.plain > len(world.training) or preset.shown >= preset.facts:
        raise DataError(
            f"Expected fewer facts in D_C than there are, and {preset.plain} lines beside them, but got {preset.shown} "
            f"of {preset.facts} facts and {len(world.training)} sentences: lower shown or plain."
        )
    pair = open_pair(settings.anchor, settings.augmenting, models, faster_dtype(device()))
    first = open_trained(composition, pair)
    known = facts(preset.facts, seed)
    start = time.perf_counter()
    small = taught(known, pair.tokenizer, pair.anchor.config.vocab_size, preset.specialist, seed)
    report(f"taught {len(known)} facts in {time.perf_counter() - start:.0f} s")
    second = _knowing(pair, first, small, known, world, preset, seed)
    varieties = settings.shown or settings.varieties.inside
    tasks = {
        "translation": [item for item in world.tested if item.variety in varieties],
        "facts": known[preset.shown :],
        "english": world.english,
    }
    before = {variety: _read_first(first, pair) for variety in varieties}
    systems: dict[str, Callable[[], Any]] = {
        "m_B": lambda: Alone(pair.anchor, pair.tokenizer),
        "reads": lambda: Alone(pair.augmenting, pair.augmenting_tokenizer, before),
        "learned": lambda: Alone(small, pair.tokenizer),
        "translates": lambda: Composed(first, pair.tokenizer),
        "knows": lambda: Composed(second, pair.tokenizer),
        "both": lambda: Composed(_both(first, second), pair.tokenizer),
    }
    cells: dict[str, dict[str, Any]] = {}
    for name, make in systems.items():
        cells[name] = _measured(make(), tasks, OWN.get(name))
        report(f"{name}: " + ", ".join(f"{task} {_figures(cells[name], tasks, task).bits:.3f}" for task in tasks))
    result = {
        "experiment": "several",
        "seed": seed,
        "preset": dataclasses.asdict(preset),
        "trained": second.get_nb_trainable_parameters()[0],
        "rows": {name: _row(name, cells, tasks) for name in cells},
        **origin(command),
    }
    for path, text in ((folder / "several.json", to_json(result) + "\n"), (folder / "several.md", markdown(result))):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_result(path, text)
        report(f"wrote {path}")
    return result


def _knowing(
    pair: Pair, first: calmlm.CalmForCausalLM, small: Any, known: list[Item], world: World, preset: Preset, seed: int
) -> calmlm.CalmForCausalLM:
    """The anchor and the specialist, with a pointer that is trained on some of the facts and plain English."""
    torch.manual_seed(seed)
    model = calmlm.compose(
        first.anchor, {AUGMENTING: small.to(pair.anchor.dtype)}, connections="none", words="pointer",
        tokenizer=pair.tokenizer, augmenting_tokenizer={AUGMENTING: pair.tokenizer},
    )  # fmt: skip
    plain = [item for item in world.composition() if not item.prompt]
    lines = [*plain, *(Item("", text, "", 0) for text in world.lines(preset.plain))][: preset.plain]
    rows = rows_of([*known[: preset.shown], *lines], pair.tokenizer)
    wanted = preset.training.steps * preset.training.batch_size
    rows = (rows * math.ceil(wanted / len(rows)))[:wanted]
    generator = torch.Generator().manual_seed(seed)
    rows = [dict(rows[index]) for index in torch.randperm(len(rows), generator=generator).tolist()]
    fit(model, rows, pad_id(pair.tokenizer), preset.training, seed)
    return model


def _both(first: calmlm.CalmForCausalLM, second: calmlm.CalmForCausalLM) -> calmlm.CalmForCausalLM:
    first.add_augmenting(VARIETY, second)
    return first


def _read_first(model: calmlm.CalmForCausalLM, pair: Pair) -> str:
    """What the composition's m_A reads before each text."""
    return pair.augmenting_tokenizer.decode(model.config.augmenting[AUGMENTING].get("prefix") or [])


def _measured(system: Any, tasks: dict[str, list[Item]], own: str | None) -> dict[str, Any]:
    """Nats of each item of each task, those of its ``own`` task with another prompt for m_A as well, and how many
    numbers are right."""
    found: dict[str, Any] = {task: system.nats(items) for task, items in tasks.items()}
    found["swapped"] = system.nats(tasks[own], swapped=True) if own else None
    said = [first_line_of(text) for text in system.write(tasks["facts"], 8)]
    found["right"] = sum(text.startswith(item.target) for text, item in zip(said, tasks["facts"], strict=True))
    return found


def _figures(cell: dict[str, Any], tasks: dict[str, list[Item]], task: str, measure: str | None = None) -> Figures:
    """Sentences are added up over the varieties they are asked in."""
    numbers = sorted({item.sentence for item in tasks[task]})
    nats, sizes = (dict.fromkeys(numbers, 0.0) for _ in range(2))
    for item, value in zip(tasks[task], cell[measure or task], strict=True):
        nats[item.sentence] += value
        sizes[item.sentence] += item.size
    return Figures(
        torch.tensor([list(nats.values())], dtype=torch.float64),
        torch.tensor(list(sizes.values()), dtype=torch.float64),
    )


def _row(name: str, cells: dict[str, dict[str, Any]], tasks: dict[str, list[Item]]) -> dict[str, Any]:
    """Bits per byte in each task, the difference to m_B, and for both at once that to each task's own composition."""
    cell = cells[name]
    row: dict[str, Any] = {"right": cell["right"] / len(tasks["facts"])}
    for task in tasks:
        figures = _figures(cell, tasks, task)
        row[task] = bits_of(figures)
        row[f"{task}_against_m_B"] = difference(figures, _figures(cells["m_B"], tasks, task))
    if name in OWN:
        task = OWN[name]
        row["gain"] = difference(_figures(cell, tasks, task, "swapped"), _figures(cell, tasks, task))
    if name == "both":
        for own, task in OWN.items():
            row[f"{task}_against_own"] = difference(_figures(cell, tasks, task), _figures(cells[own], tasks, task))
    return {key: vars(value) if isinstance(value, Estimate) else value for key, value in row.items()}


TITLES = {
    "m_B": "m_B: SmolLM2-135M-Instruct",
    "reads": "m_A: Gemma 3 270M, with its examples",
    "learned": "m_A': knows extensions alone",
    "translates": "m_B and m_A",
    "knows": "m_B and m_A'",
    "both": "m_B, m_A and m_A', nothing trained",
}


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    rows, preset = result["rows"], result["preset"]

    def told(row: dict[str, Any], key: str, form: str = ".3f") -> str:
        return shown(Estimate(**row[key]) if row.get(key) else None, form)

    lines = [
        "# Several augmenting models at once",
        "",
        f"One composition translates (m_B and m_A), one knows telephone extensions (m_B and m_A', a Llama of "
        f"{preset['specialist']['layers']} layers that learned {preset['facts']} of them on the spot and nothing "
        f"else). Both were trained apart; the second with a pointer, {result['trained']:,} numbers, "
        f"{preset['shown']} extensions and {preset['plain']} lines of English. Then the second was joined to the "
        f"first. Bits per byte of the answer: of English behind sentences in the five varieties whose examples m_A "
        f"reads, of extensions that no D_C shows, of plain English; with 95 % intervals over sentences. *Right*: "
        f"extensions that are written without a fault. *Gain*: in its own task, with another prompt for its augmenting "
        f"model, minus right.",
        "",
        "| | translation | extensions | right | English | gain |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {TITLES[name]} | {' | '.join(told(row, task) for task in ('translation', 'facts'))} | "
        f"{100 * row['right']:.0f} % | {told(row, 'english')} | {told(row, 'gain')} |"
        for name, row in rows.items()
    ]
    both = rows["both"]
    lines += [
        "",
        f"Both at once, against the composition of the task alone: translation "
        f"{told(both, 'translation_against_own', '+.3f')}, extensions {told(both, 'facts_against_own', '+.3f')} bits "
        f"per byte; plain English against m_B {told(both, 'english_against_m_B', '+.3f')}.",
        "",
        f"Made by `{result['command']}` at commit {result['commit'][:7]}, seed {result['seed']}.",
        "",
    ]
    return "\n".join(lines)
