"""Running the experiment: every seed's stages in order, each stored when it is done and never repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import calmlm
from calmlm.errors import ConfigError
from calmlm.experiments.fitting import check_seeds, preset_of
from calmlm.experiments.kv_arithmetic.joined import CORE, GROUPS, VARIANTS, train_composition
from calmlm.experiments.kv_arithmetic.measures import Answerer, cascade, columns, half_columns, models, score
from calmlm.experiments.kv_arithmetic.presets import PRESETS, Preset
from calmlm.experiments.kv_arithmetic.pretraining import BASES, TOKENIZERS
from calmlm.experiments.kv_arithmetic.report import summarise, summarise_halves, write_report
from calmlm.experiments.kv_arithmetic.words import NUMBER_WORDS
from calmlm.experiments.kv_arithmetic.world import (
    DC_PHRASINGS,
    HARD_PHRASINGS,
    OOD_PHRASINGS,
    PHRASINGS,
    Example,
    World,
)
from calmlm.experiments.record import Stages, device, origin
from calmlm.experiments.statistics import INTERVAL
from calmlm.files.storage import check_writable

__all__ = ["SeedRun", "run", "run_seed"]


class SeedRun:
    """One seed's folder: its models and what each stage cost."""

    def __init__(self, preset: Preset, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        self.world = World(preset, seed)
        mark = hashlib.sha256(json.dumps(dataclasses.asdict(preset)).encode()).hexdigest()[:8]
        self.folder = cache / f"{preset.name}-{mark}" / f"seed-{seed}"
        self.stages = Stages(self.folder, f"seed {seed}", report)
        # Longest answer: per operand two signs, a number and a total; beyond 9 each digit may be a token of its own.
        count = preset.operands[1] + 1
        largest = preset.highest**count if "×" in preset.operators else preset.highest * count
        digits = (1, 1) if preset.largest_integer > 9 else (len(str(preset.highest)), 1 + len(str(largest)))
        self.max_new_tokens = count * (2 + sum(digits)) + 2
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def tokenizer(self, base: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a base model."""
        kind = BASES[base][0]
        if kind not in self._tokenizers:
            self._tokenizers[kind] = TOKENIZERS[kind](self.world)
        return self._tokenizers[kind]

    def train(self, name: str) -> dict[str, Any]:
        """Train and store a base model."""
        tokenizer = self.tokenizer(name)

        def work() -> tuple[PreTrainedModel, dict[str, Any]]:
            model, losses = BASES[name][1](self.world, tokenizer)
            return model, {"losses": losses, "parameters": model.num_parameters()}

        return self.stages.do(name, work, tokenizer)

    def base(self, name: str) -> LlamaForCausalLM:
        """Load a stored base model."""
        model = LlamaForCausalLM.from_pretrained(self.folder / name)
        return model.to(device()).eval()

    def answerer(self, name: str) -> Answerer:
        """A stored base model that completes prompts."""
        return models(self.base(name), self.tokenizer(name), self.max_new_tokens)

    def compose(self, name: str, items: dict[str, list[Example]]) -> dict[str, Any]:
        """Train, store and evaluate a composition."""
        variant = VARIANTS[name]
        tokenizer, other = self.tokenizer(variant.anchor), self.tokenizer(variant.augmenting)

        def work() -> tuple[PreTrainedModel, dict[str, Any]]:
            anchor, augmenting = self.base(variant.anchor), self.base(variant.augmenting)
            apart = None if other is tokenizer else other
            model, losses = train_composition(self.world, tokenizer, anchor, augmenting, name, apart)
            shares = score(models(model, tokenizer, self.max_new_tokens), items)
            return model, {"losses": losses, "scores": shares, "parameters": model.get_nb_trainable_parameters()[0]}

        return self.stages.do(name, work, tokenizer)


def run_seed(
    preset: Preset,
    seed: int,
    cache: Path,
    report: Callable[[str], None] = print,
    variants: Sequence[str] | None = None,
    stored_only: bool = False,
) -> dict[str, Any]:
    """Run the stages of one seed; return its scores, wall-clock and parameter counts.

    Args:
        preset: sizes and lengths.
        seed: draws keys, models and items.
        cache: folder of finished stages.
        report: called with each line of progress.
        variants: which compositions to train; the paper's by default.
        stored_only: leave out compositions that are not stored, instead of training them.

    Raises:
        ConfigError: nothing of this seed is stored, though it should be.
    """
    here = SeedRun(preset, seed, cache, report)
    chosen = list(CORE) if variants is None else list(variants)
    if stored_only:
        if not all(here.stages.has(name) for name in ("augmenting", "anchor")):
            raise ConfigError(
                f"Expected the models of seed {seed} in {here.folder}, but they are not stored: name seeds that are "
                f"with --seeds, or run it without --stored-only first."
            )
        made_of = {name: (name, VARIANTS[name].augmenting, VARIANTS[name].anchor) for name in chosen}
        chosen = [name for name in chosen if all(map(here.stages.has, made_of[name]))]
    needed = {
        "augmenting",
        "anchor",
        *(b for name in chosen for b in (VARIANTS[name].augmenting, VARIANTS[name].anchor)),
    }
    records = {name: here.train(name) for name in BASES if name in needed}
    items, halves = columns(here.world), half_columns(here.world)
    look_up, calculate = here.answerer("augmenting"), here.answerer("anchor")
    methods = {"m_A": look_up, "m_B": calculate, "cascade": cascade(look_up, calculate)}

    def evaluate(named: dict[str, Answerer]) -> tuple[None, dict[str, Any]]:
        return None, {"scores": {name: score(method, items) for name, method in named.items()}}

    records["evaluation"] = here.stages.do("evaluation", lambda: evaluate(methods))
    scores = dict(records["evaluation"]["scores"])
    if "two_tokenizers" in chosen:
        apart = {"m_A_characters": "augmenting_characters", "m_B_bpe": "anchor_bpe"}
        records["evaluation_tokenizers"] = here.stages.do(
            "evaluation_tokenizers", lambda: evaluate({name: here.answerer(base) for name, base in apart.items()})
        )
        scores |= records["evaluation_tokenizers"]["scores"]
    for name in chosen:
        half = VARIANTS[name].half is not None
        records[name] = here.compose(name, halves if half else items)
        if not half:
            scores[name] = records[name]["scores"]
    parameters = {"m_A": records["augmenting"]["parameters"], "m_B": records["anchor"]["parameters"]}
    if "composed" in chosen:
        parameters["added"] = records["composed"]["parameters"]
    outcome: dict[str, Any] = {"scores": scores, "parameters": parameters, "folder": str(here.folder)}
    if {"first_half", "second_half"} <= set(chosen):
        records["halves"] = here.stages.do("halves", lambda: (None, _join_halves(here, halves)))
        outcome["halves"] = {name: records[name]["scores"] for name in ("first_half", "second_half")}
        outcome["halves"]["joined"] = records["halves"]["scores"]
        outcome["restored"] = records["halves"]["restored"]
    outcome["commits"] = sorted({record["commit"] for record in records.values()})
    return outcome | {"seconds": {name: record["seconds"] for name, record in records.items() if name != "random"}}


def _join_halves(here: SeedRun, items: dict[str, list[Example]]) -> dict[str, Any]:
    """Join two compositions that were trained apart, without training; then take the second out again."""
    where = device()
    tokenizer = here.tokenizer("anchor")
    first, second = (
        calmlm.CalmForCausalLM.from_pretrained(here.folder / name, anchor=here.base("anchor")).to(where)
        for name in ("first_half", "second_half")
    )
    prompts = [example.prompt for example in items["second"][:8]]
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(where)
    with torch.no_grad():
        before = first(**batch).logits
        first.add_augmenting("second", second)
        shares = score(models(first, tokenizer, here.max_new_tokens), items)
        joined = first(**batch).logits
        first.remove_augmenting("second")
        after = first(**batch).logits
    restored = bool(torch.equal(before, after)) and not bool(torch.equal(before, joined))
    return {"scores": shares, "restored": restored}


def run(
    preset: str = "small",
    seeds: Sequence[int] = (0, 1, 2),
    output: str | Path = "experiments/kv_arithmetic/results",
    cache: str | Path = "runs/kv_arithmetic",
    *,
    max_steps: int | None = None,
    items: int | None = None,
    also: Sequence[str] = (),
    stored_only: bool = False,
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
        also: groups of compositions beyond the paper's: ``connectors``, ``tokenizers``, ``halves``.
        stored_only: report on the compositions that are stored and train no others.
        command: the command that the report names as its origin.
        report: called with each line of progress.

    Returns:
        what the JSON file holds.

    Raises:
        ConfigError: for an unknown preset or group, no seeds or seeds that are not stored, or an output that cannot be
            written to.
    """
    unknown = sorted(set(also) - set(GROUPS))
    if unknown:
        raise ConfigError(
            f"Further compositions must be among {', '.join(GROUPS)}, but got {', '.join(unknown)}: choose from these."
        )
    variants = [*CORE, *(name for group in GROUPS if group in also for name in GROUPS[group])]
    chosen = preset_of(PRESETS, preset, max_steps, items)
    check_seeds(seeds)
    check_writable(Path(output) / f"{chosen.name}.json")
    outcomes = {seed: run_seed(chosen, seed, Path(cache), report, variants, stored_only) for seed in seeds}
    first = outcomes[seeds[0]]
    result = {
        "experiment": "kv_arithmetic",
        "preset": chosen.name,
        "seeds": list(seeds),
        "rows": summarise({seed: outcome["scores"] for seed, outcome in outcomes.items()}, chosen.items),
        "halves": summarise_halves({seed: o["halves"] for seed, o in outcomes.items() if "halves" in o}, chosen.items),
        "restored": all(outcome.get("restored", True) for outcome in outcomes.values()),
        "interval": INTERVAL,
        "items_per_column": chosen.items,
        "settings": dataclasses.asdict(chosen),
        "parameters": first["parameters"],
        "seconds": {
            stage: round(statistics.mean(o["seconds"][stage] for o in outcomes.values() if stage in o["seconds"]), 1)
            for stage in dict.fromkeys(stage for o in outcomes.values() for stage in o["seconds"])
        },
        "commits": sorted({commit for outcome in outcomes.values() for commit in outcome["commits"]}),
        "seconds_per_seed": {str(seed): outcome["seconds"] for seed, outcome in outcomes.items()},
        "footer": footer(chosen),
        **origin(command),
    }
    for path in write_report(result, Path(output), report):
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
        f"arithmetic and restating. {_further(preset)} "
        f"**Columns.** Key-Value: KV-SUBS; Numeric: figures in D_C's phrasings; Keys "
        f"arithmetic: D_C's phrasings; OOD: the phrasings {', '.join(OOD_PHRASINGS)}; OOD-hard: the phrasing "
        f"{', '.join(HARD_PHRASINGS)} with {high + 1} operands, the other columns {low} to {high}. Keys are outside "
        f"D_C except in the last column; {preset.items} items per column and seed. {INTERVAL}"
    )


def _further(preset: Preset) -> str:
    """What the compositions beyond the paper's differ in."""
    return (
        f"The m_A of single characters begins with {preset.first_keys} keys, and their number doubles with each 6 % of "
        f"its training; the m_B of byte pairs is trained as m_B for {preset.pieces.steps} steps instead of "
        f"{preset.anchor.steps}, and their composition for {preset.apart.steps} steps instead of "
        f"{preset.composition.steps} with a weight decay of {preset.apart.weight_decay} instead of "
        f"{preset.composition.weight_decay}, with {VARIANTS['two_tokenizers'].heads} heads instead of {preset.heads}. "
        f"Halves: each m_A learns its keys "
        f"and that other words have no value; {100 * preset.unanswerable_share:.0f} % of its D_C are questions about "
        f"words that nobody knows, with m_B's own answers, and {100 * preset.foreign_share:.0f} % of other operands "
        f"are number words."
    )
