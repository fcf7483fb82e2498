"""Words of both kinds: behind a gate that is exactly 0 at the start, wherever a composition works."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import calmlm
from calmlm.connectors.gate import OPENING
from calmlm.errors import ConfigError, ModelError
from compositions import logits_of, pad
from equalities import (
    GENERATION,
    GREEDY,
    ROWS,
    assert_causal,
    assert_generates,
    assert_joins,
    assert_off_switch,
    assert_padding,
    assert_round_trip,
    assert_static_and_drafts,
    assert_steps,
)
from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer
from words import COMPOSITIONS, KINDS, speaking


@pytest.fixture(params=list(itertools.product(KINDS, COMPOSITIONS)), ids=": ".join, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return speaking(*request.param)


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_one_is_the_anchor_and_learns(kind: str, name: str) -> None:
    model = speaking(kind, name, awake=False)
    ids = tiny_tokens(2, 9)
    with model.disable_composition():
        alone = logits_of(model, ids)
    assert torch.equal(logits_of(model, ids), alone)
    words = model.model.connectors["augmenting"][-1]
    if kind == "map":
        assert not words.map.weight.requires_grad and float(words.map.weight.abs().max()) > 0
    loud = speaking(kind, name, awake=False)  # what the augmenting model would say, and so worth learning
    with torch.no_grad():
        loud.model.connectors["augmenting"][-1].opening.fill_(1 / OPENING)
        loud.model.connectors["augmenting"][-1].gate_bias.fill_(100.0)
    labels = torch.cat((ids[:, :1], logits_of(loud, ids).argmax(-1)[:, :-1]), dim=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(25):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        assert step or float(words.opening.grad) < 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), alone)


def test_off_switch(model: calmlm.CalmForCausalLM) -> None:
    assert_off_switch(model)


def test_steps_equal_teacher_forcing(model: calmlm.CalmForCausalLM) -> None:
    assert_steps(model)


def test_nothing_of_later_text_is_said(model: calmlm.CalmForCausalLM) -> None:
    assert_causal(model)


def test_padding_and_batches_change_nothing(model: calmlm.CalmForCausalLM) -> None:
    assert_padding(model)


@pytest.mark.parametrize("options", GENERATION)
def test_generation_equals_its_uncached_reference(model: calmlm.CalmForCausalLM, options: dict[str, Any]) -> None:
    assert_generates(model, options)


def test_samples_are_those_without_a_cache(model: calmlm.CalmForCausalLM) -> None:
    ids, mask = pad(ROWS, "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = GREEDY | {"do_sample": True, "top_k": 0, "use_cache": use_cache}
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama+mistral", "gpt2+qwen3, words alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_static_caches_and_drafts(kind: str, name: str) -> None:
    assert_static_and_drafts(speaking(kind, name))


def test_saved_and_loaded_and_copied(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    assert_round_trip(model, tmp_path)


@pytest.mark.parametrize(("kind", "second"), list(itertools.product(KINDS, KINDS)))
def test_joined_and_removed(kind: str, second: str) -> None:
    assert_joins(speaking(kind, "llama+mistral"), speaking(second, "llama+mistral"))


def test_what_does_not_fit_is_refused() -> None:
    llama, mistral = tiny_model("llama"), tiny_model("mistral")
    for options, message in (
        ({"words": "letters"}, "words must be one of map, pointer"),
        ({"connections": "none"}, "connections='none' needs words"),
        ({"words": "map", "refresh": False}, "prompt alone"),
        ({"words": "pointer", "refresh": False}, "prompt alone"),
        ({"words": {"nobody": "map"}}, "words must name augmenting models"),
    ):
        with pytest.raises(ConfigError, match=message):
            calmlm.compose(llama, mistral, **options)
    assert list(itertools.chain(*llama._forward_hooks.values())) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["anchor", "augmenting"])
def test_last_states_of_another_width_are_refused(kind: str, role: str) -> None:
    models = {"anchor": tiny_model("llama"), "augmenting": tiny_model("mistral")}
    models[role] = tiny_model("opt", word_embed_proj_dim=22)
    with pytest.raises(ModelError, match="22 wide: leave words out"):
        calmlm.compose(**models, connections=1, words=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["anchor", "augmenting"])
def test_models_with_a_past_of_their_own_speak(kind: str, role: str) -> None:
    """xLSTM is never asked for its past, in which widths other than those of its checkpoint do not fit."""
    sizes = {"hidden_size": 32, "num_heads": 4, "num_blocks": 2, "embedding_dim": 32, "vocab_size": VOCAB_SIZE}
    models = {"anchor": tiny_model("llama"), "augmenting": tiny_model("mistral")}
    models[role] = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlstm", **sizes)).eval()
    alone = logits_of(models["anchor"], tiny_tokens(2, 6))
    model = calmlm.compose(**models, connections=1, words=kind)
    assert torch.equal(logits_of(model, tiny_tokens(2, 6)), alone)
    assert model.generate(tiny_tokens(1, 4), max_new_tokens=3, **GREEDY).shape == (1, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_which_nothing_is_read_has_a_gradient(kind: str) -> None:
    theirs = tokenizer("bytes")
    options = {"tokenizer": tiny_tokenizer(), "augmenting_tokenizer": theirs, "alignment": "retokenize"}
    small = tiny_model("mistral", vocab_size=len(theirs))
    model = calmlm.compose(tiny_model("llama"), small, "none", words=kind, **options).train()
    ids = torch.tensor([tiny_tokenizer()("fox").input_ids[:1] * 2])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [p for p in model.model.connectors.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
