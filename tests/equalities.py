"""What holds for every composition, whatever connects its models: each function asserts one equality."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

import calmlm
from compositions import assert_close, greedy_without_cache, logits_in_pieces, logits_of, pad
from tiny import tiny_tokens

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (7, 3, 5)]
GENERATION: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 3},
    {"prefill_chunk_size": 2},
]


def assert_off_switch(model: calmlm.CalmForCausalLM) -> None:
    """It speaks, and is the anchor bit for bit when it is off; rows without it are the anchor's."""
    ids = tiny_tokens(2, 6)
    alone = logits_of(model.anchor, ids)
    speaking = logits_of(model, ids)
    assert not torch.allclose(speaking, alone, atol=1e-2)
    with model.disable_composition():
        assert torch.equal(logits_of(model, ids), alone)
    model.disable_augmenting("augmenting")
    assert torch.equal(logits_of(model, ids), alone)
    model.enable_augmenting("augmenting")
    found = logits_of(model, ids, composition_mask=torch.tensor([True, False]))
    assert torch.equal(found[1], alone[1])
    assert_close(found[0], speaking[0], 1e-5)


def assert_steps(model: calmlm.CalmForCausalLM) -> None:
    """Steps with a cache equal teacher forcing."""
    ids = tiny_tokens(2, 10)
    expected = logits_of(model, ids)
    for pieces in ((1,) * 10, (4, 1, 5)):
        assert_close(logits_in_pieces(model, ids, pieces), expected, 1e-4)


def assert_causal(model: calmlm.CalmForCausalLM) -> None:
    """A token changes what comes after it, and nothing before."""
    ids = tiny_tokens(1, 10)
    before = logits_of(model, ids)
    for place in (3, 6, 9):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 7) % 90 + 3
        after = logits_of(model, changed)
        assert_close(after[:, :place], before[:, :place], 1e-5)
        assert not torch.allclose(after[:, place:], before[:, place:], atol=1e-3)


def assert_padding(model: calmlm.CalmForCausalLM) -> None:
    """Rows of a padded batch are as they are alone."""
    for side in ("left", "right"):
        ids, mask = pad(ROWS, side)
        found = logits_of(model, ids, mask)
        for row, alone in enumerate(ROWS):
            assert_close(found[row, mask[row].bool()], logits_of(model, alone[None])[0], 1e-4)


def assert_generates(model: calmlm.CalmForCausalLM, options: dict[str, Any]) -> None:
    """Generation with a cache equals the same without."""
    ids, mask = pad(ROWS[:1] if "prompt_lookup_num_tokens" in options else ROWS, "left")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **GREEDY)
    if "num_beams" in options:
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **options, **GREEDY)
    else:
        expected = greedy_without_cache(model, ids, 8, mask)
    assert torch.equal(found, expected)


def assert_static_and_drafts(model: calmlm.CalmForCausalLM) -> None:
    """A static cache and drafts change nothing."""
    ids = ROWS[0][None]
    expected = greedy_without_cache(model, ids, 8)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in (static, {"drafting": True}):
        assert torch.equal(model.generate(ids, max_new_tokens=8, **options, **GREEDY), expected)


def assert_round_trip(model: calmlm.CalmForCausalLM, folder: Path) -> None:
    """Saved and loaded, and copied, it is the same."""
    ids = tiny_tokens(2, 6)
    model.save_pretrained(folder)
    bases = copy.deepcopy(model.anchor), copy.deepcopy(model.augmenting["augmenting"])
    again = calmlm.CalmForCausalLM.from_pretrained(folder, anchor=bases[0], augmenting=bases[1])
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert torch.equal(logits_of(copy.deepcopy(model), ids), logits_of(model, ids))
    trained, before = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (again, model))
    assert trained == before


def assert_joins(model: calmlm.CalmForCausalLM, other: calmlm.CalmForCausalLM) -> None:
    """One more augmenting model speaks beside it, and nothing is left when it is taken out."""
    ids = tiny_tokens(1, 6)
    before = logits_of(model, ids)
    model.add_augmenting("other", other)
    assert not torch.allclose(logits_of(model, ids), before, atol=1e-3)
    model.remove_augmenting("other")
    assert torch.equal(logits_of(model, ids), before)
