"""Where generation meets a limit of one of the models, it goes on as without a cache, or an error says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import calmlm
from compositions import pad, tiny_composition
from test_cache_generation import GREEDY
from test_drafting import ASSISTED
from tiny import tiny_model, tiny_tokens


@pytest.mark.parametrize("assisted", [*ASSISTED, {"assistant_model": tiny_model("qwen3", seed=9)}], ids=str)
def test_padding_takes_no_room_in_a_learned_context(assisted: dict[str, Any]) -> None:
    """Three columns of padding before fourteen tokens leave room for ten in a context of 24."""
    model = tiny_composition("gpt2", "llama", anchor_options={"n_positions": 24, "max_position_embeddings": 24})
    ids, mask = pad([tiny_tokens(1, 14)[0], tiny_tokens(1, 17)[0]], "left")
    options = {**GREEDY, "attention_mask": mask[:1], "max_new_tokens": 11}
    expected = model.generate(ids[:1], **options)
    assert expected.shape[1] == 28
    assert torch.equal(model.generate(ids[:1], **options, **assisted), expected)


@pytest.mark.parametrize("assisted", ASSISTED, ids=["drafting", "lookup"])
def test_an_error_before_the_anchors_first_call_comes_out(assisted: dict[str, Any]) -> None:
    sizes = {"n_positions": 16, "max_position_embeddings": 16}
    model = tiny_composition("mistral", "gpt2", anchor_options={"sliding_window": 5}, augmenting_options=sizes)
    with pytest.raises(calmlm.DataError, match="at most 16 tokens"):
        model.generate(tiny_tokens(1, 17), max_new_tokens=4, **assisted, **GREEDY)
