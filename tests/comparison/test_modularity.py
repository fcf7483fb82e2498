"""Can a system be taken out again after training? What the report says of it, shown."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from calmlm.baselines import BASELINES, Bases, Budget, Data
from calmlm.comparison.page import COLUMNS, REMOVABLE
from calmlm.experiments.fitting import Stage, fit
from calmlm.experiments.kv_arithmetic.joined import compose_bases
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.pretraining import new_model
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.kv_arithmetic.world import World

TOKENIZER = build_tokenizer(20)
PAD = TOKENIZER.pad_token_id
STAGE = Stage(3, 8, 1e-2)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    world = World(PRESETS["tiny"], 0)
    rng = world.rng("modularity")
    return encode([world.arithmetic(rng, world.keys, ["plain"]) for _ in range(24)], TOKENIZER)


@pytest.fixture
def bases() -> Bases:
    anchor, augmenting, twin = (
        new_model(TOKENIZER, (24, 3, 2), 0),
        new_model(TOKENIZER, (16, 4, 2), 1),
        new_model(TOKENIZER, (24, 3, 2), 2),
    )
    return Bases(anchor.eval(), augmenting.eval(), TOKENIZER, twin.eval())


@torch.no_grad()
def logits(model: Any, rows: list[dict[str, Any]]) -> Any:
    return model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits


def test_a_composition_goes_and_comes_back(bases: Bases, rows: list[dict[str, Any]]) -> None:
    before = logits(bases.anchor, rows)
    model = compose_bases(World(PRESETS["tiny"], 0), bases.anchor, bases.augmenting)
    fit(model, rows, PAD, STAGE, 0)
    trained = logits(model, rows)
    assert not torch.equal(trained, before)
    with model.disable_composition():
        assert torch.equal(logits(model, rows), before)
    assert torch.equal(logits(model, rows), trained)


def test_lora_goes_and_comes_back(bases: Bases, rows: list[dict[str, Any]]) -> None:
    from peft import LoraConfig, get_peft_model

    before = logits(bases.anchor, rows)
    model = copy.deepcopy(bases.anchor)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    fit(model, rows, PAD, STAGE, 0)
    assert not torch.equal(logits(adapted, rows), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, rows), before)


@pytest.mark.parametrize("name", ["fine_tuning", "moe"])
def test_trained_weights_are_gone(name: str, bases: Bases, rows: list[dict[str, Any]]) -> None:
    before = bases.anchor.state_dict()
    made = BASELINES[name](bases, Data(rows, rows, rows), Budget(STAGE, 0, 1000)).state_dict()
    shared = [key for key in before if key in made and before[key].shape == made[key].shape]
    assert any("self_attn" in key for key in shared)
    assert not all(torch.equal(before[key], made[key]) for key in shared)


@pytest.mark.parametrize("name", ["router", "text_tool"])
def test_models_that_stay_apart_are_untouched(name: str, bases: Bases, rows: list[dict[str, Any]]) -> None:
    made = BASELINES[name](bases, Data(rows, rows, rows), Budget(STAGE, 0, 1000))
    held = made.models[0] if name == "router" else made.anchor
    assert held is bases.anchor
    assert not any(parameter.grad is not None for parameter in bases.anchor.parameters())


def test_the_report_speaks_of_each() -> None:
    assert set(REMOVABLE) == set(COLUMNS.values())
