"""Words of both kinds: behind a gate that is exactly 0 at the start, wherever a composition works."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.connectors.gate import OPENING
from calmlm.errors import ConfigError
from compositions import assert_close, greedy_without_cache, logits_in_pieces, logits_of, pad
from tiny import tiny_model, tiny_tokens
from words import COMPOSITIONS, KINDS, speaking

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (7, 3, 5)]


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
    for _ in range(25):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        assert words.opening.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), alone)


def test_steps_equal_teacher_forcing(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 10)
    expected = logits_of(model, ids)
    with model.disable_composition():
        assert not torch.allclose(logits_of(model, ids), expected, atol=1e-2)
    for pieces in ((1,) * 10, (4, 1, 5)):
        assert_close(logits_in_pieces(model, ids, pieces), expected, 1e-4)


def test_nothing_of_later_text_is_said(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(1, 10)
    before = logits_of(model, ids)
    for place in (3, 6, 9):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 7) % 90 + 3
        after = logits_of(model, changed)
        assert_close(after[:, :place], before[:, :place], 1e-5)
        assert not torch.allclose(after[:, place:], before[:, place:], atol=1e-3)


def test_padding_and_batches_change_nothing(model: calmlm.CalmForCausalLM) -> None:
    for side in ("left", "right"):
        ids, mask = pad(ROWS, side)
        found = logits_of(model, ids, mask)
        for row, alone in enumerate(ROWS):
            assert_close(found[row, mask[row].bool()], logits_of(model, alone[None])[0], 1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}])
def test_generation_equals_its_uncached_reference(model: calmlm.CalmForCausalLM, options: dict[str, Any]) -> None:
    ids, mask = pad(ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS, "left")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **GREEDY)
    if "num_beams" in options:
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **options, **GREEDY)
    else:
        expected = greedy_without_cache(model, ids, 8, mask)
    assert torch.equal(found, expected)


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
    model = speaking(kind, name)
    ids = ROWS[0][None]
    expected = greedy_without_cache(model, ids, 8)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in (static, {"drafting": True}):
        assert torch.equal(model.generate(ids, max_new_tokens=8, **options, **GREEDY), expected)


def test_saved_and_loaded_and_copied(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    ids = tiny_tokens(2, 6)
    model.save_pretrained(tmp_path)
    bases = copy.deepcopy(model.anchor), copy.deepcopy(model.augmenting["augmenting"])
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=bases[0], augmenting=bases[1])
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert torch.equal(logits_of(copy.deepcopy(model), ids), logits_of(model, ids))
    trained = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert not any(".map." in name for name in trained)


def test_rows_without_the_composition_are_the_anchors(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(2, 6)
    found = logits_of(model, ids, composition_mask=torch.tensor([True, False]))
    with model.disable_composition():
        assert torch.equal(found[1], logits_of(model, ids)[1])
    assert_close(found[0], logits_of(model, ids)[0], 1e-5)


@pytest.mark.parametrize(("kind", "second"), list(itertools.product(KINDS, KINDS)))
def test_joined_and_removed(kind: str, second: str) -> None:
    model, other = speaking(kind, "llama+mistral"), speaking(second, "llama+mistral")
    ids = tiny_tokens(1, 6)
    before = logits_of(model, ids)
    model.add_augmenting("other", other)
    assert not torch.allclose(logits_of(model, ids), before, atol=1e-3)
    model.remove_augmenting("other")
    assert torch.equal(logits_of(model, ids), before)


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
