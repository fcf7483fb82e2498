"""Running the experiment: every seed's stages in order, each stored when it is done and never repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import calmlm
from calmlm.errors import ConfigError
from calmlm.experiments.kv_arithmetic.bases import new_model, train_anchor, train_augmenting
from calmlm.experiments.kv_arithmetic.composition import VARIANTS, train_composition
from calmlm.experiments.kv_arithmetic.evaluate import cascade, columns, models, score
from calmlm.experiments.kv_arithmetic.presets import PRESETS, Preset, Stage
from calmlm.experiments.kv_arithmetic.report import INTERVAL, summarise, write_report
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.kv_arithmetic.words import NUMBER_WORDS
from calmlm.experiments.kv_arithmetic.world import DC_PHRASINGS, HARD_PHRASINGS, OOD_PHRASINGS, PHRASINGS, World
from calmlm.storage import write_text

__all__ = ["get_preset", "run", "run_seed"]

_BASES = ("augmenting", "anchor")
_DONE = "stage.json"


def get_preset(name: str, max_steps: int | None = None, items: int | None = None) -> Preset:
    """Return a preset; ``max_steps`` cuts every training, and its batches to 16 rows, ``items`` cuts every column.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"The preset must be one of {', '.join(PRESETS)}, but got {name!r}: choose one of these.")
    preset = PRESETS[name]
    if max_steps is not None:
        cut: dict[str, Any] = {}
        for stage_name in ("augmenting", "anchor", "composition"):
            stage: Stage = getattr(preset, stage_name)
            cut[stage_name] = dataclasses.replace(
                stage, steps=min(max_steps, stage.steps), batch_size=min(16, stage.batch_size)
            )
        preset = dataclasses.replace(preset, **cut)
    return dataclasses.replace(preset, items=items) if items is not None else preset


class _Seed:
    """One seed's folder: its models and what each stage cost."""

    def __init__(self, preset: Preset, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        self.world = World(preset, seed)
        mark = hashlib.sha256(json.dumps(dataclasses.asdict(preset)).encode()).hexdigest()[:8]
        self.folder = cache / f"{preset.name}-{mark}" / f"seed-{seed}"
        self.report = report
        self.tokenizer: PreTrainedTokenizerBase = build_tokenizer(preset.largest_integer)
        # Longest answer: per operand two signs, a number and a total; beyond 9 each digit may be a token of its own.
        count = preset.operands[1] + 1
        largest = preset.highest**count if "×" in preset.operators else preset.highest * count
        digits = (1, 1) if preset.largest_integer > 9 else (len(str(preset.highest)), 1 + len(str(largest)))
        self.max_new_tokens = count * (2 + sum(digits)) + 2

    def stage(self, name: str, work: Callable[[], tuple[PreTrainedModel | None, dict[str, Any]]]) -> dict[str, Any]:
        """Do a stage unless it is stored; return its record. The record is written last, so a stored one is whole."""
        folder = self.folder / name
        done = folder / _DONE
        if done.is_file():
            self.report(f"seed {self.world.seed}: {name} is stored in {folder}")
            return json.loads(done.read_text(encoding="utf-8"))
        self.report(f"seed {self.world.seed}: {name} ...")
        start = time.perf_counter()
        model, record = work()
        record["seconds"] = round(time.perf_counter() - start, 1)
        if model is not None:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        write_text(done, json.dumps(record, indent=2))
        self.report(f"seed {self.world.seed}: {name} took {record['seconds']:.0f} s")
        return record

    def base(self, name: str) -> LlamaForCausalLM:
        """Load a stored base model."""
        model = LlamaForCausalLM.from_pretrained(self.folder / name)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def random_augmenting(self) -> LlamaForCausalLM:
        """Return m_A of the control, untrained."""
        return new_model(self.tokenizer, self.world.preset.augmenting_size, 1000 + self.world.seed)


def _train_bases(seed: _Seed) -> dict[str, float]:
    seconds = {}
    for name, train in zip(_BASES, (train_augmenting, train_anchor), strict=True):

        def work(train: Callable[..., Any] = train) -> tuple[PreTrainedModel, dict[str, Any]]:
            model, losses = train(seed.world, seed.tokenizer)
            return model, {"losses": losses, "parameters": model.num_parameters()}

        seconds[name] = seed.stage(name, work)["seconds"]
    seed.stage("random", lambda: (seed.random_augmenting(), {}))
    return seconds


def run_seed(preset: Preset, seed: int, cache: Path, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all stages of one seed; return its scores, wall-clock and parameter counts."""
    here = _Seed(preset, seed, cache, report)
    seconds = _train_bases(here)
    items = columns(here.world)
    look_up, calculate = (models(here.base(name), here.tokenizer, here.max_new_tokens) for name in _BASES)
    methods = {"m_A": look_up, "m_B": calculate, "cascade": cascade(look_up, calculate)}

    def evaluate_bases() -> tuple[None, dict[str, Any]]:
        return None, {"scores": {name: score(method, items) for name, method in methods.items()}}

    record = here.stage("evaluation", evaluate_bases)
    scores, seconds["evaluation"] = record["scores"], record["seconds"]
    added = 0
    for variant in VARIANTS:

        def work(variant: str = variant) -> tuple[PreTrainedModel, dict[str, Any]]:
            augmenting = here.base("random" if variant == "composed_random" else "augmenting")
            model, losses = train_composition(here.world, here.tokenizer, here.base("anchor"), augmenting, variant)
            shares = score(models(model, here.tokenizer, here.max_new_tokens), items)
            return model, {"losses": losses, "scores": shares, "parameters": model.get_nb_trainable_parameters()[0]}

        record = here.stage(variant, work)
        scores[variant], seconds[variant], added = record["scores"], record["seconds"], record["parameters"]
    sizes = {name: json.loads((here.folder / name / _DONE).read_text())["parameters"] for name in _BASES}
    parameters = {"m_A": sizes["augmenting"], "m_B": sizes["anchor"], "added": added}
    return {"scores": scores, "seconds": seconds, "parameters": parameters, "folder": str(here.folder)}


def run(
    preset: str = "small",
    seeds: Sequence[int] = (0, 1, 2),
    output: str | Path = "experiments/kv_arithmetic/results",
    cache: str | Path = "runs/kv_arithmetic",
    *,
    max_steps: int | None = None,
    items: int | None = None,
    command: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the experiment and write its report.

    Args:
        preset: ``tiny``, ``small`` or ``paper``.
        seeds: each seed has its own keys, models and items.
        output: folder of the report: ``<preset>.json``, ``<preset>.md`` and a plot.
        cache: folder of finished stages; a stage that is found there is not repeated.
        max_steps: upper limit for the steps of each training, for a trial; batches are cut to 16 rows then.
        items: evaluation items per column, instead of the preset's.
        command: the command that the report names as its origin.
        report: called with each line of progress.

    Returns:
        what the JSON file holds.

    Raises:
        ConfigError: for an unknown preset or no seeds.
    """
    chosen = get_preset(preset, max_steps, items)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"At least one seed is needed and each once, but got {list(seeds)}: write for example 0,1,2.")
    outcomes = {seed: run_seed(chosen, seed, Path(cache), report) for seed in seeds}
    first = outcomes[seeds[0]]
    result = {
        "experiment": "kv_arithmetic",
        "preset": chosen.name,
        "seeds": list(seeds),
        "rows": summarise({seed: outcome["scores"] for seed, outcome in outcomes.items()}, chosen.items),
        "interval": INTERVAL,
        "items_per_column": chosen.items,
        "settings": dataclasses.asdict(chosen),
        "parameters": first["parameters"],
        "seconds": {
            stage: round(sum(o["seconds"][stage] for o in outcomes.values()) / len(outcomes), 1)
            for stage in first["seconds"]
        },
        "seconds_per_seed": {str(seed): outcome["seconds"] for seed, outcome in outcomes.items()},
        "footer": footer(chosen),
        "versions": {
            "calmlm": calmlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": _commit(),
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": _machine(),
    }
    for path in write_report(result, Path(output)):
        report(f"wrote {path}")
    return result


def footer(preset: Preset) -> str:
    """Say what the bases and the composition were trained on, and how the columns are drawn."""
    low, high = preset.operands
    some, most = preset.anchor_operands
    languages = ", ".join(NUMBER_WORDS)
    return (
        f"**What the models have seen.** m_A: {preset.keys:,} keys (2 to 6 letters) with values 1 to {preset.highest}, "
        f"as rows of keys each with its value (behind the key, or behind the sign that follows it), bare, among other "
        f"words and inside the phrasings below, and as KV-SUBS over all keys (`ab + cd ->` gives `10 + 22`); never a "
        f"sum. m_B: arithmetic ({' '.join(preset.operators)}) over {some} to {most} numbers in all {len(PHRASINGS)} "
        f"phrasings, numbers in figures or as words of {len(NUMBER_WORDS)} languages ({languages}) and of "
        f"{preset.languages} invented ones, with random words before or after some; it answers step by step "
        f"(`12 + 5 = 17 - 3 = 14`) and restates expressions in figures; never a key with its value. "
        f"D_C: {100 * preset.composition_share:.0f} % of the keys, {preset.composition_operands[0]} to "
        f"{preset.composition_operands[1]} operands; keys arithmetic in the phrasings {', '.join(DC_PHRASINGS)} with "
        f"{100 * preset.figure_share:.0f} % of operands in figures and {100 * preset.restated_share:.0f} % of the "
        f"expressions restated only, or KV-SUBS alone; either with {100 * preset.numeric_share:.0f} % numeric "
        f"arithmetic and restating. **Columns.** Key-Value: KV-SUBS; Numeric: figures in D_C's phrasings; Keys "
        f"arithmetic: D_C's phrasings; OOD: the phrasings {', '.join(OOD_PHRASINGS)}; OOD-hard: the phrasing "
        f"{', '.join(HARD_PHRASINGS)} with {high + 1} operands, the other columns {low} to {high}. Keys are outside "
        f"D_C except in the last column; {preset.items} items per column and seed. {INTERVAL}"
    )


def _commit() -> str:
    try:
        here = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
