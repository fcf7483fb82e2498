"""Models with LongRoPE turn all positions of a long text otherwise: a text that becomes long is read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from compositions import assert_helpful, pad, tiny_composition
from decoding.test_cache_generation import GREEDY
from decoding.test_drafting import agreeing, eager
from tiny import tiny_model, tiny_tokens


def long_rope(length: int) -> dict[str, Any]:
    """Options of a tiny Phi-3 whose positions are turned otherwise in texts of more than ``length`` tokens."""
    factors = {"short_factor": [1.0] * 5, "long_factor": [4.0, 5.0, 6.0, 8.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": length, **factors}
    return {"rope_parameters": rope, "original_max_position_embeddings": length}


PAIRS: dict[str, dict[str, Any]] = {
    "anchor": {"anchor": "phi3", "augmenting": "llama", "anchor_options": long_rope(16)},
    "augmenting": {"anchor": "gpt2", "augmenting": "phi3", "augmenting_options": long_rope(15)},
    "both": {
        "anchor": "phi3",
        "augmenting": "phi3",
        "anchor_options": long_rope(14),
        "augmenting_options": long_rope(17),
        "rotary": True,
    },
}
NEW = 14


@pytest.fixture(params=PAIRS, scope="module")
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    return tiny_composition(**PAIRS[request.param])


def uncached(model: calmlm.CalmForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, **{**GREEDY, "max_new_tokens": NEW, "use_cache": False, **options})


def test_the_length_matters(model: calmlm.CalmForCausalLM) -> None:
    """Else the other tests would pass whatever happens there."""
    ids = uncached(model, tiny_tokens(1, 8))
    short, long = (model(input_ids=ids[:, :end], use_cache=False).logits[:, :10] for end in (14, 18))
    assert (short - long).abs().max() > 1e-2


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch(model: calmlm.CalmForCausalLM, mode: str) -> None:
    ids, mask = pad([tiny_tokens(1, length, seed=length)[0] for length in (9, 4)], "left")
    reference = {key: value for key, value in MODES[mode].items() if key == "num_beams"}
    expected = uncached(model, ids, attention_mask=mask, **reference)
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": NEW}
    assert torch.equal(model.generate(ids, **options, **MODES[mode]), expected)


@pytest.mark.parametrize(
    "assisted",
    [
        {"drafting": eager()},
        {"drafting": eager(num_tokens=9)},
        {"prompt_lookup_num_tokens": 5},
        {"assistant_model": tiny_model("phi3", seed=1, **long_rope(16))},
    ],
    ids=["drafting", "long drafts", "lookup", "assistant"],
)
@pytest.mark.parametrize("name", [*PAIRS, "agreeing"])
def test_drafts_do_not_cross(name: str, assisted: dict[str, Any]) -> None:
    both = {"anchor_options": long_rope(16), "augmenting_options": long_rope(16)}
    model = agreeing("phi3", **both) if name == "agreeing" else tiny_composition(**PAIRS[name])
    for length in (11, 16, 17):
        ids = tiny_tokens(1, 7).repeat(1, 3)[:, -length:]
        expected = uncached(model, ids)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, **assisted, **GREEDY), expected)
    ids, mask = pad([tiny_tokens(1, 9)[0], tiny_tokens(1, 13)[0]], "left")
    ids, mask = ids[:1], mask[:1]
    expected = uncached(model, ids, attention_mask=mask)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **assisted, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("drafting", [None, eager()], ids=["one by one", "drafting"])
@pytest.mark.parametrize("further", [2, 9])
def test_a_conversation(model: calmlm.CalmForCausalLM, drafting: calmlm.DraftConfig | None, further: int) -> None:
    ids = tiny_tokens(1, 5)
    options = {**GREEDY, "return_dict_in_generate": True, "drafting": drafting, "max_new_tokens": 5}
    first = model.generate(ids, **options)
    text = torch.cat((first.sequences, tiny_tokens(1, further, seed=1)), 1)
    options |= {"attention_mask": torch.ones_like(text), "past_key_values": first.past_key_values}
    second = model.generate(text, **{**options, "max_new_tokens": 6})
    assert torch.equal(second.sequences, uncached(model, text, max_new_tokens=6))
    assert second.past_key_values is first.past_key_values
    assert second.past_key_values.get_seq_length() == second.sequences.shape[1] - 1


def test_what_cannot_be_read_again_is_refused(model: calmlm.CalmForCausalLM) -> None:
    ids = tiny_tokens(1, 20)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], use_cache=True).past_key_values
        with pytest.raises(calmlm.DataError) as error:
            model(input_ids=ids[:, 12:], past_key_values=cache)
    assert_helpful(error.value, "past_key_values", "prefill_chunk_size")
    with pytest.raises(calmlm.DataError, match="pass the whole text"):
        model.generate(ids, prefill_chunk_size=12, max_new_tokens=2, **GREEDY)
    whole = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
    with pytest.raises(calmlm.DataError, match="pass the whole text"):
        model.generate(ids[:, 12:], max_new_tokens=2, **whole, **GREEDY)
