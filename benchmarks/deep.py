"""Trained models for `decode.py`: a deep anchor, and an augmenting model of a quarter of its layers that knows keys.

    python benchmarks/deep.py runs/decode        # trains what is not there yet: about 25 minutes on one core

They know what the models of `calmlm repro kv-arithmetic` know, with longer expressions: the augmenting model restates
expressions over keys in figures, the anchor calculates, and the composition learns both from a fifth of the keys.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import calmlm
from calmlm.experiments.fitting import Stage, fit
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.pretraining import new_model
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.kv_arithmetic.world import DC_PHRASINGS, Example, World
from calmlm.experiments.record import Stages, device

__all__ = ["TASKS", "deep_models"]

PRESET = dataclasses.replace(
    PRESETS["small"],
    name="deep",
    keys=1000,
    operands=(5, 5),
    anchor_operands=(1, 3),
    augmenting_size=(96, 4, 4),
    anchor_size=(96, 16, 4),
    augmenting=Stage(4000, 40, 4e-3, 0.2),
    anchor=Stage(1300, 48, 2e-3),
    composition=Stage(1000, 48, 4e-3, 0.1),
    connections=((3, 1), (3, 15)),
)
LENGTHS = (2, 5)
TASKS = {"known": 9, "combined": 12}
"""Tokens that are written: an expression over five keys restated; one over three keys restated and calculated."""
PROMPTS = 8
SEED = 0


def _draw(world: World, name: str) -> list[Example]:
    stage: Stage = getattr(world.preset, name)
    rng, count = world.rng(name), stage.steps * stage.batch_size
    examples = []
    for index in range(count):
        draw = rng.random()
        if name == "anchor":
            examples.append(world.general(rng, index / count))
        elif name == "augmenting":
            known = index > 0.4 * count and draw < 0.5
            examples.append(world.substitution(rng, world.keys, LENGTHS) if known else world.row(rng))
        elif draw < 0.2:
            examples.append(world.numeric(rng, DC_PHRASINGS, (2, 3)))
        elif draw < 0.7:
            examples.append(world.substitution(rng, world.composition_keys, LENGTHS))
        else:
            examples.append(world.arithmetic(rng, world.composition_keys, DC_PHRASINGS, (2, 3)))
    return examples


def deep_models(folder: Path, task: str) -> tuple[calmlm.CalmForCausalLM, Any, Any, list[Tensor], int]:
    """The composition, the anchor and the augmenting model, trained once; prompts; how many tokens answer one.

    Args:
        folder: where they lie, or go.
        task: ``known``: what the augmenting model knows; ``combined``: what takes both models.
    """
    world, tokenizer = World(PRESET, SEED), build_tokenizer(PRESET.largest_integer)
    stages = Stages(folder / PRESET.name, "deep", lambda line: print(line, file=sys.stderr, flush=True))

    def train(name: str) -> tuple[Any, dict[str, Any]]:
        if name == "composition":
            # The early connection tells the values of keys, the late one what the augmenting model writes next.
            usual: dict[str, Any] = {"rotary": True, "query_key_bias": 1.5, "null_key": True}
            pair, connections = (load("anchor"), load("augmenting")), list(PRESET.connections)
            model = calmlm.compose(*pair, connections, num_heads=PRESET.heads, **usual)
        else:
            size = PRESET.anchor_size if name == "anchor" else PRESET.augmenting_size
            model = new_model(tokenizer, size, SEED + (name == "anchor"))
        rows = encode(_draw(world, name), tokenizer)
        return model, {"losses": fit(model, rows, tokenizer.pad_token_id, getattr(PRESET, name), SEED)}

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(stages.folder / name).to(device()).eval()

    for name in ("augmenting", "anchor", "composition"):
        stages.do(name, partial(train, name), tokenizer)
    anchor, augmenting = load("anchor"), load("augmenting")
    composition = calmlm.CalmForCausalLM.from_pretrained(
        stages.folder / "composition", anchor=load("anchor"), augmenting=load("augmenting")
    )
    rng = world.rng(f"prompts-{task}")

    drawn = [
        world.substitution(rng, world.unseen_keys, (5, 5))
        if task == "known"
        else world.arithmetic(rng, world.unseen_keys, DC_PHRASINGS, (3, 3))
        for _ in range(PROMPTS)
    ]
    prompts = [torch.tensor([tokenizer(example.prompt).input_ids], device=device()) for example in drawn]
    return composition.to(device()).eval(), anchor, augmenting, prompts, TASKS[task]


if __name__ == "__main__":
    deep_models(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/decode"), "known")
