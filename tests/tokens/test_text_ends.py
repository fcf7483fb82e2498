"""What a tokenizer puts behind any text is no part of a prompt, and ends what is learned where nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from calmlm.data import Example, encode_examples
from calmlm.data.labels import encode_prompt
from calmlm.tokens.text_ends import around, end_of, without_appended
from tokenizers_tiny import tokenizer as tokenizer_of


def framed(kind: str, single: str, *, ends: bool = True) -> Any:
    """A tokenizer that puts ``<s>`` and ``</s>`` around texts."""
    tokenizer = copy.deepcopy(tokenizer_of(kind))
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
    if not ends:
        tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


KINDS = ("bytes", "unigram", "wordpiece")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "<s> $A", "$A"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_prompt_is_the_beginning_of_what_is_learned(kind: str, single: str, ends: bool) -> None:
    tokenizer = framed(kind, single, ends=ends)
    first, last = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    before, behind = [first] * ("<s>" in single), [last] * ("</s>" in single)
    assert around(tokenizer) == (before, behind)
    plain = tokenizer("the brown fox", add_special_tokens=False).input_ids
    assert encode_prompt("the brown fox", tokenizer) == [*before, *plain]
    assert encode_prompt("the brown fox</s>", tokenizer)[-1] == last, "one that stands in the prompt stays"
    assert end_of(tokenizer) == (last if ends or behind else None)
    example = Example("prompt-completion", {"prompt": "the brown", "completion": " fox"}, "line 1")
    row = encode_examples([example], tokenizer, max_length=None).rows[0]["input_ids"]
    asked = encode_prompt("the brown", tokenizer)
    assert row[: len(asked)] == asked
    assert row.count(last) == (1 if ends or behind else 0), "one end, at the end"
    assert row[-1] == last or not (ends or behind)


def test_an_empty_text() -> None:
    tokenizer = framed("bytes", "<s> $A </s>")
    assert without_appended(tokenizer("").input_ids, tokenizer) == [tokenizer.convert_tokens_to_ids("<s>")]
    assert without_appended([], tokenizer) == []
