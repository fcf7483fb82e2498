"""A batch may mix rows with the composition and rows without: these are the anchor's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import calmlm
from compositions import assert_helpful, logits_of, pad, tiny_composition
from decoding.test_cache_generation import COMPOSITIONS, GREEDY, ROWS
from tiny import tiny_tokens

MASK = torch.tensor([True, False, True])


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_rows_without_are_the_anchors_bit_for_bit(name: str) -> None:
    model = tiny_composition(**COMPOSITIONS[name])
    ids, mask = pad(ROWS, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # the anchor alone would count padding
    mixed = logits_of(model, ids, mask, position_ids=positions, composition_mask=MASK)
    composed = logits_of(model, ids, mask, position_ids=positions)
    with model.disable_composition():
        alone = logits_of(model, ids, mask, position_ids=positions)
    assert torch.equal(mixed[1], alone[1])
    assert torch.equal(mixed[[0, 2]], composed[[0, 2]])
    assert not torch.allclose(alone[1, -1], composed[1, -1], atol=1e-3)


@pytest.mark.parametrize("connector", ["flamingo", "legonn"])
def test_connectors_before_a_layer_and_on_distributions(connector: str) -> None:
    model = tiny_composition(connector=connector)
    ids = tiny_tokens(3, 6)
    mixed = logits_of(model, ids, composition_mask=MASK)
    with model.disable_composition():
        assert torch.equal(mixed[1], logits_of(model, ids)[1])
    assert torch.equal(mixed[[0, 2]], logits_of(model, ids)[[0, 2]])


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
     {"prefill_chunk_size": 2}, {"cache_implementation": "static", "disable_compile": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama+gpt2, all options", "gpt2+mistral", "gemma3+llama", "qwen3+opt"])
def test_generation(name: str, options: dict[str, Any]) -> None:
    model = tiny_composition(**COMPOSITIONS[name])
    ids, mask = pad(ROWS, "left")
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 8, **options}
    found = model.generate(ids, composition_mask=MASK, **options)
    composed = model.generate(ids, **options)
    with model.disable_composition():
        alone = model.generate(ids, composition_mask=MASK, **options)
    for row in range(len(found)):
        expected = composed if MASK.repeat_interleave(len(found) // 3)[row] else alone
        assert torch.equal(found[row], expected[row])
    assert not torch.equal(alone, composed)


def test_drafting_for_a_row_without() -> None:
    model, ids = tiny_composition(), tiny_tokens(1, 5)
    found = model.generate(ids, max_new_tokens=8, composition_mask=torch.tensor([False]), drafting=True, **GREEDY)
    assert torch.equal(found, model.anchor.generate(ids, max_new_tokens=8, **GREEDY))


def test_no_gradient_comes_from_rows_without() -> None:
    model, ids = tiny_composition(), tiny_tokens(2, 6)
    model.train()
    rows = torch.tensor([False, False])
    model(input_ids=ids, labels=ids, use_cache=False, composition_mask=rows).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.model.connectors.parameters())


@pytest.mark.parametrize("wrong", [torch.tensor([True]), torch.ones(3, 2), [True, False, True]], ids=str)
def test_masks_of_another_shape_are_refused(wrong: Any) -> None:
    with pytest.raises(calmlm.DataError, match="one truth value for each of the 3 rows"):
        tiny_composition()(input_ids=tiny_tokens(3, 4), composition_mask=wrong)


@pytest.mark.parametrize("first", [True, False])
def test_a_row_keeps_its_choice_as_long_as_its_cache(first: bool) -> None:
    model, ids = tiny_composition(), tiny_tokens(2, 5)
    rows = torch.tensor([True, first])
    options = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True}
    output = model.generate(ids, composition_mask=rows, **options)
    text = torch.cat((output.sequences, tiny_tokens(2, 2, seed=4)), dim=1)
    options |= {"attention_mask": torch.ones_like(text), "past_key_values": output.past_key_values}
    with pytest.raises(calmlm.ModelError) as error:
        model.generate(text, composition_mask=torch.tensor([True, not first]), **options)
    assert_helpful(error.value, "composition_mask")
    found = model.generate(text, composition_mask=rows.clone(), **options).sequences
    expected = model.generate(text, composition_mask=rows, use_cache=False, max_new_tokens=3, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [[False], [True, False, True]], ids=str)
def test_guidance_speaks_in_the_same_rows(rows: list[bool]) -> None:
    model, ids = tiny_composition(), tiny_tokens(len(rows), 6)
    options = {**GREEDY, "max_new_tokens": 8, "guidance_scale": 2.5}
    found = model.generate(ids, composition_mask=torch.tensor(rows), **options)
    composed = model.generate(ids, **options)
    with model.disable_composition():
        alone = model.generate(ids, **options)
    for row, speaks in enumerate(rows):
        assert torch.equal(found[row], (composed if speaks else alone)[row])
    assert not torch.equal(composed, alone)


def test_an_empty_cache_has_no_choice_yet() -> None:
    model, ids = tiny_composition(), tiny_tokens(1, 6)
    cache = model.model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache, composition_mask=torch.tensor([False]))
        cache.crop(-6)
        found = model(ids, past_key_values=cache, composition_mask=torch.tensor([True])).logits
    assert torch.equal(found, logits_of(model, ids))
