"""Padding, batching and packing change nothing at real tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compositions import assert_close, logits_of, pad, tiny_composition
from tiny import tiny_tokens

ROWS = [tiny_tokens(1, length, seed=length)[0] for length in (9, 4, 1, 6)]
# Relative positions, learned absolute ones, an offset inside the embedding, ALiBi, and a sliding window that bites.
MODELS: dict[str, dict[str, Any]] = {
    "llama+gpt2": {},
    "gpt2+llama": {"anchor": "gpt2", "augmenting": "llama"},
    "gpt2+opt": {"anchor": "gpt2", "augmenting": "opt"},
    "opt+bloom": {"anchor": "opt", "augmenting": "bloom"},
    "mpt+falcon": {"anchor": "mpt", "augmenting": "falcon"},
    "gemma3+mistral": {
        "anchor": "gemma3_text",
        "augmenting": "mistral",
        "anchor_options": {"sliding_window": 3},
        "augmenting_options": {"sliding_window": 4},
    },
    "options": {"gate": True, "rotary": True, "query_key_bias": 1.5, "null_key": True},
}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_equals_single_runs(name: str, side: str, attn_implementation: str) -> None:
    if attn_implementation == "sdpa" and name in ("opt+bloom", "mpt+falcon"):
        pytest.skip("Bloom and MPT have eager attention only")
    model = tiny_composition(attn_implementation=attn_implementation, **MODELS[name])
    ids, mask = pad(ROWS, side)
    batched = logits_of(model, ids, mask)
    for row, single in enumerate(ROWS):
        assert_close(batched[row][mask[row].bool()], logits_of(model, single[None])[0], 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_at_padding_does_not_matter(name: str) -> None:
    model = tiny_composition(**MODELS[name])
    for side in ("left", "right"):
        zeros, mask = pad(ROWS, side)
        others, _ = pad(ROWS, side, pad_id=55)
        # Exactly: a masked weight is zero, not small.
        assert torch.equal(logits_of(model, zeros, mask)[mask.bool()], logits_of(model, others, mask)[mask.bool()])


def test_padding_in_the_middle_of_the_batch_keeps_the_cache_right() -> None:
    # A prefill with left padding, then one cached step: the step's logits equal those of the row alone.
    model = tiny_composition("gpt2", "llama", rotary=True, anchor_options={"n_embd": 30})
    ids, mask = pad(ROWS, "left")
    token = torch.tensor([[7], [8], [9], [10]])
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        longer = torch.cat((mask, torch.ones_like(token)), dim=1)
        step = model(input_ids=token, attention_mask=longer, past_key_values=cache).logits
    for row, single in enumerate(ROWS):
        assert_close(step[row], logits_of(model, torch.cat((single, token[row]))[None])[0, -1:], 1e-5)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama+gpt2", "gpt2+llama", "gemma3+mistral", "options"])
def test_packed_rows_equal_separate_ones(name: str, attn_implementation: str) -> None:
    # What a padding-free collator sends: one row, positions that start again, no mask.
    model = tiny_composition(attn_implementation=attn_implementation, **MODELS[name])
    packed = torch.cat(ROWS)[None]
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    for mode in (False, True):
        model.train(mode)
        together = logits_of(model, packed, position_ids=positions)[0]
        for single, part in zip(ROWS, together.split([len(row) for row in ROWS]), strict=True):
            assert_close(part, logits_of(model, single[None])[0], 1e-5)


def test_packed_rows_equal_separate_ones_in_loss_and_gradients() -> None:
    model = tiny_composition(attn_implementation="sdpa", null_key=True, rotary=True).train()
    rows = [row for row in ROWS if len(row) > 1]

    def backward(**batch: Any) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=sum(len(row) - 1 for row in rows), use_cache=False).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.model.connectors.parameters()]

    labels = torch.cat([torch.cat((torch.tensor([-100]), row[1:])) for row in rows])[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = backward(input_ids=torch.cat(rows)[None], position_ids=positions, labels=labels)
    ids, mask = pad(rows, "right")
    padded = backward(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    for a, b in zip(packed[1], padded[1], strict=True):
        assert_close(a, b, 1e-5)
