"""Running visual arithmetic: every seed's stages in order, each stored when it is done and never repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel, ViTForImageClassification

from calmlm.experiments.fitting import check_seeds, preset_of
from calmlm.experiments.record import Stages, device, origin
from calmlm.experiments.statistics import INTERVAL, rows_of
from calmlm.experiments.visual_arithmetic.joined import VARIANTS, train_composition
from calmlm.experiments.visual_arithmetic.measures import (
    COLUMNS,
    columns,
    composition,
    pipeline,
    recognised,
    score,
    text_model,
)
from calmlm.experiments.visual_arithmetic.presets import PRESETS, Preset
from calmlm.experiments.visual_arithmetic.pretraining import (
    build_visual_tokenizer,
    new_encoder,
    train_anchor,
    train_encoder,
)
from calmlm.experiments.visual_arithmetic.report import METHODS, write_report
from calmlm.experiments.visual_arithmetic.world import DC_PHRASINGS, HARD_PHRASINGS, OOD_PHRASINGS, World
from calmlm.files.storage import check_writable

__all__ = ["run", "run_seed"]


def run_seed(preset: Preset, seed: int, cache: Path, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all stages of one seed; return its scores, wall-clock, parameter counts and commits."""
    world, tokenizer = World(preset, seed), build_visual_tokenizer()
    mark = hashlib.sha256(json.dumps(dataclasses.asdict(preset)).encode()).hexdigest()[:8]
    folder = cache / f"{preset.name}-{mark}" / f"seed-{seed}"
    stages = Stages(folder, f"seed {seed}", report)

    def stored(trained: tuple[PreTrainedModel, list[tuple[int, float]]]) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, losses = trained
        return model, {"losses": losses, "parameters": model.num_parameters()}

    records = {
        "encoder": stages.do("encoder", lambda: stored(train_encoder(world))),
        "anchor": stages.do("anchor", lambda: stored(train_anchor(world, tokenizer)), tokenizer),
        "random": stages.do("random", lambda: stored((new_encoder(world, 1000 + seed), []))),
    }
    items = columns(world)
    anchor = LlamaForCausalLM.from_pretrained(folder / "anchor").to(device()).eval()
    encoder = ViTForImageClassification.from_pretrained(folder / "encoder").to(device()).eval()

    def evaluate_bases() -> tuple[None, dict[str, Any]]:
        calculate = text_model(anchor, tokenizer)
        seen = recognised(encoder, world, [example.pictures[0] for example in items["naming"]])
        right = sum(str(digit) == example.completion for digit, example in zip(seen, items["naming"], strict=True))
        scores = {
            # Alone it gives a class and writes no text: there is nothing to score in the other columns.
            "m_A": {"naming": 100.0 * right / len(items["naming"])},
            "m_B": score(calculate, items),
            "pipeline": score(pipeline(encoder, calculate, world), items),
        }
        return None, {"scores": scores}

    records["evaluation"] = stages.do("evaluation", evaluate_bases)
    scores = dict(records["evaluation"]["scores"])
    for name, variant in VARIANTS.items():

        def work(name: str = name, source: str = variant.encoder) -> tuple[PreTrainedModel, dict[str, Any]]:
            eyes = ViTForImageClassification.from_pretrained(folder / source).to(device()).eval()
            model, losses = train_composition(world, tokenizer, anchor, eyes, name)
            shares = score(composition(model, tokenizer, world), items)
            return model, {"losses": losses, "scores": shares, "parameters": model.get_nb_trainable_parameters()[0]}

        records[name] = stages.do(name, work, tokenizer)
        scores[name] = records[name]["scores"]
    return {
        "scores": scores,
        "seconds": {name: record["seconds"] for name, record in records.items() if name != "random"},
        "parameters": {name: record["parameters"] for name, record in records.items() if "parameters" in record},
        "commits": sorted({record["commit"] for record in records.values()}),
    }


def run(
    preset: str = "small",
    seeds: Sequence[int] = (0, 1, 2),
    output: str | Path = "experiments/visual_arithmetic/results",
    cache: str | Path = "runs/visual_arithmetic",
    *,
    max_steps: int | None = None,
    items: int | None = None,
    command: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the experiment and write its report.

    Args:
        preset: ``tiny`` or ``small``.
        seeds: each seed has its own models, pictures and items.
        output: folder of the report: ``<preset>.json`` and ``<preset>.md``.
        cache: folder of finished stages; a stage that is found there is not repeated.
        max_steps: upper limit for the steps of each training, for a trial; batches are cut to 16 rows then.
        items: evaluation items per column, instead of the preset's.
        command: the command that the report names as its origin.
        report: called with each line of progress.

    Returns:
        what the JSON file holds.

    Raises:
        ConfigError: for an unknown preset, no seeds, or an output that cannot be written to.
        MissingExtraError: without scikit-learn.
    """
    chosen = preset_of(PRESETS, preset, max_steps, items)
    check_seeds(seeds)
    check_writable(Path(output) / f"{chosen.name}.json")
    outcomes = {seed: run_seed(chosen, seed, Path(cache), report) for seed in seeds}
    scores = {seed: outcome["scores"] for seed, outcome in outcomes.items()}
    result = {
        "experiment": "visual_arithmetic",
        "preset": chosen.name,
        "seeds": list(seeds),
        "rows": rows_of(scores, chosen.items, METHODS, COLUMNS),
        "interval": INTERVAL,
        "items_per_column": chosen.items,
        "settings": dataclasses.asdict(chosen),
        "parameters": outcomes[seeds[0]]["parameters"],
        "seconds_per_seed": {str(seed): outcome["seconds"] for seed, outcome in outcomes.items()},
        "footer": footer(chosen),
        "commits": sorted({commit for outcome in outcomes.values() for commit in outcome["commits"]}),
        **origin(command),
    }
    for path in write_report(result, Path(output)):
        report(f"wrote {path}")
    return result


def footer(preset: Preset) -> str:
    """Say what the models have seen, and how the columns are drawn."""
    phrasings = ", ".join([*DC_PHRASINGS, *OOD_PHRASINGS, *HARD_PHRASINGS])
    return (
        f"**What the models have seen.** m_A: a vision transformer, {100 * preset.training_share:.0f} % of the 1,797 "
        f"handwritten digits that scikit-learn ships, each with its class; never a sum. m_B: arithmetic (+ -) over 1 "
        f"to 3 numbers from 0 to 9, in figures or as number words, in the phrasings {phrasings}, with random words and "
        f"image tokens that mean nothing before some; never a picture. D_C: {100 * preset.composition_share:.0f} % of "
        f"m_A's pictures, {100 - preset.unseen_pairs} of the 100 ordered pairs of digits, a third operand in "
        f"{100 * preset.third_share:.0f} %, the phrasings {', '.join(DC_PHRASINGS)}; "
        f"{100 * preset.numeric_share:.0f} % numeric arithmetic, {100 * preset.naming_share:.0f} % naming, "
        f"{100 * preset.figure_share:.0f} % of other operands in figures. **Columns.** All pictures are outside every "
        f"training; {preset.items} items per column and seed; OOD: the phrasings {', '.join(OOD_PHRASINGS)}; OOD-hard: "
        f"the phrasing {', '.join(HARD_PHRASINGS)}. {INTERVAL}"
    )
