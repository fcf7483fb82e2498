"""How long a text may be, where an augmenting model has read something before it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from calmlm.data.context import context_length, own_contexts, prompt_length
from calmlm.data.formats import Example
from calmlm.data.labels import encode_examples
from compositions import greedy_without_cache, own, tiny_composition
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


@pytest.mark.parametrize("kind", ["bytes-large", "unigram"])
def test_a_text_is_cut_where_all_of_it_can_be_read(kind: str) -> None:
    """A part of a text, or one that is cut where its prompt ends, takes other tokens than the whole, and some more."""
    options, words, texts = own(kind), tiny_tokenizer(), random.Random(0)
    options["augmenting_options"]["max_position_embeddings"] = LENGTH
    model = tiny_composition("llama", "gpt2", **options).train()
    (context,) = own_contexts(model)
    for number in range(6):
        text, end = " ".join(texts.choices("the hello world have velo la he 12 1+1".split(), k=12)), 3 + number % 8
        pair = Example("prompt-completion", {"prompt": text[:end], "completion": text[end:]}, "here")
        for example in (pair, Example("text", {"text": text}, "here")):
            (row,) = encode_examples([example], words, max_length=None, own=[context]).rows
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            assert torch.isfinite(model(ids, labels=labels).loss)
            assert ids.shape[1] < len(text)
            assert context.count(row["input_ids"]) > context.length - 6
        whole = words(text)["input_ids"]
        for given in (None, [place < 3 or place > 8 for place in range(len(whole))]):
            keep = context.readable(whole, given)
            told = torch.tensor([given or [True] * len(whole)])[:, :keep]
            model(torch.tensor([whole[:keep]]), prompt_mask=told)
            assert 0 < keep <= len(whole)
