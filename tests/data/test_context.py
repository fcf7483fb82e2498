"""How long a text may be, where an augmenting model has read something before it."""

from __future__ import annotations

from typing import Any

import pytest

from calmlm.data.context import context_length, prompt_length
from compositions import greedy_without_cache, tiny_composition
from served import expected
from tiny import tiny_tokenizer, tiny_tokens

LENGTH, PREFIX = 20, "abc"


@pytest.mark.parametrize("options", [{}, {"refresh": False}], ids=str)
def test_what_is_read_before_a_text_takes_its_room(options: dict[str, Any]) -> None:
    words = tiny_tokenizer()
    model = tiny_composition(
        "llama", "gpt2", augmenting_options={"max_position_embeddings": LENGTH}, augmenting_prefix=PREFIX,
        tokenizer=words, augmenting_tokenizer=words, **options,
    )  # fmt: skip
    most = LENGTH - len(PREFIX)
    assert len(model.model.opening("augmenting")) == len(PREFIX)
    assert prompt_length(model) == most
    assert context_length(model) == (model.anchor.config.max_position_embeddings if options else most)
    ids = tiny_tokens(1, most - 2)
    wanted = greedy_without_cache(model, ids, 3)[0, most - 2 :].tolist()
    assert expected(model, ids[0].tolist(), 3) == wanted  # behind the last of them nothing is read
