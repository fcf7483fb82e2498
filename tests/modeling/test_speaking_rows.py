"""Which of several augmenting models speak is chosen for each row: it is what it would be with the others off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.connectors.gate import OPENING
from compositions import assert_close, assert_helpful, logits_in_pieces, logits_of, own, pad, tiny_composition
from equalities import GREEDY
from tiny import tiny_tokenizer, tiny_tokens

MASK = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (7, 3, 5, 6)]
OWN = own("bytes")
GRAFT = {
    "connector": "graft", "adapters": {"r": 4}, "init": "aligned", "tokenizer": tiny_tokenizer(),
    "plain_text": ["the quick brown fox jumps over the lazy dog and the numbers are 7 and 12"] * 40,
}  # fmt: skip
JOINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cross-attention beside Flamingo": ({}, {"connector": "flamingo", "augmenting": "mistral"}),
    "two maps of words": ({"words": "map"}, {"words": "map", "connections": "none", "augmenting": "qwen3"}),
    "two pointers": ({"words": "pointer", "connections": "none"}, {"words": "pointer", "augmenting": "mistral"}),
    "a map beside a pointer": ({"words": "map"}, {"words": "pointer", "connections": "none"}),
    "adapters and a graft beside LegoNN": (GRAFT, {"connector": "legonn"}),
    "adapters beside adapters": ({"adapters": {"r": 2}}, {"adapters": {"r": 4}, "augmenting": "gpt_neox"}),
    "own tokens beside shared ones": ({**OWN, "words": "map"}, {"anchor_options": OWN["anchor_options"]}),
}  # fmt: skip


def joined(name: str) -> calmlm.CalmForCausalLM:
    first, second = (tiny_composition(**options) for options in JOINED[name])
    first.add_augmenting("other", second)
    with torch.no_grad():
        for connectors in first.model.connectors.values():
            for part in connectors:
                if hasattr(part, "opening"):
                    part.opening.fill_(0.7 / OPENING)
    return first


def in_row(model: calmlm.CalmForCausalLM, row: Tensor, speaking: Tensor) -> Any:
    """The model in which those alone speak."""
    for name, speaks in zip(model.augmenting, speaking.tolist(), strict=True):
        (model.enable_augmenting if speaks else model.disable_augmenting)(name)
    return model


@pytest.mark.parametrize("name", JOINED)
def test_a_row_is_as_with_the_others_off(name: str) -> None:
    model = joined(name)
    ids, mask = pad(ROWS, "left")
    mixed = logits_of(model, ids, mask, composition_mask=MASK)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, composition_mask=MASK, **GREEDY)
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=6, composition_mask=MASK, num_beams=2, **GREEDY)
    found = []
    for row, (text, speaking) in enumerate(zip(ROWS, MASK, strict=True)):
        alone = in_row(model, text, speaking)
        found.append(logits_of(alone, text[None])[0])
        assert_close(mixed[row, mask[row].bool()], found[-1], 1e-4)
        for options, ours in (({}, generated), ({"num_beams": 2}, beams)):
            expected = alone.generate(text[None], max_new_tokens=6, **options, **GREEDY)
            assert torch.equal(ours[row, -6:], expected[0, -6:])
    assert not torch.allclose(found[0][-1], logits_of(in_row(model, ROWS[0], MASK[3]), ROWS[0][None])[0, -1], atol=1e-3)


@pytest.mark.parametrize("name", JOINED)
def test_rows_without_any_are_the_anchors_bit_for_bit(name: str) -> None:
    model, ids = joined(name), tiny_tokens(4, 6)
    mixed = logits_of(model, ids, composition_mask=MASK)
    assert torch.equal(mixed[3], logits_of(model.anchor, ids)[3])
    whole = logits_of(model, ids, composition_mask=torch.tensor([True, True, True, False]))
    assert_close(mixed[2], whole[2], 1e-5)
    steps = logits_in_pieces(_Chosen(model), ids, (2, 1, 3))
    assert_close(steps, mixed, 1e-4)


class _Chosen:
    """A composition that is always called with the mask."""

    def __init__(self, model: calmlm.CalmForCausalLM) -> None:
        self.model = model

    def __call__(self, **kwargs: Any) -> Any:
        return self.model(composition_mask=MASK, **kwargs)


def test_masks_that_do_not_fit_are_refused() -> None:
    model = joined("two maps of words")
    with pytest.raises(calmlm.DataError) as error:
        model(input_ids=tiny_tokens(4, 3), composition_mask=MASK[:, :1])
    assert_helpful(error.value, "augmenting, other")


def test_a_cache_keeps_which_models_speak() -> None:
    model, ids = joined("cross-attention beside Flamingo"), tiny_tokens(4, 3)
    cache = model(input_ids=ids, composition_mask=MASK, use_cache=True).past_key_values
    with pytest.raises(calmlm.ModelError, match="same rows"):
        model(input_ids=ids, composition_mask=MASK.flip(1), past_key_values=cache)
    with pytest.raises(calmlm.ModelError, match="same rows"):
        model(input_ids=ids, past_key_values=cache)
    model(input_ids=ids, composition_mask=MASK.clone(), past_key_values=cache)


def test_no_gradient_reaches_a_model_that_is_silent() -> None:
    model, ids = joined("a map beside a pointer"), tiny_tokens(2, 6)
    model.train()
    rows = torch.tensor([[True, False], [True, False]])
    model(input_ids=ids, labels=ids, use_cache=False, composition_mask=rows).loss.backward()
    grads = {
        name: sum(float(p.grad.abs().sum()) for p in parts.parameters() if p.grad is not None)
        for name, parts in model.model.connectors.items()
    }
    assert grads["augmenting"] > 0 and grads["other"] == 0


@pytest.mark.parametrize("kind", ["map", "pointer"])
def test_a_model_that_has_learned_nothing_takes_nothing_from_the_others(kind: str) -> None:
    """Joined, its gate is shut, however much it would say."""
    model, ids = tiny_composition(words=kind), tiny_tokens(2, 6)
    with torch.no_grad():
        model.model.connectors["augmenting"][-1].opening.fill_(0.7 / OPENING)
    before = logits_of(model, ids)
    assert not torch.allclose(before, logits_of(model.anchor, ids), atol=1e-3)
    silent = tiny_composition(words=kind, augmenting="mistral", connections="none", awake=False)
    for loud in (0.0, 40.0):
        with torch.no_grad():
            silent.model.connectors["augmenting"][-1].gate_bias.fill_(loud)
        model.add_augmenting("other", silent)
        assert_close(logits_of(model, ids), before, 1e-6)
        model.remove_augmenting("other")
